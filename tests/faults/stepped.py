"""P and D stepped by hand with what the front makes of their answers, named states of a request, and a clock."""

import gc
import os
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Cancel, Failed, Finished
from pagewire.serve.worker import decode, prefill, timeline
from pagewire.transfer.handoff import Phase
from serve.workers import Stepped, prompt_of

TIMEOUT_S = 60  # of a handoff, on `Rig`'s clock: real time alone never gets there
STUCK_TURNS = 60  # without an answer: whoever waits now waits for the clock
MAX_TURNS = 3000  # until everything must have ended

REQUESTS = {  # prompt length, max_tokens
    "b": (9, 6),  # in D, past P, when the fault comes
    "a": (21, 6),  # the one whose state is named
    "c": (13, 6),  # behind it
    "hog": (9, 91),  # most of D's pool
    "whole_d": (32, 96),  # all of it, and all of P's
    "whole_p": (32, 2),
    "next": (17, 6),
    "last": (17, 6),
}


def config_of(model: str, pool_tokens: int) -> WorkerConfig:
    return WorkerConfig(
        model=model, page_size=4, pool_tokens=pool_tokens, prefill_chunk=8, max_batch_size=4, max_waiting=8,
        staging_bytes=4 * 2048, verify_kv=True, handoff_timeout_ms=TIMEOUT_S * 1000, device="cpu",
    )  # fmt: skip


def phases(pair: Stepped, request_id: str) -> tuple[Phase | None, Phase | None]:
    """At P, at D."""
    lives = pair.p._sender._live, pair.d._receiver._live
    return tuple(live[request_id].phase if request_id in live else None for live in lives)


def granted(pair: Stepped, side: str) -> set[int]:
    """Generations that this side holds and of which it waits for the other."""
    if side == "p":
        sender = pair.p._sender
        return {of.generation for request_id in sender.request_ids() for of in sender.reserves(request_id).values()}
    live = pair.d._receiver._live.values()
    return {leg.generation for one in live if one.phase is Phase.RECEIVING for leg in one.legs.values()}


def _on_their_way(pair: Stepped) -> bool:
    """Chunks that P has sent and D has not read."""
    (coverage,) = (leg.coverage for leg in pair.d._receiver._live["a"].legs.values())
    every = coverage._bounds.values()
    arrived = sum(sum(of[1::2]) - sum(of[::2]) for of in every)  # tokens of a layer and head
    return pair.p.requests["a"].pushed_bytes > arrived * pair.link_of("p").packing.wire.packed_bytes(0, 1, 1, 1)


def _num_computed(pair: Stepped) -> int:
    return pair.p.requests["a"].num_computed if "a" in pair.p.requests else 0


# of the request "a", as P's and D's machines have it
STATES = {
    "waiting": lambda pair: phases(pair, "a") == (Phase.WAITING, Phase.WAITING),
    "granted": lambda pair: phases(pair, "a")[1] is Phase.RECEIVING and not _num_computed(pair),
    "prefilling": lambda pair: (
        phases(pair, "a") == (Phase.PREFILLING, Phase.RECEIVING) and _num_computed(pair) and not _on_their_way(pair)
    ),
    "chunks": lambda pair: phases(pair, "a") == (Phase.PREFILLING, Phase.RECEIVING) and _on_their_way(pair),
    "draining": lambda pair: phases(pair, "a") == (Phase.DRAINING, Phase.RECEIVING),
    "committed": lambda pair: phases(pair, "a") == (Phase.DRAINING, Phase.RUNNING),
    "decoding": lambda pair: phases(pair, "a") == (None, Phase.RUNNING) and len(pair.tokens["a"]) > 2,
}


@dataclass
class Attempts:
    """A request as the front has it: what its lost attempts emitted, and the one that lives."""

    prompt: list[int]
    max_tokens: int
    attempt: str
    link: int
    before: list[int] = field(default_factory=list)
    number: int = 1


