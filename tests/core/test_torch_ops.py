"""The ops as torch ops: opcheck (schema, fakes, mutation), and torch.compile of the public functions."""

import pytest
import torch

import cases
import pagewire as pw
from pagewire.cache_part import CachePart
from pagewire.torch_ops import attention, pack
from pagewire.types import Options

ATTENTION = [
    cases.Attention((20, 9), head_dim=16),
    cases.Attention((20, 9), head_dim=16, layout="HND", sinks=True, alibi=1, kv_dtype=torch.int8, scale="head"),
    cases.Attention((20, 9), (4, 9), head_dim=16, head_dim_v=8, dtype=torch.bfloat16),
    cases.Attention((20, 9), (4, 9), head_dim=16, kv_dtype=torch.int8, scale="float", split_size=8),
]
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def flat(call: cases.Call) -> tuple:
    kw = dict(call.kwargs)
    layout = kw.pop("layout")
    rest = dict.fromkeys(Options._fields) | {"causal": False}
    return (*call.args, *attention._flatten(layout, Options(**(rest | kw)), "reference"))


@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: c.id)
def test_attention_opcheck(case):
    call = cases.build(case)
    for cache in call.args[1:3]:
        if cache.is_floating_point():
            cache.nan_to_num_()  # opcheck compares inputs before and after, and NaN != NaN
    packet = getattr(torch.ops.pagewire, call.op)
    torch.library.opcheck(packet.default, flat(call), test_utils=CHECKS)
    q, _, v_cache = call.args[:3]
    results = {"out": q.new_zeros(*q.shape[:-1], v_cache.shape[-1]), "lse": torch.zeros(q.shape[:-1])}
    torch.library.opcheck(packet.out, flat(call), results, test_utils=CHECKS)


def test_append_opcheck():
    k, cache = torch.randn(3, 2, 8), torch.zeros(2, 4, 2, 8)
    slots = torch.tensor([5, -1, 2])
    args = (k, k + 1, cache, cache.clone(), slots, "NHD", None, None, None, None, "reference")
    torch.library.opcheck(torch.ops.pagewire.append_kv.default, args, test_utils=CHECKS)
    cache8, scale = torch.zeros(2, 4, 2, 8, dtype=torch.int8), torch.ones(2, 4, 2)
    args = (k, k + 1, cache8, cache8.clone(), slots, "NHD", scale, None, scale.clone(), None, "reference")
    torch.library.opcheck(torch.ops.pagewire.append_kv.default, args, test_utils=CHECKS)


def test_merge_opcheck():
    outs, lses = torch.randn(3, 5, 2, 8), torch.randn(3, 5, 2)
    pair = (outs[0], lses[0], outs[1], lses[1], "reference")
    results = {"out": torch.zeros(5, 2, 8), "lse": torch.zeros(5, 2)}
    torch.library.opcheck(torch.ops.pagewire.merge_state.default, pair, test_utils=CHECKS)
    torch.library.opcheck(torch.ops.pagewire.merge_state.out, pair, results, test_utils=CHECKS)
    torch.library.opcheck(torch.ops.pagewire.merge_states.default, (outs, lses, "reference"), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.pagewire.merge_states.out, (outs, lses, "reference"), results, test_utils=CHECKS)


def test_pack_opcheck():
    cache = pw.PagedKVCache.allocate(
        num_layers=2, num_pages=3, page_size=4, num_kv_heads=2, head_dim=8, dtype=torch.int8, device="cpu", scale="head"
    )
    slots = torch.tensor([3, 9, 0])
    views = CachePart.of(cache, None, None).views
    packed = pw.pack_kv(cache, slots, backend="reference")
    shape = pack._flat(packed.shape)
    packet = torch.ops.pagewire.pack_kv
    packed.buffer.zero_()
    torch.library.opcheck(
        packet.default, (*views, slots, *shape, "reference"), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(
        packet.out, (*views, slots, *shape, "reference"), {"buffer": packed.buffer}, test_utils=CHECKS
    )
    unpack = torch.ops.pagewire.unpack_kv.default
    torch.library.opcheck(unpack, (packed.buffer, *views, slots, *shape, "reference"), test_utils=CHECKS)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_step_equals_eager(compiler):
    """append, decode, pack and unpack inside one full graph: mutation is seen, order is kept."""
    call = cases.build(cases.Attention((9, 16), head_dim=16, page_size=4))
    q, k_cache, v_cache, table, lens = call.args
    k, v = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    slots = torch.stack([pw.page_slots(table[b], int(lens[b]) - 1, int(lens[b]), 4)[0] for b in range(2)])

    def step(k_cache, v_cache):
        before = pw.decode(q, k_cache, v_cache, table, lens, backend="reference")
        pw.append_kv(k, v, k_cache, v_cache, slots, backend="reference")
        after, lse = pw.decode(q, k_cache, v_cache, table, lens, return_lse=True, backend="reference")
        out = torch.zeros_like(after)
        pw.decode(q, k_cache, v_cache, table, lens, out=out, backend="reference")
        return (before, after, lse, out, pw.merge_state(before, lse, after, lse, backend="reference")[0])

    eager_caches = (k_cache.clone(), v_cache.clone())
    expected = step(*eager_caches)
    compiled_caches = (k_cache.clone(), v_cache.clone())
    got = torch.compile(step, backend=compiler, fullgraph=True)(*compiled_caches)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(expected[0], expected[1])
    for a, b in zip(compiled_caches, eager_caches, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_compiled_pack_and_unpack():
    tensors = [torch.randn(3, 4, 2, 8) for _ in range(4)]
    slots, to = torch.tensor([3, 9, 0]), torch.tensor([1, 2, 11])

    def move(k0, k1, v0, v1):
        cache = pw.PagedKVCache([k0, k1], [v0, v1])
        packed = pw.pack_kv(cache, slots, heads=(0, 1), backend="reference")
        pw.unpack_kv(packed, cache, to, heads=(1, 2), backend="reference")
        return packed.k.clone()

    eager, compiled = [t.clone() for t in tensors], [t.clone() for t in tensors]
    expected = move(*eager)
    got = torch.compile(move, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(got, expected)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)
