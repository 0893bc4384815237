"""The model, its page pool, and the two steps every worker is made of: prefill and decode."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import pagewire as pw
from pagewire.environment import lookup
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Sampling, Submit
from pagewire.serve.model.fingerprint import fingerprint
from pagewire.serve.model.llama import Llama, OnLayer
from pagewire.serve.model.sampling import sample
from pagewire.types import QUANT_MAX

_ALIGN = 4  # int32 values: 16 bytes, for which kernels are compiled
_REQUEST_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # also a file name when recording


@dataclass(eq=False)
class RequestState:
    """One request in one process: its prompt, its pages, and how far it is."""

    submit: Submit
    since_us: int  # it waits for this stage: submitted, or the prompt's KV is complete here
    pages: list[int]
    output: list[int] = field(default_factory=list)  # token ids the client gets
    num_computed: int = 0  # prompt tokens whose KV a prefill here has put into the cache
    started_us: int = 0  # start of the stage's first forward
    pushed_us: int = 0  # P: start of the first push
    committed_us: int = 0  # P: the COMMIT left
    pushed_bytes: int = 0
    pack_us: int = 0
    logits: list[Tensor] = field(default_factory=list)  # recorded decode steps: fp32 [vocab_size]

    @property
    def id(self) -> str:
        return self.submit.request_id

    @cached_property
    def page_row(self) -> np.ndarray:
        return np.array(self.pages, np.int32)

    @property
    def prompt_len(self) -> int:
        return len(self.submit.token_ids)


@dataclass(frozen=True)
class PromptChunk:
    """Tokens [start, stop) of a request, in one forward: of its prompt, or of its output."""

    request: RequestState
    start: int
    stop: int

    @property
    def token_ids(self) -> list[int]:
        prompt = self.request.submit.token_ids
        return prompt[self.start : self.stop] or self.request.output[self.start - len(prompt) : self.stop - len(prompt)]


Tokens = dict[RequestState, int | None]  # None: the model gave NaN or infinity for this request


def next_chunks(requests: Sequence[RequestState], max_tokens: int) -> list[PromptChunk]:
    """The next prompt tokens in FIFO order, at most `max_tokens` of them."""
    chunks = []
    for request in requests:
        if max_tokens == 0:
            break
        start, stop = request.num_computed, min(request.prompt_len, request.num_computed + max_tokens)
        chunks.append(PromptChunk(request, start, stop))
        max_tokens -= stop - start
    return chunks


class Inputs:
    """What a forward needs from the host, int32 all of it: one copy takes it to the device, and nothing waits."""

    def __init__(self, device: torch.device, **shapes: tuple[int, ...]) -> None:
        sizes = [-(-math.prod(shape) // _ALIGN) * _ALIGN for shape in shapes.values()]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        rooms = zip(shapes.items(), self._host.split(sizes), self._device.split(sizes), strict=True)
        self.host: dict[str, np.ndarray] = {}
        self._inputs: dict[str, Tensor] = {}
        for (name, shape), here, there in rooms:
            self.host[name] = here[: math.prod(shape)].view(shape).numpy()
            self._inputs[name] = there[: math.prod(shape)].view(shape)

    def upload(self, chunks: Sequence[PromptChunk], page_size: int) -> dict[str, Tensor]:
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

    def run(self, chunks: Sequence[PromptChunk], on_layer: OnLayer = None) -> Tensor:
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


class Engine:
    """A model over one page pool. Raises ValueError or BackendError when the config cannot work."""

    def __init__(self, config: WorkerConfig) -> None:
        config.check()
        torch.set_num_threads(config.num_threads)
        self.config = config
        device = _device(config.device)
        kv_dtype = getattr(torch, config.kv_dtype or config.dtype)
        self.model = Llama(Path(config.model), getattr(torch, config.dtype), device)
        model = self.model.config
        self.cache = pw.PagedKVCache.allocate(
            num_layers=model.num_layers, num_pages=config.num_pages, page_size=config.page_size,
            num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=kv_dtype, device=device,
            scale="token_head" if kv_dtype in QUANT_MAX else "none",
        )  # fmt: skip
        self._max_pages = min(config.num_pages, -(-model.max_context // config.page_size))  # of a request
        self._steps: dict[int, DecodeStep] = {}  # by batch size
        self.begin()
        self._record_dir: Path | None = None  # the warm-up is not recorded
        self._warm_up()
        if config.record_dir:
            self._record_dir = Path(config.record_dir)
            self._record_dir.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """For another front: all pages are free."""
        self.allocator = pw.PageAllocator(self.config.num_pages)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """Of the model, 32 bytes."""
        return bytes.fromhex(fingerprint(Path(self.config.model), self.model.config))

    def problem(self, submit: Submit) -> str | None:
        """Why the request can never run here. The front checked the same before."""
        model = self.model.config
        num_tokens = len(submit.token_ids) + submit.max_tokens
        if not _REQUEST_ID.fullmatch(submit.request_id):
            return "expected a request id of 1 to 128 letters, digits, '_', '.' and '-'"
        if not submit.token_ids or submit.max_tokens < 1:
            return "expected at least one prompt token and max_tokens >= 1"
        if num_tokens > model.max_context:
            return f"the request needs {num_tokens} tokens, the context has {model.max_context}"
        if not 0 <= min(submit.token_ids) <= max(submit.token_ids) < model.vocab_size:
            return f"expected token ids in [0, {model.vocab_size})"
        return None

    def prefill(self, chunks: list[PromptChunk], on_layer: OnLayer = None) -> Tokens:
        """Computes the chunks' KV; the first token of every request whose prompt is complete."""
        num_chunks, ends = len(chunks), np.cumsum([chunk.stop - chunk.start for chunk in chunks])
        done = [chunk.stop == chunk.request.prompt_len for chunk in chunks]
        of_rows = dict.fromkeys(("token_ids", "positions", "slot_mapping"), (int(ends[-1]),))
        inputs = Inputs(
            self.model.device, **of_rows, page_table=(num_chunks, self._max_pages), seq_lens=(num_chunks,),
            cu_seqlens_q=(num_chunks + 1,), logit_rows=(sum(done),),
        )  # fmt: skip
        inputs.host["cu_seqlens_q"][1:] = ends
        inputs.host["logit_rows"][:] = ends[done] - 1
        on_device = inputs.upload(chunks, self.config.page_size)
        logits = self.model.forward(cache=self.cache, **on_device, on_layer=on_layer)  # [num_done, vocab_size]
        for chunk in chunks:
            chunk.request.num_computed = chunk.stop
        finished = [chunk.request for chunk, is_done in zip(chunks, done, strict=True) if is_done]
        tokens = self._sample(finished, logits)
        for request, token, row in zip(finished, tokens, logits, strict=True):
            if token is not None:
                self.record(request, "prefill", [row], [*request.submit.token_ids, token])
        return dict(zip(finished, tokens, strict=True))

    def decode(self, requests: list[RequestState], on_layer: OnLayer = None) -> list[int | None]:
        """The token after each request's last one, whose KV is written on the way."""
        batch_size = min(1 << (len(requests) - 1).bit_length(), self.config.max_batch_size)
        if batch_size not in self._steps:
            # the reference backend waits for the device, which a capture refuses
            captures = self.model.device.type == "cuda" and lookup("PAGEWIRE_BACKEND") != "reference"
            self._steps[batch_size] = DecodeStep(self.model, self.cache, batch_size, self._max_pages, captures)
        stops = [request.prompt_len + len(request.output) for request in requests]
        chunks = [PromptChunk(request, stop - 1, stop) for request, stop in zip(requests, stops, strict=True)]
        logits = self._steps[batch_size].run(chunks, on_layer)
        if self._record_dir:
            for request, row in zip(requests, logits, strict=True):
                request.logits.append(row.to("cpu", copy=True))
        return self._sample(requests, logits)

    def _sample(self, requests: list[RequestState], logits: Tensor) -> list[int | None]:
        """None for a row with NaN or infinity, which fails its own request only."""
        positions = [request.prompt_len + len(request.output) for request in requests]
        return sample(logits, [request.submit.sampling for request in requests], positions)

    def record(self, request: RequestState, phase: str, logits: list[Tensor], token_ids: list[int]) -> None:
        """If asked to, <request id>.<phase>.safetensors: logits fp32 [num_rows, vocab_size], token_ids int64.

        prefill: the logits after the prompt; the prompt, then the first token.
        decode: one row per step; the output tokens, the first one included.
        """
        if self._record_dir is None:
            return
        rows = torch.stack(logits).cpu() if logits else torch.empty(0, self.model.config.vocab_size, device="cpu")
        path = self._record_dir / f"{request.id}.{phase}.safetensors"
        save_file({"logits": rows.contiguous(), "token_ids": torch.tensor(token_ids, device="cpu")}, path)

    def _warm_up(self) -> None:
        """Both kinds of forward: a backend that refuses says so before Ready. On a GPU the longest prefill and a step
        of each batch size too: kernels are compiled and graphs captured before a client waits for them.
        """
        config, longest, most = self.config, 1, 1
        if self.model.device.type == "cuda":
            most = config.max_batch_size
            longest = min(config.prefill_chunk, self.model.config.max_context, self._max_pages * config.page_size)
        submit = Submit("", [0] * longest, 1, [], Sampling(temperature=1.0))
        request = RequestState(submit, 0, list(range(self._max_pages)))
        for stop in (1, longest):
            self.prefill([PromptChunk(request, 0, stop)])
        request = RequestState(Submit("", [], 1, [], Sampling()), 0, [0], output=[0])
        for n in range((most - 1).bit_length() + 1):
            self.decode([request] * min(1 << n, most))


def _device(name: str) -> torch.device:
    """Raises ValueError where there is no such GPU. The one that is taken is then the current one."""
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    device = torch.device("cuda", int(name.partition(":")[2] or 0))
    if device.index >= count:
        raise ValueError(f"device: expected cpu or one of the {count} GPUs that torch sees, got {name}")
    torch.cuda.set_device(device)
    return device