class Rig:
    """A pair, its front (`serve/front/routing.py` in small) and its clock."""

    def __init__(self, model: str, patch: pytest.MonkeyPatch) -> None:
        self.skew_s = 0.0
        patch.setattr(decode, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + self.skew_s))
        patch.setattr(prefill, "now_us", lambda: timeline.now_us() + int(self.skew_s * 1e6))
        self.pair = Stepped(config_of(model, 32), config_of(model, 128))
        self.open: dict[str, Attempts] = {}
        self.outputs: dict[str, list[int]] = {}  # of those that ended well
        self.cancelled: set[str] = set()
        self.recovered: dict[str, str] = {}  # why an attempt of it was lost
        gc.collect()
        self.num_fds = self.fds()

    def fds(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    @property
    def lost(self) -> bool:
        return any(loss.link == self.pair.link for _, loss in self.pair.unlinked)

    def submit(self, name: str) -> None:
        length, max_tokens = REQUESTS[name]
        prompt = prompt_of(length, salt=length)
        self.open[name] = Attempts(prompt, max_tokens, name, 0 if self.lost else self.pair.link)
        self.pair.submit(name, prompt, max_tokens, local=self.lost)

    def reach(self, state: str) -> None:
        """Submits the load and steps until `a` is in this state."""
        if state == "waiting":
            self.submit("hog")
        self.submit("b")
        self.until(lambda: 1 in self.pair.tokens["b"])
        self.submit("a")
        self.submit("c")
        for _ in range(MAX_TURNS):
            for turn in (self.pair.turn_d, self.pair.turn_p):
                if STATES[state](self.pair):
                    return
                turn()
        raise AssertionError(f"{state} is never reached: {phases(self.pair, 'a')}")

    def until(self, condition) -> None:
        for _ in range(MAX_TURNS):
            if condition():
                return
            self.pair.turns()
        raise AssertionError(f"not within {MAX_TURNS} turns: {self.open}, {self.pair.ends}")

    def settle(self) -> None:
        """Until every request has ended, in `outputs` or `cancelled`; what is lost is tried again by D alone."""
        quiet, seen = 0, None
        for _ in range(MAX_TURNS):
            for name in list(self.open):
                self._look(name)
            if not self.open:
                return
            self.pair.turns()
            now = {name: len(self.pair.tokens[one.attempt]) for name, one in self.open.items()}
            quiet, seen = (quiet + 1 if now == seen else 0), now
            if quiet == STUCK_TURNS:
                quiet, self.skew_s = 0, self.skew_s + TIMEOUT_S + 1
        raise AssertionError(f"not within {MAX_TURNS} turns: {self.open}, {self.pair.ends}")

    def _look(self, name: str) -> None:
        one = self.open[name]
        tokens, ends = self.pair.tokens[one.attempt], self.pair.ends[one.attempt]
        joined = any(index > 0 for index in tokens) and 0 in tokens
        if ends and isinstance(ends[0], Finished):
            if ends[0].reason == "cancelled":
                assert name in self.cancelled, f"nobody cancelled {name}"
                del self.open[name]
            elif len(tokens) >= ends[0].num_tokens:
                self.outputs[name] = one.before + self.pair.output(one.attempt)
                del self.open[name]
        elif ends:
            assert isinstance(ends[0], Failed) and ends[0].retry, ends
            self._again(name, one, ends[0].message)
        elif one.link and self.lost and not joined:
            if "decode" in {role for role, loss in self.pair.unlinked if loss.link == one.link}:
                assert phases(self.pair, one.attempt)[1] in (None, Phase.RUNNING), "D keeps what came from P"
            self._again(name, one, next(loss.reason for _, loss in self.pair.unlinked if loss.link == one.link))

    def _again(self, name: str, one: Attempts, reason: str) -> None:
        self.pair.send(Cancel(one.attempt))
        if name in self.cancelled:
            del self.open[name]
            return
        self.recovered[name] = reason
        tokens = self.pair.tokens[one.attempt]
        for index in range(len(tokens)):
            if index not in tokens:
                break  # what overtook a token that never came is computed again
            one.before.append(tokens[index])
        one.number, one.link = one.number + 1, 0
        one.attempt = f"{name}.{one.number}"
        rest = one.max_tokens - len(one.before)
        assert rest > 0 and one.number < 4
        self.pair.submit(one.attempt, one.prompt + one.before, rest, local=True)

    def check_clean(self, expected: dict[str, list[int]]) -> None:
        """Nothing wrong was sent, nothing is held, and the next request goes the ordinary way."""
        if self.lost:
            self.pair.pair()
        recovered = dict(self.recovered)
        self.submit("last")
        self.settle()
        assert self.recovered == recovered, "the next request needs no help"
        for name, output in self.outputs.items():
            assert output == expected[name], f"{name}: {output} instead of {expected[name]}"
        self.until(self.pair.pages_free)
        self.pair.turns(3)
        p, d = self.pair.p, self.pair.d
        for worker in (p, d):
            allocator = worker.engine.allocator
            assert sum(allocator.counts().values()) == allocator.num_pages == allocator.num_free
            assert not worker.requests and not worker._submits and not any(worker.batches)
        assert not p._sender._live and not p._sender._moving and not d._receiver._live and not d._receiver._moving
        (of_p,), (of_d,) = p._sender._links.values(), d._receiver._links.values()
        assert not of_p.early and not of_p.sent_staging and len(of_p.credits) == self.pair.arena.num_staging_slots
        assert len(of_d.granted_staging) == self.pair.arena.num_staging_slots
        gc.collect()
        assert self.fds() == self.num_fds
