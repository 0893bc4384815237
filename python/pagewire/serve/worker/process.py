"""The life of a model process, from its arguments (`serve/config.py`) to its exit."""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING

import msgspec

from pagewire.serve.channel import WORKER_CODEC
from pagewire.serve.config import EXIT_BAD_CONFIG, WorkerConfig
from pagewire.serve.messages import Shutdown
from pagewire.transfer.channel import Channel, ChannelClosed, wait

if TYPE_CHECKING:
    from pagewire.serve.worker.worker import Worker

LAST_WORD_S = 0.5  # how long the front may take to read what is left at the end
MAX_MESSAGES = 256  # of the front, a turn
_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pagewire.serve.worker")
    parser.add_argument("--role", required=True, choices=("prefill", "decode", "colocated"))
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's; it tells us
    try:
        worker, front = _start(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        _say(f"{args.role}: {error}")
        return EXIT_BAD_CONFIG
    except ChannelClosed as closed:
        _say(f"{args.role}: {closed}, exiting")
        return 0
    return serve(worker, front)


def serve(worker: "Worker", front: Channel) -> int:
    """The process's loop; returns its exit code."""
    try:
        while (timeout_s := turn(worker, front)) is not None:
            wait([front], timeout_s, worker.peer.watched() if worker.peer else {})
        front.drain(LAST_WORD_S)
    except ChannelClosed:
        _say(f"{worker.role}: the front closed, exiting")
    return 0


def turn(worker: "Worker", front: Channel) -> float | None:
    """Some of what arrived, one step, what is due to be reported. Seconds to wait then; None: Shutdown."""
    for message in front.poll(MAX_MESSAGES):
        if isinstance(message, Shutdown):
            return None
        worker.on_front(message)
    worker.on_peer()
    worked = worker.step()
    timeout_s = worker.report()
    return 0 if worked or front.pending or (worker.peer and worker.peer.pending) else timeout_s


def die_with_front(control: socket.socket) -> None:
    """The kernel kills us when the front ends, even while we load a model or are stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    front_pid = struct.unpack("3i", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    if os.getppid() != front_pid:  # it ended before the kernel was told
        raise ChannelClosed(f"the front (pid {front_pid}) is not the parent (pid {os.getppid()})")


def _start(args: argparse.Namespace) -> tuple["Worker", Channel]:
    """Raises ValueError, TypeError, OSError or RuntimeError when the config cannot work."""
    control = _unix_socket(args.control_fd, "--control-fd")
    die_with_front(control)
    config = msgspec.json.decode(args.config_json, type=WorkerConfig)
    config.check()
    front = Channel(control, WORKER_CODEC, name="the front")
    if config.backend:
        os.environ["PAGEWIRE_BACKEND"] = config.backend
    from pagewire.serve.worker.engine import Engine  # the model is not needed to refuse a config

    engine = Engine(config)

    from pagewire.serve.model.fingerprint import fingerprint
    from pagewire.serve.worker.decode import DecodeWorker
    from pagewire.serve.worker.peer import Peer
    from pagewire.serve.worker.prefill import PrefillWorker
    from pagewire.transfer.packing import Packing, new_hello

    worker: Worker
    if args.role == "colocated":
        worker = DecodeWorker(engine, front, Packing(engine.cache, bytes(32)).wire, None)
    else:
        digest = bytes.fromhex(fingerprint(config.model, engine.model.config))
        peer = Peer(new_hello(args.role, engine.cache, digest, config.kv_wire_dtype), engine.cache, config)
        if args.role == "prefill":
            worker = PrefillWorker(engine, front, peer)
        else:
            worker = DecodeWorker(engine, front, peer.packing.wire, peer)
    worker.send_ready(os.getpid())
    return worker, front


def _unix_socket(fd: int, option: str) -> socket.socket:
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"{option}: expected an AF_UNIX stream socket, got {sock.family!r}")
    os.set_inheritable(fd, False)
    return sock


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(sentence, file=sys.stderr, flush=True)
