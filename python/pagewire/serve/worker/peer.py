"""A worker's end of the KV stream: connected, lost, and connected again.

D listens and P connects, each to the incarnation that the front's `Pair` names. Nothing here raises because the other
process is gone: the link is then lost, what is sent into it vanishes, and the worker hears of it at its next turn.
"""

import time
from dataclasses import dataclass

import pagewire as pw
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Pair, Unlinked
from pagewire.transfer.channel import ChannelClosed
from pagewire.transfer.codec import ConnectionLost
from pagewire.transfer.frames import Frame, Hello
from pagewire.transfer.handoff import HELLO_FIELDS, Stored, mismatch
from pagewire.transfer.negotiation import negotiate
from pagewire.transfer.packing import Packing
from pagewire.transfer.transport import Staging, Transport, connect, listen

MAX_PENDING = 4  # connections that nobody has asked for yet; each costs D an arena
MAX_FRAMES = 64  # a turn: who sends without pause does not keep us from our work
MAX_UNSENT_BYTES = 16 << 20  # beside payloads, which credits bound: this much is a peer that does not read


@dataclass(eq=False)
class _Connection:
    """One whose peer has not been joined."""

    transport: Transport
    deadline: float
    hello: Hello | None = None


class Peer:
    """Of P or of D, for as long as the process lives; at most one connection at a time is the link."""

    def __init__(self, hello: Hello, cache: pw.PagedKVCache, config: WorkerConfig) -> None:
        """hello: what this side says, but for its staging arena.

        Raises ValueError when not even one token fits a staging slot, OSError when D cannot listen.
        """
        role = hello.role
        self.incarnation = hello.incarnation
        self.link = 0  # number of the pairing whose connection stands; 0: none does
        self.packing = Packing(cache, hello.fingerprint, negotiate(hello, hello))  # of the link; now for one like us
        self._role = role
        self._other = "prefill" if role == "decode" else "decode"
        self._ours, self._cache = hello, cache
        self._timeout_s = config.handoff_timeout_ms / 1000
        staging = self.packing.staging(config.staging_bytes, config.prefill_chunk)
        self._listener = listen("unix:", hello, staging) if role == "decode" else None
        self._wanted: tuple[Pair, float] | None = None  # not joined yet; until when
        self._pending: list[_Connection] = []
        self._transport: Transport | None = None
        self._losses: list[Unlinked] = []

    @property
    def address(self) -> str:
        """D's, to connect to."""
        return self._listener.address if self._listener else ""

    @property
    def arena(self) -> Staging | None:
        """The link's staging slots."""
        return self._transport.staging if self._transport else None

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
        if self._transport is None:
            return
        try:
            self._transport.send(frame)
        except ChannelClosed as closed:
            self.drop(str(closed))
            return
        if self._transport.num_unsent > MAX_UNSENT_BYTES + self._transport.num_staging_bytes:
            self.drop(f"{self._name}: it does not read, {self._transport.num_unsent} bytes wait for it")

    def poll(self, max_frames: int = MAX_FRAMES) -> list[Frame]:
        if self._transport is None:
            return []
        try:
            self._transport.flush()
            return self._transport.poll(max_frames)
        except (ChannelClosed, ConnectionLost) as lost:
            self.drop(str(lost))
            return []

    def drop(self, reason: str) -> None:
        """Ends the link, or the wish for one."""
        if self._transport is not None:
            self._losses.append(Unlinked(self.link, reason))
            self._transport.close()
            self._transport, self.link = None, 0
        else:
            self._unpaired(reason)

    @property
    def pending(self) -> bool:
        """Whether there are frames of which the socket says nothing any more."""
        return self._transport is not None and self._transport.pending

    def watched(self) -> dict[int, bool]:
        """Descriptors to wait for, and whether for writing too."""
        transports = [connection.transport for connection in self._pending]
        if self._transport is not None:
            transports.append(self._transport)
        listening = {self._listener.fileno(): False} if self._listener else {}
        return listening | {transport.fileno(): transport.wants_write for transport in transports}

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
            self._pending.pop().transport.close()

    def _accept(self) -> None:
        for _ in range(MAX_PENDING if self._listener else 0):
            assert self._listener is not None
            if (transport := self._listener.accept()) is None:
                return
            if len(self._pending) == MAX_PENDING:
                self._pending.pop(0).transport.close()
            self._add(transport)

    def _connect(self, pair: Pair) -> None:
        try:
            self._add(connect(pair.address))
        except (OSError, ValueError) as error:
            self._unpaired(f"{self._name}: cannot be connected to: {getattr(error, 'strerror', None) or error}")

    def _add(self, transport: Transport) -> None:
        self._pending.append(_Connection(transport, time.monotonic() + self._timeout_s))

    def _greet(self, connection: _Connection) -> None:
        """Takes its HELLO, and nothing behind that."""
        try:
            connection.transport.flush()
            frames = connection.transport.poll(1)
        except (ChannelClosed, ConnectionLost) as lost:
            self._give_up(connection, str(lost))
            return
        if not frames:
            if time.monotonic() > connection.deadline:
                self._give_up(connection, f"{self._name}: no HELLO that was asked for within {self._timeout_s:g} s")
        elif connection.hello is None and isinstance(frames[0], Hello):
            connection.hello = frames[0]
        else:
            self._give_up(connection, f"HELLO: expected one from {self._other}, got {type(frames[0]).__name__}")

    def _give_up(self, connection: _Connection, reason: str) -> None:
        connection.transport.close()
        self._pending.remove(connection)
        if self._role == "prefill":  # D may be connected to by anyone
            self._unpaired(reason)

    def _join(self, pair: Pair, connection: _Connection, hello: Hello) -> bool:
        self._pending.remove(connection)
        transport = connection.transport
        try:
            self._check(pair, hello)
            packing = self._packing_with(hello)
            if self._role == "prefill":
                transport.open_staging(hello)
                transport.send(self._ours)
        except (ValueError, OSError, ChannelClosed) as error:
            transport.close()
            self._unpaired(str(error))
            return False
        self._transport, self.link, self.packing = transport, pair.link, packing
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
