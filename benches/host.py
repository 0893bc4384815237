"""What a call costs on the host: python benches/host.py [--calls N] [--json]

Every op on shapes it has seen before: µs of this machine's Python, the least of many rounds.

- checks: until the backend is reached, which does nothing; `anew`: with nothing remembered (`memo.py`).
- triton: the whole call on Triton, over a stand-in libcuda (`standin/`). launches: of it, what starting the compiled
  kernels takes, their addresses included. The rest is the plan and scratch memory. A driver's time is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from standin import driver as standin

import pagewire as pw
from pagewire import memo, registry

_ROUNDS = 100


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
    two = (outs[0], lses[0], outs[1], lses[1])
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
        "merge_state": lambda: pw.merge_state(*two),
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


def over_standin(count: int) -> dict[str, tuple[float, float, int]]:
    """(µs of a call, of these in starting its kernels, launches), in a process with `standin.environment`."""
    from pagewire.bench import pretend
    from pagewire.kernels import again, plan

    launched = standin.activate()
    spent = [0.0]

    def timed(*given: Any) -> Any:
        launches = again.launches_again(*given)

        def start(*call: Any) -> bool:
            before = time.perf_counter()
            done = launches.start(*call)
            spent[0] += time.perf_counter() - before
            return done

        return launches and SimpleNamespace(start=start)

    whole, launches, in_starts = {}, {}, {}
    with pretend.gpu(90), torch.inference_mode():
        for name, call in calls().items():
            call()
            before = launched()
            call()
            launches[name] = launched() - before
            whole[name] = microseconds(call, count)
    with pretend.gpu(90), torch.inference_mode(), mock.patch.object(plan, "launches_again", timed):
        for name, call in calls().items():
            call()
            found = []
            for _ in range(_ROUNDS):
                spent[0] = 0.0
                for _ in range(count):
                    call()
                found.append(spent[0] / count * 1e6)
            in_starts[name] = min(found)
    return {name: (whole[name], in_starts[name], launches[name]) for name in whole}


def _on_triton(count: int) -> dict[str, list[float]]:
    """`over_standin` in a process of its own; nothing where Triton or a C compiler is missing."""
    with tempfile.TemporaryDirectory() as name:
        try:
            standin.build(Path(name))
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(f"not measured on triton: {error}", file=sys.stderr)
            return {}
        kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, __file__, "--over-standin", "--calls", str(count)]
        environment = kept | standin.environment(Path(name)) | {"PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(prog="host", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="a round")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--over-standin", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.over_standin:
        print(json.dumps(over_standin(options.calls)))
        return 0
    found = {}
    with no_backend():
        for name, call in calls().items():
            remembered = microseconds(call, options.calls)
            with mock.patch.object(memo, "once", lambda of, check: check()):
                found[name] = {"checks": remembered, "anew": microseconds(call, options.calls)}
    for name, (whole, in_starts, launches) in _on_triton(options.calls).items():
        found[name] |= {"triton": whole, "launches": in_starts, "number": launches}
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{'µs':<28} checks    anew  triton  launches")
    for name, of in found.items():
        line = f"{name:<28} {of['checks']:>6.1f} {of['anew']:>7.1f}"
        if "triton" in of:
            line += f" {of['triton']:>7.1f} {of['launches']:>7.1f} of {of['number']}"
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
