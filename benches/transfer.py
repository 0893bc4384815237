"""The KV stream beside the raw transport: python benches/transfer.py [--prompts 16,256] [--layers 30 ...]

Two processes of one thread each, a socket and the shared arena between them. Ours is the whole way of a prompt's KV
through `Sender`, `Packing`, `Arena`, frames and `Receiver`, from RESERVE to a checked COMMIT. Raw moves as many bytes
in as many pieces: memcpy into the arena, CRC32C, a 12-byte frame, CRC32C, memcpy out of it, a credit. Both in turn, in
every round; the figures are medians over the rounds, `% of raw` of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import secrets
import socket
import statistics
import struct
import time
from multiprocessing.connection import Connection

import torch

import pagewire as pw
from pagewire.net.channel import Channel, Codec, wait
from pagewire.transfer.codec import FrameCodec
from pagewire.transfer.frames import Ack, Block, Chunk, Commit, Credit, Reserve, crc32c
from pagewire.transfer.handoff import Begin, Dropped, Push, Send, Start, Unpack
from pagewire.transfer.packing import Packing, held, new_hello
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from pagewire.transfer.shm import Arena

STAGING_BYTES = 64 << 20
FORWARD_TOKENS = 512  # prompt tokens whose layers are ready together
LINK = 1
PIECE = struct.Struct("<III")  # staging slot, bytes, CRC32C
SLOT = struct.Struct("<I")


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Side:
    """What both processes have: a cache with room for the longest prompt, the arena, two sockets and a pipe."""

    roles: tuple[str, str]  # ours, theirs

    def __init__(self, args: argparse.Namespace, frames: socket.socket, pieces: socket.socket, pipe: Connection):
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
        hellos = [new_hello(role, self.cache, b"f" * 32) for role in self.roles]
        self.packing = Packing(self.cache, *hellos)
        block = Block(0, 0, args.layers, 0, args.heads)
        self.memory = torch.ones(self.packing.wire.block_bytes(block, max(args.prompts)), dtype=torch.uint8)
        codec = FrameCodec()
        self.channel = Channel(frames, Codec(codec.encode, codec.decode), name="the other side")
        self.pieces = pieces
        self.pipe = pipe

    def shuffle(self) -> None:
        """As in a pool that has served for a while: neighbours in a prompt are not neighbours in memory."""
        pages = self.pages.alloc(self.pages.num_free)
        self.pages.free([pages[i] for i in torch.randperm(len(pages)).tolist()])


class P(Side):
    roles = "prefill", "decode"

    def serve(self, arena: Arena) -> None:
        """Does what the pipe says until it closes."""
        self.arena = arena
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
        self.pieces.recv(1)
        at = 0
        for size in sizes:
            self.take_credits(wait=not self.credits)
            slot = self.credits.pop()
            out = self.arena.staging_slot(slot)[:size].copy_(self.memory[at : at + size])
            self.pieces.sendall(PIECE.pack(slot, size, crc32c(out.numpy())))
            at += size
        while len(self.credits) < self.arena.num_staging_slots:
            self.take_credits(wait=True)

    def take_credits(self, wait: bool) -> None:
        try:
            data = self.pieces.recv(4096, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self.credits += [slot for (slot,) in SLOT.iter_unpack(data)]


class D(Side):
    """Times both ways, from the first word to P until everything is in place."""

    roles = "decode", "prefill"

    def begin(self) -> Arena:
        arena = Arena.create(*self.packing.staging(STAGING_BYTES, FORWARD_TOKENS))
        self.arena = arena
        self.shuffle()
        self.receiver = Receiver(
            self.pages, self.page_size, (held(self.cache),), vocab_size=2, max_waiting=1, timeout_ms=60_000,
            now_ms=now_ms, new_capability=lambda: secrets.token_bytes(16),
        )  # fmt: skip
        self.receiver.link(LINK, self.packing.wire, arena.num_staging_slots)
        return arena

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
                    problem = self.packing.unpack(chunk, pages, self.arena.staging_slot(chunk.slot))
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
        at = 0
        for _ in sizes:
            slot, size, checksum = PIECE.unpack(self.pieces.recv(PIECE.size, socket.MSG_WAITALL))
            piece = self.arena.staging_slot(slot)[:size]
            assert crc32c(piece.numpy()) == checksum
            self.memory[at : at + size].copy_(piece)
            self.pieces.send(SLOT.pack(slot))
            at += size
        return time.perf_counter() - start_s

    def ask(self, *what: object) -> None:
        self.pipe.send(what)
        assert self.pipe.recv() == "ready"


def p_process(args: argparse.Namespace, frames: socket.socket, pieces: socket.socket, pipe: Connection) -> None:
    p = P(args, frames, pieces, pipe)
    _, (fd,), _, _ = socket.recv_fds(pieces, 1, 1)
    p.serve(Arena(fd, *pipe.recv()))


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
    args = parser.parse_args()
    (frames, p_frames), (pieces, p_pieces) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
    pipe, p_pipe = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process
    child = process(target=p_process, args=(args, p_frames, p_pieces, p_pipe), daemon=True)
    child.start()  # before there is memory that both would have, to be copied when D writes it
    d = D(args, frames, pieces, pipe)
    arena = d.begin()
    slots = arena.num_staging_slots, arena.staging_slot_bytes
    socket.send_fds(pieces, [b"!"], [arena.fd])
    pipe.send(slots)
    print(f"{args.layers} layers, {args.heads} heads of {args.head_dim}, {args.dtype}, pages of {args.page_size}")
    print(f"{slots[0]} staging slots of {slots[1]} bytes, {args.rounds} rounds")
    print("tokens chunks       MB   ms ours    ms raw % of raw")
    for num_tokens in args.prompts:
        print(measure(d, num_tokens, args.rounds), flush=True)
    pipe.close()
    child.join(5)


if __name__ == "__main__":
    main()
