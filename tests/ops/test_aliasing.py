"""Results that overlap an input, each other or themselves are right or refused: never half of each."""

import pytest
import torch

import cases
import pagewire as pw
from cases import Attention, fp16, int8

CALLS = {
    "decode": Attention((37, 9), dtype=fp16, head_dim=16),
    "split": Attention((90, 9), dtype=fp16, head_dim=16, split_size=16),
    "short": Attention((37, 9), (3, 9), dtype=fp16, head_dim=16, max_q_len=16),
    "mixed": Attention((200, 40), (1, 40), dtype=fp16, head_dim=16, heads=(2, 1)),
    "padded": Attention((37, 0), (3, 4), dtype=fp16, head_dim=16, max_q_len=16, padding_rows=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_out_may_be_q(name, backend, device):
    """Every row is read before it is written."""
    call = cases.build(CALLS[name], device, backend=backend)
    expected, expected_lse = call.run(backend)
    q = call.args[0]
    lse = torch.empty_like(expected_lse)
    call.run(backend, out=q, lse=lse)
    assert torch.equal(q, expected) and torch.equal(lse, expected_lse)


def overlapping(call, device):
    """(result, tensor, the input it overlaps) that are all refused."""
    q, k_cache, v_cache, table, lens = call.args[:5]
    rows, heads, width = q.shape
    wide = torch.zeros(rows + 2, heads, width, dtype=q.dtype, device=device)
    wide[:rows].copy_(q)
    call.args = (wide[:rows], *call.args[1:])
    yield "out", wide[1 : rows + 1], "q"
    yield "out", wide.flatten()[8 : 8 + q.numel()].view(q.shape), "q"
    yield "out", k_cache.flatten()[: q.numel()].view(q.shape), "k_cache"
    yield "out", v_cache.flatten()[-q.numel() :].view(q.shape), "v_cache"
    yield "lse", wide.view(torch.float32).flatten()[: rows * heads].view(rows, heads), "q"
    one = torch.zeros(1, heads, width, dtype=q.dtype, device=device)
    yield "out", one.expand(rows, heads, width), None
    yield "out", one.flatten()[:width].expand(rows, heads, width), None
    yield ("out", torch.zeros(4096, dtype=q.dtype, device=device).as_strided(q.shape, (8, 4, 1)), None)
    yield "lse", torch.zeros(1, 1, device=device).expand(rows, heads), None


def test_the_same_view_will_do_for_q_alone(backend, device):
    call = cases.build(CALLS["decode"], device, backend=backend)
    slopes = torch.rand(2, 4, device=device)
    with pytest.raises(ValueError, match="lse: .* overlaps alibi_slopes"):
        call.run(backend, alibi_slopes=slopes, lse=slopes)


@pytest.mark.parametrize("name", ["decode", "short"])
def test_other_overlaps_are_refused(name, backend, device):
    call = cases.build(CALLS[name], device, backend=backend)
    found = 0
    for result, tensor, other in overlapping(call, device):
        before = [a.clone() for a in call.args]
        words = f"overlaps {other}" if other else f"{result}: expected memory of its own"
        with pytest.raises(ValueError, match=words):
            call.run(backend, **{result: tensor})
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(call.args, before, strict=True)
        )
        found += 1
    assert found == 9


def test_results_in_one_buffer_side_by_side_are_right(backend, device):
    """out and lse between each other, and K and V between each other: no byte belongs to both."""
    call = cases.build(CALLS["decode"], device, backend=backend)
    expected, expected_lse = call.run(backend)
    rows, heads, width = expected.shape
    both = torch.zeros(rows, heads, width + 4, dtype=fp16, device=device)
    out, lse = both[..., :width], both[..., width : width + 2].view(torch.float32)[..., 0]
    call.run(backend, out=out, lse=lse)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    with pytest.raises(ValueError, match="lse: .* overlaps out"):
        call.run(backend, out=out, lse=both[..., width - 2 : width].view(torch.float32)[..., 0])


def test_merge_in_place_and_nothing_else(backend, device):
    g = torch.Generator().manual_seed(0)
    buffer = torch.randn(6, 3, 24, generator=g).to(device)
    outs, lses = (torch.randn(2, 5, 3, *w, generator=g).to(device) for w in ((24,), ()))
    expected = pw.merge_state(outs[0], lses[0], outs[1], lses[1], backend=backend)
    of_many = pw.merge_states(outs, lses, backend=backend)
    for i in (0, 1):
        for j in (0, 1):
            a, s = outs.clone(), lses.clone()
            pw.merge_state(a[0], s[0], a[1], s[1], out=a[i], lse=s[j], backend=backend)
            assert torch.equal(a[i], expected[0]) and torch.equal(s[j], expected[1])
            a, s = outs.clone(), lses.clone()
            pw.merge_states(a, s, out=a[i], lse=s[j], backend=backend)
            assert torch.equal(a[i], of_many[0]) and torch.equal(s[j], of_many[1])
    with pytest.raises(ValueError, match="out: .* overlaps out_a"):
        pw.merge_state(buffer[:5], lses[0], outs[1], lses[1], out=buffer[1:], backend=backend)
    flat = outs.flatten()
    with pytest.raises(ValueError, match=r"out: .* overlaps outs\[0\]"):
        pw.merge_states(outs, lses, out=flat[24:][: 15 * 24].view(5, 3, 24), backend=backend)
    with pytest.raises(ValueError, match="out: .* overlaps lse_a"):
        pw.merge_state(outs[0], buffer.flatten()[:15].view(5, 3), outs[1], lses[1], out=buffer[:5], backend=backend)


def test_tokens_of_the_cache_itself_are_appended(backend, device):
    """Source rows lie in the cache that is written, also where it is written."""
    caches = [torch.randn(4, 4, 2, 16, device=device) for _ in range(2)]
    slots = torch.tensor([2, 0, 1, 9], device=device)  # onto the rows themselves, in another order
    rows = [c.flatten(0, 1)[:4] for c in caches]
    expected = [c.clone() for c in caches]
    for e, r in zip(expected, rows, strict=True):
        e.flatten(0, 1)[slots] = r.clone()
    pw.append_kv(*rows, *caches, slots, backend=backend)
    assert all(map(torch.equal, caches, expected))


def test_appends_that_write_twice_are_refused(backend, device):
    k, slots = torch.randn(2, 2, 16, device=device), torch.tensor([1, 2], device=device)
    c, d = (torch.zeros(4, 4, 2, 16, device=device) for _ in range(2))
    whole = torch.zeros(4, 4, 2, 24, device=device)
    for k_cache, v_cache, words in [
        (c, c[:1].expand(4, 4, 2, 16), "v_cache: .* for each element"),
        (c.view(-1)[:32].expand(4, 4, 32).view(4, 4, 2, 16), d, "k_cache: .* for each element"),
        (whole[..., :16], whole[..., 8:], "v_cache: .* overlaps k_cache"),
    ]:
        with pytest.raises(ValueError, match=words):
            pw.append_kv(k, k, k_cache, v_cache, slots, backend=backend)
    q8 = [torch.zeros(4, 4, 2, 16, dtype=int8, device=device) for _ in range(2)]
    scale = torch.ones(4, 4, 1, device=device).expand(4, 4, 2)
    with pytest.raises(ValueError, match="k_scale: .* for each element"):
        pw.append_kv(k, k, *q8, slots, k_scale=scale, v_scale=scale.clone(), backend=backend)
    assert (c == 0).all() and (whole == 0).all()


def test_buffers_of_pack_and_unpack(backend, device):
    storage = torch.zeros(2, 4, 4, 2, 16, device=device)
    slots = torch.tensor([1, 2], device=device)
    cache = pw.PagedKVCache([storage[0]], [storage[1]])
    inside = storage.view(-1).view(torch.uint8)[1024 : 1024 + 512]
    with pytest.raises(ValueError, match=r"out: .* overlaps k_caches\[0\] of the cache"):
        pw.pack_kv(cache, slots, out=inside, backend=backend)
    index = torch.zeros(256, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="out: .* overlaps slots"):
        pw.pack_kv(cache, index[:2], out=index.view(torch.uint8), backend=backend)
    packed = pw.pack_kv(cache, slots, backend=backend)
    lies = pw.PackedKV.wrap(inside, packed.shape)
    with pytest.raises(ValueError, match=r"packed: .* overlaps k_caches\[0\] of the cache"):
        pw.unpack_kv(lies, cache, slots, backend=backend)
    twice = pw.PagedKVCache([storage[0]] * 2, [storage[1], storage[1].clone()])
    two = pw.pack_kv(twice, slots, backend=backend)  # layers that share are read as they are
    with pytest.raises(ValueError, match=r"k_caches\[1\] overlaps k_caches\[0\]"):
        pw.unpack_kv(two, twice, slots, backend=backend)
    expanded = pw.PagedKVCache([storage[0, :1].expand(4, 4, 2, 16)], [storage[1]])
    with pytest.raises(ValueError, match=r"k_caches\[0\] has stride"):
        pw.unpack_kv(packed, expanded, slots, backend=backend)
