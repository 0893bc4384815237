"""The README's snippet, as a file: make a cache, append, attend, move the tokens to another cache."""

import torch

import pagewire as pw

cache = pw.PagedKVCache.allocate(
    num_layers=1, num_pages=64, page_size=16, num_kv_heads=2, head_dim=64, dtype=torch.float32, device="cpu"
)
pages = pw.PageAllocator(num_pages=64)
page_table = torch.tensor([pages.alloc(3)], dtype=torch.int32)  # one request, up to 48 tokens
slots = pw.page_slots(page_table[0], 0, 40, cache.page_size)
pw.append_kv(torch.randn(40, 2, 64), torch.randn(40, 2, 64), cache.k[0], cache.v[0], slots)
seq_lens = torch.tensor([40], dtype=torch.int32)
out, lse = pw.decode(torch.randn(1, 8, 64), cache.k[0], cache.v[0], page_table, seq_lens, return_lse=True)
packed = pw.pack_kv(cache, slots, dtype=torch.int8)  # one contiguous buffer for the wire, quantised on the way
print(tuple(out.shape), tuple(lse.shape), packed.num_bytes, "bytes")
print(pw.explain("decode", device="cpu", dtype=torch.float32, head_dim=64, group_size=4))
