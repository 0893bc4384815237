"""Which process computes which request, and what becomes of a request whose process is lost.

An attempt is one Submit to D, and to P where there is a link between them. When the process that holds it dies, or the
link that its KV travels on, a new attempt is made of the prompt and what was emitted so far: sampling depends on seed
and position alone, so the new one goes on where the old one was. A client notices a pause.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from pagewire.serve.front.openai import server_error
from pagewire.serve.front.output import Output
from pagewire.serve.front.worker import Worker
from pagewire.serve.messages import Cancel, Failed, Finished, Submit, Token

MAX_LOSSES = 3  # attempts in a row in which D emitted no token: such a request may be what kills the process
SUSPECT_LOSSES = 2  # from here on such requests are tried one at a time, so that they do not cost each other attempts


class _Place(NamedTuple):
    """Where an attempt is computed."""

    decode: Worker
    prefill: Worker | None  # None: D prefills it too
    submit: Submit  # what they were told

    @property
    def holders(self) -> tuple[Worker, ...]:
        """D comes first: it reserves before P writes."""
        return (self.decode, self.prefill) if self.prefill else (self.decode,)


class Routing:
    """The requests in flight, each with its attempt. `up` and `*_lost` say which processes there are."""

    def __init__(self, recover: bool, prefills: Callable[[Worker], Mapping[int, Worker]]) -> None:
        """prefills: by link, the P's that a D is joined with now."""
        self.num_recovered = 0
        self._recover = recover
        self._prefills = prefills
        self._decodes: list[Worker] = []  # that take requests
        self._outputs: dict[str, Output] = {}  # by their attempt's id
        self._places: dict[str, _Place] = {}  # what is not in here waits
        self._suspect = ""  # the attempt that is tried while others like it wait

    def up(self, decode: Worker) -> None:
        """D takes requests, with the P's that it is joined with or alone; what waits is handed out."""
        if decode not in self._decodes:
            self._decodes.append(decode)
        self._hand_out_waiting()

    def links_lost(self, links: set[int], reason: str) -> None:
        """What D decodes goes on; what D has not heard the last of is computed anew."""
        held = (i for i, place in self._places.items() if place.submit.link in links)
        self._again((i for i in held if self._outputs[i].needs_prefill), reason)

    def decode_lost(self, decode: Worker, reason: str) -> None:
        if decode in self._decodes:
            self._decodes.remove(decode)
        self._again((i for i, place in self._places.items() if place.decode is decode), reason)

    def submit(self, output: Output) -> None:
        self._outputs[output.attempt.request_id] = output
        self._hand_out(output)

    def cancel(self, attempt_id: str) -> None:
        if self._outputs.pop(attempt_id, None) is not None:
            self._withdraw(attempt_id)

    def receive(self, worker: Worker, message: Token | Finished | Failed) -> None:
        output = self._outputs.get(message.request_id)
        if output is None:
            return
        match message:
            case Token(_, index, token_id):
                output.on_token(index, token_id, joined=worker.role != "prefill")
            case Finished(_, reason, num_tokens):
                output.on_finished(reason, num_tokens)
            case Failed(attempt_id, text, True) if self._recover:
                return self._again([attempt_id], text, alone=True)
            case Failed(_, text):
                output.fail(server_error(text, status=500, code="request_failed"))
                return self.cancel(message.request_id)
        if output.outcome and self._outputs.pop(message.request_id, None) is not None:
            self._places.pop(message.request_id, None)
        if output.outcome or output.joined:
            self._cleared(message.request_id)

    def fail_all(self, reason: str) -> None:
        outputs, self._outputs, self._places, self._suspect = self._outputs, {}, {}, ""
        for output in outputs.values():
            output.fail(server_error(reason))

    def _again(self, attempt_ids: Iterable[str], reason: str, *, alone: bool = False) -> None:
        """New attempts for those that were lost. alone: without P, whose push has failed."""
        for attempt_id in list(attempt_ids):
            output = self._outputs.pop(attempt_id)
            self._withdraw(attempt_id)
            if output.restart():
                continue
            if not self._recover:
                output.fail(server_error(f"{reason} while it served this request"))
            elif output.num_losses >= MAX_LOSSES:
                given_up = f"given up after {MAX_LOSSES} attempts in which no token was decoded"
                output.fail(server_error(f"{given_up}: {reason}"))
            else:
                self.num_recovered += 1
                self._outputs[output.attempt.request_id] = output
                self._hand_out(output, alone=alone)

    def _hand_out(self, output: Output, *, alone: bool = False) -> None:
        attempt = output.attempt
        suspect = output.num_losses >= SUSPECT_LOSSES
        if not self._decodes or (suspect and self._suspect):
            return
        if suspect:
            self._suspect = attempt.request_id
        place = self._places[attempt.request_id] = self._least_loaded(attempt, alone)
        for worker in place.holders:
            worker.channel.send(place.submit)

    def _least_loaded(self, attempt: Submit, alone: bool) -> _Place:
        """By requests: a D counts all of its own, a P those whose prompts may still be on their way."""
        decoding = [place.decode for place in self._places.values()]
        decode = min(self._decodes, key=decoding.count)
        prefills = self._prefills(decode)
        if alone or not prefills:
            return _Place(decode, None, attempt)
        prefilling = [place.prefill for i, place in self._places.items() if self._outputs[i].needs_prefill]
        link = min(prefills, key=lambda link: prefilling.count(prefills[link]))
        return _Place(decode, prefills[link], msgspec.structs.replace(attempt, link=link))

    def _withdraw(self, attempt_id: str) -> None:
        if place := self._places.pop(attempt_id, None):
            for worker in place.holders:
                if not worker.channel.withdraw(place.submit):
                    worker.channel.send(Cancel(attempt_id))
        self._cleared(attempt_id)

    def _cleared(self, attempt_id: str) -> None:
        if attempt_id == self._suspect:
            self._suspect = ""
            self._hand_out_waiting()

    def _hand_out_waiting(self) -> None:
        for attempt_id, output in list(self._outputs.items()):
            if attempt_id not in self._places:
                self._hand_out(output)
