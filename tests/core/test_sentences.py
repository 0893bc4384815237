"""Arguments of the wrong kind: one sentence with the argument's name, what was expected and what came."""

import re

import numpy as np
import pytest
import torch

import cases
import pagewire as pw
from pagewire.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

DECODE = cases.Attention((20, 9), head_dim=16)
PREFILL = cases.Attention((20, 9), (6, 9), head_dim=16)
INT8 = cases.Attention((20, 9), (6, 9), head_dim=16, kv_dtype=torch.int8, scale="float")


def kind_of(value) -> str:
    return value if isinstance(value, str) else type(value).__name__


def sentence(error: pytest.ExceptionInfo, name: str) -> None:
    said = str(error.value)
    assert said.startswith(f"{name}:") and "expected" in said and ", got" in said, said
    assert "\n" not in said and "'?'" not in said and len(said) < 400, said


# ------------------------------------------------------------------------------------ numbers


NUMBERS = {
    "np.float32": np.float32, "np.float64": np.float64, "np.float16": np.float16, "0-d": torch.tensor,
    "0-d double": lambda x: torch.tensor(x, dtype=torch.float64), "1 element": lambda x: torch.tensor([x]),
}  # fmt: skip
INTEGERS = {
    "np.int64": np.int64, "np.int32": np.int32, "np.uint8": np.uint8, "0-d": torch.tensor,
    "0-d int32": lambda x: torch.tensor(x, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_is_a_number_wherever_it_comes_from(kind, backend):
    n = NUMBERS[kind]
    call = cases.build(INT8, backend=backend)
    plain = {"softmax_scale": 0.25, "softcap": 2.0}
    given = {name: n(value) for name, value in plain.items()}
    if kind != "1 element":  # that is a scale per head, of another number of heads
        plain |= {"k_scale": 0.5, "v_scale": 0.125}
        given |= {"k_scale": n(0.5), "v_scale": n(0.125)}
    for a, b in zip(call.run(backend, **given), call.run(backend, **plain), strict=True):
        torch.testing.assert_close(a, b)
    k = torch.randn(2, 2, 16)
    if kind != "1 element":
        caches = [torch.zeros(2, 4, 2, 16, dtype=torch.int8) for _ in range(4)]
        for s, c in ((n(0.5), caches[:2]), (0.5, caches[2:])):
            pw.append_kv(k, k, *c, torch.tensor([1, 2]), k_scale=s, v_scale=s, backend=backend)
        assert torch.equal(caches[0], caches[2])


@pytest.mark.parametrize("kind", INTEGERS)
def test_an_integer_is_an_integer_wherever_it_comes_from(kind, backend):
    n = INTEGERS[kind]
    call = cases.build(PREFILL, backend=backend)
    plain = {"window_size": (5, 2), "split_size": 8, "max_q_len": 9}
    expected = call.run(backend, **plain)
    for window in ((n(5), n(2)), [n(5), 2], np.array([5, 2]), torch.tensor([5, 2])):
        got = call.run(backend, window_size=window, split_size=n(8), max_q_len=n(9), causal=np.bool_(True))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    cache = pw.PagedKVCache.allocate(
        num_layers=n(2), num_pages=n(3), page_size=n(4), num_kv_heads=n(2), head_dim=n(8), dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    assert cache.geometry.num_slots == 12 and type(cache.geometry.page_size) is int
    packed = pw.pack_kv(cache, torch.tensor([1]), layers=(n(0), n(1)), heads=[n(1), n(2)], backend=backend)
    assert packed.k.shape == (1, 1, 1, 8)
    assert pw.packed_shape(cache, n(5)).num_tokens == 5
    assert pw.page_slots(torch.tensor([1, 2]), n(1), n(3), page_size=n(4)).tolist() == [5, 6]


WRONG = {
    "softmax_scale": ["0.5", [0.5], torch.ones(2), 1j, float("inf"), 1e39, object()],
    "softcap": ["1", [1.0], None, torch.ones(2), float("nan"), -1.0, 1e39],
    "window_size": [3, None, (1,), (1, 2, 3), (1.5, 0), ("1", 2), (None, 0), slice(0, 2), {1, 2}, torch.ones(2)],
    "split_size": [8.0, "8", [8], 0, -(2**70), torch.tensor(8.0), (8,)],
    "max_q_len": [9.0, "9", [9], 0, np.float32(9)],
    "causal": ["yes", None, 2, [True], torch.tensor([1, 0])],
    "k_scale": ["1", [1.0], 0.0, -1.0, float("nan"), 1e39, 1e-45, object()],
    "v_scale": [{}, (1.0, 1.0), np.float32(-1)],
    "alibi_slopes": [[1.0] * 4, 1.0, torch.tensor(1.0), torch.ones(4).half(), np.ones(4)],
    "sinks": [[1.0] * 4, 1.0, torch.tensor(1.0), np.ones(4)],
    "layout": [None, 0, "nhd", ["NHD"]],
    "out": [[1.0], 3, np.ones(4), torch.tensor(1.0)],
    "lse": [[1.0], 3, torch.tensor(1.0)],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG.items() for v in values], ids=kind_of)
def test_keyword(name, value):
    call = cases.build(INT8)
    with pytest.raises((TypeError, ValueError)) as error:
        call.run("reference", **{name: value})
    sentence(error, name)


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("value", [None, 1, [[1.0]], "q", np.ones((2, 4, 16)), torch.tensor(1.0)], ids=kind_of)
def test_tensor_of_attention(op, position, value):
    call = cases.build(DECODE if op == "decode" else PREFILL)
    if position >= len(call.args):
        pytest.skip("decode has no offsets")
    args = list(call.args)
    args[position] = value
    names = ("q", "k_cache", "v_cache", "page_table", "seq_lens", "cu_seqlens_q")
    with pytest.raises((TypeError, ValueError)) as error:
        getattr(pw, op)(*args, **({} if op == "decode" else {"causal": True}))
    sentence(error, names[position])


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("value", [None, 1, [[1.0]], np.ones(3), torch.tensor(1.0)], ids=kind_of)
def test_tensor_of_append(position, value):
    k = torch.randn(2, 2, 16)
    args = [k, k, torch.zeros(2, 4, 2, 16), torch.zeros(2, 4, 2, 16), torch.tensor([1, 2])]
    args[position] = value
    with pytest.raises((TypeError, ValueError)) as error:
        pw.append_kv(*args)
    sentence(error, ("k", "v", "k_cache", "v_cache", "slot_mapping")[position])


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [None, 1, [[1.0]], np.ones(3), torch.tensor(1.0)], ids=kind_of)
def test_tensor_of_merge(position, value):
    outs, lses = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4)
    args = [outs[0], lses[0], outs[1], lses[1]]
    args[position] = value
    with pytest.raises((TypeError, ValueError)) as error:
        pw.merge_state(*args)
    sentence(error, ("out_a", "lse_a", "out_b", "lse_b")[position])
    if position < 2:
        args = [outs, lses]
        args[position] = value
        with pytest.raises((TypeError, ValueError)) as error:
            pw.merge_states(*args)
        sentence(error, ("outs", "lses")[position])


