"""P and D stepped by hand: exact moments, injected failures, and that nobody else notices."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from pagewire.net.channel import Channel, Codec
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Cancel, Failed, Finished, Sampling
from pagewire.serve.worker import prefill, timeline
from pagewire.transfer.frames import Abort
from serve.tiny import make_tiny_llama
from serve.workers import Stepped, prompt_of

PROMPT_LEN = 21
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model"), num_layers=3, eos_token_id=None))


def config_of(model: str, **changes) -> WorkerConfig:
    fields = dict(
        model=model, page_size=4, pool_tokens=256, prefill_chunk=8, max_batch_size=4, max_waiting=8,
        staging_bytes=4 * 2048, verify_kv=True, device="cpu",
    )  # fmt: skip
    return WorkerConfig(**{**fields, **changes})


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_BACKEND", "reference")  # obviously right, and quiet about it


@pytest.fixture()
def pair(model: str) -> Stepped:
    return Stepped(config_of(model))


@pytest.fixture()
def patch() -> Iterator[pytest.MonkeyPatch]:
    """To be undone in the middle of a test, unlike what the environment's fixtures set."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def bystander(pair: Stepped) -> Callable[[], None]:
    """A request that goes through, with the output of a lone run, whatever happens to others."""
    pair.submit("lone", prompt_of(9, salt=5), MAX_TOKENS)
    pair.until_ended("lone")
    pair.submit("bystander", prompt_of(9, salt=5), MAX_TOKENS)

    def check() -> None:
        pair.until_ended("bystander")
        assert pair.ends["bystander"] == [Finished("bystander", "length", MAX_TOKENS)]
        assert pair.output("bystander") == pair.output("lone")
        pair.until(pair.pages_free)

    return check


def test_one_request(pair: Stepped) -> None:
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.until_ended("a")
    assert pair.ends["a"] == [Finished("a", "length", MAX_TOKENS)]
    assert len(pair.output("a")) == MAX_TOKENS
    pair.until(pair.pages_free)
    (verified,) = pair.reported("kv_verify", "a")
    assert verified.args["equal"] == 1
    (transfer,) = pair.reported("transfer_total", "a")
    # K and V, 3 layers x 2 heads x 16 fp32 a token
    assert transfer.args["bytes"] == PROMPT_LEN * 2 * 3 * 2 * 16 * 4


def test_a_layer_leaves_before_the_next_is_computed(pair: Stepped) -> None:
    pair.submit("a", prompt_of(8), 2)
    forward = pair.p.engine.model.forward
    sent_at_layer = []

    def watched(*args, on_layer, **kwargs):
        def watch(layer: int) -> None:
            on_layer(layer)
            sent_at_layer.append(len(next(iter(pair.p._sender._links.values())).sent_staging))

        return forward(*args, on_layer=watch, **kwargs)

    pair.p.engine.model.forward = watched
    try:
        pair.until_ended("a")
    finally:
        pair.p.engine.model.forward = forward
    assert sent_at_layer == [1, 2, 3]
    pair.until(pair.pages_free)


@pytest.mark.parametrize("num_turns", range(12))
def test_cancel_after_any_number_of_turns(pair: Stepped, num_turns: int) -> None:
    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.turns(num_turns)
    pair.cancel("a")
    pair.until_ended("a")
    check()
    for end in pair.ends["a"]:  # P and D may both answer
        assert isinstance(end, Finished)
        assert end.reason == "cancelled" or (end.reason, end.num_tokens) == ("length", MAX_TOKENS)


@pytest.mark.parametrize("num_turns", [0, 1, 2, 4])
@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_cancel_reaches_one_side_long_before_the_other(pair: Stepped, first: str, num_turns: int) -> None:
    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.turns(num_turns)
    pair.channels[first].send(Cancel("a"))
    pair.turns(3)
    pair.cancel("a")
    check()
    assert pair.ends["a"][0].reason == "cancelled"


