"""Who is joined with whom, and who is late, without processes."""

import asyncio
from types import SimpleNamespace

import pytest

from pagewire.serve.config import WorkerConfig
from pagewire.serve.front import process, supervisor
from pagewire.serve.front.process import WorkerProcess
from pagewire.serve.front.supervisor import Supervisor
from pagewire.serve.messages import Gauges, Linked, Pair, Ready, Token, Unlinked


def worker(role: str, incarnation: str) -> SimpleNamespace:
    ready = Ready(role, 1, "m", 512, 100 if role == "decode" else 90, 320, incarnation, f"at {incarnation}")
    sent: list = []
    return SimpleNamespace(role=role, ready=ready, beating=True, sent=sent, channel=SimpleNamespace(send=sent.append))


def make() -> Supervisor:
    return Supervisor(
        WorkerConfig(model="m"),
        colocated=False,
        recover=True,
        on_events=print,
        on_gauges=print,
        forget=lambda role: None,
    )


def up(front: Supervisor, process: SimpleNamespace) -> None:
    front.workers[process.role] = process
    front._receive(process, process.ready)


def test_each_is_told_of_the_others_incarnation_and_a_whole_pair_is_healthy():
    async def run() -> None:
        front, d, p = make(), worker("decode", "dd"), worker("prefill", "pp")
        up(front, d)
        assert d.sent == [] and front.reason == "the model processes are starting"
        up(front, p)
        assert d.sent == [Pair(1, "pp", "")] and p.sent == [Pair(1, "dd", "at dd")]
        front._receive(d, Linked(1))
        front._receive(p, Linked(0))  # of an older one
        assert front.reason is not None
        front._receive(p, Linked(1))
        assert front.reason is None and front.limits.pool_tokens == 90

    asyncio.run(run())


def test_a_pairing_that_is_overtaken_does_not_happen(monkeypatch):
    """The link is lost and to be made anew a moment later; before that P ends, and the next one is joined."""
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)

    async def run() -> None:
        front, d, p = make(), worker("decode", "dd"), worker("prefill", "pp")
        up(front, d)
        up(front, p)
        for side in (d, p):
            front._receive(side, Linked(1))
        front._receive(d, Unlinked(1, "P: the other end closed"))
        front._receive(p, Unlinked(1, "said twice, counted once"))
        del front.workers["prefill"]
        front._on_end("prefill", "it ended", broken=False)
        p2 = worker("prefill", "p2")
        up(front, p2)
        (pair,) = p2.sent
        for side in (d, p2):
            front._receive(side, Linked(pair.link))
        assert front.reason is None
        await asyncio.sleep(0.05)
        assert p2.sent == [pair] and d.sent[1:] == [Pair(pair.link, "p2", "")] and front.reason is None

    asyncio.run(run())


def test_d_serves_alone_when_it_is_not_joined_in_time(monkeypatch):
    monkeypatch.setattr(supervisor, "PAIRING_S", 0.01)

    async def run() -> None:
        front, d, p = make(), worker("decode", "dd"), worker("prefill", "pp")
        up(front, d)
        up(front, p)
        await asyncio.sleep(0.03)
        assert front.routing._decode is None, "nobody is served before the first pair"
        for side in (d, p):
            front._receive(side, Linked(1))
        del front.workers["decode"]
        front._on_end("decode", "it ended", broken=False)
        d2 = worker("decode", "d2")
        up(front, d2)
        assert front.routing._decode is None
        await asyncio.sleep(0.03)
        assert front.routing._decode is d2 and front.routing._prefill is None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "was not ready within 600 s"),
        ([(1, Ready("decode", 1, "m", 512, 100, 320, "", ""))], "said nothing for 30 s"),
        ([(1, "ready"), (20, Token("r", 0, 1)), (40, Token("r", 0, 1))], "came no further for 30 s"),
        ([(1, "ready"), *((t, Gauges("decode", {}, 1, 0, 7)) for t in range(2, 40))], "came no further for 30 s"),
        ([(1, "ready"), *((t, Gauges("decode", {}, 0, 9, 7)) for t in range(2, 700))], ""),  # it has no work
        ([(1, "ready"), *((t, Gauges("decode", {}, 1, 0, t)) for t in range(2, 700))], ""),
    ],
    ids=["loads", "silent", "tokens alone", "stands still", "idle", "advances"],
)
def test_a_late_process_is_killed_for_a_reason(monkeypatch, messages, why):
    now = 0.0
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: now))
    killed = []
    told = WorkerProcess("decode", SimpleNamespace(returncode=None, pid=7, kill=lambda: killed.append(now)), None)
    ready = Ready("decode", 1, "m", 512, 100, 320, "", "")
    due = dict(messages)
    for second in range(700):
        now = float(second)
        if message := due.get(second):
            told._hear(ready if message == "ready" else message)
        told.kill_if_late(600, 30)
        if killed:
            break
        assert told.beating == (told.ready is not None and now - min(told._heard, told._progressed) < 5)
    assert bool(killed) == bool(why) and why in told._killed_for
