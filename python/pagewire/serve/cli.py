"""`pagewire serve`: arguments, the listening socket, signals, and one sentence for whatever cannot work."""

import argparse
import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvicorn

from pagewire.net.tls import Tls, at, resolve
from pagewire.serve.config import DTYPES, KV_ADDRESSES, KV_DTYPES, WorkerConfig
from pagewire.serve.front.app import make_app
from pagewire.serve.front.generation import Front
from pagewire.serve.front.openai import Limits
from pagewire.serve.front.process import WorkerProcess, thread_environment, worker_command
from pagewire.serve.front.remote import ROLES, RemoteWorker, parse_peer
from pagewire.serve.front.supervisor import Supervisor
from pagewire.serve.model.config import ModelError
from pagewire.serve.model.default import default_model_path
from pagewire.serve.model.tokenizer import Tokenizer

DRAIN_POLL_S = 0.05
T = TypeVar("T", bound=msgspec.Struct)


class ServeError(Exception):
    """One sentence for stderr; the server does not start."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="pagewire serve", description="Serve a model from two processes, P and D.")
    defaults = msgspec.structs.asdict(WorkerConfig(model="")) | msgspec.structs.asdict(Limits())

    def fill(field: str, help: str, option: str = "", **more: Any) -> None:
        """An option for a field of WorkerConfig or Limits, which say its default."""
        option, default = option or field.replace("_", "-"), defaults[field]
        how = {"metavar": option.replace("-", "_").upper(), "type": str if default is None else type(default)} | more
        p.add_argument(f"--{option}", dest=field, default=default, help=help, **how)

    p.add_argument("--role", choices=("all", "front", "prefill", "decode"), default="all",
                   help="all (default): the front, a P and a D on this machine; front: HTTP for the --peer processes; "
                   "prefill or decode: one model process that waits for a front on --host and --port")  # fmt: skip
    p.add_argument("--peer", action="append", default=[], metavar="ROLE@HOST:PORT",
                   help="of --role front: a prefill or decode process; once for each")  # fmt: skip
    p.add_argument("--tls-ca", help="PEM; with certificate and key: TLS 1.3 between front, P and D")
    p.add_argument("--tls-certificate", help="PEM; its DNS name is front.pagewire, prefill.pagewire or decode.pagewire")
    p.add_argument("--tls-key", help="PEM")
    fill("kv_port", "of --role decode: for KV; 0 (default): any")
    fill("tenant", "P and D of different ones do not exchange KV")
    remote = "beyond loopback an API key or, for a model process, TLS is required"
    p.add_argument("--host", default="127.0.0.1", help=remote)
    p.add_argument("--port", type=int, default=8000, help="0: any free port, printed on stdout")
    p.add_argument("--model", help="a Hugging Face directory or a .gguf file; default: SmolLM2-135M-Instruct")
    p.add_argument("--served-model-name", help="the name clients use; default: the file's or folder's")
    p.add_argument("--colocated", action="store_true", help="one process instead of two: the baseline")
    p.add_argument("--api-key", help="clients must send it as a bearer token; PAGEWIRE_API_KEY hides it from ps")
    fill("device", "auto (the first GPU if there is one), cpu, cuda, cuda:1")
    fill("dtype", "of weights", choices=DTYPES, metavar=None)
    kv_dtypes: dict[str, Any] = {"type": _kv_dtype, "choices": KV_DTYPES, "metavar": None}
    fill("kv_dtype", "of KV caches: --dtype (default) or 8 bits", **kv_dtypes)
    fill("page_size", "tokens")
    fill("pool_tokens", "KV tokens of each process's pool")
    fill("max_batch_size", "requests decoded at once")
    fill("prefill_chunk", "prompt tokens in one forward")
    fill("kv_wire_dtype", "of KV between P and D; default: the caches'", **kv_dtypes)
    fill("kv_transport", "between P and D: through host memory, or, on one GPU, through its own", choices=KV_ADDRESSES,
         metavar=None)  # fmt: skip
    fill("num_threads", "of each model process", "threads")
    fill("backend", "pagewire backend of the model processes; default: the best that runs here")
    fill("max_inflight", "choices in flight; more get a 429", "max-queue")
    fill("request_timeout_s", "seconds", "request-timeout")
    p.add_argument("--on-failure", choices=("recover", "fail"), default="recover",
                   help="of a model process: its requests go on in another one, or end with an error")  # fmt: skip
    p.add_argument("--handoff-timeout", type=float, default=defaults["handoff_timeout_ms"] / 1000,
                   help="seconds that a handoff from P to D may make no progress")  # fmt: skip
    fill("worker_timeout_s", "seconds after which a silent model process is killed and started again", "worker-timeout")
    fill("start_timeout_s", "seconds that a model process may take to load", "start-timeout")
    fill("record_dir", "write each request's logits here (tests, debugging)")
    p.add_argument("--verify-kv", action="store_true", help="compare digests of P's and D's KV at each handoff")
    return p


def _filled(kind: type[T], args: argparse.Namespace, **others: Any) -> T:
    """A `kind` of the options that are its fields, and the others."""
    return kind(**{name: value for name, value in vars(args).items() if name in kind.__struct_fields__} | others)


def _kv_dtype(name: str) -> str:
    return {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(name, name)


def listen(host: str, port: int, api_key: str | None) -> socket.socket:
    """A listening socket, IPv4 if the name has such an address. Raises ServeError."""
    if not 0 <= port <= 65535:
        raise ServeError(f"--port: expected 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServeError(f"--host: {host!r} is not an address: {error.strerror}") from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    if api_key is None and not ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback:
        raise ServeError(f"--host {host} can be reached from other machines: give --api-key or set PAGEWIRE_API_KEY")
    # asyncio sets TCP_NODELAY only where the protocol is named; without it a stream stutters by 40 ms
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise ServeError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return sock


class _Server(uvicorn.Server):
    capture_signals = contextlib.nullcontext  # type: ignore[assignment]  # they are ours: see _serve


async def _serve(front: Front, sock: socket.socket, api_key: str | None) -> str | None:
    """Until a signal or a start that failed; returns the sentence that explains the latter.

    SIGTERM lets the requests that run end first; SIGINT, and a second SIGTERM, do not.
    """
    app, supervisor = make_app(front, api_key), front.supervisor
    quiet: Any = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
    server = _Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **quiet))

    def stop() -> None:
        server.force_exit, server.should_exit = server.should_exit, True
        supervisor.stop()

    async def drain() -> None:
        supervisor.drain()
        while front.num_inflight:
            await asyncio.sleep(DRAIN_POLL_S)
        stop()

    def terminate() -> None:
        if supervisor.closed:
            stop()
        else:
            tasks.append(asyncio.ensure_future(drain()))

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGTERM, terminate)
    tasks = [asyncio.ensure_future(supervisor.run())]
    tasks[0].add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[sock])
    finally:
        supervisor.stop()
    return await tasks[0]


def main(argv: list[str]) -> int:
    try:
        return _main(argv)
    except (ServeError, ModelError) as error:
        print(f"pagewire serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the event loop took the signal over
        return 130


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    api_key = args.api_key or os.environ.get("PAGEWIRE_API_KEY") or None
    if (args.role == "front") != bool(args.peer) or (args.colocated and args.role != "all"):
        raise ServeError("--peer: expected with --role front, once for each model process; --colocated with --role all")
    tls_files = (args.tls_ca, args.tls_certificate, args.tls_key)
    if any(tls_files) and not all(tls_files):
        raise ServeError("--tls-ca, --tls-certificate, --tls-key: expected all three or none")
    path = Path(args.model) if args.model else default_model_path()
    config = _filled(
        WorkerConfig, args, model=str(path), tls=Tls(*tls_files) if all(tls_files) else None,
        max_waiting=2 * args.max_inflight, handoff_timeout_ms=int(1000 * args.handoff_timeout),
    )  # fmt: skip
    limits = _filled(Limits, args)
    try:
        if limits.max_inflight < 1 or not limits.request_timeout_s > 0:
            raise ValueError("--max-queue and --request-timeout: expected more than 0")
        config.check()
        if config.tls and args.role == "all":
            raise ValueError(
                "--tls-ca: expected with --role front, prefill or decode; on one machine nothing crosses TCP"
            )
        if config.kv_transport != "shm" and args.role != "all":
            raise ValueError(f"--kv-transport: expected shm with --role {args.role}, got {config.kv_transport}")
        if config.tls:
            config.tls.context(server_side=False)
        for _, host, port in map(parse_peer, args.peer):
            if config.tls is None:
                resolve(f"tcp://{at(host, port)}", None)
    except ValueError as error:
        raise ServeError(str(error)) from None
    if args.role in ROLES:
        command = worker_command(args.role, config, "--listen", at(args.host, args.port))
        os.execve(command[0], command, thread_environment(config))  # this process becomes the model process
    name = args.served_model_name or (path.stem if path.is_file() else path.resolve().name)
    with listen(args.host, args.port, api_key) as sock:
        dialled = {peer: partial(RemoteWorker.dial, peer, config.tls) for peer in args.peer}
        tokenizer, roles = Tokenizer.load(path), ("colocated",) if args.colocated else ("decode", "prefill")
        spawned = {role: partial(WorkerProcess.spawn, role, config) for role in roles}
        supervisor = Supervisor(config, dialled or spawned, recover=args.on_failure == "recover")
        front = Front(name, tokenizer, limits, supervisor)
        host, port = sock.getsockname()[:2]
        processes = ", ".join(args.peer) or ("one process" if args.colocated else "two processes, P and D")
        print(f"pagewire: http://{at(host, port)} serves {name} from {processes}", flush=True)
        reason = asyncio.run(_serve(front, sock, api_key))
    if reason:
        raise ServeError(reason)
    return 0