# ---------------------------------------------------------------------------------------- pack


def small():
    return pw.PagedKVCache([torch.zeros(2, 4, 2, 8)], [torch.zeros(2, 4, 2, 8)])


PACK = {
    "cache": [None, 3, [torch.zeros(2, 4, 2, 8)], torch.zeros(2, 4, 2, 8)],
    "slots": [None, [1, 2], 3, torch.tensor(1), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), slice(0, 2)],
    "layers": [slice(0, 1), range(0, 1), 1, (0,), (0, 1, 1), (0.0, 1), "01", (0, 2**70), (1, 0), (-1, 1)],
    "heads": [slice(0, 2), range(0, 2), 2, (0, 3), (None, 1), [0, "1"]],
    "dtype": [8, "float32", torch.int32, torch.complex64, float],
    "out": [3, [1, 2], np.zeros(64, dtype=np.uint8)],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in PACK.items() for v in values], ids=kind_of)
def test_pack(name, value):
    keywords = {"cache": small(), "slots": torch.tensor([1, 2]), name: value}
    with pytest.raises((TypeError, ValueError)) as error:
        pw.pack_kv(**keywords)
    sentence(error, name)
    if name in ("cache", "slots", "layers", "heads"):
        packed = pw.pack_kv(small(), torch.tensor([1, 2]))
        with pytest.raises((TypeError, ValueError)) as error:
            pw.unpack_kv(packed=packed, **keywords)
        sentence(error, name)


@pytest.mark.parametrize("value", [None, 3, torch.zeros(64, dtype=torch.uint8), b"x"], ids=kind_of)
def test_unpack_of_what_was_not_packed(value):
    with pytest.raises(TypeError) as error:
        pw.unpack_kv(value, small(), torch.tensor([1]))
    sentence(error, "packed")


