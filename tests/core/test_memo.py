"""Remembered checks: the same verdicts and the same sentences as checks done every time, and nothing kept alive."""

import gc
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pagewire as pw
from pagewire import memo, native, registry
from pagewire.types import Modifiers

bf16, fp16, fp32, int32, int64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
e4m3, int8 = torch.float8_e4m3fn, torch.int8
CALLS = 10_000


class Sub(torch.Tensor):
    pass


@pytest.fixture
def reached(monkeypatch):
    """What the backend was handed, call by call; it does nothing."""
    seen: list = []
    ops = {op: (lambda *arguments, op=op: seen.append((op, arguments))) for op in registry.METHODS}
    monkeypatch.setattr(registry, "_load", lambda module: SimpleNamespace(**ops))
    registry._choose.cache_clear()
    memo.forget()
    yield seen
    registry._choose.cache_clear()
    memo.forget()


def attention(ragged: bool, **more):
    call = {
        "q": torch.zeros(2, 4, 16, dtype=bf16), "k_cache": torch.zeros(3, 4, 2, 16, dtype=bf16),
        "v_cache": torch.zeros(3, 4, 2, 16, dtype=bf16), "page_table": torch.zeros(2, 2, dtype=int32),
        "seq_lens": torch.zeros(2, dtype=int32),
    }  # fmt: skip
    if ragged:
        call["cu_seqlens_q"] = torch.zeros(3, dtype=int32)
    return call | more


def append(**more):
    call = {name: torch.zeros(2, 2, 16, dtype=bf16) for name in "kv"}
    call |= {f"{name}_cache": torch.zeros(3, 4, 2, 16, dtype=bf16) for name in "kv"}
    return call | {"slot_mapping": torch.arange(2)} | more


def merge(**more):
    call = {f"{what}_{of}": torch.zeros(2, 4, *w) for of in "ab" for what, w in (("out", (16,)), ("lse", ()))}
    return call | more


def fp8(call):
    caches = {name: call[name].to(e4m3) for name in ("k_cache", "v_cache")}
    return call | caches | {"k_scale": 0.5, "v_scale": 0.5}


GOOD = {
    "decode": [lambda: attention(False), lambda: fp8(attention(False))],
    "prefill": [lambda: attention(True), lambda: fp8(attention(True))],
    "append_kv": [append, lambda: fp8(append())],
    "merge_state": [merge],
    "merge_states": [lambda: {"outs": torch.zeros(2, 3, 4, 16), "lses": torch.zeros(2, 3, 4)}],
}
OTHERS = {
    "softmax_scale": [
        None,
        0.1,
        1,
        0.0,
        -0.0,
        -1.0,
        np.float32(0.1),
        torch.tensor(0.1),
        "x",
        float("nan"),
        1e300,
        True,
    ],
    "causal": [True, False, 1, 0, 1.0, np.bool_(True), "yes", None],
    "window_size": [(-1, -1), (3, 0), [3, 0], (3.0, 0), (True, 0), (3,), (3, 0, 1), "ab", None, torch.tensor([3, 0])],
    "softcap": [0, 0.0, 5, 5.0, -1.0, torch.tensor(5.0), torch.tensor(2.0), np.int64(5), None],
    "split_size": [None, 4, 4.0, 0, True, np.int32(4)],
    "max_q_len": [None, 2, 2.0, 0, 99],
    "layout": ["NHD", "HND", "nhd", None, 3],
    "alibi_slopes": [None, torch.zeros(4), torch.zeros(2, 4), torch.zeros(4, dtype=bf16), 1.0],
    "sinks": [None, torch.zeros(4), torch.zeros(5), 2.0],
    "out": [None, torch.zeros(2, 4, 16, dtype=bf16), torch.zeros(2, 4, 16), torch.zeros(2, 4, 8)],
    "lse": [None, torch.zeros(2, 4), torch.zeros(2, 4, dtype=fp16)],
    "backend": [None, "reference", "nobody", 3],
}
SCALES = [
    None, 0.5, 1, 0, -0.5, True, float("inf"), np.float32(0.5), torch.tensor(0.5), torch.tensor(2.0),
    torch.tensor(-2.0), torch.tensor(0.5, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64),
    torch.ones(2), torch.ones(3), torch.ones(2, 2), torch.ones(3, 4, 2), "x",
]  # fmt: skip
OTHERS |= {"k_scale": SCALES, "v_scale": SCALES}
ATTENTION = [name for name in OTHERS if name not in ("causal", "max_q_len")]
TAKES = {
    "decode": ATTENTION, "prefill": [*OTHERS], "append_kv": ["layout", "k_scale", "v_scale", "backend"],
    "merge_state": ["out", "lse", "backend"], "merge_states": ["out", "lse", "backend"],
}  # fmt: skip
SPOILED = [
    lambda x: x[:1], lambda x: x[..., :1], lambda x: x.unsqueeze(0), lambda x: x.to(fp16), lambda x: x.to(int64),
    lambda x: x.transpose(0, -1), lambda x: x.expand(2, *x.shape), lambda x: x.tolist(), lambda x: None,
    lambda x: x.as_subclass(Sub), lambda x: torch.nn.Parameter(x, requires_grad=False), lambda x: x.to("meta"),
    lambda x: x.contiguous().clone(), lambda x: x[..., ::2], lambda x: x[:0], lambda x: x.to(fp32).to_sparse(),
]  # fmt: skip


