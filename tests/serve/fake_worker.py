"""A worker without a model: every token is the one three places before it. For what only the front does.

FAKE_* in the environment set its pace and its misbehaviour, and a prompt that holds POISON kills the D that gets it.
"""

import argparse
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass

import msgspec

from pagewire.net.channel import Channel, ChannelClosed, wait
from pagewire.serve.channel import WORKER_CODEC
from pagewire.serve.config import EXIT_BAD_CONFIG, WorkerConfig
from pagewire.serve.messages import (
    Cancel,
    Event,
    Events,
    Failed,
    Finished,
    Gauges,
    Linked,
    Pair,
    Ready,
    Shutdown,
    Submit,
    Token,
    Unlinked,
)
from pagewire.serve.worker.process import die_with_front

VOCAB_SIZE = 320  # tiny.py's
POISON = 319
TOKEN_MS = float(os.environ.get("FAKE_TOKEN_MS", "1"))  # between two tokens of D
FIRST_TOKEN_MS = float(os.environ.get("FAKE_FIRST_TOKEN_MS", "0"))  # P's prefill
FAIL_AT = int(os.environ.get("FAKE_FAIL_AT", "-1"))  # D fails a request instead of sending this token


@dataclass
class Running:
    submit: Submit
    token_ids: list[int]  # prompt and output
    due: float

    @property
    def index(self) -> int:
        """Of the next token."""
        return len(self.token_ids) - len(self.submit.token_ids)

    def next(self) -> int:
        self.token_ids.append(self.token_ids[max(0, len(self.token_ids) - 3)])
        return self.token_ids[-1]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--role")
    parser.add_argument("--config-json")
    parser.add_argument("--control-fd", type=int)
    args = parser.parse_args()
    config = msgspec.json.decode(args.config_json, type=WorkerConfig)
    if os.path.exists(os.environ.get("FAKE_BAD_CONFIG", "")):
        print("model.safetensors: expected 100 bytes, got 50", file=sys.stderr)
        return EXIT_BAD_CONFIG
    sock = socket.socket(fileno=args.control_fd)
    die_with_front(sock)
    control = Channel(sock, WORKER_CODEC, name="front")
    time.sleep(float(os.environ.get("FAKE_START_MS", "0")) / 1000)
    control.send(Ready(args.role, os.getpid(), config.model, 512, config.pool_tokens, VOCAB_SIZE, "ab", "cd"))
    if os.path.exists(os.environ.get("FAKE_DIES", "")):
        return 7
    running: dict[str, Running] = {}
    progress = 0
    while True:
        due = min((r.due for r in running.values()), default=time.monotonic() + 1)
        wait([control], min(0.5, max(0.0, due - time.monotonic())))
        for message in control.poll():
            match message:
                case Pair(link):
                    misfit = os.environ.get("FAKE_MISFIT")
                    control.send(Unlinked(link, misfit) if misfit else Linked(link))
                case Submit():
                    first = args.role != "decode" or not message.link
                    if POISON in message.token_ids and args.role != "prefill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    pace = FIRST_TOKEN_MS if first else TOKEN_MS
                    item = Running(message, list(message.token_ids), time.monotonic() + pace / 1000)
                    if not first:
                        item.next()
                    running[message.request_id] = item
                case Cancel(request_id):
                    running.pop(request_id, None)
                    control.send(Finished(request_id, "cancelled", 0))
                case Shutdown():
                    return 0
        for request_id, item in list(running.items()):
            if item.due <= time.monotonic() and step(control, args.role, item):
                del running[request_id]
        pages = {"free": 9 - len(running), "active": len(running), "cached": 0, "leased": 0, "total": 9}
        progress += 1
        control.send(Gauges(pages, len(running), 0, progress))


def step(control: Channel, role: str, item: Running) -> bool:
    """Sends one token; True when this process is done with the request."""
    submit = item.submit
    if role == "prefill" and os.environ.get("FAKE_NO_HANDOFF"):
        control.send(Failed(submit.request_id, "CHUNK: payload CRC32C: expected 1, got 2", retry=True))
        return True
    if role != "prefill" and item.index == FAIL_AT:
        control.send(Failed(submit.request_id, "the fake ran out of luck"))
        return True
    if item.index < submit.max_tokens:
        control.send(Token(submit.request_id, item.index, item.next()))
        item.due = time.monotonic() + TOKEN_MS / 1000
    if role == "prefill":
        control.send(Events([Event("prefill", time.monotonic_ns() // 1000, 5, submit.request_id)]))
        return True
    if item.index >= submit.max_tokens:
        control.send(Finished(submit.request_id, "length", submit.max_tokens))
        return True
    return False


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ChannelClosed:
        sys.exit(0)
