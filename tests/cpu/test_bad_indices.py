"""A bad index raises the reference's sentence, and nothing has been written."""

import pytest
import torch

import cases
import pagewire as pw

DECODE = cases.Attention((20, 7), page_size=4)
PREFILL = cases.Attention((20, 7), (3, 2), page_size=4)


def poisoned(call, position, at, value):
    args = list(call.args)
    args[position] = args[position].clone()
    args[position][at] = value
    call.args = tuple(args)
    return call


ATTENTION = {
    "page past the end": (DECODE, 3, (0, 2), 1000),
    "negative page": (PREFILL, 3, (1, 1), -1),
    "negative length": (DECODE, 4, (1,), -1),
    "length past the table": (DECODE, 4, (0,), 1000),
    "first offset": (PREFILL, 5, (0,), 1),
    "decreasing offsets": (PREFILL, 5, (1,), 9),
    "offset past q": (PREFILL, 5, (2,), 90),
}


@pytest.mark.parametrize("what", ATTENTION)
def test_attention(what):
    case, *where = ATTENTION[what]
    call = poisoned(cases.build(case), *where)
    messages = []
    for backend in ("reference", "cpu"):
        out = torch.full((*call.args[0].shape[:-1], call.args[2].shape[-1]), 7.0)
        lse = torch.full(out.shape[:-1], 7.0)
        with pytest.raises(pw.BadIndexError) as caught:
            getattr(pw, call.op)(*call.args, **call.kwargs, out=out, lse=lse, backend=backend)
        assert (out == 7).all() and (lse == 7).all()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_more_rows_than_max_q_len():
    call = cases.build(cases.Attention((20, 7), (3, 2), max_q_len=2))
    messages = []
    for backend in ("reference", "cpu"):
        with pytest.raises(pw.BadIndexError) as caught:
            call.run(backend)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("op", ["append_kv", "pack_kv", "unpack_kv"])
@pytest.mark.parametrize("slot", [8, 2**40, -1])
def test_slots(op, slot):
    if op == "append_kv" and slot < 0:
        pytest.skip("append skips negative slots")
    slots = torch.tensor([1, slot, 2])
    messages = []
    for backend in ("reference", "cpu"):
        cache = pw.PagedKVCache.allocate(
            num_layers=1, num_pages=2, page_size=4, num_kv_heads=1, head_dim=8, dtype=torch.float32, device="cpu"
        )
        cache.k[0].fill_(7)
        packed = pw.pack_kv(cache, torch.tensor([0, 1, 2]), backend=backend)
        packed.k.fill_(5)
        rows = torch.zeros(3, 1, 8)
        with pytest.raises(pw.BadIndexError) as caught:
            if op == "append_kv":
                pw.append_kv(rows, rows, cache.k[0], cache.v[0], slots, backend=backend)
            elif op == "pack_kv":
                pw.pack_kv(cache, slots, out=packed, backend=backend)
            else:
                pw.unpack_kv(packed, cache, slots, backend=backend)
        assert (cache.k[0] == 7).all() and (packed.k == 5).all()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
