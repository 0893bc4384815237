"""Bad indices on a device: masked, recorded in the error word, reported by check_errors, and the rest is right.

Only backends that guard on the device; the CPU and reference backends raise at once (tests/core/test_bad_input.py).
"""

import re

import pytest
import torch

import cases
import pagewire as pw
import tolerance


@pytest.fixture(params=["cuda", "triton"])
def guarded(request: pytest.FixtureRequest, device: torch.device) -> str:
    reason = pw.backends(device.type)[request.param]
    if reason is not None:
        pytest.skip(f"{request.param} on {device.type}: {reason}")
    return request.param


def limit(call: cases.Call) -> float:
    return 1e-4 if call.args[0].dtype == torch.float32 else 4e-3


def recorded(words: str) -> None:
    with pytest.raises(pw.BadIndexError, match=re.escape(words)):
        pw.check_errors()
    pw.check_errors()  # reading clears it


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_a_pool_without_pages_has_none_to_read(op, guarded, device):
    """Every page is outside: rows without keys, and the first entry is named."""
    caches = [torch.zeros(0, 16, 1, 32, dtype=torch.float16, device=device) for _ in range(2)]
    table, lens = torch.zeros(1, 20, dtype=torch.int32, device=device), torch.tensor([300], device=device).int()
    q = torch.ones(3 if op == "prefill" else 1, 2, 32, dtype=torch.float16, device=device)
    more = (torch.tensor([0, 3], device=device).int(),) if op == "prefill" else ()
    promise = {"max_q_len": 3} if op == "prefill" else {}
    out, lse = getattr(pw, op)(q, *caches, table, lens, *more, **promise, return_lse=True, backend=guarded)
    with pytest.raises(pw.BadIndexError, match=rf"{op}: page_table\[0, \d+\] is outside"):
        pw.check_errors()
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("q_lens", [None, (4, 9)], ids=["decode", "prefill"])
@pytest.mark.parametrize("page", [-1, 99, 2147480000])
def test_bad_page_leaves_the_softmax(page, q_lens, guarded, device):
    """As if the page's tokens did not exist; the other request is untouched."""
    call = cases.build(cases.Attention((40, 33), q_lens, page_size=16, head_dim=32), device, backend=guarded)
    expected_out, expected_lse = tolerance.evaluate(call, torch.float64)
    call.args[3][0, 1] = page
    out, lse = call.run(guarded)
    op = "decode" if q_lens is None else "prefill"
    recorded(f"{op}: page_table[0, 1] is outside [0, num_pages)")
    first = 1 if q_lens is None else q_lens[0]
    tolerance.close("out", out[first:].double(), expected_out[first:], limit(call), "the other request")
    assert not out.isnan().any() and not lse.isnan().any()

    # the first request over its remaining keys, in the same positions: attention with the page masked
    q, k_cache, v_cache, table, _ = call.args[:5]
    pages = [int(table[0, 0]), int(table[0, 2])]
    keys = list(range(16)) + list(range(32, 40))
    k = torch.cat([k_cache[p] for p in pages])[: len(keys)].double()
    v = torch.cat([v_cache[p] for p in pages])[: len(keys)].double()
    group = q.shape[1] // k.shape[1]
    for row in range(first):
        visible = torch.tensor([j <= 40 - first + row for j in keys], device=device)
        logits = torch.einsum("hd,khd->hk", q[row].double(), k.repeat_interleave(group, 1)) * 32**-0.5
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        expected = torch.einsum("hk,khd->hd", weights, v.repeat_interleave(group, 1).nan_to_num())
        tolerance.close("out", out[row].double(), expected, limit(call), "the request itself")


@pytest.mark.parametrize("length", [-3, 1000])
@pytest.mark.parametrize("q_lens", [None, (4, 9)], ids=["decode", "prefill"])
def test_length_is_clamped(length, q_lens, guarded, device):
    call = cases.build(cases.Attention((40, 33), q_lens, page_size=16, head_dim=32), device, backend=guarded)
    expected_out, _ = tolerance.evaluate(call, torch.float64)
    call.args[3][0] = call.args[3][0, 0]  # every entry of the clamped request is a page that exists
    call.args[4][0] = length
    out, _ = call.run(guarded)
    recorded(f"{'decode' if q_lens is None else 'prefill'}: seq_lens[0] is outside")
    first = 1 if q_lens is None else q_lens[0]
    tolerance.close("out", out[first:].double(), expected_out[first:], limit(call), "the other request")


