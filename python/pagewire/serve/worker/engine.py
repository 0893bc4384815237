"""The model, its page pool, and the two steps every worker is made of: prefill and decode."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import pagewire as pw
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Sampling, Submit
from pagewire.serve.model.fingerprint import fingerprint
from pagewire.serve.model.llama import Llama
from pagewire.serve.model.sampling import sample
from pagewire.types import QUANT_MAX

_REQUEST_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # also a file name when recording


@dataclass(eq=False)
class RequestState:
    """One request in one process: its prompt, its pages, and how far it is."""

    submit: Submit
    submitted_us: int
    pages: list[int]
    output: list[int] = field(default_factory=list)  # token ids the client gets
    num_computed: int = 0  # prompt tokens whose KV a prefill here has put into the cache
    started_us: int = 0  # start of the first prefill forward
    computed_us: int = 0  # the prompt's KV is complete here
    decoded_us: int = 0  # start of the first decode step
    pushed_us: int = 0  # P: start of the first push
    committed_us: int = 0  # P: the COMMIT left
    pushed_bytes: int = 0
    pack_us: int = 0
    logits: list[Tensor] = field(default_factory=list)  # recorded decode steps: fp32 [vocab_size]

    @property
    def id(self) -> str:
        return self.submit.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.submit.token_ids)


@dataclass(frozen=True)
class PromptChunk:
    """Prompt tokens [start, stop) of a request, in one forward."""

    request: RequestState
    start: int
    stop: int


def next_chunks(requests: Sequence[RequestState], max_tokens: int) -> list[PromptChunk]:
    """The next prompt tokens in FIFO order, at most `max_tokens` of them."""
    chunks = []
    for request in requests:
        if max_tokens == 0:
            break
        start = request.num_computed
        stop = min(request.prompt_len, start + max_tokens)
        chunks.append(PromptChunk(request, start, stop))
        max_tokens -= stop - start
    return chunks


class Engine:
    """A model over one page pool. Raises ValueError or BackendError when the config cannot work."""

    def __init__(self, config: WorkerConfig) -> None:
        config.check()
        torch.set_num_threads(config.num_threads)
        self.config = config
        dtype = getattr(torch, config.dtype)
        kv_dtype = getattr(torch, config.kv_dtype or config.dtype)
        self.model = Llama.load(config.model, dtype, "cpu")
        model = self.model.config
        self.cache = pw.PagedKVCache.allocate(
            num_layers=model.num_layers,
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=kv_dtype,
            device="cpu",
            scale="token_head" if kv_dtype in QUANT_MAX else "none",
        )
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
        return bytes.fromhex(fingerprint(self.config.model, self.model.config))

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

    def prefill(
        self, chunks: list[PromptChunk], on_layer: Callable[[int], None] | None = None
    ) -> dict[RequestState, int | None]:
        """Computes the chunks' KV; the first token of every request whose prompt is complete.

        None instead of a token: the model gave NaN for this request.
        """
        starts = [chunk.start for chunk in chunks]
        stops = [chunk.stop for chunk in chunks]
        lens = [chunk.stop - chunk.start for chunk in chunks]
        last_rows = torch.tensor(lens).cumsum(0) - 1
        done = [chunk.stop == chunk.request.prompt_len for chunk in chunks]
        rows = [self._page_row(chunk.request) for chunk in chunks]
        logits = self.model.forward(
            torch.tensor([t for c in chunks for t in c.request.submit.token_ids[c.start : c.stop]]),
            torch.cat([torch.arange(*span) for span in zip(starts, stops, strict=True)]),
            self.cache,
            slot_mapping=torch.cat(
                [
                    pw.page_slots(row, start, stop, self.config.page_size)
                    for row, start, stop in zip(rows, starts, stops, strict=True)
                ]
            ),
            page_table=_page_table(rows),
            seq_lens=torch.tensor(stops, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *(last_rows + 1).tolist()], dtype=torch.int32),
            logit_rows=last_rows[torch.tensor(done)],
            on_layer=on_layer,
        )  # [num_done, vocab_size]
        for chunk in chunks:
            chunk.request.num_computed = chunk.stop
        finished = [chunk.request for chunk, is_done in zip(chunks, done, strict=True) if is_done]
        tokens = self._sample(finished, logits)
        for request, token, row in zip(finished, tokens, logits, strict=True):
            if self._record_dir and token is not None:
                self._record(request, "prefill", [row], [*request.submit.token_ids, token])
        return dict(zip(finished, tokens, strict=True))

    def decode(self, requests: list[RequestState], on_layer: Callable[[int], None] | None = None) -> list[int | None]:
        """The token after each request's last one, whose KV is written on the way."""
        page_size = self.config.page_size
        positions = [r.prompt_len + len(r.output) - 1 for r in requests]
        slots = [r.pages[p // page_size] * page_size + p % page_size for r, p in zip(requests, positions, strict=True)]
        logits = self.model.forward(
            torch.tensor([r.output[-1] for r in requests]),
            torch.tensor(positions),
            self.cache,
            slot_mapping=torch.tensor(slots),
            page_table=_page_table([self._page_row(r) for r in requests]),
            seq_lens=torch.tensor(positions, dtype=torch.int32) + 1,
            cu_seqlens_q=None,
            logit_rows=torch.arange(len(requests)),
            on_layer=on_layer,
        )  # [batch_size, vocab_size]
        if self._record_dir:
            for request, row in zip(requests, logits, strict=True):
                request.logits.append(row.clone())
        return self._sample(requests, logits)

    def record_decode(self, request: RequestState) -> None:
        """Writes the logits of the request's decode steps and its output, if asked to."""
        if self._record_dir:
            self._record(request, "decode", request.logits, request.output)

    def _sample(self, requests: list[RequestState], logits: Tensor) -> list[int | None]:
        """A row with NaN fails its own request only."""
        good = (~logits.isnan().any(dim=-1)).nonzero().flatten().tolist()
        drawn = sample(
            logits[good],
            [requests[i].submit.sampling for i in good],
            [requests[i].prompt_len + len(requests[i].output) for i in good],
        )
        tokens: list[int | None] = [None] * len(requests)
        for i, token in zip(good, drawn, strict=True):
            tokens[i] = token
        return tokens

    def _record(self, request: RequestState, phase: str, logits: list[Tensor], token_ids: list[int]) -> None:
        """<request id>.<phase>.safetensors: logits fp32 [num_rows, vocab_size], token_ids int64.

        prefill: the logits after the prompt; the prompt, then the first token.
        decode: one row per step; the output tokens, the first one included.
        """
        assert self._record_dir is not None
        rows = torch.stack(logits) if logits else torch.empty(0, self.model.config.vocab_size)
        path = self._record_dir / f"{request.id}.{phase}.safetensors"
        save_file({"logits": rows.contiguous(), "token_ids": torch.tensor(token_ids)}, path)

    def _page_row(self, request: RequestState) -> Tensor:
        return torch.tensor(request.pages, dtype=torch.int32)

    def _warm_up(self) -> None:
        """One token through both kinds of forward: a backend that refuses says so before Ready."""
        request = RequestState(Submit("", [0], 2, [], Sampling()), submitted_us=0, pages=[0, 0])
        self.prefill([PromptChunk(request, 0, 1)])
        request.output = [0]
        self.decode([request])


def _page_table(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
