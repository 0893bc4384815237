"""The order of calls: interleaved, on buffers that nothing has touched for longest, a slow contender cut short."""

import pytest

from pagewire.bench import timing
from pagewire.bench.timing import Clock, ContenderFailed, Times, interleave
from pagewire.bench.work import Contender


class FakeClock(Clock):
    """A GPU's clock that measures nothing: every call costs what its contender says."""

    def __init__(self, device: str) -> None:
        self.device = device

    def time(self, call, host_us=0.0, syncs=False):
        return float(call() or 1.0), 1.0

    def synchronize(self) -> None:
        pass


def _recorded(calls: list, name: str, **more) -> Contender:
    return Contender(name, lambda copy: calls.append((name, copy)) or 5.0, **more)


def test_contenders_take_turns_on_the_coldest_buffers():
    calls: list[tuple[str, int]] = []
    contenders = [_recorded(calls, name) for name in "abc"]
    times = interleave(FakeClock("cuda"), contenders, copies=7, seconds=0.01)
    copies = [copy for _, copy in calls]
    assert copies == [i % 7 for i in range(len(calls))]
    rounds = [name for name, _ in calls][9:]  # three warm calls each come first
    for at in range(0, 3 * timing.MIN_ROUNDS, 3):
        assert set(rounds[at : at + 3]) == set("abc")
    assert len({tuple(rounds[at : at + 3]) for at in (0, 3, 6)}) == 3  # another one is first each time
    assert all(t.median == 5.0 and len(t.device_us) >= timing.MIN_ROUNDS for t in times.values())


def test_warm_calls_are_not_counted_and_before_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "_SETTLE", 0.0)
    calls: list[tuple[str, int]] = []
    prepared: list[int] = []
    contender = _recorded(calls, "a", before=prepared.append)
    times = interleave(FakeClock("cpu"), [contender], copies=3, seconds=0.0)["a"]
    assert prepared == [copy for _, copy in calls]
    assert len(times.device_us) < len(calls)


def test_a_slow_contender_stops_after_two_rounds():
    assert timing._continues(0, spent=100.0, share=1.0)
    assert timing._continues(1, spent=100.0, share=1.0)
    assert not timing._continues(2, spent=100.0, share=1.0)
    assert timing._continues(timing.MIN_ROUNDS - 1, spent=2.0, share=1.0)
    assert not timing._continues(timing.MIN_ROUNDS, spent=2.0, share=1.0)


def test_who_raises_is_named_with_the_cause():
    def fail(copy: int) -> float:
        raise OSError("no")

    for failing in (Contender("b", fail), Contender("b", lambda copy: 5.0, before=fail)):
        with pytest.raises(ContenderFailed, match="^b: OSError: no$") as caught:
            interleave(FakeClock("cuda"), [_recorded([], "a"), failing], copies=2, seconds=0.0)
        assert caught.value.name == "b" and isinstance(caught.value.__cause__, OSError)


def test_a_device_is_lost_when_it_says_so():
    class Lost(FakeClock):
        def synchronize(self) -> None:
            raise RuntimeError("whatever the words")

    assert Lost("cuda").lost()
    assert not FakeClock("cuda").lost() and not Clock("cpu").lost()


def test_quantiles():
    times = Times(device_us=[float(n) for n in range(10, 0, -1)])
    assert times.median == 5.5
    assert times.quantile(0.2) == 3.0 and times.quantile(0.8) == 9.0