def random_call(rng: random.Random):
    op = rng.choice(list(GOOD))
    call = rng.choice(GOOD[op])()
    tensors = list(call)
    for name in rng.sample(TAKES[op], k=min(len(TAKES[op]), rng.choice((0, 0, 1, 1, 2)))):
        call[name] = rng.choice(OTHERS[name])
    if rng.random() < 0.3:
        name = rng.choice(tensors)
        if isinstance(call[name], torch.Tensor) and call[name].dim():
            call[name] = rng.choice(SPOILED)(call[name])
    if rng.random() < 0.1 and "out" in TAKES[op]:  # memory of its own, or not
        call["out"] = next(iter(call.values()))
    return op, call


def told(x):
    """Comparable: a tensor by identity and look, for it must be the caller's own or a new one alike."""
    if isinstance(x, torch.Tensor):
        return type(x).__name__, tuple(x.shape), x.dtype, str(x.device)
    if isinstance(x, tuple):
        return tuple(map(told, x))
    return type(x).__name__, repr(x)


def outcome(op, call, reached):
    reached.clear()
    try:
        result = getattr(pw, op)(**call)
    except Exception as error:
        return type(error).__name__, str(error)
    return told(result), [(name, told(arguments)) for name, arguments in reached]


KINDS = {"native": native.looker and native.looker.kind, "python": memo._kind}


@pytest.fixture(params=list(KINDS))
def kind(request, monkeypatch):
    """Both ways to tell kinds apart; one that is not to be had here is skipped."""
    if KINDS[request.param] is None:
        pytest.skip(f"pagewire._host is not built, or torch {torch.__version__} does not show tensors to C++")
    monkeypatch.setattr(memo, "kind", KINDS[request.param])
    return KINDS[request.param]


def test_the_verdicts_are_those_of_checks_done_every_time(reached, kind, monkeypatch):
    rng = random.Random(20261126)
    every_time = memo.once
    kinds = set()
    for _ in range(CALLS):
        op, call = random_call(rng)
        remembered = outcome(op, call, reached)
        monkeypatch.setattr(memo, "once", lambda of, check: check())
        assert outcome(op, call, reached) == remembered, (op, {k: told(v) for k, v in call.items()})
        monkeypatch.setattr(memo, "once", every_time)
        kinds.add(str(remembered)[:60])
    assert len(memo._found) > 100 and len(kinds) > 100  # it remembered some, and saw much


def test_kinds_that_differ_are_told_apart(kind):
    x = torch.zeros(4, 6, 8)
    mixed = [
        x, x[:2], x[..., :4], x.transpose(0, 1), x[:, ::2], x.half(), x.to(int32), x.to(int8), x.to(torch.uint8),
        x.view(torch.int32), x.to(e4m3), x.to(torch.float8_e5m2), x[0], x[0, 0, 0], x.flatten(), x[:0], x[:, :0],
        torch.empty(4, 6, 8, dtype=torch.uint4), torch.empty(4, 6, 8, dtype=torch.int4), None, True, False,
        1, 0, -1, 1.0, 0.5, "x", "", "1", 2**40, float("inf"),
    ]  # fmt: skip
    found = {kind("op", (value, x), ()) for value in mixed} | {kind("op", (x, value), ()) for value in mixed}
    assert None not in found and len(found) == 2 * len(mixed) - 3  # (x, x) twice; x as int32 twice on both sides
    numbers = [None, True, 1, 1.0, "1", "b'1'"]
    assert len({kind("op", (x,), (a, b)) for a in numbers for b in numbers}) == len(numbers) ** 2
    assert (
        len({kind(op, (), values) for op in ("a", "ab") for values in (("b",), ("", "b"), ("bb",), ("", "", "b"))}) == 8
    )