def test_first_token_ends_the_request(pair: Stepped) -> None:
    pair.submit("a", prompt_of(PROMPT_LEN), 1)
    pair.until_ended("a")
    assert pair.ends["a"] == [Finished("a", "length", 1)]
    (first,) = pair.output("a")
    pair.submit("b", prompt_of(PROMPT_LEN), MAX_TOKENS, stop=(first,))
    pair.until_ended("b")
    assert pair.ends["b"] == [Finished("b", "stop", 0)]
    assert pair.output("b") == []
    pair.until(pair.pages_free)


def test_a_stop_token_ends_the_request_and_is_not_sent(pair: Stepped) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    pair.submit("a", prompt_of(PROMPT_LEN), 12, sampling=sampling)
    pair.until_ended("a")
    output = pair.output("a")
    at = next(i for i in range(1, 12) if output[i] not in output[:i])
    pair.submit("b", prompt_of(PROMPT_LEN), 12, sampling=sampling, stop=(output[at],))
    pair.until_ended("b")
    assert pair.ends["b"] == [Finished("b", "stop", at)]
    assert pair.output("b") == output[:at]
    pair.until(pair.pages_free)


@pytest.mark.parametrize("side", ["p", "d"])
def test_a_forward_that_raises_fails_its_batch_only(pair: Stepped, side: str, patch: pytest.MonkeyPatch) -> None:
    check = bystander(pair)
    pair.until(lambda: 1 in pair.tokens["bystander"])  # in D, past P
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    model = getattr(pair, side).engine.model
    if side == "d":
        pair.until_ended("bystander")
        pair.until(lambda: 1 in pair.tokens["a"])

    def broken(*args, **kwargs):
        patch.undo()
        raise RuntimeError("out of luck")

    patch.setattr(model, "forward", broken)
    pair.until_ended("a")
    assert pair.ends["a"] == [Failed("a", "RuntimeError: out of luck")]
    check()


@pytest.mark.parametrize("side", ["p", "d"])
def test_nan_fails_its_own_request_only(pair: Stepped, side: str, patch: pytest.MonkeyPatch) -> None:
    """Both requests are in the batch; the row of one is NaN."""
    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    engine = getattr(pair, side).engine
    draw = engine._sample

    def poisoned(requests, logits):
        logits = logits.clone()
        for i, request in enumerate(requests):
            if request.id == "a":
                logits[i, 3] = torch.nan
        return draw(requests, logits)

    patch.setattr(engine, "_sample", poisoned)
    pair.until_ended("a")
    assert pair.ends["a"] == [Failed("a", "the model gave NaN or infinity")]
    patch.undo()
    check()


def test_packing_that_raises_fails_its_request_only(pair: Stepped, patch: pytest.MonkeyPatch) -> None:
    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pack = pair.link_of("p").packing.pack

    def broken(pages, block, tokens, out):
        if block.layer_start == 1 and "a" in pair.p.requests and pages == pair.p.requests["a"].pages:
            raise RuntimeError("no pack")
        return pack(pages, block, tokens, out)

    patch.setattr(pair.link_of("p").packing, "pack", broken)
    pair.until_ended("a")
    assert pair.ends["a"] == [Failed("a", "RuntimeError: no pack", retry=True)]
    patch.undo()
    check()
    assert len(next(iter(pair.p._sender._links.values())).credits) == pair.arena.num_staging_slots


def test_a_corrupt_payload_fails_its_request_only(pair: Stepped, patch: pytest.MonkeyPatch) -> None:
    """One bit flips in shared memory between P's checksum and D's."""
    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    push_one = pair.p._push_one

    def corrupt(push, link):
        push_one(push, link)
        if push.request_id == "a" and push.block.layers == (2, 3):
            pair.arena.staging_slot(push.staging_slot)[5] ^= 1

    patch.setattr(pair.p, "_push_one", corrupt)
    pair.until_ended("a")
    patch.undo()
    (failed,) = pair.ends["a"]
    assert isinstance(failed, Failed) and "CRC32C" in failed.message and failed.retry
    check()


