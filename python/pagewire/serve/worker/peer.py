"""A worker's end of the KV stream: connected, lost, and connected again.

D listens and P connects, each to the incarnation that the front's `Pair` names. Nothing here raises because the other
process is gone: the link is then lost, what is sent into it vanishes, and the worker hears of it at its next turn.
"""

import dataclasses
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass

import pagewire as pw
from pagewire.serve.channel import Channel, ChannelClosed, Codec
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Pair, Unlinked
from pagewire.transfer.codec import ConnectionLost, FrameCodec
from pagewire.transfer.frames import Frame, Hello
from pagewire.transfer.handoff import HELLO_FIELDS, Stored, mismatch
from pagewire.transfer.negotiation import negotiate
from pagewire.transfer.packing import Packing
from pagewire.transfer.shm import Arena

MAX_PENDING = 4  # connections that nobody has asked for yet; each costs D an arena
MAX_FRAMES = 64  # a turn: who sends without pause does not keep us from our work
MAX_UNSENT_BYTES = 16 << 20  # credits bound what P sends, requests what D does: this much is a peer that does not read
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(eq=False)
class _Connection:
    """One whose peer has not been joined."""

    channel: Channel
    deadline: float
    arena: Arena | None = None  # D: made for it
    hello: Hello | None = None


