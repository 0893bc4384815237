"""Order, stop strings and ends of one output, without a server."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.serve.front.openai import ApiError, server_error
from pagewire.serve.front.output import Delta, Output, Text
from pagewire.serve.messages import Sampling, Submit


def letters(token_id):
    """Token 65 is "A"; 0 is a character's first half, which only 1 completes."""
    return {0: b"\xc3", 1: b"\xa9"}.get(token_id, bytes([token_id]))


def make(stops=()):
    sink, cancelled = asyncio.Queue(), []
    submit = Submit("r", [1], 16, [], Sampling())
    return Output(submit, 0, Text(letters, stops), sink, cancelled.append), sink, cancelled


def drain(sink):
    return [sink.get_nowait() for _ in range(sink.qsize())]


def text_of(items):
    return "".join(item.text for item in items)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_of_arrival_gives_one_text(order):
    output, sink, _ = make()
    for index in order:
        output.on_token(index, 65 + index)
        output.on_token(index, 90)  # a repetition is dropped
    assert not output.outcome
    output.on_finished("length", 4)
    items = drain(sink)
    assert text_of(items) == "ABCD" and [i.reason for i in items if i.reason] == ["length"]
    assert output.outcome == "length" and output.num_tokens == 4


def test_finished_waits_for_the_tokens_it_counts():
    output, sink, _ = make()
    output.on_token(1, 66)
    output.on_finished("stop", 2)
    assert drain(sink) == [] and not output.outcome
    output.on_token(0, 65)
    assert text_of(drain(sink)) == "AB" and output.outcome == "stop"


def test_no_tokens_at_all():
    output, sink, _ = make()
    output.on_finished("stop", 0)
    assert drain(sink) == [Delta(0, "", "stop")]


def test_half_a_character_at_the_end_is_flushed():
    output, sink, _ = make()
    output.on_token(0, 65)
    output.on_token(1, 0)
    output.on_finished("length", 2)
    assert text_of(drain(sink)) == "A\ufffd"


def test_a_stop_string_across_tokens_ends_and_cancels():
    output, sink, cancelled = make(("BC",))
    for index, letter in enumerate("ABCD"):
        output.on_token(index, ord(letter))
        if letter == "B":
            assert text_of(items := drain(sink)) == "A" and items[-1].reason is None
    assert drain(sink) == [Delta(0, "", "stop")]
    assert cancelled == ["r"] and output.num_tokens == 3
    output.on_finished("length", 4)  # what the workers said before they heard of it
    assert drain(sink) == [] and output.outcome == "stop"


def test_text_withheld_for_a_stop_string_is_sent_at_the_end():
    output, sink, _ = make(("ABX",))
    for index, letter in enumerate("AB"):
        output.on_token(index, ord(letter))
    assert drain(sink) == []
    output.on_finished("length", 2)
    assert text_of(drain(sink)) == "AB"


def test_failure_and_cancellation_end_once():
    output, sink, cancelled = make()
    output.fail(server_error("broken"))
    output.fail(server_error("again"))
    output.on_token(0, 65)
    output.abandon()
    (error,) = drain(sink)
    assert isinstance(error, ApiError) and str(error) == "broken" and not cancelled
    output, sink, cancelled = make()
    output.abandon()
    output.abandon()
    assert cancelled == ["r"] and output.outcome == "cancelled" and drain(sink) == []


def test_a_request_cancelled_by_a_worker_is_an_error_not_an_answer():
    output, sink, _ = make()
    output.on_finished("cancelled", 0)
    assert isinstance(drain(sink)[0], ApiError)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_text_equals_a_search_of_the_whole(text, stops, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher, sent = Text(lambda i: text[edges[i] : edges[i + 1]].encode(), tuple(stops)), ""
    for i, end in enumerate(edges[1:]):
        piece, matched = matcher.push(i)
        sent += piece
        assert all(stop not in sent for stop in stops)
        if matched:
            # nothing before the first place where a stop string was complete is lost
            assert any(text[:end].find(stop) == len(sent) for stop in stops)
            return
    assert all(stop not in text for stop in stops)
    assert (sent + matcher.finish()[0], matched) == (text, False)


def test_an_attempt_goes_on_where_the_one_before_was_lost():
    """What was emitted is the next prompt's end; nothing is emitted twice, and Finished counts what is left."""
    output, sink, _ = make()
    output.on_token(1, 66)
    output.on_token(0, 65, joined=False)
    output.on_token(3, 68)  # its predecessor is lost
    assert not output.restart()
    attempt = output.attempt
    assert (attempt.token_ids, attempt.max_tokens, attempt.request_id) == ([1, 65, 66], 14, "r.2")
    assert output.submit.token_ids == [1] and output.num_losses == 0
    output.on_token(0, 67, joined=False)
    output.on_token(1, 68)
    output.on_finished("stop", 2)
    assert text_of(drain(sink)) == "ABCD" and output.num_tokens == 4 and output.outcome == "stop"


def test_nothing_is_left_to_compute_when_only_finished_is_missing():
    output, sink, _ = make()
    for index in range(16):
        output.on_token(index, 65)
    assert output.restart() and output.outcome == "length"
    assert drain(sink)[-1] == Delta(0, "", "length")


def test_a_stop_string_across_attempts():
    output, sink, cancelled = make(("BC",))
    output.on_token(0, 65)
    output.on_token(1, 66)
    output.restart()
    output.on_token(0, 67)
    assert text_of(drain(sink)) == "A" and output.outcome == "stop" and cancelled == ["r.2"]


def test_losses_in_a_row_are_counted_until_d_says_something():
    output, _, _ = make()
    for num_losses in (1, 2):
        output.on_token(0, 65, joined=False)  # P's token does not count: it may be D that the request kills
        output.restart()
        assert output.num_losses == num_losses
    output.on_token(0, 65)
    output.restart()
    assert output.num_losses == 0


def test_p_is_needed_until_its_token_and_one_of_d_are_here():
    output, _, _ = make()
    assert output.needs_prefill
    output.on_token(1, 66)
    assert output.needs_prefill, "P may have died before its token left"
    output.on_token(0, 65, joined=False)
    assert not output.needs_prefill
    output.restart()
    assert output.needs_prefill
