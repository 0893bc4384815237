"""`pagewire serve`: arguments, the listening socket, signals, and one sentence for whatever cannot work."""

import argparse
import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import uvicorn

from pagewire.net.tls import Tls, resolve
from pagewire.serve.config import DTYPES, KV_ADDRESSES, KV_DTYPES, WorkerConfig
from pagewire.serve.front.app import make_app
from pagewire.serve.front.front import Front
from pagewire.serve.front.limits import Limits
from pagewire.serve.front.process import WORKER_COMMAND, WorkerProcess, thread_environment
from pagewire.serve.front.remote import ROLES, Address, RemoteWorker, at
from pagewire.serve.front.supervisor import Supervisor
from pagewire.serve.front.worker import Worker
from pagewire.serve.model import ModelError, default_model_path
from pagewire.serve.model.tokenizer import Detokenizer, Tokenizer

DRAIN_POLL_S = 0.05


class ServeError(Exception):
    """One sentence for stderr; the server does not start."""


def parser() -> argparse.ArgumentParser:
    """Defaults that the model processes also know come from WorkerConfig."""
    config, limits = WorkerConfig(model=""), Limits()
    p = argparse.ArgumentParser(prog="pagewire serve", description="Serve a model from two processes, P and D.")
    p.add_argument("--role", choices=("all", "front", "prefill", "decode"), default="all",
                   help="all (default): the front, a P and a D on this machine; front: HTTP for the --peer processes; "
                   "prefill or decode: one model process that waits for a front on --host and --port")  # fmt: skip
    p.add_argument("--peer", action="append", default=[], metavar="ROLE@HOST:PORT",
                   help="of --role front: a prefill or decode process; once for each")  # fmt: skip
    p.add_argument("--tls-ca", help="PEM; with certificate and key: TLS 1.3 between front, P and D")
    p.add_argument("--tls-certificate", help="PEM; its DNS name is front.pagewire, prefill.pagewire or decode.pagewire")
    p.add_argument("--tls-key", help="PEM")
    p.add_argument("--kv-port", type=int, default=config.kv_port, help="of --role decode: for KV; 0 (default): any")
    p.add_argument("--tenant", default=config.tenant, help="P and D of different ones do not exchange KV")
    p.add_argument(
        "--host", default="127.0.0.1", help="beyond loopback an API key or, for a model process, TLS is required"
    )
    p.add_argument("--port", type=int, default=8000, help="0: any free port, printed on stdout")
    p.add_argument("--model", help="a Hugging Face directory or a .gguf file; default: SmolLM2-135M-Instruct")
    p.add_argument("--served-model-name", help="the name clients use; default: the file's or folder's")
    p.add_argument("--colocated", action="store_true", help="one process instead of two: the baseline")
    p.add_argument("--api-key", help="clients must send it as a bearer token; PAGEWIRE_API_KEY hides it from ps")
    p.add_argument("--device", default=config.device, help="auto (the first GPU if there is one), cpu, cuda, cuda:1")
    p.add_argument("--dtype", choices=DTYPES, default=config.dtype, help="of weights")
    p.add_argument("--kv-dtype", type=_kv_dtype, choices=KV_DTYPES, help="of KV caches: --dtype (default) or 8 bits")
    p.add_argument("--page-size", type=int, default=config.page_size, help="tokens")
    p.add_argument("--pool-tokens", type=int, default=config.pool_tokens, help="KV tokens of each process's pool")
    p.add_argument("--max-batch-size", type=int, default=config.max_batch_size, help="requests decoded at once")
    p.add_argument("--prefill-chunk", type=int, default=config.prefill_chunk, help="prompt tokens in one forward")
    p.add_argument(
        "--kv-wire-dtype", type=_kv_dtype, choices=KV_DTYPES, help="of KV between P and D; default: the caches'"
    )
    p.add_argument("--kv-transport", choices=KV_ADDRESSES, default=config.kv_transport,
                   help="between P and D: through host memory, or, on one GPU, through its own")  # fmt: skip
    p.add_argument("--threads", type=int, default=config.num_threads, help="of each model process")
    p.add_argument("--backend", help="pagewire backend of the model processes; default: the best that runs here")
    p.add_argument("--max-queue", type=int, default=limits.max_inflight, help="choices in flight; more get a 429")
    p.add_argument("--request-timeout", type=float, default=limits.request_timeout_s, help="seconds")
    p.add_argument(
        "--on-failure",
        choices=("recover", "fail"),
        default="recover",
        help="of a model process: its requests go on in another one, or end with an error",
    )
    p.add_argument("--handoff-timeout", type=float, default=config.handoff_timeout_ms / 1000,
                   help="seconds that a handoff from P to D may make no progress")  # fmt: skip
    p.add_argument("--worker-timeout", type=float, default=config.worker_timeout_s,
                   help="seconds after which a silent model process is killed and started again")  # fmt: skip
    p.add_argument("--start-timeout", type=float, default=config.start_timeout_s,
                   help="seconds that a model process may take to load")  # fmt: skip
    p.add_argument("--record-dir", help="write each request's logits here (tests, debugging)")
    p.add_argument("--verify-kv", action="store_true", help="compare digests of P's and D's KV at each handoff")
    return p


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
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # ours: see _serve


