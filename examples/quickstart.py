"""The README's snippet, as a file: make a cache, append, attend, pack the tokens for a wire."""

import torch

import pagewire as pw

cache = pw.PagedKVCache.allocate(
    num_layers=1, num_pages=64, page_size=16, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cpu"
)
k, v = torch.randn(2, 40, 2, 64, dtype=torch.bfloat16)
q = torch.randn(1, 8, 64, dtype=torch.bfloat16)
pages = pw.PageAllocator(num_pages=64)
page_table = torch.tensor([pages.alloc(3)], dtype=torch.int32)  # one request, up to 48 tokens
slots = pw.page_slots(page_table[0], 0, 40, page_size=16)
pw.append_kv(k, v, cache.k[0], cache.v[0], slots)
seq_lens = torch.tensor([40], dtype=torch.int32)
out, lse = pw.decode(q, cache.k[0], cache.v[0], page_table, seq_lens, return_lse=True)
packed = pw.pack_kv(cache, slots, dtype=torch.int8)  # one contiguous buffer, quantised on the way
print(tuple(out.shape), tuple(lse.shape), packed.num_bytes, "bytes")
print(pw.explain("decode", device="cpu", head_dim=64, group_size=4))
