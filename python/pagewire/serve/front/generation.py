"""One HTTP request between admission and its end: its places in the queue, its choices, its record."""

import asyncio
import time
from collections.abc import AsyncIterator

import msgspec

from pagewire.serve.front import openai
from pagewire.serve.front.front import Front
from pagewire.serve.front.openai import Answer, ApiError, GenerationRequest, Usage
from pagewire.serve.front.output import Delta, Output
from pagewire.serve.messages import Event, Ready, Submit


class Generation:
    """Every choice of one request. Holds its places in the queue from `admit` to `close`."""

    def __init__(self, front: Front, request: GenerationRequest, arrived: float) -> None:
        self.front = front
        self.request = request
        self.arrived = arrived  # CLOCK_MONOTONIC seconds
        self.answer = Answer(bool(request.messages), front.model, request.include_usage)
        self.outputs: list[Output] = []
        self._sink: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        self._places = 0
        self._timer: asyncio.TimerHandle | None = None

    def admit(self) -> None:
        wanted, most = self.request.num_outputs, self.front.limits.max_inflight
        if self.front.num_inflight + wanted > most:
            raise ApiError(
                429,
                f"the queue is full: {self.front.num_inflight} of {most} places are taken and "
                f"this request needs {wanted}; try again later",
                type="rate_limit_error",
                code="queue_full",
            )
        self._places = wanted
        self.front.num_inflight += wanted

    async def submit(self) -> None:
        """Tokenises, checks the lengths, and hands every choice to the pair."""
        pair = self.front.supervisor.limits
        if pair is None:
            raise openai.server_error(self.front.supervisor.reason or "")
        prompts = await self._tokenise(pair)
        max_tokens = [self._max_tokens(prompt, pair) for prompt in prompts]
        for prompt in prompts:
            if max(prompt) >= pair.vocab_size:
                raise ApiError(
                    400,
                    f"prompt: expected token ids below {pair.vocab_size}, the vocabulary's size, got {max(prompt)}",
                    param="prompt",
                )
        stop_ids = [] if self.request.ignore_eos else sorted(self.front.tokenizer.eos_token_ids)
        self._timer = asyncio.get_running_loop().call_later(self.front.limits.request_timeout_s, self._expire)
        sampling = self.request.sampling
        for i, prompt in enumerate(prompts):
            for j in range(self.request.n):
                choice = len(self.outputs)
                seeded = msgspec.structs.replace(sampling, seed=(sampling.seed + j) & openai.MAX_SEED)
                submit = Submit(f"{self.answer.id}-{choice}", prompt, max_tokens[i], stop_ids, seeded)
                output = Output(
                    submit,
                    choice,
                    self.request.stop,
                    self.front.detokenizer(),
                    self._sink,
                    self.front.supervisor.cancel,
                )
                self.front.supervisor.submit(output)
                self.outputs.append(output)

    async def _tokenise(self, pair: Ready) -> list[list[int]]:
        tokenizer, request = self.front.tokenizer, self.request
        most_chars = pair.max_context * self.front.limits.max_chars_per_context_token
        chars = sum(len(m["content"]) for m in request.messages) or max(
            (len(p) for p in request.prompts if isinstance(p, str)), default=0
        )
        if chars > most_chars:
            raise self._too_long(
                f"this model's context is {pair.max_context} tokens, at most {most_chars} characters "
                f"of text; the prompt has {chars}"
            )
        if request.messages:

            def render() -> list[list[int]]:
                text = tokenizer.render_chat(request.messages, add_generation_prompt=True)
                return [tokenizer.encode(text, add_special_tokens=False)]

            try:
                return await asyncio.to_thread(render)
            except ValueError as error:  # the template refuses these messages
                raise ApiError(400, str(error), param="messages") from None
        if isinstance(request.prompts[0], str):
            texts = request.prompts
            return await asyncio.to_thread(
                lambda: [tokenizer.encode(str(text), add_special_tokens=True) for text in texts]
            )
        return request.prompts

    @property
    def _prompt_field(self) -> str:
        return "messages" if self.answer.chat else "prompt"

    def _too_long(self, message: str) -> ApiError:
        return ApiError(400, message, param=self._prompt_field, code="context_length_exceeded")

    def _max_tokens(self, prompt: list[int], pair: Ready) -> int:
        """Output tokens to reserve for. Raises ApiError when prompt and output can never fit."""
        if not prompt:
            raise ApiError(400, "prompt: expected at least one token, got an empty prompt", param=self._prompt_field)
        what, most = "context", pair.max_context
        if pair.pool_tokens < most:
            what, most = "KV pool", pair.pool_tokens
        room = most - len(prompt)
        if room < 1:
            raise self._too_long(
                f"this model's {what} holds {most} tokens; the prompt has {len(prompt)} and at least one more must fit"
            )
        limits = self.front.limits
        default = limits.default_max_chat_tokens if self.answer.chat else limits.default_max_tokens
        wanted = self.request.max_tokens or min(default, room)
        if wanted > room:
            raise self._too_long(
                f"this model's {what} holds {most} tokens; the request needs {len(prompt) + wanted} "
                f"({len(prompt)} in the prompt, {wanted} to generate)"
            )
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

    def usage(self) -> Usage:
        prompt = sum(len(output.submit.token_ids) for output in self.outputs[:: self.request.n])
        completion = sum(output.num_tokens for output in self.outputs)
        return Usage(prompt, completion, prompt + completion)

    def _expire(self) -> None:
        timeout_s = self.front.limits.request_timeout_s
        for output in self.outputs:
            output.fail(
                openai.server_error(f"the request did not end within {timeout_s:g} s", status=504, code="timeout")
            )
            self.front.supervisor.cancel(output.attempt.request_id)

    def close(self) -> None:
        """Cancels what still runs, gives the places back, and records what happened."""
        self.front.num_inflight -= self._places
        self._places = 0
        if self._timer:
            self._timer.cancel()
        for output in self.outputs:
            output.abandon()
            self._record(output)
        self.outputs = []

    def _record(self, output: Output) -> None:
        metrics, times = self.front.metrics, output.token_times
        metrics.requests.labels(output.outcome).inc()
        metrics.prompt_tokens.inc(len(output.submit.token_ids))
        metrics.output_tokens.inc(len(times))
        for before, after in zip(times, times[1:], strict=False):
            metrics.inter_token.observe(after - before)
        start_us = int(self.arrived * 1e6)
        args: dict[str, int | float | str] = {
            "outcome": output.outcome,
            "prompt_tokens": len(output.submit.token_ids),
            "output_tokens": len(times),
        }
        if times:
            metrics.ttft.observe(times[0] - self.arrived)
            args["ttft_us"] = int(times[0] * 1e6) - start_us
        duration_us = int(time.monotonic() * 1e6) - start_us
        self.front.events.add(Event("request", "front", start_us, duration_us, output.submit.request_id, args))
