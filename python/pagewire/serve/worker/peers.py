"""A worker's ends of the KV stream: connected, lost, and connected again, each with another process.

D listens and P connects, each to the incarnations that the front's `Pair`s name. Nothing here raises because another
process is gone: its link is then lost, what is sent into it vanishes, and the worker hears of it at its next turn.
"""

import sys
import time
from collections import deque
from dataclasses import dataclass

import pagewire as pw
from pagewire.net.channel import ChannelClosed
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Pair, Unlinked
from pagewire.transfer.codec import ConnectionLost
from pagewire.transfer.frames import Frame, Hello, Reserve
from pagewire.transfer.packing import Packing
from pagewire.transfer.transport import Staging, Transport, connect, listen

MAX_PENDING = 16  # connections that nobody has asked for yet; each costs D an arena
MAX_FRAMES = 64  # of a link, a turn: who sends without pause does not keep us from our work
MAX_UNSENT_BYTES = 16 << 20  # credits bound what P sends, requests what D does: this much is a peer that does not read


@dataclass(eq=False)
class Link:
    """A connection whose two ends have agreed on what KV is on the wire."""

    number: int
    incarnation: str  # of the peer
    transport: Transport
    packing: Packing

    @property
    def staging(self) -> Staging:
        assert self.transport.staging is not None
        return self.transport.staging

    def digests(self, pages: list[int], reserve: Reserve) -> tuple[bytes, ...]:
        """SHA-256 per layer of each block that it asks for, of what `pages` hold here."""
        return self.packing.digests(pages, reserve.blocks, (reserve.num_cached, reserve.num_tokens))


@dataclass(eq=False)
class _Connection:
    """One whose peer has not been joined."""

    transport: Transport
    deadline: float
    link: int = 0  # P: what it is for
    hello: Hello | None = None


