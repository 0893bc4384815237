"""D: grants pages, takes the KV that P pushes or computes it, then decodes every running request in one batch.

Without a peer it is the colocated process: the baseline.
"""

import hashlib
import secrets
import time

from pagewire.net.channel import Channel
from pagewire.serve.messages import Submit
from pagewire.serve.worker.engine import Engine, RequestState
from pagewire.serve.worker.peers import Link, Peers
from pagewire.serve.worker.steps import Decoding, describe
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Worker
from pagewire.transfer.actions import Action, Share, Start, Unpack
from pagewire.transfer.packing import held
from pagewire.transfer.receiver import Receiver


class DecodeWorker(Worker):
    def __init__(self, engine: Engine, front: Channel, peers: Peers | None) -> None:
        self._receiver = Receiver(
            engine.allocator, engine.config.page_size, (held(engine.cache),),
            vocab_size=engine.model.config.vocab_size, max_waiting=engine.config.max_waiting,
            timeout_ms=engine.config.handoff_timeout_ms,
            now_ms=lambda: int(time.monotonic() * 1000),
            new_capability=lambda: secrets.token_bytes(16),
        )  # fmt: skip
        super().__init__(engine, front, "decode" if peers else "colocated", peers, self._receiver)
        self._decoding = Decoding(self)
        self.batches.append(self._decoding.requests)

    def admit(self, submit: Submit) -> list[Action]:
        num_tokens = len(submit.token_ids) + submit.max_tokens
        problem, links = self.engine.problem(submit), (submit.link,) if submit.link else ()
        return self._receiver.submit(submit.request_id, tuple(submit.token_ids), num_tokens, problem, links=links)

    def linked(self, link: Link) -> None:
        self._receiver.link(link.number, link.packing.wire, link.staging.num_staging_slots)

    def step(self) -> bool:
        """A chunk of prompts, then a token for everything that runs."""
        self.do(self._receiver.tick())
        worked = any(self.batches)
        for work in (self.prefilling, self._decoding):
            for request, ending in work.step() if work.requests else ():
                if ending:
                    self.end(request, ending, self._receiver.release)
                else:
                    self._decoding.requests.append(request)
        return worked

    def carry_out(self, action: Action) -> None:
        match action:
            case Unpack():
                self.do(self._receiver.unpacked(action, self._unpack(action)))
            case Start():
                self._start(action)
            case _:
                super().carry_out(action)

    def _unpack(self, unpack: Unpack) -> str | None:
        """Returns why the payload is not in the pages."""
        assert self.peers is not None
        start_us, chunk = now_us(), unpack.chunk
        if (link := self.peers.links.get(unpack.link)) is None:  # since this turn began
            self.do(self._receiver.lost(unpack.link))
            return "the link is lost"
        try:
            staging, shared = link.staging.staging_slot(chunk.slot), not link.transport.payload_follows
            problem = link.packing.unpack(chunk, unpack.pages, staging, shared=shared)
        except Exception as error:
            problem = describe(error)
        if not problem:
            args = {"layer": chunk.layer_start, "bytes": chunk.payload_bytes}
            self.timeline.add("unpack", start_us, None, chunk.request_id, **args)
        return problem

    def _start(self, start: Start) -> None:
        submit, _ = self._submits[start.request_id]
        if not all(self._same_digests(start, share) for share in start.shares if share.commit.digests):
            self.do(self._receiver.fail(start.request_id, "D's KV differs from P's"), retry=False)
            return
        request = RequestState(submit, now_us(), start.pages, output=[start.first_token])
        self.requests[submit.request_id] = request
        self._decoding.requests.append(request)

    def _same_digests(self, start: Start, share: Share) -> bool:
        start_us = now_us()
        assert self.peers is not None
        ours = self.peers.links[share.link].digests(start.pages, share.reserve)
        p_sha256, d_sha256 = (hashlib.sha256(b"".join(digests)).hexdigest() for digests in (share.commit.digests, ours))
        equal = p_sha256 == d_sha256
        self.timeline.add(
            "kv_verify", start_us, None, start.request_id, p_sha256=p_sha256, d_sha256=d_sha256, equal=int(equal)
        )
        return equal
