"""The life of a model process, from its arguments (`serve/config.py`) to its exit."""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Literal

import msgspec

from pagewire.net.channel import Channel, ChannelClosed, wait
from pagewire.serve.channel import WORKER_CODEC
from pagewire.serve.config import EXIT_BAD_CONFIG, KV_ADDRESSES, WorkerConfig
from pagewire.serve.messages import Shutdown
from pagewire.serve.worker.fronts import Front, listen

if TYPE_CHECKING:
    from pagewire.serve.worker.engine import Engine
    from pagewire.serve.worker.worker import Worker

LAST_WORD_S = 0.5  # how long the front may take to read what is left at the end
MAX_MESSAGES = 256  # of the front, a turn
_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pagewire.serve.worker")
    parser.add_argument("--role", required=True, choices=("prefill", "decode", "colocated"))
    parser.add_argument("--config-json", required=True)
    whence = parser.add_mutually_exclusive_group(required=True)
    whence.add_argument("--control-fd", type=int, help="of the front that started us")
    whence.add_argument("--listen", help="HOST:PORT for fronts, one after the other")
    args = parser.parse_args(argv)
    if args.listen is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's; it tells us
    try:
        ours = [_inherited(args.control_fd)] if args.listen is None else []
        config = msgspec.json.decode(args.config_json, type=WorkerConfig)
        config.check()
        fronts = ours or listen(args.role, args.listen, config)  # no model is needed to refuse an address
        if config.backend:
            os.environ["PAGEWIRE_BACKEND"] = config.backend
        from pagewire.serve.worker.engine import Engine

        engine = Engine(config)
        for front in fronts:
            _serve(args.role, engine, front)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        _say(f"{args.role}: {error}")
        return EXIT_BAD_CONFIG
    except ChannelClosed as closed:
        _say(f"{args.role}: {closed}, exiting")
    except KeyboardInterrupt:  # without a front nobody else is there to tell us
        return 130
    return 0


def serve(worker: "Worker", front: Channel) -> None:
    """Until Shutdown, or until the front is gone."""
    try:
        worker.send_ready(os.getpid())
        while (timeout_s := turn(worker, front)) is not None:
            wait([front], timeout_s, worker.peers.watched() if worker.peers else {})
        front.drain(LAST_WORD_S)
    except (ChannelClosed, msgspec.MsgspecError) as error:
        _say(f"{worker.role}: {error}")
    finally:
        front.close()
        if worker.peers:
            worker.peers.close()


def turn(worker: "Worker", front: Channel) -> float | None:
    """Some of what arrived, one step, what is due to be reported. Seconds to wait then; None: Shutdown."""
    for message in front.poll(MAX_MESSAGES):
        if isinstance(message, Shutdown):
            return None
        worker.on_front(message)
    worker.on_peers()
    worked = worker.step()
    timeout_s = worker.report()
    return 0 if worked or front.pending or (worker.peers and worker.peers.pending) else timeout_s


def die_with_front(control: socket.socket) -> None:
    """The kernel kills us when the front ends, even while we load a model or are stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    front_pid = struct.unpack("3i", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    if os.getppid() != front_pid:  # it ended before the kernel was told
        raise ChannelClosed(f"the front (pid {front_pid}) is not the parent (pid {os.getppid()})")


def _inherited(fd: int) -> Front:
    """From the front that started us. Raises ChannelClosed when it has ended."""
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"--control-fd: expected an AF_UNIX stream socket, got {sock.family!r}")
    os.set_inheritable(fd, False)
    die_with_front(sock)
    return Front(Channel(sock, WORKER_CODEC, name="the front"), "")


def _serve(role: Literal["prefill", "decode", "colocated"], engine: "Engine", front: Front) -> None:
    """Raises ValueError or OSError when the links that the config asks for cannot be."""
    from pagewire.serve.worker.decode import DecodeWorker
    from pagewire.serve.worker.peers import Peers
    from pagewire.serve.worker.prefill import PrefillWorker
    from pagewire.transfer.packing import new_hello

    config = engine.config
    engine.begin()
    if role == "colocated":
        return serve(DecodeWorker(engine, front.channel, None), front.channel)
    hello = new_hello(role, engine.cache, engine.fingerprint, config.kv_wire_dtype, tenant=config.tenant)
    if config.kv_transport == "cuda-ipc" and engine.cache.device.type != "cuda":
        raise ValueError(f"kv_transport: expected shm for caches on {engine.cache.device.type}, got cuda-ipc")
    peers = Peers(hello, engine.cache, config, front.kv_address or KV_ADDRESSES[config.kv_transport])
    serve((PrefillWorker if role == "prefill" else DecodeWorker)(engine, front.channel, peers), front.channel)


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(sentence, file=sys.stderr, flush=True)
