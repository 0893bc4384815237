"""P and D of the CUDA IPC tests, one of them in a process of its own:

    python ipc_ends.py p|d ADDRESS DTYPE LIBRARY [HOW]

LIBRARY: a fake libcuda, or "" for the GPU. It says "ready" once P has D's memory mapped; a D says its address before.
"""

import sys
import time

import torch

import pagewire as pw
from pagewire.net.channel import ChannelClosed, wait
from pagewire.transfer.frames import Ack, Block, Chunk, Credit, Frame, Hello
from pagewire.transfer.packing import Packing, new_hello
from pagewire.transfer.transport import Listener, Transport, connect, listen
from transfer import fake_cuda

LAYERS, HEADS, DIM, PAGE_SIZE, NUM_PAGES, TOKENS = 3, 2, 64, 16, 12, 150
P_PAGES, D_PAGES = [3, 1, 7, 0, 9, 11, 2, 5, 6, 8], [0, 2, 4, 6, 8, 10, 11, 9, 7, 5]
BLOCK = Block(0, 0, LAYERS, 0, HEADS)
RANGES = [(0, 64), (64, 128), (128, 150)]
SLOTS, SLOT_BYTES = len(RANGES), 1 << 17
START_S = 120  # of a process that may compile kernels


def make_cache(dtype: str, device: str, seed: int) -> pw.PagedKVCache:
    eight_bits = dtype not in ("bfloat16", "float16", "float32")
    cache = pw.PagedKVCache.allocate(
        num_layers=LAYERS, num_pages=NUM_PAGES, page_size=PAGE_SIZE, num_kv_heads=HEADS, head_dim=DIM,
        dtype=getattr(torch, dtype), device=device, scale="token_head" if eight_bits else "none",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for rows in (*cache.k, *cache.v):
        rows.copy_((torch.randn(rows.shape, generator=generator) * 3).to(rows.dtype))
    for scales in (*cache.k_scale, *cache.v_scale):
        if scales is not None:
            scales.copy_(torch.rand(scales.shape, generator=generator) + 0.1)
    return cache


def kept(cache: pw.PagedKVCache, pages: list[int]) -> torch.Tensor:
    """All bytes of the tokens and their scales, in host memory."""
    slots = pw.page_slots(torch.tensor(pages, device=cache.device), 0, TOKENS, PAGE_SIZE)
    return pw.pack_kv(cache, slots).buffer.cpu()


def next_frame(transport: Transport, timeout_s: float = START_S) -> Frame:
    deadline = time.monotonic() + timeout_s
    while not (frames := transport.poll(1)):
        assert time.monotonic() < deadline, "nothing came"
        wait([transport], 0.2)
    return frames[0]


def accepted(listener: Listener, timeout_s: float = START_S) -> Transport:
    deadline = time.monotonic() + timeout_s
    while (transport := listener.accept()) is None:
        assert time.monotonic() < deadline, listener.problem
        time.sleep(0.005)
    return transport


class D:
    def __init__(self, address: str, cache: pw.PagedKVCache) -> None:
        self.cache, self.hello = cache, new_hello("decode", cache, b"f" * 32)
        self.listener = listen(address, self.hello, (SLOTS, SLOT_BYTES))

    def join(self) -> None:
        self.link = accepted(self.listener)
        theirs = next_frame(self.link)
        assert isinstance(theirs, Hello)
        self.packing = Packing(self.cache, self.hello, theirs, self.link.checksum_kind)

    def unpack(self, chunk: Frame) -> str | None:
        assert isinstance(chunk, Chunk)
        problem = self.packing.unpack(chunk, D_PAGES, self.link.staging.staging_slot(chunk.slot))
        self.link.send(Credit(chunk.slot))
        return problem


class P:
    def __init__(self, address: str, cache: pw.PagedKVCache) -> None:
        self.link = connect(address)
        hello = next_frame(self.link)
        self.link.open_staging(hello)
        ours = new_hello("prefill", cache, b"f" * 32)
        self.packing = Packing(cache, ours, hello, self.link.checksum_kind)
        self.link.send(ours)

    def push(self, slot: int) -> None:
        tokens, of = RANGES[slot], self.packing.wire.groups[0]
        num_bytes, checksum = self.packing.pack(P_PAGES, BLOCK, tokens, self.link.staging.staging_slot(slot))
        of_block = {name: getattr(BLOCK, name) for name in Chunk.__struct_fields__ if hasattr(BLOCK, name)}
        self.link.send(
            Chunk(
                request_id="r", generation=1, capability=b"c" * 16, fingerprint=b"f" * 32, **of_block, head_dim=DIM,
                head_dim_v=DIM, token_start=tokens[0], token_stop=tokens[1], dtype=of.dtype, scale_kind=of.scale_kind,
                checksum_kind=self.packing.wire.checksum_kind, checksum=checksum, payload_bytes=num_bytes, slot=slot,
            )
        )  # fmt: skip


def run_p(address: str, cache: pw.PagedKVCache, library: str, how: str) -> None:
    """how: push (all, then wait for D's end), tamper (behind each CHUNK), hold (the mapping until stdin ends) or again
    (20 times, mapped and closed).
    """
    for _ in range(20 if how == "again" else 1):
        p = P(address, cache)
        print("ready", flush=True)
        for slot in range(SLOTS if how in ("push", "tamper") else 0):
            p.push(slot)
            if how == "tamper":
                p.link.staging.staging_slot(slot)[1000 + slot] ^= 1
                if not library:
                    torch.cuda.synchronize()
                p.link.send(Ack("tampered", slot))
        if how == "hold":
            sys.stdin.read()
        try:
            while how in ("push", "tamper"):
                next_frame(p.link)
        except ChannelClosed:
            pass
        p.link.close()
    if library:
        assert fake_cuda.num_bytes(library) == (0, 0)


def main() -> None:
    role, address, dtype, library, *how = sys.argv[1:]
    if library:
        fake_cuda.install(library)
    cache = make_cache(dtype, "cpu" if library else "cuda", seed=1 if role == "p" else 2)
    if role == "p":
        run_p(address, cache, library, how[0])
        return
    d = D(address, cache)
    print(d.listener.address, flush=True)
    d.join()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