def test_equal_looks_are_one_kind(kind):
    a, b = torch.zeros(3, 5).half(), torch.ones(6, 5)[:3].half()
    assert kind("op", (a, None, 2.5), ("NHD", 3)) == kind("op", (b, None, 5 / 2), ("".join("NHD"), 6 // 2)) is not None


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2).to_sparse(),
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(2).as_subclass(Sub),
        np.float32(1),
        [1],
        1j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_more_than_its_look_has_no_kind(kind, value):
    assert kind("op", (value,), ()) is None
    assert kind("op", (), (torch.zeros(2) if isinstance(value, torch.Tensor) else value,)) is None


def test_what_bytes_do_not_hold_has_no_native_kind():
    native = KINDS["native"]
    if native is not None:
        assert native("op", (2**70,), ()) is None and native("op", (), ("\ud800",)) is None
        assert native("op", (torch.zeros(2, device="meta"),), ()) is None


def test_the_second_call_has_its_own_tensors(reached):
    slopes = [torch.zeros(4), torch.ones(4)]
    scales = [torch.full((2,), x) for x in (0.5, 2.0)]
    for i in range(2):
        pw.decode(**fp8(attention(False)) | {"alibi_slopes": slopes[i], "k_scale": scales[i]})
    modifiers = [next(x for x in arguments if isinstance(x, Modifiers)) for _, arguments in reached]
    assert [m.alibi_slopes is slopes[i] and m.k_scale is scales[i] for i, m in enumerate(modifiers)] == [True, True]
    assert modifiers[0].v_scale == modifiers[1].v_scale == 0.5


def test_a_number_in_a_tensor_is_read_every_time(reached):
    for value in (0.5, 2.0):
        pw.decode(**fp8(attention(False)) | {"k_scale": torch.tensor(value, dtype=torch.float64)})
    modifiers = [next(x for x in arguments if isinstance(x, Modifiers)) for _, arguments in reached]
    assert [m.k_scale for m in modifiers] == [0.5, 2.0]


def test_memory_is_looked_at_every_time(reached):
    call = attention(False)
    out = torch.zeros(2, 4, 16, dtype=bf16)
    pw.decode(**call, out=out)
    shared = call["k_cache"].view(-1)[: out.numel()].view_as(out)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        pw.decode(**call, out=shared)


def test_memory_of_every_result_is_looked_at_every_time(reached):
    call = attention(False) | {"sinks": torch.zeros(8)[:4]}
    own = {"out": torch.zeros(2, 4, 16, dtype=bf16), "lse": torch.zeros(2, 4), "return_lse": True}
    pw.decode(**call, **own)
    room = torch.zeros(8)
    for other in ({"sinks": room[4:]}, {"sinks": room[2:6]}):
        with pytest.raises(ValueError, match="lse: expected memory of its own, got a tensor that overlaps sinks"):
            pw.decode(**call | own | other | {"lse": room.view(2, 4)})
    with pytest.raises(ValueError, match="v_cache: expected memory of its own"):
        call = append()
        pw.append_kv(**call)
        room = torch.zeros(500, dtype=bf16)
        caches = {
            name: room[start : start + 384].view(3, 4, 2, 16) for name, start in (("k_cache", 0), ("v_cache", 100))
        }
        pw.append_kv(**call | caches)
    reached.clear()
    inside = {"v": call["v_cache"].view(-1)[:64].view(2, 2, 16)}  # new rows in the cache are read before it is written
    pw.append_kv(**call | inside)
    ((_, (movement, _)),) = reached
    assert movement.parts[0].rows is call["k"] and movement.parts[1].rows.data_ptr() != call["v_cache"].data_ptr()
    a, b = merge(), merge()
    pw.merge_state(**a, out=torch.zeros(2, 4, 16), lse=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="lse: expected memory of its own, got a tensor that overlaps out_b"):
        pw.merge_state(**b, out=torch.zeros(2, 4, 16), lse=b["out_b"].view(-1)[:8].view(2, 4))


def test_the_environment_is_looked_at_every_time(reached, monkeypatch):
    pw.decode(**attention(False))
    monkeypatch.setenv("PAGEWIRE_BACKEND", "nobody")
    with pytest.raises(pw.BackendError, match="nobody"):
        pw.decode(**attention(False))


def test_nothing_is_kept_alive(reached):
    call = fp8(attention(False)) | {"sinks": torch.zeros(4), "k_scale": torch.ones(2), "out": torch.zeros(2, 4, 16)}
    kept = [weakref.ref(x) for x in call.values() if isinstance(x, torch.Tensor)]
    pw.decode(**call)
    assert memo._found
    reached.clear()
    del call
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_kinds_are_forgotten_when_there_are_many(reached, monkeypatch):
    monkeypatch.setattr(memo, "_MOST", 3)
    for n in range(1, 9):
        pw.merge_states(torch.zeros(2, n, 4, 16), torch.zeros(2, n, 4))
        assert len(memo._found) <= 3
