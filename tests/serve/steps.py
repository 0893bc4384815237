"""An engine's steps without a server: pages in no order, and a cache that is NaN where none is owned."""

from pathlib import Path

import torch

import pagewire as pw
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Sampling, Submit
from pagewire.serve.model.llama import Llama
from pagewire.serve.worker.engine import Engine, PromptChunk, RequestState
from serve.tiny import make_tiny_llama
from serve.workers import prompt_of

PAGE_SIZE = 4
MAX_TOKENS = 40  # of a request
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=5)


def engine_of(folder: Path, **changes) -> Engine:
    path = make_tiny_llama(folder / "tiny", num_layers=3, eos_token_id=None, max_context=128)
    fields = dict(
        model=str(path), page_size=PAGE_SIZE, pool_tokens=512, prefill_chunk=32, max_batch_size=6, device="cpu"
    )
    engine = Engine(WorkerConfig(**{**fields, **changes}))
    for layer in (*engine.cache.k, *engine.cache.v):  # behind the warm-up
        if layer.itemsize > 1:
            layer.fill_(torch.nan)
    return engine


def new_request(engine: Engine, name: str, length: int, seed: int, sampling: Sampling = GREEDY) -> RequestState:
    pages = engine.allocator.alloc(-(-MAX_TOKENS // PAGE_SIZE))
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(seed)).tolist()
    submit = Submit(name, prompt_of(length, seed), MAX_TOKENS - length, [], sampling)
    return RequestState(submit, 0, [pages[i] for i in order])


def start(engine: Engine, *requests: RequestState) -> None:
    tokens = engine.prefill([PromptChunk(request, 0, request.prompt_len) for request in requests])
    for request in requests:
        request.output.append(tokens[request])


def plain_decode(model: Llama, cache: pw.PagedKVCache, requests: list[RequestState]) -> torch.Tensor:
    """The logits of one decode step over tensors made for it: no row and no page more than there is."""
    slots, lens = [], []
    for request in requests:
        position = request.prompt_len + len(request.output) - 1
        slots.append(request.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
        lens.append(position + 1)
    device = model.device
    return model.forward(
        torch.tensor([request.output[-1] for request in requests], device=device),
        torch.tensor(lens, device=device) - 1,
        cache,
        slot_mapping=torch.tensor(slots, device=device),
        page_table=torch.tensor([request.pages for request in requests], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
    )


def copy_of(cache: pw.PagedKVCache) -> pw.PagedKVCache:
    scales = [list(map(torch.clone, x)) if x[0] is not None else None for x in (cache.k_scale, cache.v_scale)]
    return pw.PagedKVCache(
        [layer.clone() for layer in cache.k], [layer.clone() for layer in cache.v], layout=cache.layout,
        k_scales=scales[0], v_scales=scales[1],
    )  # fmt: skip


def both(engine: Engine, cache: pw.PagedKVCache, batch: list[RequestState], rounding: float = 1e-4) -> torch.Tensor:
    """One step of each over the same contents: logits and what was written agree, and no other slot was touched.

    rounding: matmuls of other sizes round otherwise; the logits are about +-10. Returns the logits of the engine's.
    """
    logits = {}
    sample, engine._sample = engine._sample, lambda requests, found: logits.setdefault("found", found.clone()) * 0
    try:
        engine.decode(batch)
    finally:
        engine._sample = sample
    expected = plain_decode(engine.model, cache, batch)
    found = logits["found"]
    assert found.shape == expected.shape and not expected.isnan().any()
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    for ours, theirs in zip((*engine.cache.k, *engine.cache.v), (*cache.k, *cache.v), strict=True):
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=1e-2 if ours.itemsize == 2 else 0, atol=rounding, equal_nan=True
        )
    for request, row in zip(batch, found, strict=True):
        request.output.append(int(row.argmax()))
    return found