def test_kv_that_differs_is_found_by_digest(pair: Stepped, patch: pytest.MonkeyPatch) -> None:
    """D unpacks into the wrong place: every checksum holds, the digests do not."""
    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    unpack = pair.link_of("d").packing.unpack

    def misplaced(chunk, pages, staging, **shared):
        return unpack(chunk, pages[::-1] if chunk.request_id == "a" else pages, staging, **shared)

    patch.setattr(pair.link_of("d").packing, "unpack", misplaced)
    pair.until_ended("a")
    patch.undo()
    assert pair.reported("kv_verify", "a")[0].args["equal"] == 0
    assert [type(end) for end in pair.ends["a"]] == [Failed]
    check()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "request_id", "message"),
    [
        (prompt_of(500), 20, "a", "context has 512"),
        (prompt_of(200), 60, "a", "needs 65 pages, D has 64"),
        ([5, 320], 2, "a", "token ids in [0, 320)"),
        ([5, -1], 2, "a", "token ids in [0, 320)"),
        ([], 2, "a", "at least one prompt token"),
        ([5], 0, "a", "max_tokens >= 1"),
        ([5], 2, "../a", "request id"),
    ],
)
def test_a_request_that_can_never_run_fails_at_once(
    pair: Stepped, prompt: list[int], max_tokens: int, request_id: str, message: str
) -> None:
    check = bystander(pair)
    pair.submit(request_id, prompt, max_tokens)
    pair.until_ended(request_id)
    check()
    assert all(isinstance(end, Failed) and not end.retry for end in pair.ends[request_id])
    assert message in pair.ends[request_id][0].message


def test_more_than_fits_waits_its_turn(pair: Stepped) -> None:
    """20 requests of 10 pages in a pool of 64, at most 8 of them queued: the rest is refused."""
    ids = [f"r{i}" for i in range(20)]
    for i, request_id in enumerate(ids):
        pair.submit(request_id, prompt_of(34, salt=i), MAX_TOKENS)
    pair.until_ended(*ids)
    pair.until(pair.pages_free)
    failed = [i for i in ids if isinstance(pair.ends[i][0], Failed)]
    assert len(failed) == 20 - 6 - 8
    assert all("are waiting for pages" in pair.ends[i][0].message for i in failed)
    assert all(len(pair.output(i)) == MAX_TOKENS for i in ids if i not in failed)


def test_prefill_that_never_comes_runs_into_the_deadline(model: str) -> None:
    pair = Stepped(config_of(model, handoff_timeout_ms=100))
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.turn_d()
    time.sleep(0.101)
    pair.turn_d()
    assert "nothing came from P within 100 ms" in pair.ends["a"][0].message and pair.ends["a"][0].retry
    pair.until(pair.pages_free)


def test_chunks_that_nobody_takes_run_into_the_deadline(model: str) -> None:
    pair = Stepped(config_of(model, handoff_timeout_ms=50))
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.turn_d()
    while "a" not in pair.p.requests or pair.p.step():  # more chunks than slots
        pair.turn_p()
    time.sleep(0.051)
    pair.turn_p()
    assert "nothing moved between P and D within 50 ms" in pair.ends["a"][0].message
    pair.until(pair.pages_free)


def test_d_alone_gives_the_same_tokens(pair: Stepped) -> None:
    """Prompts that D computes itself, in a batch with one that P does, and with one that goes on after some tokens."""
    sampling = Sampling(temperature=1.0, seed=3)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS, sampling=sampling)
    pair.until_ended("a")
    output = pair.output("a")
    pair.submit("b", prompt_of(PROMPT_LEN), MAX_TOKENS, sampling=sampling)
    pair.submit("alone", prompt_of(PROMPT_LEN), MAX_TOKENS, sampling=sampling, local=True)
    for done in (1, 4, 5):
        rest = MAX_TOKENS - done
        pair.submit(f"after{done}", prompt_of(PROMPT_LEN) + output[:done], rest, sampling=sampling, local=True)
    pair.until_ended("b", "alone", "after1", "after4", "after5")
    assert pair.output("b") == pair.output("alone") == output
    for done in (1, 4, 5):
        assert pair.output(f"after{done}") == output[done:]
        assert pair.ends[f"after{done}"] == [Finished(f"after{done}", "length", MAX_TOKENS - done)]
    pair.until(pair.pages_free)


