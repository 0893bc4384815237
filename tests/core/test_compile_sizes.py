"""Under torch.compile every op compiles once, whatever the batch, the rows, the slots and the sizes asked for."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pagewire as pw
from pagewire.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

SIZES = range(17, 29)  # more than the limit of eight, and no dim of the fixed tensors: equal ones are taken for one
CACHE = torch.randn(8, 4, 2, 16)
WRITTEN = CACHE.clone(), CACHE.clone()
TABLE = torch.arange(6, dtype=torch.int32).view(1, 6)
LENS = torch.tensor([20], dtype=torch.int32)


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 4, 16)


def offsets(n: int) -> torch.Tensor:
    return torch.tensor([0, n], dtype=torch.int32)


def cache() -> pw.PagedKVCache:
    tensors = [torch.zeros(9, 4, 2, 8, dtype=torch.int8) for _ in range(4)]
    scales = [torch.ones(9, 4, 2) for _ in range(4)]
    return pw.PagedKVCache(tensors[:2], tensors[2:], k_scales=scales[:2], v_scales=scales[2:])


def pack(slots, packs=cache()):  # noqa: B008
    packed = pw.pack_kv(packs, slots, backend="cpu")
    pw.unpack_kv(packed, packs, slots, backend="cpu")
    return packed.buffer


TABLES = (CACHE, CACHE, TABLE, LENS)
CALLS = {
    "decode": (
        lambda q, t, n: pw.decode(q, CACHE, CACHE, t, n, backend="cpu"),
        lambda m: (rows(m), TABLE.expand(m, 6), LENS.expand(m)),
    ),
    "decode split_size": (
        lambda q, size: pw.decode(q, *TABLES, split_size=size, backend="cpu"),
        lambda m: (rows(1), m),
    ),
    "decode window": (
        lambda q, left: pw.decode(q, *TABLES, window_size=(left, -1), backend="cpu"),
        lambda m: (rows(1), m),
    ),
    "prefill max_q_len": (
        lambda q, c, m: pw.prefill(q, *TABLES, c, max_q_len=m, backend="cpu"),
        lambda m: (rows(m), offsets(m), m),
    ),
    "append_kv": (
        lambda k, s: pw.append_kv(k, k, *WRITTEN, s, backend="cpu"),
        lambda m: (torch.randn(m, 2, 16), torch.arange(m)),
    ),
    "merge_state": (lambda o, s: pw.merge_state(o, s, o, s, backend="cpu")[0], lambda m: (rows(m), torch.zeros(m, 4))),
    "merge_states": (
        lambda o, s: pw.merge_states(o, s, backend="cpu")[0],
        lambda m: (torch.randn(m, 3, 4, 16), torch.zeros(m, 3, 4)),
    ),
    "pack_kv, unpack_kv": (pack, lambda m: (torch.arange(m),)),
    "flash_attn_with_kvcache": (
        lambda q: flash_attn_with_kvcache(q, CACHE, CACHE, cache_seqlens=LENS, block_table=TABLE, causal=True),
        lambda m: (rows(m)[None],),
    ),
    "flash_attn_varlen_func": (
        lambda q, c, m: flash_attn_varlen_func(
            q, CACHE, CACHE, c, max_seqlen_q=m, seqused_k=LENS, block_table=TABLE, causal=True
        ),
        lambda m: (rows(m), offsets(m), m),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_compilation_for_all_sizes(name):
    call, arguments = CALLS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        torch.manual_seed(size)
        args = arguments(size)
        got, expected = compiled(*args), call(*args)
        if expected is not None:
            assert torch.equal(got, expected), f"size {size}"
    assert counter.frame_count == 1


def test_marked_dynamic():
    torch._dynamo.reset()
    q, slots = rows(17), torch.arange(17)
    for x in (q, slots):
        torch._dynamo.mark_dynamic(x, 0)
    cu = offsets(17)

    def step(q, slots):
        out = pw.prefill(q, *TABLES, cu, max_q_len=q.shape[0], split_size=q.shape[0], backend="cpu")
        pw.append_kv(q[:, :2], q[:, 2:], *WRITTEN, slots, backend="cpu")
        return out

    got = torch.compile(step, backend="aot_eager", fullgraph=True)(q, slots)
    assert torch.equal(got, step(q, slots))


def test_unbounded_sizes_pass_through_a_torch_op():
    """2 ** 63 and more is no int64."""
    torch._dynamo.reset()

    def call(q):
        return pw.decode(q, *TABLES, window_size=(2**63, 2**70), split_size=2**64, softmax_scale=None, backend="cpu")

    q = rows(1)
    expected = pw.decode(q, *TABLES, backend="cpu")
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(q), expected)


def test_values_within_keys_travel_with_their_scale():
    """A cache whose V is a view of K, made outside the compiled function."""
    torch._dynamo.reset()

    def made():
        t = torch.zeros(2, 4, 1, 24, dtype=torch.int8)
        scales = torch.full((2, 4, 1), 0.25), torch.full((2, 4, 1), 0.25)
        return pw.PagedKVCache([t], [t[..., :16]], k_scales=scales[:1], v_scales=scales[1:])

    a, b, slots = made(), made(), torch.tensor([1, 2, 6])
    for scale in (b.k_scale[0], b.v_scale[0]):
        scale.fill_(1.0)

    def move(slots):
        pw.unpack_kv(pw.pack_kv(a, slots, backend="cpu"), b, slots, backend="cpu")

    torch.compile(move, backend="aot_eager", fullgraph=True)(slots)
    for scale in (b.k_scale[0], b.v_scale[0]):
        assert (scale.view(-1)[slots] == 0.25).all()


def test_a_cache_made_inside_hides_what_it_shares():
    """Its addresses cannot be seen there: V would be packed and unpacked on its own, over K's bytes."""
    torch._dynamo.reset()
    t = torch.zeros(2, 4, 1, 24)

    def move(t, slots):
        cache = pw.PagedKVCache([t], [t[..., :16]])
        pw.unpack_kv(pw.pack_kv(cache, slots, backend="cpu"), cache, slots, backend="cpu")

    with pytest.raises(ValueError, match="shares_kv=True"):
        torch.compile(move, backend="aot_eager", fullgraph=True)(t, torch.arange(3))
