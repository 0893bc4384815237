"""Runs requests through a `Llama` as a server does: permuted pages, chunked prefill, batches."""

from collections.abc import Callable, Sequence

import torch

import pagewire as pw
from pagewire.serve.model.llama import Llama
from pagewire.types import StoredScaleKind


class PagedRun:
    """Requests over one cache whose every slot starts as NaN; pages are given in random order."""

    def __init__(
        self,
        model: Llama,
        max_lens: Sequence[int],
        *,
        page_size: int = 3,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        scale: StoredScaleKind = "none",
    ) -> None:
        config = model.config
        max_pages = [-(-n // page_size) for n in max_lens]
        num_pages = sum(max_pages) + 2  # two that nobody owns
        self.model, self.page_size = model, page_size
        self.cache = pw.PagedKVCache.allocate(
            num_layers=config.num_layers,
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype or model.dtype,
            device=model.device,
            scale=scale,
        )
        if self.cache.k[0].dtype.is_floating_point:
            for layer in (*self.cache.k, *self.cache.v):
                layer.fill_(float("nan"))
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        # Entries past a request's pages are never read.
        self.page_table = torch.full((len(max_lens), max(max_pages)), 2147480000, dtype=torch.int32)
        for row, pages in zip(self.page_table, order.split([*max_pages, 2]), strict=False):
            row[: len(pages)] = pages
        self.lens = [0] * len(max_lens)

    def forward(
        self,
        new_ids: dict[int, Sequence[int]],
        *,
        decode: bool = False,
        want_logits: bool = True,
        on_layer: Callable[[int], None] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Append `new_ids` (request -> ids) in one forward; [num_new, vocab_size] logits of each."""
        requests, device = list(new_ids), self.model.device
        token_ids, positions, slots, q_lens = [], [], [], []
        for request in requests:
            start, count = self.lens[request], len(new_ids[request])
            mine = torch.arange(start, start + count)
            pages = self.page_table[request, mine // self.page_size].long()
            token_ids.append(torch.tensor(new_ids[request], dtype=torch.int64))
            positions.append(mine)
            slots.append(pages * self.page_size + mine % self.page_size)
            q_lens.append(count)
            self.lens[request] += count
        cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
        logits = self.model.forward(
            torch.cat(token_ids).to(device),
            torch.cat(positions).to(device),
            self.cache,
            slot_mapping=torch.cat(slots).to(device),
            page_table=self.page_table[requests].to(device),
            seq_lens=torch.tensor([self.lens[r] for r in requests], dtype=torch.int32).to(device),
            cu_seqlens_q=None if decode else cu_seqlens_q.to(device),
            logit_rows=torch.arange(sum(q_lens) if want_logits else 0).to(device),
            on_layer=on_layer,
        )
        return dict(zip(requests, logits.split(q_lens if want_logits else [0] * len(q_lens)), strict=True))


def run(
    model: Llama, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], *, chunk: int, page_size: int = 3
) -> list[torch.Tensor]:
    """Prefill all prompts together, `chunk` tokens of each at a time, then feed `outputs` by decode.

    Returns, per request, the logits after every token of prompt + output: [len(prompt) + len(output), vocab_size].
    """
    batch = PagedRun(model, [len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)], page_size=page_size)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk):
        new = {i: p[start : start + chunk] for i, p in enumerate(prompts) if start < len(p)}
        for i, logits in batch.forward(new).items():
            rows[i].append(logits)
    for step in range(max(map(len, outputs))):
        new = {i: [o[step]] for i, o in enumerate(outputs) if step < len(o)}
        for i, logits in batch.forward(new, decode=True).items():
            rows[i].append(logits)
    return [torch.cat(r) for r in rows]