@pytest.mark.parametrize("offsets", [(0, 4, 99), (0, -2, 13), (0, 9, 4)])
def test_offsets_are_clamped(offsets, guarded, device):
    call = cases.build(cases.Attention((40, 33), (4, 9), page_size=16, head_dim=32), device, backend=guarded)
    call.args[5].copy_(torch.tensor(offsets, dtype=torch.int32))
    out, lse = call.run(guarded)
    recorded("prefill: cu_seqlens_q[")
    assert out.shape == call.args[0].shape


def test_longer_than_max_q_len_is_left_empty(guarded, device):
    call = cases.build(
        cases.Attention((40, 33), (4, 9), page_size=16, head_dim=32, max_q_len=4, sinks=True), device, backend=guarded
    )
    out, lse = call.run(guarded)
    recorded("prefill: request 1 has more query rows than max_q_len")
    call.kwargs["max_q_len"] = None
    expected_out, _ = tolerance.evaluate(call, torch.float64)
    tolerance.close("out", out[:4].double(), expected_out[:4], limit(call), "the request that keeps its promise")
    assert not out[4:].any() and torch.equal(lse[4:], call.kwargs["sinks"].expand(9, -1))


def test_pages_nobody_can_see_are_not_recorded(guarded, device):
    call = cases.build(cases.Attention((60,), (4,), page_size=4, window=(7, -1)), device, backend=guarded)
    expected = call.run(guarded)[0].clone()
    call.args[3][0, : (60 - 4 - 7) // 4] = -5
    assert torch.equal(call.run(guarded)[0], expected)
    pw.check_errors()


def test_append_slot_past_the_end(guarded, device):
    cache = torch.zeros(2, 4, 1, 16, device=device)
    k = torch.ones(3, 1, 16, device=device)
    pw.append_kv(k, k, cache, cache.clone(), torch.tensor([1, 8, -7], device=device), backend=guarded)
    recorded("append_kv: slot_mapping[1] is past the last slot")
    assert cache[..., 0].flatten().tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("slot", [-1, 8, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=cases.SHORT.get)
def test_pack_and_unpack_bad_slot(dtype, slot, guarded, device):
    scale = "token_head" if dtype == torch.int8 else "none"
    cache = pw.PagedKVCache.allocate(
        num_layers=2, num_pages=2, page_size=4, num_kv_heads=1, head_dim=16, dtype=dtype, device=device, scale=scale
    )
    for t in cache.k + cache.v:
        t.fill_(3)
    slots = torch.tensor([2, slot, 5], device=device)
    packed = pw.pack_kv(cache, slots, backend=guarded)
    recorded("pack_kv: slots[1] is outside [0, num_pages * page_size)")
    assert packed.k[..., 0].float().tolist() == [[[3, 0, 3]]] * 2
    if packed.k_scale is not None:
        assert packed.k_scale.tolist() == [[[1, 1, 1]]] * 2
    for t in cache.k + cache.v:
        t.zero_()
    packed.k.fill_(7)
    pw.unpack_kv(packed, cache, slots, backend=guarded)
    recorded("unpack_kv: slots[1] is outside")
    for t in cache.k:
        assert t.float()[..., 0].flatten().tolist() == [0, 0, 7, 0, 0, 7, 0, 0]


def test_of_several_faults_the_largest_word_is_reported(guarded, device):
    cache = torch.zeros(2, 4, 1, 16, device=device)
    k = torch.ones(3, 1, 16, device=device)
    pw.append_kv(k, k, cache, cache.clone(), torch.tensor([8, 0, 9], device=device), backend=guarded)
    recorded("slot_mapping[2]")


def test_checking_every_call(guarded, device, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_CHECK", "1")
    cache = torch.zeros(2, 4, 1, 16, device=device)
    k = torch.ones(1, 1, 16, device=device)
    with pytest.raises(pw.BadIndexError, match="slot_mapping\\[0\\]"):
        pw.append_kv(k, k, cache, cache.clone(), torch.tensor([8], device=device), backend=guarded)
