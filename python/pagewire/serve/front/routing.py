"""Which process computes which request, and what becomes of a request whose process is lost.

An attempt is one Submit to D, and to P where there is a link between them. When the process that holds it dies, or the
link that its KV travels on, a new attempt is made of the prompt and what was emitted so far: sampling depends on seed
and position alone, so the new one goes on where the old one was. A client notices a pause.
"""

from collections.abc import Iterable

import msgspec

from pagewire.serve.front.openai import server_error
from pagewire.serve.front.output import Output
from pagewire.serve.front.process import WorkerProcess
from pagewire.serve.messages import Cancel, Failed, Finished, Submit, Token, WorkerMessage

MAX_LOSSES = 3  # attempts in a row in which D emitted no token: such a request may be what kills the process
SUSPECT_LOSSES = 2  # from here on such requests are tried one at a time, so that they do not cost each other attempts


class Routing:
    """The requests in flight, each with its attempt. `up` and `*_lost` say which processes there are."""

    def __init__(self, recover: bool) -> None:
        self.num_recovered = 0
        self._recover = recover
        self._decode: WorkerProcess | None = None
        self._prefill: WorkerProcess | None = None  # linked to `_decode`
        self._link = 0
        self._outputs: dict[str, Output] = {}  # by their attempt's id
        self._holders: dict[str, tuple[WorkerProcess, ...]] = {}  # (D) or (D, P); what is not in here waits
        self._suspect = ""  # the attempt that is tried while others like it wait

    def up(self, decode: WorkerProcess, prefill: WorkerProcess | None, link: int) -> None:
        """What waits goes to these; link 0: D is alone."""
        self._decode, self._prefill, self._link = decode, prefill, link
        self._hand_out_waiting()

    def prefill_lost(self, reason: str) -> None:
        """P or its link is gone. What D decodes goes on; what D has not heard the last of is computed by D."""
        self._prefill, self._link = None, 0
        lost = [i for i, holders in self._holders.items() if len(holders) == 2 and self._outputs[i].needs_prefill]
        self._again(lost, reason)

    def decode_lost(self, reason: str) -> None:
        self._decode = self._prefill = None
        self._again(list(self._holders), reason)

    def submit(self, output: Output) -> None:
        self._outputs[output.attempt.request_id] = output
        self._hand_out(output)

    def cancel(self, attempt_id: str) -> None:
        if self._outputs.pop(attempt_id, None) is not None:
            self._withdraw(attempt_id)

    def receive(self, worker: WorkerProcess, message: WorkerMessage) -> None:
        match message:
            case Token(attempt_id, index, token_id):
                if output := self._outputs.get(attempt_id):
                    output.on_token(index, token_id, joined=worker.role != "prefill")
                    self._forget_ended(output)
                    if output.joined:
                        self._cleared(attempt_id)
            case Finished(attempt_id, reason, num_tokens):
                if output := self._outputs.get(attempt_id):
                    output.on_finished(reason, num_tokens)
                    self._forget_ended(output)
            case Failed(attempt_id, text, retry):
                if attempt_id in self._outputs and retry and self._recover:
                    self._again([attempt_id], text, alone=True)
                elif output := self._outputs.get(attempt_id):
                    output.fail(server_error(text, status=500, code="request_failed"))
                    self.cancel(attempt_id)

    def fail_all(self, reason: str) -> None:
        outputs, self._outputs, self._holders, self._suspect = self._outputs, {}, {}, ""
        for output in outputs.values():
            output.fail(server_error(reason))

    def _again(self, attempt_ids: Iterable[str], reason: str, *, alone: bool = False) -> None:
        """New attempts for those that were lost. alone: without P, whose push has failed."""
        for attempt_id in attempt_ids:
            output = self._outputs.pop(attempt_id)
            self._withdraw(attempt_id)
            if output.restart():
                continue
            if not self._recover:
                output.fail(server_error(f"{reason} while it served this request"))
            elif output.num_losses >= MAX_LOSSES:
                output.fail(
                    server_error(f"given up after {MAX_LOSSES} attempts in which no token was decoded: {reason}")
                )
            else:
                self.num_recovered += 1
                self._outputs[output.attempt.request_id] = output
                self._hand_out(output, alone=alone)

    def _hand_out(self, output: Output, *, alone: bool = False) -> None:
        """D comes first: it reserves before P writes."""
        attempt = output.attempt
        if self._decode is None:
            return
        if output.num_losses >= SUSPECT_LOSSES:
            if self._suspect:
                return
            self._suspect = attempt.request_id
        if self._prefill is None or alone:
            self._holders[attempt.request_id] = (self._decode,)
            self._decode.channel.send(attempt)
            return
        holders = self._holders[attempt.request_id] = (self._decode, self._prefill)
        for worker in holders:
            worker.channel.send(msgspec.structs.replace(attempt, link=self._link))

    def _withdraw(self, attempt_id: str) -> None:
        def unsent(message: object) -> bool:
            return isinstance(message, Submit) and message.request_id == attempt_id

        for worker in self._holders.pop(attempt_id, ()):
            if not worker.channel.withdraw(unsent):
                worker.channel.send(Cancel(attempt_id))
        self._cleared(attempt_id)

    def _forget_ended(self, output: Output) -> None:
        if output.outcome and self._outputs.pop(output.attempt.request_id, None) is not None:
            self._holders.pop(output.attempt.request_id, None)
            self._cleared(output.attempt.request_id)

    def _cleared(self, attempt_id: str) -> None:
        if attempt_id == self._suspect:
            self._suspect = ""
            self._hand_out_waiting()

    def _hand_out_waiting(self) -> None:
        for attempt_id, output in list(self._outputs.items()):
            if attempt_id not in self._holders:
                self._hand_out(output)
