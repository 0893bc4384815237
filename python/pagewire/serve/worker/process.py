"""The life of a model process, from its arguments (`serve/config.py`) over the handshake with its peer to its exit."""

import argparse
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from pagewire.serve.channel import WORKER_CODEC, Channel, ChannelClosed, Codec, receive, wait
from pagewire.serve.config import EXIT_BAD_CONFIG, EXIT_PEER_LOST, WorkerConfig
from pagewire.serve.messages import Shutdown
from pagewire.transfer import frames
from pagewire.transfer.codec import ConnectionLost, FrameCodec
from pagewire.transfer.handoff import HELLO_FIELDS, Wire

if TYPE_CHECKING:
    from pagewire.serve.worker.worker import Worker
    from pagewire.transfer.packing import Packing
    from pagewire.transfer.shm import Arena

HELLO_TIMEOUT_S = 600.0  # the other side may still be loading its model
LAST_WORD_S = 0.5  # when the peer goes, how long the front may take to say that this was intended


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pagewire.serve.worker")
    parser.add_argument("--role", required=True, choices=("prefill", "decode", "colocated"))
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--peer-fd", type=int)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's; it tells us
    try:
        worker, front, peer = _start(args)
    except ChannelClosed as closed:
        _say(f"{args.role}: {closed}")
        return EXIT_PEER_LOST
    except (ValueError, TypeError, OSError, RuntimeError, ConnectionLost) as error:
        _say(f"{args.role}: {error}")
        return EXIT_BAD_CONFIG
    return serve(worker, front, peer)


def serve(worker: "Worker", front: Channel, peer: Channel | None) -> int:
    """The process's loop; returns its exit code."""
    channels = [front] if peer is None else [front, peer]
    try:
        while (timeout_s := turn(worker, front, peer)) is not None:
            wait(channels, timeout_s)
        front.drain(LAST_WORD_S)
        return 0
    except (ChannelClosed, ConnectionLost) as closed:
        if getattr(closed, "channel", peer) is front or _stop_intended(front):
            _say(f"{worker.role}: the front closed, exiting")
            return 0
        with contextlib.suppress(ChannelClosed):
            worker.fail_all(f"the {worker.role} process lost its peer")
            front.drain(LAST_WORD_S)
        _say(f"{worker.role}: {closed}, exiting")
        return EXIT_PEER_LOST


def turn(worker: "Worker", front: Channel, peer: Channel | None) -> float | None:
    """What arrived, one step, what is due to be reported. Seconds to wait then; None: Shutdown."""
    for message in front.poll():
        if isinstance(message, Shutdown):
            return None
        worker.on_front(message)
    for frame in peer.poll() if peer else ():
        worker.on_peer(frame)
    worked = worker.step()
    timeout_s = worker.report()
    return 0 if worked else timeout_s


def _stop_intended(front: Channel) -> bool:
    """Whether the front, too, says that this is the end."""
    deadline = time.monotonic() + LAST_WORD_S
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            wait([front], left_s)
            if any(isinstance(message, Shutdown) for message in front.poll()):
                return True
    except ChannelClosed:
        return True
    return False


def _start(args: argparse.Namespace) -> tuple["Worker", Channel, Channel | None]:
    """Raises ValueError, TypeError, OSError or RuntimeError when the config cannot work."""
    if (args.peer_fd is None) != (args.role == "colocated"):
        raise ValueError("--peer-fd: expected for prefill and decode, and only for them")
    config = msgspec.json.decode(args.config_json, type=WorkerConfig)
    config.check()
    front = Channel(_unix_socket(args.control_fd, "--control-fd"), WORKER_CODEC, name="the front")
    if config.backend:
        os.environ["PAGEWIRE_BACKEND"] = config.backend
    from pagewire.serve.worker.engine import Engine  # the model is not needed to refuse a config

    engine = Engine(config)
    if args.role == "colocated":
        from pagewire.serve.worker.colocated import ColocatedWorker

        worker: Worker = ColocatedWorker(engine, front)
        worker.send_ready(os.getpid())
        return worker, front, None

    import torch

    from pagewire.serve.model.fingerprint import fingerprint
    from pagewire.serve.worker.decode import DecodeWorker
    from pagewire.serve.worker.prefill import PrefillWorker
    from pagewire.transfer.packing import Packing

    peer = Channel(
        _unix_socket(args.peer_fd, "--peer-fd"),
        frame_codec(),
        name="D" if args.role == "prefill" else "P",
        accept_fds=args.role == "prefill",
    )
    digest = bytes.fromhex(fingerprint(config.model, engine.model.config))
    wire_dtype = getattr(torch, config.kv_wire_dtype) if config.kv_wire_dtype else None
    packing = Packing(engine.cache, digest, wire_dtype)
    sides = {"prefill": (PrefillWorker, _attach_arena), "decode": (DecodeWorker, _create_arena)}
    new_worker, handshake = sides[args.role]
    worker = new_worker(engine, front, peer, packing, handshake(config, peer, packing))
    worker.send_ready(os.getpid())
    return worker, front, peer


def _create_arena(config: WorkerConfig, peer: Channel, packing: "Packing") -> "Arena":
    """D's side of the handshake: every staging slot is P's from here on."""
    from pagewire.transfer.shm import Arena

    arena = Arena.create(*packing.staging(config.staging_bytes, config.prefill_chunk))
    peer.send(_hello("decode", packing.wire, arena.num_staging_slots, arena.staging_slot_bytes), fds=[arena.fd])
    _expect_hello(receive(peer, HELLO_TIMEOUT_S), "prefill", packing.wire)
    return arena


def _attach_arena(config: WorkerConfig, peer: Channel, packing: "Packing") -> "Arena":
    from pagewire.transfer.shm import Arena

    peer.send(_hello("prefill", packing.wire, 0, 0))
    hello = _expect_hello(receive(peer, HELLO_TIMEOUT_S), "decode", packing.wire)
    if len(peer.fds) != 1:
        raise ValueError(f"HELLO: expected the staging arena's descriptor, got {len(peer.fds)}")
    return Arena(peer.fds.popleft(), hello.num_slots, hello.slot_bytes)


def _hello(role: str, wire: Wire, num_staging_slots: int, staging_slot_bytes: int) -> frames.Hello:
    fields = {name: getattr(wire, name) for name in HELLO_FIELDS}
    return frames.Hello(role=role, num_slots=num_staging_slots, slot_bytes=staging_slot_bytes,
                        incarnation=secrets.token_bytes(16), **fields)  # fmt: skip


def _expect_hello(frame: object, role: str, wire: Wire) -> frames.Hello:
    if not isinstance(frame, frames.Hello) or frame.role != role:
        raise ValueError(f"HELLO: expected one from {role}, got {frame}")
    if problem := wire.mismatch(frame, HELLO_FIELDS):
        raise ValueError(f"the {role} process has another model or wire: {problem}")
    return frame


def frame_codec() -> Codec:
    """For one end of one connection."""
    codec = FrameCodec()
    return Codec(codec.encode, codec.decode)


def _unix_socket(fd: int, option: str) -> socket.socket:
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"{option}: expected an AF_UNIX stream socket, got {sock.family!r}")
    os.set_inheritable(fd, False)
    return sock


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(sentence, file=sys.stderr, flush=True)
