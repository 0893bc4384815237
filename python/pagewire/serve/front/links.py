"""Which P's and D's are joined: every P with every D, by numbered links."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pagewire.serve.front.worker import Worker
from pagewire.serve.messages import Linked, Pair, Unlinked

BACKOFF_S = 0.25  # doubles with every attempt in a row that failed
MAX_BACKOFF_S = 10.0
PAIRING_S = 5.0  # from a D's Ready to its links; meanwhile requests wait for one


def backoff_s(in_a_row: int) -> float:
    return min(BACKOFF_S * 2.0 ** min(in_a_row, 10), MAX_BACKOFF_S)


@dataclass(eq=False)
class _Link:
    """An attempt to join the two; what is said of another one is void."""

    number: int
    decode: Worker
    prefill: Worker
    misses: int  # attempts before this one, in a row, that ended before they stood
    said: set[Worker] = field(default_factory=set)  # who has said that it stands

    @property
    def stands(self) -> bool:
        return len(self.said) == 2


class Links:
    """`add` and `remove` what is ready and what has ended; `on_change` and `on_lost` tell what became of it."""

    def __init__(
        self, on_change: Callable[[Worker], None], on_lost: Callable[[set[int], str, int | None], None]
    ) -> None:
        """on_change: a D takes requests, with the P's of `of`. on_lost: (links, why, how many attempts in a
        row ended before they stood; None: there is no next one)."""
        self._on_change, self._on_lost = on_change, on_lost
        self._workers: list[Worker] = []
        self._links: dict[int, _Link] = {}
        self._number = 0

    def add(self, worker: Worker) -> None:
        self._workers.append(worker)
        if worker.role == "prefill":
            for decode in [other for other in self._workers if other.role != "prefill"]:
                self._pair(decode, worker)
        elif prefills := [other for other in self._workers if other.role == "prefill"]:
            for prefill in prefills:
                self._pair(worker, prefill)
            asyncio.get_running_loop().call_later(PAIRING_S, self._changed, worker)
        else:
            self._on_change(worker)

    def remove(self, worker: Worker, reason: str) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        lost = [link for link in self._links.values() if worker in (link.decode, link.prefill)]
        for link in lost:
            del self._links[link.number]
        if worker.role == "prefill":
            self._on_lost({link.number for link in lost}, reason, None)
            for link in lost:
                self._on_change(link.decode)

    def of(self, decode: Worker) -> dict[int, Worker]:
        return {link.number: link.prefill for link in self._links.values() if link.stands and link.decode is decode}

    @property
    def beating(self) -> bool:
        """Whether some pair is joined and alive."""
        return any(link.stands and link.decode.beating and link.prefill.beating for link in self._links.values())

    def receive(self, worker: Worker, message: Linked | Unlinked) -> None:
        link = self._links.get(message.link)
        if link is None or worker not in (link.decode, link.prefill):
            return
        if isinstance(message, Linked):
            link.said.add(worker)
            if link.stands:
                self._on_change(link.decode)
            return
        del self._links[link.number]
        misses = 0 if link.stands else link.misses + 1
        self._on_lost({link.number}, message.reason, misses)
        self._on_change(link.decode)
        asyncio.get_running_loop().call_later(backoff_s(misses), self._pair, link.decode, link.prefill, misses)

    def _pair(self, decode: Worker, prefill: Worker, misses: int = 0) -> None:
        if not {decode, prefill} <= set(self._workers) or decode.ready is None or prefill.ready is None:
            return
        self._number += 1
        self._links[self._number] = _Link(self._number, decode, prefill, misses)
        decode.channel.send(Pair(self._number, prefill.ready.incarnation, ""))
        prefill.channel.send(Pair(self._number, decode.ready.incarnation, decode.ready.address))

    def _changed(self, decode: Worker) -> None:
        if decode in self._workers:
            self._on_change(decode)