@pytest.mark.parametrize("num_turns", range(6))
def test_cancel_of_what_d_computes_itself(pair: Stepped, num_turns: int) -> None:
    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS, local=True)
    pair.turns(num_turns)
    pair.cancel("a")
    pair.until_ended("a")
    assert pair.ends["a"][0].reason == "cancelled"
    check()


def test_a_request_of_another_link_is_dropped_in_silence(pair: Stepped) -> None:
    check = bystander(pair)
    pair.link += 1
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.link -= 1
    check()
    assert not pair.ends["a"] and not pair.tokens["a"]


@pytest.mark.parametrize("num_turns", range(10))
@pytest.mark.parametrize("side", ["p", "d"])
def test_a_link_lost_after_any_number_of_turns(pair: Stepped, side: str, num_turns: int) -> None:
    """D ends it well or both drop it; no page is lost, and the next link serves."""
    pair.submit("lone", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.until_ended("lone")
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.turns(num_turns)
    pair.drop(side)
    pair.until(lambda: len(pair.unlinked) == 2)
    pair.until(pair.pages_free)
    assert pair.ends["a"] in ([], [Finished("a", "length", MAX_TOKENS)])
    if not pair.ends["a"]:
        assert set(pair.tokens["a"]) <= {0}
    pair.pair()
    pair.submit("next", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.until_ended("next")
    assert pair.output("next") == pair.output("lone")
    pair.until(pair.pages_free)


@pytest.mark.parametrize("side", ["p", "d"])
def test_a_forward_beats_behind_every_layer(pair: Stepped, side: str, patch: pytest.MonkeyPatch) -> None:
    import pagewire.serve.worker.worker as worker

    patch.setattr(worker, "REPORT_US", 0)
    patch.setattr(worker, "BEAT_US", 0)
    role = {"p": "prefill", "d": "decode"}[side]
    model = getattr(pair, side).engine.model
    forward, told = model.forward, []

    def watched(*args, on_layer, **kwargs):
        def watch(layer: int) -> None:
            on_layer(layer)
            pair.poll()
            told[-1].append(pair.gauges[role].progress)

        told.append([])
        return forward(*args, on_layer=watch, **kwargs)

    patch.setattr(model, "forward", watched)
    pair.submit("a", prompt_of(5), 3)
    pair.until_ended("a")
    assert len(told) == (1 if side == "p" else 2)  # forwards
    for first, second, third in told:
        assert first < second < third


def test_p_holds_few_frames_during_a_forward(pair: Stepped, patch: pytest.MonkeyPatch) -> None:
    """The rest waits in the socket; what was held is looked at behind the forward."""
    patch.setattr(prefill, "MAX_HELD_FRAMES", 64)
    on_layer, held = pair.p.on_layer, []

    def flooded(layer: int, chunks: list) -> None:
        for _ in range(100):
            pair.link_of("d").transport.send(Abort("nobody", 99, "flood"))
        on_layer(layer, chunks)
        held.append(len(pair.p._frames))

    patch.setattr(pair.p, "on_layer", flooded)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.until_ended("a")
    assert held[:3] == [64, 64, 64]
    pair.until(pair.pages_free)


def test_what_a_front_does_not_read_is_bounded(pair: Stepped) -> None:
    """Events are the newest ones and say how many older ones are lost; no message comes near a frame's limit."""
    front = pair.d.front
    sizes = []
    while not front.wants_write:  # until the socket is full
        pair.d.timeline.add("filler", 0, 0, "r" * 128, text="x" * 10_000)
        pair.d._reported_us = 0
        pair.d.report()
    for i in range(10_000):
        pair.d.timeline.add("event", i, i, text="x" * 10_000)
        pair.d._reported_us = 0
        pair.d.report()
        sizes.append(front.num_unsent)
    assert sizes[0] == sizes[-1] < 1 << 20 and len(pair.d.timeline) == timeline.MAX_EVENTS
    pair.until(lambda: len(pair.named("event")) == timeline.MAX_EVENTS)
    assert pair.named("event")[-1].start_us == 9_999
    assert sum(event.args["count"] for event in pair.named("events_dropped")) > 5_000


SCALED = 16 + 4  # bytes of a row of 16 values with its scale


@pytest.mark.parametrize(
    ("of_p", "of_d", "row_bytes"),
    [
        ({}, {"kv_wire_dtype": "bfloat16"}, 2 * 16),
        ({}, {"kv_wire_dtype": "int8"}, SCALED),
        ({"kv_dtype": "float8_e4m3fn"}, {"kv_dtype": "float8_e4m3fn"}, SCALED),
        ({}, {"kv_dtype": "float8_e5m2"}, SCALED),  # D's is the narrower cache
        ({"kv_dtype": "int8"}, {"kv_dtype": "float8_e4m3fn"}, SCALED),
        ({"kv_dtype": "int8", "kv_wire_dtype": "float16"}, {}, 2 * 16),
        ({"kv_dtype": "int8"}, {"kv_dtype": "int8", "kv_wire_dtype": "bfloat16"}, 2 * 16),
    ],
    ids=str,
)
def test_any_cache_over_any_wire_to_any_cache(model: str, of_p: dict, of_d: dict, row_bytes: int) -> None:
    """The digests are of D's cache, so they are equal bit by bit whatever was lost on the way."""
    pair = Stepped(config_of(model, **of_p), config_of(model, **of_d))
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.until_ended("a")
    assert pair.ends["a"] == [Finished("a", "length", MAX_TOKENS)]
    (transfer,) = pair.reported("transfer_total", "a")
    padding = transfer.args["bytes"] - PROMPT_LEN * 2 * 3 * 2 * row_bytes
    assert 0 <= padding < 16 * 16  # of chunks, in front of their scales
    assert pair.reported("kv_verify", "a")[0].args["equal"] == 1
    if "float8_e4m3fn" in of_p.values():
        assert pair.d.engine.cache.k[0].dtype == torch.float8_e4m3fn


def test_a_frame_that_is_not_the_peers_to_send_changes_nothing(pair: Stepped) -> None:
    """One of another reservation and one only D sends, between the chunks of a request."""
    from pagewire.transfer.frames import Ack, Commit

    check = bystander(pair)
    pair.submit("a", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.until(lambda: "a" in pair.p.requests)
    for frame in (Ack("a", 1), Commit("a", 99, b"?" * 16, 5, b"h" * 32, ())):
        pair.link_of("p").transport.send(frame)
    pair.until_ended("a")
    assert pair.ends["a"] == [Finished("a", "length", MAX_TOKENS)]
    check()
    pair.until(lambda: len(pair.named("refused")) == 2)
    reasons = [str(event.args["reason"]) for event in pair.named("refused")]
    for reason, word in zip(reasons, ("Ack", "not receiving"), strict=True):
        assert word in reason


@pytest.mark.parametrize("noise", [b"", b"PWKV" + b"\xff" * 90])
def test_bytes_that_are_no_frame_end_the_link_and_the_next_one_works(pair: Stepped, noise: bytes) -> None:
    """What D runs goes on; what is on its way is dropped on both sides, without an answer: the front makes it anew."""
    pair.submit("lone", prompt_of(9, salt=5), MAX_TOKENS)
    pair.until_ended("lone")
    pair.submit("running", prompt_of(9, salt=5), MAX_TOKENS)
    pair.until(lambda: 1 in pair.tokens["running"])
    pair.submit("coming", prompt_of(PROMPT_LEN), MAX_TOKENS)
    pair.until(lambda: "coming" in pair.p.requests)
    Channel(pair.link_of("p").transport._sock, Codec(bytes, bytes), name="raw").send(noise)
    pair.until(lambda: len(pair.unlinked) == 2)
    assert {role for role, _ in pair.unlinked} == {"prefill", "decode"}
    assert any("cannot be read" in unlinked.reason for _, unlinked in pair.unlinked)
    pair.submit("too late", prompt_of(9), MAX_TOKENS)
    pair.until_ended("running")
    assert pair.output("running") == pair.output("lone")
    pair.until(pair.pages_free)
    pair.pair()
    pair.submit("next", prompt_of(9, salt=5), MAX_TOKENS)
    pair.until_ended("next")
    assert pair.output("next") == pair.output("lone")
    assert not pair.ends["coming"] and not pair.ends["too late"]
    pair.until(pair.pages_free)
