"""What is not finite stays so in the rows that see it, and nowhere else."""

import math

import pytest
import torch

import cases
import pagewire as pw
from cases import Attention, bf16, e4m3, e5m2, fp16, fp32, int8

NAN, INF = math.nan, math.inf


def int32(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


# -------------------------------------------------------------------------------- invisible keys


VISIBILITY = {
    "causal": Attention((50, 20), (12, 9), dtype=bf16, head_dim=32, max_q_len=16),
    "causal_wide_group": Attention((40,), (3,), heads=(20, 1), dtype=fp16, head_dim=32, max_q_len=16),
    "windows": Attention((50, 20), (12, 9), causal=False, window=(5, 3), head_dim=32, max_q_len=16),
    "left_window": Attention((70,), (16,), window=(9, -1), dtype=bf16, head_dim=32, max_q_len=16),
    "split": Attention((70,), (5,), dtype=fp16, split_size=16, head_dim=32, max_q_len=16),
    "sees_nothing": Attention((3, 9), (7, 9), sinks=True, head_dim=32, max_q_len=16),
    "long": Attention((40, 20), (12, 20), dtype=bf16, head_dim=32),
    "long_windows": Attention((40,), (14,), causal=False, window=(20, 7), dtype=fp16, head_dim=32),
    "e4m3": Attention((50,), (12,), dtype=fp16, kv_dtype=e4m3, scale="token_head", head_dim=32, max_q_len=16),
    "e5m2": Attention((50,), (12,), dtype=bf16, kv_dtype=e5m2, scale="head", head_dim=32, max_q_len=16),
    "int8": Attention((50,), (12,), dtype=bf16, kv_dtype=int8, scale="token_head", head_dim=32, max_q_len=16),
}


def sees(case, request: int, row: int, key: int) -> bool:
    """Whether query row `row` of the request sees a key, from the words of the contract alone."""
    position = case.seq_lens[request] - case.q_lens[request] + row
    left, right = case.window
    if case.causal and key > position:
        return False
    return not (left >= 0 and position - key > left) and not (right >= 0 and key - position > right)


def spoil(call, request: int, key: int, value: float) -> None:
    """Writes `value` where the key's V (int8: its scale) is read from; K becomes NaN as well where that is possible."""
    case = call.case
    _, k_cache, v_cache, table = call.args[:4]
    page, slot = int(table[request, key // case.page_size]), key % case.page_size
    if v_cache.dtype == int8:
        call.kwargs["v_scale"][page, slot] = value
        return
    at = (page, slot, 0, 3) if case.layout == "NHD" else (page, 0, slot, 3)
    v_cache[at] = torch.tensor(value).to(v_cache.dtype)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", VISIBILITY)
def test_only_rows_that_see_a_key_see_that_it_is_not_finite(name, value, backend, device):
    case = VISIBILITY[name]
    if case.kv_dtype == e4m3 and not math.isnan(value):
        pytest.skip("e4m3 has no infinity")
    interpreted = backend == "triton" and device.type == "cpu"
    if interpreted and value == -INF:
        pytest.skip("the interpreter is slow: +inf stands for both there")
    clean = cases.build(case, device, backend=backend)
    expected, expected_lse = clean.run(backend)
    request, n = len(case.seq_lens) - 1, case.seq_lens[-1]
    first = sum(case.q_lens[:request])
    for key in {n - 2} if interpreted else {n - 1, n - 2, n // 2}:
        call = cases.build(case, device, backend=backend)
        spoil(call, request, key, value)
        out, lse = call.run(backend)
        for row in range(case.q_lens[request]):
            i = first + row
            where = f"row {row}, key {key}"
            if not sees(case, request, row, key):
                torch.testing.assert_close(out[i], expected[i], rtol=1e-2, atol=1e-2, msg=where)
            elif case.kv_dtype == int8:
                assert not out[i, : case.heads[0] // case.heads[1]].isfinite().any(), where
            else:
                got = out[i, 0, 3]  # query head 0 reads kv head 0
                assert got.isnan() if math.isnan(value) else got == value, where
                assert out[i, -1].isfinite().all() or case.heads[1] == 1, where
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def test_two_infinities_that_a_row_sees_make_nan(backend, device):
    call = cases.build(VISIBILITY["causal"], device, backend=backend)
    spoil(call, 1, 17, INF)
    spoil(call, 1, 18, -INF)
    out, _ = call.run(backend)
    last = out[12:, 0, 3]  # of the request with 9 rows at 11 .. 19
    assert last[:6].isfinite().all() and last[6] == INF and last[7:].isnan().all()


# ------------------------------------------------------------------------------------ NaN stays NaN


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("parts", [None, 8])
def test_a_poisoned_key_poisons_its_rows_through_every_merge(parts, value, backend, device):
    """An infinite logit too: inf - inf. As a state, lse = +inf would be an empty one."""
    case = Attention((40,), dtype=fp16, heads=(2, 1), head_dim=16, split_size=parts)
    call = cases.build(case, device, backend=backend)
    q, k_cache, _, table = call.args[:4]
    q.copy_(q.abs() + 0.1)
    k_cache[int(table[0, 1]), 3, 0, 0] = value
    out, lse = call.run(backend)
    assert out.isnan().all() and lse.isnan().all()
    clean = torch.ones_like(out), torch.zeros_like(lse)
    for states in ((out, lse, *clean), (*clean, out, lse)):
        merged, merged_lse = pw.merge_state(*states, backend=backend)
        assert merged.isnan().all() and merged_lse.isnan().all()
    outs, lses = torch.stack([clean[0], out, clean[0]]), torch.stack([clean[1], lse, clean[1]])
    merged, merged_lse = pw.merge_states(outs, lses, backend=backend)
    assert merged.isnan().all() and merged_lse.isnan().all()


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=cases.SHORT.get)
@pytest.mark.parametrize("order", [[NAN, -INF], [-INF, NAN], [NAN, 0.0], [INF, NAN, -300.0]])
def test_a_nan_lse_is_no_empty_state(order, dtype, backend, device):
    outs = torch.ones(len(order), 3, 2, 24, dtype=dtype, device=device)
    lses = torch.tensor(order, device=device)[:, None, None].expand(-1, 3, 2).contiguous()
    out, lse = pw.merge_states(outs, lses, backend=backend)
    assert out.isnan().all() and lse.isnan().all()


def test_a_state_with_a_vanishing_weight_still_brings_its_nan(backend, device):
    """Empty is what its lse says; exp(-300) is 0 in fp32, and 0 * NaN is NaN."""
    outs = torch.ones(2, 3, 2, 24, device=device)
    outs[1, 0] = NAN
    lses = torch.zeros(2, 3, 2, device=device)
    lses[1] = -300.0
    out, lse = pw.merge_states(outs, lses, backend=backend)
    assert out[0].isnan().all() and (out[1:] == 1).all() and (lse == 0).all()


def test_a_sink_of_infinity_takes_all_of_the_weight(backend, device):
    for split_size in (None, 8):
        case = Attention((40,), dtype=fp16, heads=(2, 1), head_dim=16, split_size=split_size)
        call = cases.build(case, device, backend=backend)
        sinks = torch.tensor([INF, NAN], device=device)
        out, lse = call.run(backend, sinks=sinks)
        assert (out[:, 0] == 0).all() and (lse[:, 0] == INF).all()
        assert out[:, 1].isnan().all() and lse[:, 1].isnan().all()


def test_rows_nobody_owns_read_nothing(backend, device):
    """An empty batch has neither slopes nor scales to read, and its padding rows are empty."""
    call = cases.build(Attention((), (), padding_rows=3, alibi=2, dtype=fp16), device)
    scales = {"k_scale": torch.ones(0, 2, device=device), "v_scale": torch.ones(0, 2, device=device)}
    caches = [c.new_zeros(c.shape, dtype=fp16).to(int8) for c in call.args[1:3]]
    call.args = (call.args[0], *caches, *call.args[3:])
    out, lse = call.run(backend, **scales)
    assert (out == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("ragged", [False, True], ids=["decode", "prefill"])
def test_whole_tiles_of_infinitely_unlikely_keys_weigh_nothing(ragged, backend, device):
    """Logits of -inf, for longer than any tile, before and between others."""
    g = torch.Generator().manual_seed(3)
    k_cache, v_cache = (torch.randn(20, 16, 1, 16, generator=g).to(fp16) for _ in range(2))
    k_cache[..., 0] = 1.0
    k_cache[:9, ..., 0] = k_cache[11:19, ..., 0] = -INF
    q = torch.randn(3 if ragged else 1, 2, 16, generator=g).to(fp16)
    q[..., 0] = 1.0
    table, lens = torch.arange(20, dtype=torch.int32)[None], torch.tensor([318], dtype=torch.int32)
    args = [x.to(device) for x in (q, k_cache, v_cache, table, lens)]
    more = {}
    if ragged:
        args.append(torch.tensor([0, 3], dtype=torch.int32, device=device))
        more["max_q_len"] = 3
    op = pw.prefill if ragged else pw.decode
    out, lse = op(*args, return_lse=True, backend=backend, **more)
    expected, expected_lse = op(*args, return_lse=True, backend="reference", **more)
    assert expected.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