class Peer:
    """Of P or of D, for as long as the process lives; at most one connection at a time is the link."""

    def __init__(self, hello: Hello, cache: pw.PagedKVCache, config: WorkerConfig) -> None:
        """hello: what this side says, but for its staging arena.

        Raises ValueError when not even one token fits a staging slot, OSError when D cannot listen.
        """
        role = hello.role
        self.incarnation = hello.incarnation
        self.address = ""  # D's
        self.link = 0  # number of the pairing whose connection stands; 0: none does
        self.arena: Arena | None = None  # of the link
        self.packing = Packing(cache, hello.fingerprint, negotiate(hello, hello))  # of the link; now for one like us
        self._role = role
        self._other = "prefill" if role == "decode" else "decode"
        self._ours, self._cache = hello, cache
        self._timeout_s = config.handoff_timeout_ms / 1000
        self._staging = self.packing.staging(config.staging_bytes, config.prefill_chunk)
        self._listener = self._listen() if role == "decode" else None
        self._wanted: tuple[Pair, float] | None = None  # not joined yet; until when
        self._pending: list[_Connection] = []
        self._channel: Channel | None = None
        self._losses: list[Unlinked] = []

    def pair(self, pair: Pair) -> None:
        """Be joined with this one, and with no other any more."""
        self.drop("another pairing was asked for")
        self._wanted = pair, time.monotonic() + self._timeout_s
        if self._role == "prefill":
            self._connect(pair)

    def join(self) -> bool:
        """Goes on with the handshakes; whether the link stands from now on."""
        self._accept()
        for connection in list(self._pending):
            self._greet(connection)
        if self._wanted is None:
            return False
        pair, deadline = self._wanted
        # the newest first: an older one of the same process is what it has given up
        for connection in reversed(self._pending):
            if connection.hello and (self._role == "prefill" or connection.hello.incarnation.hex() == pair.incarnation):
                return self._join(pair, connection, connection.hello)
        if time.monotonic() > deadline:
            self._unpaired(f"{self._name}: no connection with a HELLO within {self._timeout_s:g} s")
        return False

    def losses(self) -> list[Unlinked]:
        """Those since the last call; the link that was is gone once there are any."""
        losses, self._losses = self._losses, []
        return losses

    def send(self, frame: Frame) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(frame)
        except ChannelClosed as closed:
            self.drop(str(closed))
            return
        if self._channel.num_unsent > MAX_UNSENT_BYTES:
            self.drop(f"{self._name}: it does not read, {self._channel.num_unsent} bytes wait for it")

    def poll(self, max_frames: int = MAX_FRAMES) -> list[Frame]:
        if self._channel is None:
            return []
        try:
            self._channel.flush()
            return self._channel.poll(max_frames)
        except (ChannelClosed, ConnectionLost) as lost:
            self.drop(str(lost))
            return []

    def drop(self, reason: str) -> None:
        """Ends the link, or the wish for one."""
        if self._channel is not None:
            self._losses.append(Unlinked(self.link, reason))
            self._channel.close()
            self._channel, self.arena, self.link = None, None, 0
        else:
            self._unpaired(reason)

    @property
    def pending(self) -> bool:
        """Whether there are frames of which the socket says nothing any more."""
        return self._channel is not None and self._channel.pending

    def watched(self) -> dict[int, bool]:
        """Descriptors to wait for, and whether for writing too."""
        channels = [connection.channel for connection in self._pending]
        if self._channel is not None:
            channels.append(self._channel)
        listening = {self._listener.fileno(): False} if self._listener else {}
        return listening | {channel.fileno(): channel.wants_write for channel in channels}

    @property
    def _name(self) -> str:
        return "P" if self._other == "prefill" else "D"

    def _unpaired(self, reason: str) -> None:
        if self._wanted is None:
            return
        self._losses.append(Unlinked(self._wanted[0].link, reason))
        self._wanted = None
        if self._role == "prefill":
            self._close_pending()

    def _close_pending(self) -> None:
        while self._pending:
            self._pending.pop().channel.close()

    def _listen(self) -> socket.socket:
        """An abstract name: no file is left behind, and it ends with the process."""
        self.address = secrets.token_hex(16)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_abstract(self.address))
        listener.listen(MAX_PENDING)
        listener.setblocking(False)
        return listener

    def _accept(self) -> None:
        for _ in range(MAX_PENDING if self._listener else 0):
            assert self._listener is not None
            try:
                sock, _ = self._listener.accept()
            except OSError:  # none is waiting, or we have no descriptor for it: it waits on
                return
            if len(self._pending) == MAX_PENDING:
                self._pending.pop(0).channel.close()
            try:
                if not _same_user(sock):
                    raise PermissionError
                self._add(sock, Arena.create(*self._staging))
            except OSError:  # or no memory or descriptor for the arena: it sees that we close
                sock.close()

    def _connect(self, pair: Pair) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(_abstract(pair.address))
        except OSError as error:
            sock.close()
            self._unpaired(f"{self._name}: cannot be connected to: {error.strerror}")
            return
        if _same_user(sock):
            self._add(sock, None)
        else:
            sock.close()
            self._unpaired(f"{self._name}: its address belongs to another user")

    def _add(self, sock: socket.socket, arena: Arena | None) -> None:
        codec = FrameCodec()
        channel = Channel(sock, Codec(codec.encode, codec.decode), name=self._name, accept_fds=arena is None)
        connection = _Connection(channel, time.monotonic() + self._timeout_s, arena)
        self._pending.append(connection)
        if arena is None:
            return
        try:
            channel.send(self._hello(*self._staging), fds=[arena.fd])
        except (ChannelClosed, OSError) as error:
            self._give_up(connection, str(error))
        finally:
            os.close(arena.fd)  # the mapping stays

    def _hello(self, num_slots: int, slot_bytes: int) -> Hello:
        return dataclasses.replace(self._ours, num_slots=num_slots, slot_bytes=slot_bytes)

    def _greet(self, connection: _Connection) -> None:
        """Takes its HELLO, and nothing behind that."""
        try:
            frames = connection.channel.poll(1)
        except (ChannelClosed, ConnectionLost) as lost:
            self._give_up(connection, str(lost))
            return
        if not frames:
            if time.monotonic() > connection.deadline:
                self._give_up(connection, f"{self._name}: no HELLO that was asked for within {self._timeout_s:g} s")
        elif connection.hello is None and isinstance(frames[0], Hello):
            connection.hello = frames[0]
            connection.channel.accept_fds = False
        else:
            self._give_up(connection, f"HELLO: expected one from {self._other}, got {type(frames[0]).__name__}")

    def _give_up(self, connection: _Connection, reason: str) -> None:
        connection.channel.close()
        self._pending.remove(connection)
        if self._role == "prefill":  # D may be connected to by anyone
            self._unpaired(reason)

    def _join(self, pair: Pair, connection: _Connection, hello: Hello) -> bool:
        self._pending.remove(connection)
        channel = connection.channel
        try:
            self._check(pair, hello)
            packing = self._packing_with(hello)
            arena = connection.arena or self._map(hello, channel)
            channel.close_fds()  # the mapping needs none
            if self._role == "prefill":
                channel.send(self._hello(0, 0))
        except (ValueError, OSError, ChannelClosed) as error:
            channel.close()
            self._unpaired(str(error))
            return False
        self._channel, self.arena, self.link, self.packing = channel, arena, pair.link, packing
        self._wanted = None
        return True

    def _check(self, pair: Pair, hello: Hello) -> None:
        if hello.role != self._other:
            raise ValueError(f"HELLO: expected one from {self._other}, got one from {hello.role}")
        if hello.incarnation.hex() != pair.incarnation:
            raise ValueError(f"HELLO: incarnation: expected {pair.incarnation}, got {hello.incarnation.hex()}")
        if problem := mismatch(self._ours, hello, HELLO_FIELDS):
            raise ValueError(f"the {self._other} process has another model: {problem}")

    def _packing_with(self, theirs: Hello) -> Packing:
        """Raises ValueError when the two take no wire in common."""
        if self._role == "decode":
            return Packing(self._cache, theirs.fingerprint, negotiate(theirs, self._ours))
        kept = Stored(theirs.cache_dtype, theirs.cache_scale_kind)
        return Packing(self._cache, theirs.fingerprint, negotiate(self._ours, theirs), kept)

    def _map(self, hello: Hello, channel: Channel) -> Arena:
        """Raises ValueError or OSError when the descriptor is not the arena that HELLO says it is."""
        if len(channel.fds) != 1:
            raise ValueError(f"HELLO: expected the staging arena's descriptor, got {len(channel.fds)}")
        return Arena(channel.fds[0], hello.num_slots, hello.slot_bytes)


def _abstract(address: str) -> str:
    return f"\0pagewire-{address}"


def _same_user(sock: socket.socket) -> bool:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid == os.getuid()
