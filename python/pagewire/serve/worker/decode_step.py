"""D's step over tensors that stay where they are, so that a CUDA graph can replay it."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import pagewire as pw
from pagewire.serve.model.llama import Llama

_ALIGN = 4  # int32 values: 16 bytes, for which kernels are compiled


class Inputs:
    """What a forward needs from the host, int32 all of it: one copy takes it to the device, and nothing waits."""

    def __init__(self, device: torch.device, **shapes: tuple[int, ...]) -> None:
        sizes = [-(-math.prod(shape) // _ALIGN) * _ALIGN for shape in shapes.values()]
        pinned = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._device = torch.empty(sum(sizes), dtype=torch.int32, device=device)

        def parts(whole: Tensor) -> dict[str, Tensor]:
            rooms = zip(shapes.items(), whole.split(sizes), strict=True)
            return {name: room[: math.prod(shape)].view(shape) for (name, shape), room in rooms}

        self.host: dict[str, np.ndarray] = {name: part.numpy() for name, part in parts(self._host).items()}
        self._parts = parts(self._device)

    def upload(self) -> dict[str, Tensor]:
        """By name, on the device: what `host` holds now."""
        self._device.copy_(self._host, non_blocking=True)
        return self._parts


class DecodeStep:
    """One new token for each of at most `batch_size` requests. On a GPU its first run is an ordinary one, and is then
    captured into a graph that every later one replays.
    """

    def __init__(
        self, model: Llama, cache: pw.PagedKVCache, batch_size: int, max_pages: int, *, captures: bool
    ) -> None:
        self._model, self._cache, self._captures = model, cache, captures
        of_rows = dict.fromkeys(("token_ids", "positions", "slot_mapping", "seq_lens"), (batch_size,))
        self._inputs = Inputs(model.device, **of_rows, page_table=(batch_size, max_pages))
        self._pages: list[list[int] | None] = [None] * batch_size  # that are in the rows of the page table
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None  # of the graph

    def run(
        self, token_ids: Sequence[int], positions: Sequence[int], pages: Sequence[list[int]],
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """fp32 [len(token_ids), vocab_size], which the next run may write over.

        on_layer: as `Llama.forward`'s; behind a graph, which cannot call, once and with the last layer.
        """
        self._fill(token_ids, positions, pages)
        inputs = self._inputs.upload()
        if self._graph is not None and self._logits is not None:
            self._graph.replay()
            if on_layer is not None:
                on_layer(self._cache.num_layers - 1)
            return self._logits[: len(token_ids)]
        logits = self._model.forward(cache=self._cache, **inputs, on_layer=on_layer)
        if self._captures:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._model.forward(cache=self._cache, **inputs, on_layer=None)
        return logits[: len(token_ids)]

    def _fill(self, token_ids: Sequence[int], positions: Sequence[int], pages: Sequence[list[int]]) -> None:
        host, count, page_size = self._inputs.host, len(token_ids), self._cache.page_size
        host["token_ids"][:count] = token_ids
        host["positions"][:count] = positions
        host["slot_mapping"][:count] = [
            own[p // page_size] * page_size + p % page_size for own, p in zip(pages, positions, strict=True)
        ]
        host["seq_lens"][:count] = [p + 1 for p in positions]
        # the rows beyond write nowhere and attend to nothing
        host["slot_mapping"][count:], host["seq_lens"][count:] = -1, 0
        for row, own in enumerate(pages):
            if self._pages[row] is not own:  # entries past a request's pages are never read
                host["page_table"][row, : len(own)] = own
                self._pages[row] = own
