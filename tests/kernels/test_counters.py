"""Counters for kernels whose last program does something: a call's own at zero, without a launch that sets them."""

import pytest
import torch

pytest.importorskip("triton")
from pagewire.kernels import counters as of  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def none_known(monkeypatch):
    monkeypatch.setattr(of, "_halves", {})


def test_calls_of_a_stream_take_turns():
    a, b = of.counters(CPU, 0, 8)
    assert not a.any() and not b.any() and a.dtype == torch.int32
    assert of.counters(CPU, 0, 8) == (b, a)
    assert of.counters(CPU, 0, 4) == (a, b)


def test_streams_share_none():
    ours, theirs = of.counters(CPU, 0, 8), of.counters(CPU, 7, 8)
    assert len({x.data_ptr() for x in (*ours, *theirs)}) == 4


def test_a_call_with_more_gets_new_ones():
    first = of.counters(CPU, 0, 8)
    more = of.counters(CPU, 0, 9)
    assert all(len(x) >= 9 and not x.any() and x.data_ptr() % 16 == 0 for x in more)
    assert of.counters(CPU, 0, 8) == (more[1], more[0]) and first[0] is not more[0]


@pytest.mark.parametrize("stream, capturing", [(0, True), (2, False)], ids=["captured", "one handle of many streams"])
def test_what_may_run_side_by_side_keeps_to_itself(stream, capturing, monkeypatch):
    monkeypatch.setattr(of, "is_capturing", lambda device: capturing)
    assert of.counters(CPU, stream, 8)[0] is not of.counters(CPU, stream, 8)[1]
    assert not of._halves


def test_they_serve_calls_in_any_mode():
    with torch.inference_mode():
        a, _ = of.counters(CPU, 0, 8)
    a.add_(1)  # an inference tensor could not be
