"""From a worker's tokens to a client's text: order, detokenise, watch for stop strings, end exactly once."""

import asyncio
import codecs
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from pagewire.serve.front.openai import ApiError, server_error
from pagewire.serve.messages import Submit


class Delta(NamedTuple):
    """A piece of one choice; the one with a `reason` is its last."""

    choice: int
    text: str
    reason: str | None  # "stop" | "length"


Sink = asyncio.Queue[Delta | ApiError]


class Text:
    """Of one output, as its tokens come. Bytes of an unfinished character, and text that may be the beginning of a
    stop string, are held back; what is no UTF-8 becomes U+FFFD.
    """

    def __init__(self, piece: Callable[[int], bytes], stops: tuple[str, ...] = ()) -> None:
        """piece: the bytes that a token adds, in constant time, whatever came before."""
        self._piece, self._stops = piece, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that may be sent now, and whether a stop string was met (it and what follows is dropped)."""
        return self._watch(self._decoder.decode(self._piece(token_id)))

    def finish(self) -> tuple[str, bool]:
        """As `push`: all that is left."""
        text, matched = self._watch(self._decoder.decode(b"", final=True))
        return (text if matched else text + self._held), matched

    def _watch(self, text: str) -> tuple[str, bool]:
        held = self._held + text
        ends = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self._held = ""
            return held[: min(ends)], True
        longest = min(len(held), max(map(len, self._stops), default=0))
        keep = next((n for n in range(longest, 0, -1) if any(stop.startswith(held[-n:]) for stop in self._stops)), 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False


class Output:
    """One choice of an answer, fed by `Routing`, drained by the HTTP handler through `sink`.

    `submit` is what the client asked for, `attempt` what the model processes compute of it now: after a loss, the rest.
    """

    def __init__(self, submit: Submit, choice: int, text: Text, sink: Sink, cancel: Callable[[str], None]) -> None:
        self.submit = self.attempt = submit
        self.joined = False  # D has emitted a token of the attempt: it needs no P
        self.num_attempts = 1
        self.num_losses = 0  # attempts in a row that were lost before D emitted a token
        self.choice = choice
        self.outcome = ""  # "stop" | "length" | "cancelled" | "failed", once it ended
        self.token_times: list[float] = []  # one per token taken in order, CLOCK_MONOTONIC seconds
        self._sink = sink
        self._cancel = cancel
        self._text = text
        self._token_ids: list[int] = []  # emitted in order
        self._early: dict[int, int] = {}  # tokens that overtook an earlier one, by index
        self._last: tuple[str, int] | None = None  # (reason, num_tokens) of Finished

    @property
    def num_tokens(self) -> int:
        return len(self.token_times)

    @property
    def needs_prefill(self) -> bool:
        """Whether P's part of the attempt is not known to be over: D has it, and its first token is here."""
        return not self.joined or self.num_tokens == self._num_before

    @property
    def _num_before(self) -> int:
        """Tokens that earlier attempts emitted: the end of this one's prompt."""
        return len(self.attempt.token_ids) - len(self.submit.token_ids)

    def restart(self) -> bool:
        """The attempt is lost: the next one begins behind what was emitted. True: nothing is left to compute."""
        if self.num_tokens >= self.submit.max_tokens:
            self._last = ("length", self.num_tokens)
            self._maybe_finish()
            return True
        self.num_losses = 0 if self.joined else self.num_losses + 1
        self.num_attempts += 1
        self.joined, self._last = False, None
        self._early.clear()
        self.attempt = msgspec.structs.replace(
            self.submit,
            request_id=f"{self.submit.request_id}.{self.num_attempts}",
            token_ids=[*self.submit.token_ids, *self._token_ids],
            max_tokens=self.submit.max_tokens - self.num_tokens,
        )
        return False

    def on_token(self, index: int, token_id: int, *, joined: bool = True) -> None:
        """Tokens come from two processes: they may overtake each other; a repeated index is dropped.

        Args:
            index: of the attempt's output. joined: it comes from the process that decodes.
        """
        index += self._num_before
        self.joined = self.joined or joined
        if self.outcome or index < self.num_tokens or index in self._early:
            return
        self._early[index] = token_id
        while not self.outcome and self.num_tokens in self._early:
            token = self._early.pop(self.num_tokens)
            self._token_ids.append(token)
            self.token_times.append(time.monotonic())
            text, matched = self._text.push(token)
            if matched:
                self._end("stop", text)
                self._cancel(self.attempt.request_id)
            elif text:
                self._sink.put_nowait(Delta(self.choice, text, None))
        self._maybe_finish()

    def on_finished(self, reason: str, num_tokens: int) -> None:
        if reason not in ("stop", "length"):
            return self.fail(server_error(f"the request was {reason} by the model process"))
        self._last = (reason, self._num_before + num_tokens)
        self._maybe_finish()

    def _maybe_finish(self) -> None:
        """Finished may come from D before P's first token was read: wait for every token it counted."""
        if self.outcome or self._last is None or self.num_tokens < self._last[1]:
            return
        text, matched = self._text.finish()
        self._end("stop" if matched else self._last[0], text)

    def fail(self, error: ApiError) -> None:
        if not self.outcome:
            self.outcome = "failed"
            self._sink.put_nowait(error)

    def abandon(self) -> None:
        """The client is gone: nobody reads the sink."""
        if not self.outcome:
            self.outcome = "cancelled"
            self._cancel(self.attempt.request_id)

    def _end(self, reason: str, text: str) -> None:
        self.outcome = reason
        self._sink.put_nowait(Delta(self.choice, text, reason))