class Peers:
    """Of P or of D, for as long as the front knows the process."""

    def __init__(self, hello: Hello, cache: pw.PagedKVCache, config: WorkerConfig, address: str = "unix:") -> None:
        """hello: what this side says, but for its staging arena. address: where D listens.

        Raises ValueError when not even one token fits a staging slot, OSError when D cannot listen.
        """
        self.incarnation = hello.incarnation.hex()
        self.links: dict[int, Link] = {}
        self._ours, self._cache = hello, cache
        self._other = "prefill" if hello.role == "decode" else "decode"
        self._name = "P" if self._other == "prefill" else "D"
        self._timeout_s = config.handoff_timeout_ms / 1000
        self._tls = config.tls
        self._listener = None
        if hello.role == "decode":
            staging = Packing(cache, hello, hello).staging(config.staging_bytes, config.prefill_chunk)
            self._listener = listen(address, hello, staging, name=self._name, tls=config.tls)
        self._wanted: dict[int, tuple[Pair, float]] = {}  # not joined yet; until when
        self._pending: list[_Connection] = []
        self._losses: list[Unlinked] = []
        self.refusals: deque[str] = deque(maxlen=MAX_PENDING)  # why connections to D were closed

    @property
    def address(self) -> str:
        """D's; P has none."""
        return self._listener.address if self._listener else ""

    def pair(self, pair: Pair) -> None:
        """Be joined with this one; an older connection with the same process is given up."""
        with_links = [(number, link.incarnation) for number, link in self.links.items()]
        for number, incarnation in [*with_links, *((n, wanted.incarnation) for n, (wanted, _) in self._wanted.items())]:
            if incarnation == pair.incarnation:
                self.drop(number, "another pairing was asked for")
        deadline = time.monotonic() + self._timeout_s
        self._wanted[pair.link] = pair, deadline
        if self._listener is None:
            try:
                transport = connect(pair.address, name=self._name, tls=self._tls)
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                self.drop(pair.link, f"{self._name}: cannot be connected to: {why}")
            else:
                self._pending.append(_Connection(transport, deadline, pair.link))

    def join(self) -> list[Link]:
        """Goes on with the handshakes; the links that stand from now on."""
        self._accept()
        for connection in list(self._pending):
            self._greet(connection)
        joined = []
        for pair, deadline in list(self._wanted.values()):
            # the newest first: an older one of the same process is what it has given up
            fits = (c for c in reversed(self._pending) if c.hello and c.link in (0, pair.link)
                    and (c.link or c.hello.incarnation.hex() == pair.incarnation))  # fmt: skip
            if (found := next(fits, None)) is not None:
                joined += self._join(pair, found)
            elif time.monotonic() > deadline:
                self.drop(pair.link, f"{self._name}: no connection with a HELLO within {self._timeout_s:g} s")
        return joined

    def losses(self) -> list[Unlinked]:
        """Those since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def send(self, number: int, frame: Frame) -> None:
        link = self.links.get(number)
        if link is None:
            return
        try:
            link.transport.send(frame)
        except ChannelClosed as closed:
            self.drop(number, str(closed))
            return
        if link.transport.num_unsent > MAX_UNSENT_BYTES + link.staging.num_bytes:
            self.drop(number, f"{self._name}: it does not read, {link.transport.num_unsent} bytes wait for it")

    def poll(self) -> list[tuple[int, Frame]]:
        """What came, with the number of its link."""
        found: list[tuple[int, Frame]] = []
        for number, link in list(self.links.items()):
            try:
                link.transport.flush()
                found += ((number, frame) for frame in link.transport.poll(MAX_FRAMES))
            except (ChannelClosed, ConnectionLost) as lost:
                self.drop(number, str(lost))
        return found

    def drop(self, number: int, reason: str) -> None:
        """Ends the link, or the wait for it."""
        link, wanted = self.links.pop(number, None), self._wanted.pop(number, None)
        if link is not None:
            link.transport.close()
        for connection in [c for c in self._pending if c.link == number]:
            self._close(connection)
        if link or wanted:
            self._losses.append(Unlinked(number, reason))

    def close(self) -> None:
        """The front is gone, and with it all that it asked for."""
        for connection in list(self._pending):
            self._close(connection)
        for number in list(self.links):
            self.drop(number, "the front is gone")
        if self._listener:
            self._listener.close()

    @property
    def pending(self) -> bool:
        """Whether there are frames of which no socket says anything any more."""
        return any(link.transport.pending for link in self.links.values())

    def watched(self) -> dict[int, bool]:
        """Descriptors to wait for, and whether for writing too."""
        transports = [*(c.transport for c in self._pending), *(link.transport for link in self.links.values())]
        listening = {self._listener.fileno(): False} if self._listener else {}
        return listening | {transport.fileno(): transport.wants_write for transport in transports}

    def _close(self, connection: _Connection) -> None:
        connection.transport.close()
        self._pending.remove(connection)

    def _accept(self) -> None:
        for _ in range(MAX_PENDING):
            if self._listener is None or (transport := self._listener.accept()) is None:
                return
            if len(self._pending) == MAX_PENDING:
                self._close(self._pending[0])
            self._pending.append(_Connection(transport, time.monotonic() + self._timeout_s))

    def _greet(self, connection: _Connection) -> None:
        """Takes its HELLO, and nothing behind that."""
        try:
            connection.transport.flush()
            frames = connection.transport.poll(1)
            if not frames and time.monotonic() > connection.deadline:
                raise ConnectionLost(f"{self._name}: no HELLO that was asked for within {self._timeout_s:g} s")
            if frames and (connection.hello or not isinstance(frames[0], Hello)):
                raise ConnectionLost(f"HELLO: expected one from {self._other}, got {type(frames[0]).__name__}")
        except (ChannelClosed, ConnectionLost) as lost:
            self._close(connection)
            if self._listener is None:
                self.drop(connection.link, str(lost))
            else:  # D may be connected to by anyone
                self.refusals.append(str(lost))
        else:
            connection.hello = frames[0] if frames else connection.hello

    def _join(self, pair: Pair, connection: _Connection) -> list[Link]:
        self._pending.remove(connection)
        transport, hello = connection.transport, connection.hello
        assert hello is not None
        try:
            if hello.role != self._other:
                raise ValueError(f"HELLO: expected one from {self._other}, got one from {hello.role}")
            if hello.incarnation.hex() != pair.incarnation:
                raise ValueError(f"HELLO: incarnation: expected {pair.incarnation}, got {hello.incarnation.hex()}")
            packing = Packing(self._cache, self._ours, hello, transport.checksum_kind)
            if self._listener is None:
                transport.open_staging(hello)
                assert transport.staging is not None
                if self._cache.device.type == "cuda" and (problem := transport.staging.pin()):
                    print(f"{self._ours.role}: staging is not pinned: {problem}", file=sys.stderr, flush=True)
                transport.send(self._ours)
        except (ValueError, OSError, ChannelClosed) as error:
            transport.close()
            self.drop(pair.link, str(error))
            return []
        del self._wanted[pair.link]
        link = self.links[pair.link] = Link(pair.link, pair.incarnation, transport, packing)
        return [link]
