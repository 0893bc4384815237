"""Who is joined with whom, and who is late, without processes."""

import asyncio
import signal
import time
from types import SimpleNamespace

import msgspec
import pytest

from pagewire.net.channel import ChannelClosed
from pagewire.serve.config import WorkerConfig
from pagewire.serve.front import links, process
from pagewire.serve.front import worker as workers
from pagewire.serve.front.process import WorkerProcess
from pagewire.serve.front.remote import RemoteWorker, parse_peer
from pagewire.serve.front.supervisor import Supervisor
from pagewire.serve.front.trace import EventLog
from pagewire.serve.messages import Event, Gauges, Linked, Pair, Ready, Sampling, Submit, Token, Unlinked


def worker(role: str, incarnation: str, name: str = "") -> SimpleNamespace:
    ready = Ready(role, 1, "m", 512, 100 if role == "decode" else 90, 320, incarnation, f"at {incarnation}")
    sent: list = []
    channel = SimpleNamespace(send=sent.append, withdraw=lambda unsent: False)
    return Told(role=role, name=name or role, ready=ready, beating=True, sent=sent, channel=channel)


class Told(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


async def never() -> None:
    raise AssertionError


def make(*names: str) -> Supervisor:
    return Supervisor(WorkerConfig(model="m"), dict.fromkeys(names or ("decode", "prefill"), never), recover=True)


def up(front: Supervisor, *told: Told) -> None:
    for one in told:
        front.workers[one.name] = one
        front._receive(one, one.ready)


def down(front: Supervisor, told: Told) -> None:
    del front.workers[told.name]
    front._on_end(told.name, told, "it ended")


def link(front: Supervisor, number: int, *told: Told) -> None:
    for one in told:
        front._receive(one, Linked(number))


def serving(front: Supervisor) -> dict[str, list[str]]:
    """By incarnation, the P's of each D that takes requests."""
    return {
        decode.ready.incarnation: sorted(prefill.ready.incarnation for prefill in front._links.of(decode).values())
        for decode in front.routing._decodes
    }


def test_each_is_told_of_the_others_incarnation_and_a_whole_pair_is_healthy():
    async def run() -> None:
        front, d, p = make(), worker("decode", "dd"), worker("prefill", "pp")
        up(front, d)
        assert d.sent == [] and front.reason == "the model processes are starting"
        up(front, p)
        assert d.sent == [Pair(1, "pp", "")] and p.sent == [Pair(1, "dd", "at dd")]
        link(front, 1, d)
        link(front, 0, p)  # of an older one
        assert front.reason is not None
        link(front, 1, p)
        assert front.reason is None and front.limits.pool_tokens == 90

    asyncio.run(run())


def test_a_pairing_that_is_overtaken_does_not_happen(monkeypatch):
    """The link is lost and to be made anew a moment later; before that P ends, and the next one is joined."""
    monkeypatch.setattr(links, "BACKOFF_S", 0.01)

    async def run() -> None:
        front, d, p = make(), worker("decode", "dd"), worker("prefill", "pp")
        up(front, d, p)
        link(front, 1, d, p)
        front._receive(d, Unlinked(1, "P: the other end closed"))
        front._receive(p, Unlinked(1, "said twice, counted once"))
        assert serving(front) == {"dd": []}
        down(front, p)
        p2 = worker("prefill", "p2")
        up(front, p2)
        (pair,) = p2.sent
        link(front, pair.link, d, p2)
        assert front.reason is None
        await asyncio.sleep(0.05)
        assert p2.sent == [pair] and d.sent[1:] == [Pair(pair.link, "p2", "")] and front.reason is None

    asyncio.run(run())


def test_d_serves_alone_when_it_is_not_joined_in_time(monkeypatch):
    monkeypatch.setattr(links, "PAIRING_S", 0.01)

    async def run() -> None:
        front, d, p = make(), worker("decode", "dd"), worker("prefill", "pp")
        up(front, d, p)
        await asyncio.sleep(0.03)
        assert serving(front) == {}, "nobody is served before the first pair"
        link(front, 1, d, p)
        down(front, d)
        d2 = worker("decode", "d2")
        up(front, d2)
        assert serving(front) == {}
        await asyncio.sleep(0.03)
        assert serving(front) == {"d2": []}
        link(front, p.sent[-1].link, d2, p)
        assert serving(front) == {"d2": ["pp"]}

    asyncio.run(run())


def test_d_does_not_wait_for_a_p_that_has_ended():
    async def run() -> None:
        front, d, p = make(), worker("decode", "dd"), worker("prefill", "pp")
        up(front, d, p)
        link(front, 1, d, p)
        down(front, d)
        d2 = worker("decode", "d2")
        up(front, d2)
        assert serving(front) == {}, "it is being joined"
        down(front, p)
        assert serving(front) == {"d2": []}

    asyncio.run(run())


def output(request_id: str, **state) -> Told:
    """A request of which nothing was emitted."""
    submit = Submit(request_id, [1, 2], 4, [], Sampling())
    return Told(attempt=submit, num_losses=0, needs_prefill=True, outcome="", joined=False, **state)


def test_every_p_is_joined_with_every_d_and_the_least_loaded_of_each_takes_the_next_request():
    async def run() -> None:
        names = ("decode@a:1", "decode@b:1", "prefill@a:2", "prefill@b:2")
        front = make(*names)
        d1, d2, p1, p2 = (worker(name.partition("@")[0], name[-3:], name) for name in names)
        up(front, d1, p1, d2, p2)
        pairs = {pair.link: (d, p) for d in (d1, d2) for pair in d.sent for p in (p1, p2) if pair in p.sent or
                 any(other.link == pair.link for other in p.sent)}  # fmt: skip
        assert sorted((d.name, p.name) for d, p in pairs.values()) == sorted(
            (d.name, p.name) for d in (d1, d2) for p in (p1, p2)
        )
        for number, both in pairs.items():
            link(front, number, *both)
        assert serving(front) == {"a:1": ["a:2", "b:2"], "b:1": ["a:2", "b:2"]}
        for each in (d1, d2, p1, p2):
            each.sent.clear()
        outputs = [output(f"r{i}") for i in range(8)]
        for one in outputs:
            front.submit(one)
        assert [len(each.sent) for each in (d1, d2, p1, p2)] == [4, 4, 4, 4]
        for submit in (*p1.sent, *p2.sent):  # to both ends of the link, and to nobody else
            d, p = pairs[submit.link]
            assert submit in d.sent and submit in p.sent
        outputs[0].needs_prefill = outputs[2].needs_prefill = False  # a P that is done with two
        busy = next(p for p in (p1, p2) if any(s.request_id == "r1" for s in p.sent))
        free = p1 if busy is p2 else p2
        for each in (d1, d2, p1, p2):
            each.sent.clear()
        front.submit(output("r8"))
        front.submit(output("r9"))
        assert (len(free.sent), len(busy.sent)) == (2, 0)
        assert front.reason is None
        front.workers[d1.name].beating = False
        assert front.reason is None, "a whole pair beats: d2's"
        d2.beating = False
        assert front.reason == "the decode@a:1 and the decode@b:1 process does not answer or is restarting"

    asyncio.run(run())


def requests_to(front: Supervisor, number: int) -> tuple[list[Told], list[str]]:
    """That many, handed out; and the list of the attempts that are lost from now on."""
    lost: list[str] = []
    outputs = [output(f"r{i}") for i in range(number)]
    for one in outputs:

        def restart(one=one) -> bool:
            lost.append(one.attempt.request_id)
            one.attempt = msgspec.structs.replace(one.attempt, request_id=one.attempt.request_id + ".2")
            return False

        one.restart = restart
        front.submit(one)
    return outputs, lost


def test_the_loss_of_one_of_several_touches_only_what_it_held():
    async def run() -> None:
        names = ("decode@a:1", "decode@b:1", "prefill@a:2", "prefill@b:2")
        front = make(*names)
        d1, d2, p1, p2 = (worker(name.partition("@")[0], name[-3:], name) for name in names)
        up(front, d1, d2, p1, p2)
        for p in (p1, p2):
            for pair in list(p.sent):
                link(front, pair.link, d1 if pair.incarnation == "a:1" else d2, p)
        outputs, lost = requests_to(front, 8)
        held = [s.request_id for s in d1.sent if isinstance(s, Submit)]
        assert len(held) == 4
        down(front, d1)
        assert lost == held and serving(front) == {"b:1": ["a:2", "b:2"]}
        again = [s for s in d2.sent if isinstance(s, Submit) and s.request_id.endswith(".2")]
        assert len(again) == 4 and all(s.link for s in again)
        lost.clear()
        for one in outputs:
            one.needs_prefill = one.attempt.request_id != "r7"
        held = [s.request_id for s in p1.sent if isinstance(s, Submit) and s.link in front._links.of(d2)]
        down(front, p1)
        assert sorted(lost) == sorted(set(held) - {"r7"}) and len(lost) >= 3, "what needs no P any more goes on"
        assert serving(front) == {"b:1": ["b:2"]}
        down(front, p2)
        assert serving(front) == {"b:1": []}

    asyncio.run(run())


def test_a_p_that_dies_loses_every_attempt_once():
    """Its links to several D's go at once: nothing is handed to the next one of them."""

    async def run() -> None:
        names = ("decode@a:1", "decode@b:1", "prefill@a:2")
        front = make(*names)
        d1, d2, p = (worker(name.partition("@")[0], name[-3:], name) for name in names)
        up(front, d1, d2, p)
        for pair in list(p.sent):
            link(front, pair.link, d1 if pair.incarnation == "a:1" else d2, p)
        _, lost = requests_to(front, 6)
        down(front, p)
        assert sorted(lost) == [f"r{i}" for i in range(6)] and serving(front) == {"a:1": [], "b:1": []}

    asyncio.run(run())


def test_a_process_with_another_model_or_role_is_not_used():
    async def run() -> None:
        front = make("decode@a:1", "decode@b:1")
        d1, d2 = worker("decode", "d1", "decode@a:1"), worker("decode", "d2", "decode@b:1")
        d1.ready = msgspec.structs.replace(d1.ready, fingerprint="aa")
        d2.ready = msgspec.structs.replace(d2.ready, fingerprint="bb")
        up(front, d1)
        with pytest.raises(ChannelClosed, match="has another model: expected aa, got bb"):
            up(front, d2)
        assert serving(front) == {"d1": []}
        remote = RemoteWorker("decode@c:1", None)
        with pytest.raises(ChannelClosed, match="is a prefill process"):
            remote._hear(worker("prefill", "x").ready)

    asyncio.run(run())


def test_events_of_another_machine_are_by_our_clock():
    remote = RemoteWorker("decode@c:1", None)
    remote._hear(Ready("decode", 1, "m", 512, 100, 320, "", "", now_us=5))
    ahead = time.monotonic_ns() // 1000 - 5
    event = remote.dated(Event("decode", 7, 3))
    assert event.role == "decode@c:1" and event.duration_us == 3 and abs(event.start_us - 7 - ahead) < 1_000_000


def test_each_worker_has_a_track_of_its_own_in_the_trace():
    names = ["decode@a:1", "front", "decode@b:1", "prefill", "prefill@a:2"]
    log = EventLog()
    for start_us, name in enumerate(names):
        log.add(Event("decode_step", start_us, 1, role=name))
    rows = msgspec.json.decode(log.chrome_trace())["traceEvents"]
    spans = {row["cat"]: row["pid"] for row in rows if row["ph"] == "X"}
    assert spans == {row["args"]["name"]: row["pid"] for row in rows if row["name"] == "process_name"}
    assert len(set(spans.values())) == 5 and (spans["front"], spans["prefill"]) == (1, 2)


@pytest.mark.parametrize("text", ["decode", "decode@", "decode@h", "decode@h:0", "decode@h:x", "front@h:1", "h:1"])
def test_an_address_that_is_none(text):
    with pytest.raises(ValueError, match="--peer: expected prefill@HOST:PORT or decode@HOST:PORT, got"):
        parse_peer(text)


def test_an_address():
    assert parse_peer("decode@[::1]:80") == ("decode", "::1", 80)
    assert parse_peer("prefill@10.0.0.2:9001") == ("prefill", "10.0.0.2", 9001)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "was not ready within 600 s"),
        ([(1, Ready("decode", 1, "m", 512, 100, 320, "", ""))], "said nothing for 30 s"),
        ([(1, "ready"), (20, Token("r", 0, 1)), (40, Token("r", 0, 1))], "came no further for 30 s"),
        ([(1, "ready"), *((t, Gauges({}, 1, 0, 7)) for t in range(2, 40))], "came no further for 30 s"),
        ([(1, "ready"), *((t, Gauges({}, 0, 9, 7)) for t in range(2, 700))], ""),  # it has no work
        ([(1, "ready"), *((t, Gauges({}, 1, 0, t)) for t in range(2, 700))], ""),
    ],
    ids=["loads", "silent", "tokens alone", "stands still", "idle", "advances"],
)
def test_a_late_process_is_killed_for_a_reason(monkeypatch, messages, why):
    now = 0.0
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now))
    killed = []
    monkeypatch.setattr(process, "os", SimpleNamespace(kill=lambda pid, number: killed.append((pid, number))))
    told = WorkerProcess("decode", SimpleNamespace(returncode=None, pid=7), None)
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
    assert killed == ([(7, signal.SIGKILL)] if why else []) and why in told._killed_for
