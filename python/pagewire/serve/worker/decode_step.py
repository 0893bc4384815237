"""D's step over tensors that stay where they are, so that a CUDA graph can replay it."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import pagewire as pw
from pagewire.serve.model.llama import Llama

if TYPE_CHECKING:
    from pagewire.serve.worker.engine import PromptChunk

_ALIGN = 4  # int32 values: 16 bytes, for which kernels are compiled


class Inputs:
    """What a forward needs from the host, int32 all of it: one copy takes it to the device, and nothing waits."""

    def __init__(self, device: torch.device, **shapes: tuple[int, ...]) -> None:
        sizes = [-(-math.prod(shape) // _ALIGN) * _ALIGN for shape in shapes.values()]
        pinned = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._device = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        here, there = (
            {
                name: room[: math.prod(shape)].view(shape)
                for (name, shape), room in zip(shapes.items(), whole.split(sizes), strict=True)
            }
            for whole in (self._host, self._device)
        )
        self.host, self._inputs = {name: part.numpy() for name, part in here.items()}, there

    def upload(self, chunks: Sequence["PromptChunk"], page_size: int) -> dict[str, Tensor]:
        """By name, on the device: what `host` holds, and these chunks."""
        host, stop = self.host, 0
        for row, chunk in enumerate(chunks):
            positions, pages = np.arange(chunk.start, chunk.stop), chunk.request.page_row
            start, stop = stop, stop + len(positions)
            host["token_ids"][start:stop] = chunk.token_ids
            host["positions"][start:stop] = positions
            host["slot_mapping"][start:stop] = pages[positions // page_size] * page_size + positions % page_size
            host["page_table"][row, : len(pages)] = pages  # entries past a request's are never read
            host["seq_lens"][row] = chunk.stop
        # the rows beyond write nowhere and attend to nothing
        host["slot_mapping"][stop:], host["seq_lens"][len(chunks) :] = -1, 0
        self._device.copy_(self._host, non_blocking=True)
        return self._inputs


class DecodeStep:
    """A token for at most `batch_size` requests. captures: the first run is made a graph that the others replay."""

    def __init__(self, model: Llama, cache: pw.PagedKVCache, batch_size: int, max_pages: int, captures: bool) -> None:
        self._model, self._cache, self._captures = model, cache, captures
        of_rows = dict.fromkeys(("token_ids", "positions", "slot_mapping", "seq_lens"), (batch_size,))
        self._inputs = Inputs(model.device, **of_rows, page_table=(batch_size, max_pages))
        self._graph: tuple[torch.cuda.CUDAGraph, Tensor] | None = None  # and its logits

    def run(self, chunks: Sequence["PromptChunk"], on_layer: Callable[[int], None] | None = None) -> Tensor:
        """fp32 [len(chunks), vocab_size], which the next run may write over.

        on_layer: as `Llama.forward`'s; behind a graph, which cannot call, once and with the last layer.
        """
        inputs = self._inputs.upload(chunks, self._cache.page_size)
        if self._graph is not None:
            graph, logits = self._graph
            graph.replay()
            if on_layer is not None:
                on_layer(self._cache.num_layers - 1)
            return logits[: len(chunks)]
        logits = self._model.forward(cache=self._cache, **inputs, on_layer=on_layer)
        if self._captures:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._graph = graph, self._model.forward(cache=self._cache, **inputs, on_layer=None)
        return logits[: len(chunks)]
