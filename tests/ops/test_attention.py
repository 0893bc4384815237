"""decode and prefill: one body over every backend and every shared case."""

import dataclasses

import pytest
import torch

import cases
import tolerance

QUICK = cases.DECODE + cases.PREFILL


@pytest.mark.parametrize("case", QUICK, ids=lambda c: ("decode-" if c.q_lens is None else "prefill-") + c.id)
def test_attention(case, backend, device):
    call = cases.build(case, device, backend=backend)
    out, lse = call.run(backend)
    tolerance.check(call, out, lse)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.matrix(), ids=lambda c: ("decode-" if c.q_lens is None else "prefill-") + c.id)
def test_attention_matrix(case, backend, device):
    call = cases.build(case, device, backend=backend)
    out, lse = call.run(backend)
    tolerance.check(call, out, lse)


@pytest.mark.parametrize("q_lens", [None, (1, 7)], ids=["decode", "prefill"])
def test_same_call_same_bits(q_lens, backend, device):
    call = cases.build(cases.Attention((40, 21), q_lens, dtype=torch.bfloat16), device, backend=backend)
    first, second = call.run(backend), call.run(backend)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_split_size_makes_a_request_independent_of_its_batch(op, backend, device):
    """Bitwise: alone, and among others of other lengths."""
    lens, q_lens = (150, 3, 70), (2, 3, 5)
    case = cases.Attention(
        lens, None if op == "decode" else q_lens, dtype=torch.bfloat16, split_size=32, max_q_len=None
    )
    call = cases.build(case, device, backend=backend)
    together_out, together_lse = call.run(backend)
    row = 0
    for b, n in enumerate(q_lens if op == "prefill" else (1, 1, 1)):
        q, k, v, table, seq_lens = call.args[:5]
        args = (q[row : row + n], k, v, table[b : b + 1], seq_lens[b : b + 1])
        if op == "prefill":
            args += (torch.tensor([0, n], dtype=torch.int32, device=device),)
        alone_out, alone_lse = dataclasses.replace(call, args=args).run(backend)
        assert torch.equal(alone_out, together_out[row : row + n]), f"request {b}"
        assert torch.equal(alone_lse, together_lse[row : row + n]), f"request {b}"
        row += n


def test_sliced_kv_merges_to_the_whole(backend, device):
    """decode over two halves of the keys, merged, equals decode over all of them."""
    import pagewire as pw

    call = cases.build(cases.Attention((64,), page_size=16, sinks=True), device, backend=backend)
    whole = call.run(backend)
    q, k, v, table, _ = call.args
    half = torch.tensor([32], dtype=torch.int32, device=device)
    kw = {**call.kwargs, "return_lse": True, "backend": backend}
    a = pw.decode(q, k, v, table[:, :2].contiguous(), half, **kw)
    b = pw.decode(q, k, v, table[:, 2:4].contiguous(), half, **{**kw, "sinks": None})
    merged = pw.merge_state(*a, *b, backend=backend)
    limit = 1e-5 if q.dtype == torch.float32 else 4e-3  # parts rounded to fp16
    for got, expected in zip(merged, whole, strict=True):
        tolerance.close("merged", got, expected, limit, call.case.id)


@pytest.mark.parametrize("q_lens", [None, ()], ids=["decode", "prefill"])
def test_empty_batch(q_lens, backend, device):
    call = cases.build(cases.Attention((), q_lens), device, backend=backend)
    out, lse = call.run(backend)
    assert out.shape[0] == 0 and lse.shape[0] == 0


def test_only_padding_rows(backend, device):
    call = cases.build(cases.Attention((), (), padding_rows=3, sinks=True), device, backend=backend)
    out, lse = call.run(backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, call.kwargs["sinks"].expand_as(lse))
