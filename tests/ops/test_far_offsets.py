"""A cache of more than 2^31 elements: untouched memory costs nothing, so only the far end of it is used."""

import pytest
import torch

import pagewire as pw

PAGE_SIZE, HEADS, DIM = 16, 2, 64
NUM_PAGES = 2**31 // (PAGE_SIZE * HEADS * DIM) + 4
LAST = NUM_PAGES * PAGE_SIZE - 3


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_pack_unpack_beyond_31_bits(layout, backend, device):
    shape = (NUM_PAGES, PAGE_SIZE, HEADS, DIM) if layout == "NHD" else (NUM_PAGES, HEADS, PAGE_SIZE, DIM)
    try:
        k = torch.empty(shape, dtype=torch.float16, device=device)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("no 4 GiB of address space")
    cache = pw.PagedKVCache([k], [k], layout=layout)  # V is K: one copy on the wire
    slots = torch.tensor([LAST, 1, LAST - 20], device=device)
    new = torch.arange(3 * HEADS * DIM, device=device).reshape(3, HEADS, DIM).half()
    pw.append_kv(new, new, k, k, slots, layout=layout, backend=backend)
    packed = pw.pack_kv(cache, slots, backend=backend)
    assert torch.equal(packed.k[0], new.transpose(0, 1))
    elsewhere = torch.tensor([2, LAST - 1, LAST - 40], device=device)
    pw.unpack_kv(packed, cache, elsewhere, backend=backend)
    assert torch.equal(pw.pack_kv(cache, elsewhere, backend=backend).buffer, packed.buffer)