async def _serve(front: Front, supervisor: Supervisor, sock: socket.socket, api_key: str | None) -> str | None:
    """Until a signal or a start that failed; returns the sentence that explains the latter.

    SIGTERM lets the requests that run end first; SIGINT, and a second SIGTERM, do not.
    """
    app = make_app(front, api_key)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=5
    )
    server = _Server(config)

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
        server.should_exit = True
        supervisor.stop()

    def drain() -> None:
        if supervisor.draining:
            stop()
            return
        supervisor.drain()
        tasks.append(asyncio.ensure_future(stop_when_drained()))

    async def stop_when_drained() -> None:
        while front.num_inflight:
            await asyncio.sleep(DRAIN_POLL_S)
        stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGTERM, drain)
    tasks = [asyncio.ensure_future(supervisor.run())]
    tasks[0].add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[sock])
    finally:
        supervisor.stop()
    return await tasks[0]


def _tls(*files: str | None) -> Tls | None:
    if not any(files):
        return None
    ca, certificate, key = files
    if ca is None or certificate is None or key is None:
        raise ServeError("--tls-ca, --tls-certificate, --tls-key: expected all three or none")
    return Tls(ca, certificate, key)


def _sources(config: WorkerConfig, colocated: bool, peers: list[Address]) -> dict[str, Callable[[], Awaitable[Worker]]]:
    if not peers:
        roles = ("colocated",) if colocated else ("decode", "prefill")
        return {role: partial(WorkerProcess.spawn, role, config) for role in roles}
    return {str(peer): partial(RemoteWorker.dial, peer, config.tls) for peer in peers}


def _run_worker(role: str, address: str, config: WorkerConfig) -> int:
    """Never returns: this process becomes the model process."""
    args = ("--role", role, "--config-json", msgspec.json.encode(config).decode(), "--listen", address)
    os.execve(WORKER_COMMAND[0], [*WORKER_COMMAND, *args], thread_environment(config))


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
    path = Path(args.model) if args.model else default_model_path()
    config = WorkerConfig(
        tls=_tls(args.tls_ca, args.tls_certificate, args.tls_key),
        kv_port=args.kv_port,
        tenant=args.tenant,
        model=str(path),
        device=args.device,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        page_size=args.page_size,
        pool_tokens=args.pool_tokens,
        max_batch_size=args.max_batch_size,
        max_waiting=2 * args.max_queue,
        prefill_chunk=args.prefill_chunk,
        num_threads=args.threads,
        kv_wire_dtype=args.kv_wire_dtype,
        kv_transport=args.kv_transport,
        backend=args.backend,
        handoff_timeout_ms=int(1000 * args.handoff_timeout),
        start_timeout_s=args.start_timeout,
        worker_timeout_s=args.worker_timeout,
        record_dir=args.record_dir,
        verify_kv=args.verify_kv,
    )
    try:
        if args.max_queue < 1 or not args.request_timeout > 0:
            raise ValueError("--max-queue and --request-timeout: expected more than 0")
        config.check()
        peers = [Address.parse(peer) for peer in args.peer]
        for peer in peers if config.tls is None else ():
            resolve(peer.url, None)
    except ValueError as error:
        raise ServeError(str(error)) from None
    if args.role in ROLES:
        return _run_worker(args.role, at(args.host, args.port), config)
    name = args.served_model_name or (path.stem if path.is_file() else path.resolve().name)
    limits = Limits(max_inflight=args.max_queue, request_timeout_s=args.request_timeout)
    with listen(args.host, args.port, api_key) as sock:
        tokenizer = Tokenizer.load(path)
        front = Front(name, tokenizer, lambda: Detokenizer(tokenizer), limits)
        host, port = sock.getsockname()[:2]
        print(
            f"pagewire: http://{at(host, port)} serves {name} "
            f"from {', '.join(args.peer) or ('one process' if args.colocated else 'two processes, P and D')}",
            flush=True,
        )

        async def run() -> str | None:
            front.supervisor = Supervisor(
                config, _sources(config, args.colocated, peers), recover=args.on_failure == "recover",
                on_events=front.on_events, on_gauges=front.metrics.on_gauges, forget=front.metrics.forget,
            )  # fmt: skip
            return await _serve(front, front.supervisor, sock, api_key)

        reason = asyncio.run(run())
    if reason:
        raise ServeError(reason)
    return 0