def test_a_buffer_that_is_none():
    shape = pw.packed_shape(small(), 2)
    for buffer, said in ((None, shape), (torch.zeros(512, dtype=torch.uint8), (1, 2)), ([1], shape)):
        with pytest.raises(TypeError, match="packed buffer: expected a uint8 tensor and a PackedShape, got"):
            pw.PackedKV.wrap(buffer, said)


@pytest.mark.parametrize("name", ["k_caches", "v_caches", "k_scales", "v_scales"])
@pytest.mark.parametrize("value", [3, [1, 2], [], "ab", [np.zeros((2, 4, 2, 8))], [None, 1]], ids=kind_of)
def test_cache_of_no_tensors(name, value):
    t = [torch.zeros(2, 4, 2, 8, dtype=torch.int8) for _ in range(2)]
    s = [torch.ones(2) for _ in range(2)]
    keywords = {"k_caches": t[:1], "v_caches": t[1:], "k_scales": s[:1], "v_scales": s[1:], name: value}
    with pytest.raises(TypeError) as error:
        pw.PagedKVCache(**keywords)
    sentence(error, name)


@pytest.mark.parametrize("name", ["num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim", "head_dim_v"])
@pytest.mark.parametrize("value", [2.0, "2", [2], 0, -1], ids=kind_of)
def test_allocate(name, value):
    keywords = dict.fromkeys(["num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim"], 2)
    with pytest.raises((TypeError, ValueError), match=re.escape(f"{name}: expected")):
        pw.PagedKVCache.allocate(**{**keywords, name: value}, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", ["float16", 5, torch.int64, None], ids=kind_of)
def test_allocate_dtype(dtype):
    keywords = dict.fromkeys(["num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim"], 2)
    with pytest.raises(TypeError) as error:
        pw.PagedKVCache.allocate(**keywords, dtype=dtype, device="cpu")
    sentence(error, "dtype")


@pytest.mark.parametrize("backend_name", [3, ["cpu"], torch.float32], ids=kind_of)
def test_backend(backend_name):
    call = cases.build(DECODE)
    with pytest.raises(TypeError) as error:
        pw.decode(*call.args, backend=backend_name)
    sentence(error, "backend")


# ------------------------------------------------------------------------------------- drop-in


DROP_IN = {
    "q": [None, [1.0], torch.tensor(1.0)],
    "k_cache": [None, [1.0]],
    "cache_seqlens": ["5", 5.0, [5], -1, 2**40],
    "cu_seqlens_q": [[0, 2], 3, torch.tensor(1, dtype=torch.int32)],
    "block_table": [[[0]], 3],
    "num_splits": [1.5, "1", -1],
    "window_size": [(1, 2, 3), 5, (1.5, None), "ab"],
    "softcap": ["1", None],
    "max_seqlen_q": [2.5, "2"],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in DROP_IN.items() for v in values], ids=kind_of)
def test_drop_in(name, value):
    keywords = {
        "q": torch.randn(2, 4, 16), "k_cache": torch.randn(4, 4, 2, 16), "v_cache": torch.randn(4, 4, 2, 16),
        "block_table": torch.tensor([[0, 1, 2]], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 2], dtype=torch.int32), "max_seqlen_q": 2, "cache_seqlens": 5, name: value,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError)) as error:
        flash_attn_with_kvcache(**keywords)
    sentence(error, name)


def test_drop_in_takes_numbers_from_anywhere():
    q, k = torch.randn(5, 4, 16), torch.randn(4, 4, 2, 16)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    cu, lens = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([8, 5], dtype=torch.int32)
    expected = flash_attn_varlen_func(q, k, k, cu, max_seqlen_q=3, seqused_k=lens, block_table=table, causal=True)
    for n in (torch.tensor, np.int64, np.int32):
        got = flash_attn_varlen_func(
            q, k, k, cu, max_seqlen_q=n(3), seqused_k=lens, block_table=table, causal=True, num_splits=n(0),
            window_size=(n(-1), None), softcap=np.float32(0),
        )  # fmt: skip
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name, value", [("q", [1.0]), ("k", None), ("seqused_k", [5]), ("max_seqlen_k", 2.5)])
def test_varlen(name, value):
    k = torch.randn(9, 2, 16)
    keywords = {
        "q": torch.randn(2, 2, 16), "k": k, "v": k, "cu_seqlens_q": torch.tensor([0, 2], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 9], dtype=torch.int32), "max_seqlen_q": 2, "max_seqlen_k": 9, name: value,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError)) as error:
        flash_attn_varlen_func(**keywords)
    sentence(error, name)
