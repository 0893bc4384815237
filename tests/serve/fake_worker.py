"""A worker without a model: output token i of a prompt is prompt[i % len(prompt)]. For what only the front does.

FAKE_* in the environment set its pace and its misbehaviour; the last word of the prompt does not.
"""

import argparse
import os
import socket
import sys
import time
from dataclasses import dataclass

import msgspec

from pagewire.serve.channel import WORKER_CODEC, Channel, ChannelClosed, wait
from pagewire.serve.config import EXIT_BAD_CONFIG, EXIT_PEER_LOST, WorkerConfig
from pagewire.serve.messages import Cancel, Event, Events, Failed, Finished, Gauges, Ready, Shutdown, Submit, Token

VOCAB_SIZE = 320  # tiny.py's
TOKEN_MS = float(os.environ.get("FAKE_TOKEN_MS", "1"))  # between two tokens of D
FIRST_TOKEN_MS = float(os.environ.get("FAKE_FIRST_TOKEN_MS", "0"))  # P's prefill
FAIL_AT = int(os.environ.get("FAKE_FAIL_AT", "-1"))  # D fails a request instead of sending this token


@dataclass
class Running:
    submit: Submit
    index: int  # of the next token
    due: float


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--role")
    parser.add_argument("--config-json")
    parser.add_argument("--control-fd", type=int)
    parser.add_argument("--peer-fd", type=int)
    args = parser.parse_args()
    config = msgspec.json.decode(args.config_json, type=WorkerConfig)
    if os.environ.get("FAKE_BAD_CONFIG"):
        print("model.safetensors: expected 100 bytes, got 50", file=sys.stderr)
        return EXIT_BAD_CONFIG
    control = Channel(socket.socket(fileno=args.control_fd), WORKER_CODEC, name="front")
    channels = [control]
    if args.peer_fd is not None:
        channels.append(Channel(socket.socket(fileno=args.peer_fd), WORKER_CODEC, name="peer"))
    time.sleep(float(os.environ.get("FAKE_START_MS", "0")) / 1000)
    control.send(Ready(args.role, os.getpid(), config.model, 512, config.pool_tokens, VOCAB_SIZE))
    if os.environ.get("FAKE_DIES"):
        return 7
    running: dict[str, Running] = {}
    while True:
        due = min((r.due for r in running.values()), default=time.monotonic() + 1)
        wait(channels, max(0.0, due - time.monotonic()))
        for channel in channels[1:]:
            try:
                channel.poll()
            except ChannelClosed:
                return EXIT_PEER_LOST
        for message in control.poll():
            match message:
                case Submit():
                    first = args.role != "decode"
                    pace = FIRST_TOKEN_MS if first else TOKEN_MS
                    running[message.request_id] = Running(message, 0 if first else 1, time.monotonic() + pace / 1000)
                case Cancel(request_id):
                    running.pop(request_id, None)
                    control.send(Finished(request_id, "cancelled", 0))
                case Shutdown():
                    return 0
        for request_id, item in list(running.items()):
            if item.due <= time.monotonic() and step(control, args.role, item):
                del running[request_id]
        pages = {"free": 9 - len(running), "active": len(running), "cached": 0, "leased": 0, "total": 9}
        control.send(Gauges(args.role, pages, len(running), 0))


def step(control: Channel, role: str, item: Running) -> bool:
    """Sends one token; True when this process is done with the request."""
    submit = item.submit
    if role != "prefill" and item.index == FAIL_AT:
        control.send(Failed(submit.request_id, "the fake ran out of luck"))
        return True
    if item.index < submit.max_tokens:
        control.send(Token(submit.request_id, item.index, submit.token_ids[item.index % len(submit.token_ids)]))
        item.index += 1
        item.due = time.monotonic() + TOKEN_MS / 1000
    if role == "prefill":
        control.send(Events([Event("prefill", role, time.monotonic_ns() // 1000, 5, submit.request_id)]))
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
