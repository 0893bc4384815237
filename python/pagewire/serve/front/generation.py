"""One HTTP request between admission and its end: its places in the queue, its choices, its record."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from pagewire.serve.front import openai
from pagewire.serve.front.openai import Answer, ApiError, GenerationRequest, Limits
from pagewire.serve.front.output import Delta, Output, Sink, Text
from pagewire.serve.front.supervisor import Supervisor
from pagewire.serve.messages import Arg, Event, Ready, Submit


class Tokenizer(Protocol):
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def piece(self, token_id: int) -> bytes: ...
    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str: ...


@dataclass
class Front:
    """What all requests share: the model's name, its tokenizer, and the model processes."""

    model: str
    tokenizer: Tokenizer
    limits: Limits
    supervisor: Supervisor
    num_inflight: int = 0
    created: int = field(default_factory=lambda: int(time.time()))


class Generation:
    """Every choice of one request. Holds its places in the queue from `admit` to `close`."""

    def __init__(self, front: Front, request: GenerationRequest, arrived: float) -> None:
        self.front = front
        self.request = request
        self.arrived = arrived  # CLOCK_MONOTONIC seconds
        options = request.stream_options
        self.answer = Answer(bool(request.messages), front.model, options is not None and options.include_usage)
        self.outputs: list[Output] = []
        self._sink: Sink = asyncio.Queue()
        self._prompt_field = "messages" if self.answer.chat else "prompt"
        self._timer: asyncio.TimerHandle | None = None

    def admit(self) -> None:
        wanted, most, taken = self.request.num_outputs, self.front.limits.max_inflight, self.front.num_inflight
        if taken + wanted > most:
            full = f"the queue is full: {taken} of {most} places are taken and this request needs {wanted}"
            raise ApiError(429, f"{full}; try again later", code="queue_full")
        self.front.num_inflight += wanted

    async def submit(self) -> None:
        """Tokenises, checks the lengths, and hands every choice to the pair."""
        pair = self.front.supervisor.limits
        if pair is None:
            raise openai.server_error(self.front.supervisor.reason or "")
        prompts = await self._tokenise(pair)
        max_tokens = [self._max_tokens(prompt, pair) for prompt in prompts]
        tokenizer = self.front.tokenizer
        stop_ids = [] if self.request.ignore_eos else sorted(tokenizer.eos_token_ids)
        self._timer = asyncio.get_running_loop().call_later(self.front.limits.request_timeout_s, self._expire)
        sampling = self.request.sampling
        for choice in range(self.request.num_outputs):
            i, j = divmod(choice, self.request.n)
            seeded = msgspec.structs.replace(sampling, seed=(sampling.seed + j) & openai.MAX_SEED)
            submit = Submit(f"{self.answer.id}-{choice}", prompts[i], max_tokens[i], stop_ids, seeded)
            text, cancel = Text(tokenizer.piece, self.request.stops), self.front.supervisor.routing.cancel
            output = Output(submit, choice, text, self._sink, cancel)
            self.front.supervisor.submit(output)
            self.outputs.append(output)

    async def _tokenise(self, pair: Ready) -> list[list[int]]:
        tokenizer, request = self.front.tokenizer, self.request
        most_chars = pair.max_context * self.front.limits.max_chars_per_context_token
        texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
        chars = sum(len(m["content"]) for m in request.messages) or max(map(len, texts), default=0)
        if chars > most_chars:
            most = f"this model's context is {pair.max_context} tokens, at most {most_chars} characters of text"
            raise self._too_long(f"{most}; the prompt has {chars}")

        def encode() -> list[list[int]]:
            if not request.messages:
                return [tokenizer.encode(text, add_special_tokens=True) for text in texts]
            text = tokenizer.render_chat(request.messages, add_generation_prompt=True)
            return [tokenizer.encode(text, add_special_tokens=False)]

        try:
            return await asyncio.to_thread(encode) if texts or request.messages else request.prompts
        except ValueError as error:  # the template refuses these messages
            raise ApiError(400, str(error), self._prompt_field) from None

    def _too_long(self, message: str) -> ApiError:
        return ApiError(400, message, self._prompt_field, "context_length_exceeded")

    def _max_tokens(self, prompt: list[int], pair: Ready) -> int:
        """Output tokens to reserve for. Raises ApiError when prompt and output can never fit."""
        openai.expect(bool(prompt), self._prompt_field, "expected at least one token, got an empty prompt")
        vocabulary = f"token ids below {pair.vocab_size}, the vocabulary's size"
        openai.expect(max(prompt) < pair.vocab_size, "prompt", f"expected {vocabulary}, got {max(prompt)}")
        what, most = min(("context", pair.max_context), ("KV pool", pair.pool_tokens), key=lambda told: told[1])
        room = most - len(prompt)
        holds = f"this model's {what} holds {most} tokens"
        if room < 1:
            raise self._too_long(f"{holds}; the prompt has {len(prompt)} and at least one more must fit")
        limits = self.front.limits
        default = limits.default_max_chat_tokens if self.answer.chat else limits.default_max_tokens
        wanted = self.request.max_tokens or min(default, room)
        if wanted > room:
            needs = f"{len(prompt) + wanted} ({len(prompt)} in the prompt, {wanted} to generate)"
            raise self._too_long(f"{holds}; the request needs {needs}")
        return wanted

    async def deltas(self) -> AsyncIterator[Delta]:
        """Until the last choice ended. Raises ApiError if one failed."""
        left = len(self.outputs)
        while left:
            item = await self._sink.get()
            if isinstance(item, ApiError):
                raise item
            left -= item.reason is not None
            yield item

    async def whole(self) -> tuple[list[str], list[str]]:
        """Each choice's text, and why it ended."""
        texts, reasons = [""] * len(self.outputs), [""] * len(self.outputs)
        async for delta in self.deltas():
            texts[delta.choice] += delta.text
            reasons[delta.choice] = delta.reason or ""
        return texts, reasons

    def usage(self) -> dict[str, int]:
        prompt = sum(len(output.submit.token_ids) for output in self.outputs[:: self.request.n])
        completion = sum(output.num_tokens for output in self.outputs)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _expire(self) -> None:
        message = f"the request did not end within {self.front.limits.request_timeout_s:g} s"
        for output in self.outputs:
            output.fail(openai.server_error(message, status=504, code="timeout"))
            self.front.supervisor.routing.cancel(output.attempt.request_id)

    def close(self) -> None:
        """Once: cancels what still runs, gives the places back, and records what happened."""
        self.front.num_inflight -= self.request.num_outputs
        if self._timer:
            self._timer.cancel()
        for output in self.outputs:
            output.abandon()
            self._record(output)

    def _record(self, output: Output) -> None:
        supervisor, times = self.front.supervisor, output.token_times
        metrics, num_prompt = supervisor.metrics, len(output.submit.token_ids)
        metrics.requests.labels(output.outcome).inc()
        metrics.prompt_tokens.inc(num_prompt)
        metrics.output_tokens.inc(len(times))
        for before, after in zip(times, times[1:], strict=False):
            metrics.inter_token.observe(after - before)
        start_us = int(self.arrived * 1e6)
        args: dict[str, Arg] = {"outcome": output.outcome, "prompt_tokens": num_prompt, "output_tokens": len(times)}
        if times:
            metrics.ttft.observe(times[0] - self.arrived)
            args["ttft_us"] = int(times[0] * 1e6) - start_us
        duration_us = int(time.monotonic() * 1e6) - start_us
        supervisor.events.add(Event("request", start_us, duration_us, output.submit.request_id, args, "front"))
