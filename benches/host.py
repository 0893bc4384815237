"""What a call costs before its backend is reached: python benches/host.py [--calls N] [--json]

Every op on shapes it has seen before, with a backend that does nothing: µs of this machine's Python, the least of
several rounds, with the checks remembered (`memo.py`) and with all of them done each time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import pagewire as pw
from pagewire import memo, registry

_ROUNDS = 7


def calls() -> dict[str, Callable[[], Any]]:
    """A serving step's: 8 requests of 1024 tokens, 32 query and 8 K/V heads of 128, pages of 16."""
    bf16, int32 = torch.bfloat16, torch.int32
    k_cache, v_cache = (torch.zeros(64, 16, 8, 128, dtype=bf16) for _ in range(2))
    k_fp8, v_fp8 = (torch.zeros(64, 16, 8, 128, dtype=torch.float8_e4m3fn) for _ in range(2))
    scales = [torch.ones(64, 16, 8) for _ in range(2)]
    table, lens = torch.zeros(8, 8, dtype=int32), torch.ones(8, dtype=int32)
    q, out, lse = torch.zeros(8, 32, 128, dtype=bf16), torch.zeros(8, 32, 128, dtype=bf16), torch.zeros(8, 32)
    many, rows = torch.zeros(64, 32, 128, dtype=bf16), torch.arange(0, 72, 8, dtype=int32)
    k, v, slots = torch.zeros(8, 8, 128, dtype=bf16), torch.zeros(8, 8, 128, dtype=bf16), torch.arange(8)
    outs, lses = torch.zeros(2, 8, 32, 128), torch.zeros(2, 8, 32)
    caches, fp8 = (k_cache, v_cache), (k_fp8, v_fp8)
    cache = pw.PagedKVCache.allocate(
        num_layers=32, num_pages=8, page_size=16, num_kv_heads=8, head_dim=128, dtype=bf16, device="cpu"
    )
    packed = pw.PackedKV.empty(pw.packed_shape(cache, len(slots)), "cpu")
    return {
        "decode": lambda: pw.decode(q, *caches, table, lens),
        "decode, out and lse given": lambda: pw.decode(q, *caches, table, lens, out=out, lse=lse, return_lse=True),
        "decode e4m3": lambda: pw.decode(q, *fp8, table, lens, k_scale=scales[0], v_scale=scales[1]),
        "prefill": lambda: pw.prefill(many, *caches, table, lens, rows, max_q_len=8),
        "append_kv": lambda: pw.append_kv(k, v, *caches, slots),
        "append_kv e4m3": lambda: pw.append_kv(k, v, *fp8, slots, k_scale=scales[0], v_scale=scales[1]),
        "merge_state": lambda: pw.merge_state(outs[0], lses[0], outs[1], lses[1]),
        "merge_states": lambda: pw.merge_states(outs, lses),
        "pack_kv, 32 layers": lambda: pw.pack_kv(cache, slots, out=packed),
        "unpack_kv, 32 layers": lambda: pw.unpack_kv(packed, cache, slots),
    }


@contextmanager
def no_backend() -> Iterator[None]:
    """Every op reaches a function that does nothing."""
    nothing = SimpleNamespace(**dict.fromkeys(registry.METHODS, lambda *arguments: None))
    registry._choose.cache_clear()
    with mock.patch.object(registry, "_load", lambda module: nothing):
        yield
    registry._choose.cache_clear()


def microseconds(call: Callable[[], Any], count: int) -> float:
    call()
    found = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        found.append((time.perf_counter() - start) / count * 1e6)
    return min(found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="host", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="a round")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with no_backend():
        for name, call in calls().items():
            remembered = microseconds(call, options.calls)
            with mock.patch.object(memo, "once", lambda of, check: check()):
                found[name] = remembered, microseconds(call, options.calls)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{'µs to the backend':<28} remembered  checked each time")
    for name, (remembered, checked) in found.items():
        print(f"{name:<28} {remembered:>10.1f}  {checked:>17.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
