"""The KV stream beside the raw transport: python benches/transfer.py [--transports shm,tcp,tls] [--prompts 16,256] ...

Two processes of one thread each. Ours is the whole way of a prompt's KV through `Sender`, `Packing`, a transport and
`Receiver`, from RESERVE to a checked COMMIT. Raw moves as many bytes in as many pieces: memcpy into a staging slot,
CRC32C, a 12-byte frame, CRC32C, memcpy out of it, a credit; with tcp and tls the piece itself crosses a blocking socket
of the same kind behind its frame. Both in turn, in every round; the figures are medians over the rounds, `% of raw` of
the rounds' ratios. tls needs the package trustme, for certificates.
"""

from __future__ import annotations

import argparse
import multiprocessing
import secrets
import socket
import ssl
import statistics
import struct
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import pagewire as pw
from pagewire.net.channel import wait
from pagewire.net.tls import DOMAIN, Tls, secure
from pagewire.transfer.actions import Begin, Dropped, Push, Send, Start, Unpack
from pagewire.transfer.frames import Ack, Block, Chunk, Commit, Credit, Reserve, crc32c
from pagewire.transfer.packing import Packing, held, new_hello
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from pagewire.transfer.transport import Transport, connect, listen

STAGING_BYTES = 64 << 20
FORWARD_TOKENS = 512  # prompt tokens whose layers are ready together
LINK = 1
PIECE = struct.Struct("<III")  # staging slot, bytes, CRC32C
SLOT = struct.Struct("<I")


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Side:
    """What both processes have: a cache with room for the longest prompt, a transport, a raw socket and a pipe."""

    roles: tuple[str, str]  # ours, theirs
    channel: Transport
    pieces: socket.socket
    in_band: bool  # pieces cross the socket, not shared memory

    def __init__(self, args: argparse.Namespace, pipe: Connection) -> None:
        torch.set_num_threads(1)
        num_pages = -(-max(args.prompts) // args.page_size)
        self.cache = pw.PagedKVCache.allocate(
            num_layers=args.layers, num_pages=num_pages, page_size=args.page_size, num_kv_heads=args.heads,
            head_dim=args.head_dim, dtype=getattr(torch, args.dtype), device="cpu",
        )  # fmt: skip
        for part in (*self.cache.k, *self.cache.v):
            part.fill_(1)
        self.page_size = args.page_size
        self.pages = pw.PageAllocator(num_pages)
        self.hello, theirs = (new_hello(role, self.cache, b"f" * 32) for role in self.roles)
        self.packing = Packing(self.cache, self.hello, theirs)
        block = Block(0, 0, args.layers, 0, args.heads)
        self.memory = torch.ones(self.packing.wire.block_bytes(block, max(args.prompts)), dtype=torch.uint8)
        self.pipe = pipe

    def receive(self, into: memoryview) -> None:
        while into:
            into = into[self.pieces.recv_into(into) :]

    def shuffle(self) -> None:
        """As in a pool that has served for a while: neighbours in a prompt are not neighbours in memory."""
        pages = self.pages.alloc(self.pages.num_free)
        self.pages.free([pages[i] for i in torch.randperm(len(pages)).tolist()])


class P(Side):
    roles = "prefill", "decode"

    def serve(self, address: str, raw: tuple[str, int], tls: Tls | None) -> None:
        """Does what the pipe says until it closes."""
        self.in_band = not address.startswith("unix:")
        self.channel = connect(address, tls=tls)
        while not (hello := self.channel.poll(1)):
            wait([self.channel], None)
        self.channel.open_staging(hello[0])
        self.pieces = socket.create_connection(raw)
        self.pieces.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.pieces = shaken(secure(tls.context(False), self.pieces, "decode", server_side=False))
        self.got_credits = b""
        assert self.channel.staging is not None
        arena = self.arena = self.channel.staging
        self.shuffle()
        self.sender = Sender(self.pages, self.page_size, now_ms=now_ms)
        self.sender.link(LINK, self.packing.wire, arena.num_staging_slots, arena.staging_slot_bytes)
        self.credits = list(range(arena.num_staging_slots))
        while True:
            try:
                what, *arguments = self.pipe.recv()
            except EOFError:
                return
            getattr(self, what)(*arguments)

    def ours(self, request_id: str, num_tokens: int) -> None:
        self.sender.submit(request_id, tuple(range(num_tokens)), (LINK,))
        self.pipe.send("ready")
        handlers = {Reserve: self.sender.reserve, Credit: self.sender.credit, Ack: self.sender.ack}
        while True:
            for frame in self.channel.poll():
                for action in handlers[type(frame)](LINK, frame):
                    if isinstance(action, Dropped):
                        return
                    assert isinstance(action, Begin), action
                    self.compute(request_id, num_tokens)
            send = self.sender.next_send()
            if isinstance(send, Push):
                out = self.arena.staging_slot(send.staging_slot)
                packed = self.packing.pack(send.pages, send.block, send.tokens, out)
                for action in self.sender.pushed(send, *packed):
                    self.channel.send(action.frame)
            elif isinstance(send, Send):
                self.channel.send(send.frame)
            else:
                wait([self.channel], None)

    def compute(self, request_id: str, num_tokens: int) -> None:
        """In no time."""
        for start in range(0, num_tokens, FORWARD_TOKENS):
            for layer in range(self.cache.num_layers):
                self.sender.layer_ready(request_id, layer, start, min(start + FORWARD_TOKENS, num_tokens))
        self.sender.prefilled(request_id, first_token=1)

    def raw(self, sizes: list[int]) -> None:
        self.pipe.send("ready")
        self.receive(memoryview(bytearray(1)))
        at = 0
        for size in sizes:
            self.take_credits(wait=not self.credits)
            slot = self.credits.pop()
            out = self.arena.staging_slot(slot)[:size].copy_(self.memory[at : at + size])
            self.pieces.sendall(PIECE.pack(slot, size, crc32c(out.numpy())))
            if self.in_band:
                self.pieces.sendall(out.numpy().data)
            at += size
        while len(self.credits) < self.arena.num_staging_slots:
            self.take_credits(wait=True)

    def take_credits(self, wait: bool) -> None:
        self.pieces.setblocking(wait)
        try:
            self.got_credits += self.pieces.recv(4096)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        finally:
            self.pieces.setblocking(True)
        whole = len(self.got_credits) // SLOT.size * SLOT.size
        self.credits += [slot for (slot,) in SLOT.iter_unpack(self.got_credits[:whole])]
        self.got_credits = self.got_credits[whole:]


class D(Side):
    """Times both ways, from the first word to P until everything is in place."""

    roles = "decode", "prefill"

    def begin(self, address: str, tls: Tls | None) -> None:
        self.in_band = not address.startswith("unix:")
        listener = listen(address, self.hello, self.packing.staging(STAGING_BYTES, FORWARD_TOKENS), tls=tls)
        with socket.create_server(("127.0.0.1", 0)) as raw:
            self.pipe.send((listener.address, raw.getsockname()[:2]))
            while (channel := listener.accept()) is None:
                time.sleep(0.01)
            self.channel = channel
            raw.setblocking(False)
            while True:  # beside the handshakes
                channel.flush()
                try:
                    self.pieces, _ = raw.accept()
                    break
                except BlockingIOError:
                    time.sleep(0.01)
        self.pieces.setblocking(True)
        self.pieces.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.pieces = shaken(secure(tls.context(True), self.pieces, "prefill", server_side=True))
        listener.close()
        assert channel.staging is not None
        arena = self.arena = channel.staging
        self.shuffle()
        self.receiver = Receiver(
            self.pages, self.page_size, (held(self.cache),), vocab_size=2, max_waiting=1, timeout_ms=60_000,
            now_ms=now_ms, new_capability=lambda: secrets.token_bytes(16),
        )  # fmt: skip
        self.receiver.link(LINK, self.packing.wire, arena.num_staging_slots)

    def ours(self, request_id: str, num_tokens: int) -> tuple[float, list[int]]:
        """Seconds, and the bytes of every chunk."""
        self.ask("ours", request_id, num_tokens)
        sizes: list[int] = []
        start_s = time.perf_counter()
        actions = self.receiver.submit(request_id, tuple(range(num_tokens)), num_tokens, links=(LINK,))
        while not self.carry_out(actions):
            wait([self.channel], None)
            actions = []
            for frame in self.channel.poll():
                if isinstance(frame, Chunk):
                    sizes.append(frame.payload_bytes)
                    actions += self.receiver.chunk(LINK, frame)
                else:
                    assert isinstance(frame, Commit), frame
                    actions += self.receiver.commit(LINK, frame)
        seconds = time.perf_counter() - start_s
        self.receiver.release(request_id)
        return seconds, sizes

    def carry_out(self, actions: list) -> bool:
        """Whether the request has started."""
        started = False
        for action in actions:
            match action:
                case Send(frame):
                    self.channel.send(frame)
                case Unpack(_, chunk, pages):
                    staging = self.arena.staging_slot(chunk.slot)
                    problem = self.packing.unpack(chunk, pages, staging, shared=not self.channel.payload_follows)
                    started |= self.carry_out(self.receiver.unpacked(action, problem))
                case Start():
                    started = True
                case _:
                    raise RuntimeError(str(action))
        return started

    def raw(self, sizes: list[int]) -> float:
        self.ask("raw", sizes)
        start_s = time.perf_counter()
        self.pieces.send(b"!")
        at, header = 0, bytearray(PIECE.size)
        for _ in sizes:
            self.receive(memoryview(header))
            slot, size, checksum = PIECE.unpack(header)
            piece = self.arena.staging_slot(slot)[:size]
            if self.in_band:
                self.receive(piece.numpy().data)
            assert crc32c(piece.numpy()) == checksum
            self.memory[at : at + size].copy_(piece)
            self.pieces.send(SLOT.pack(slot))
            at += size
        return time.perf_counter() - start_s

    def ask(self, *what: object) -> None:
        self.pipe.send(what)
        assert self.pipe.recv() == "ready"


def shaken(sock: ssl.SSLSocket) -> ssl.SSLSocket:
    sock.setblocking(True)
    sock.do_handshake()
    return sock


def p_process(args: argparse.Namespace, pipe: Connection, tls: Tls | None) -> None:
    P(args, pipe).serve(*pipe.recv(), tls)


def certificates(folder: Path) -> dict[str, Tls]:
    import trustme

    ca, found = trustme.CA(), {}
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    for role in ("prefill", "decode"):
        issued, paths = ca.issue_cert(role + DOMAIN), [str(folder / f"{role}.{kind}") for kind in ("pem", "key")]
        issued.cert_chain_pems[0].write_to_path(paths[0])
        issued.private_key_pem.write_to_path(paths[1])
        found[role] = Tls(str(folder / "ca.pem"), *paths)
    return found


def measure(d: D, num_tokens: int, num_rounds: int) -> str:
    """A line of the table."""
    _, sizes = d.ours("warm", num_tokens)
    d.raw(sizes)
    ours, raw = [], []
    for i in range(num_rounds):
        for turn in (0, 1) if i % 2 else (1, 0):
            if turn:
                ours.append(d.ours(f"r{i}", num_tokens)[0])
            else:
                raw.append(d.raw(sizes))
    percent = statistics.median(r / o for r, o in zip(raw, ours, strict=True)) * 100
    ours_ms, raw_ms = (statistics.median(of) * 1e3 for of in (ours, raw))
    return f"{num_tokens:6} {len(sizes):6} {sum(sizes) / 1e6:8.2f} {ours_ms:9.2f} {raw_ms:9.2f} {percent:8.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name, default in dict(layers=30, heads=3, head_dim=64, page_size=16, rounds=21).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[16, 256, 1024, 4096])
    parser.add_argument("--transports", type=lambda text: text.split(","), default=["shm", "tcp", "tls"])
    args = parser.parse_args()
    print(f"{args.layers} layers, {args.heads} heads of {args.head_dim}, {args.dtype}, pages of {args.page_size}")
    for transport in args.transports:
        with tempfile.TemporaryDirectory() as folder:
            run(transport, args, certificates(Path(folder)) if transport == "tls" else {})


def run(transport: str, args: argparse.Namespace, tls: dict[str, Tls]) -> None:
    pipe, p_pipe = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=p_process, args=(args, p_pipe, tls.get("prefill")), daemon=True
    )
    child.start()  # before there is memory that both would have, to be copied when D writes it
    d = D(args, pipe)
    d.begin("unix:" if transport == "shm" else "tcp://127.0.0.1:0", tls.get("decode"))
    slots = d.arena.num_staging_slots, d.arena.staging_slot_bytes
    print(f"{transport}: {slots[0]} staging slots of {slots[1]} bytes, {args.rounds} rounds")
    print("tokens chunks       MB   ms ours    ms raw % of raw")
    for num_tokens in args.prompts:
        print(measure(d, num_tokens, args.rounds), flush=True)
    pipe.close()
    child.join(5)


if __name__ == "__main__":
    main()
