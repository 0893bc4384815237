"""Compiles decode's Hopper kernel as its launcher launches it, for sm_90 without a GPU; one JSON line per case.

Run as a script, in a process without TRITON_INTERPRET and with PAGEWIRE_HOPPER=1: `compile_decode.py [ID ...]` or
`compile_decode.py shapes`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.runtime.driver import driver

from gluon import compiling, sass
from pagewire.bench.pretend import NoDevice
from pagewire.kernels import decode, launch
from pagewire.kernels.place import Launch
from pagewire.types import Modifiers

bf16, fp16 = torch.bfloat16, torch.float16
NUM_KV_HEADS = 8
HANDED = {"MUFU.EX2": "exp2", " STS": "store", "FENCE.VIEW.ASYNC": "fence", "BAR.SYNC": "barrier", "HGMMA": "product"}
WIDTHS = {16: "LDS.128", 8: "LDS.64", 4: "LDS R", 2: "LDS.U16"}  # bytes -> a load from shared memory


class Case(NamedTuple):
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = bf16
    kv_dtype: torch.dtype | None = None  # of the cache; None: dtype
    group_size: int = 4
    modified: bool = False  # every modifier
    scale: str = "head"  # of a kv_dtype: head or token

    @property
    def id(self) -> str:
        words = [f"D{self.head_dim}", f"P{self.page_size}", f"G{self.group_size}"]
        words += [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype) if dtype]
        return "-".join(words + ["modified"] * self.modified + [self.scale] * (self.scale != "head"))


e4m3 = torch.float8_e4m3fn
CASES = [Case(d, p) for d in (64, 128, 256) for p in (16, 64)] + [Case(128, 8), Case(128, 16, fp16), Case(128, 256)]
CASES += [Case(d, 16, bf16, e4m3) for d in (64, 128, 256)]
CASES += [Case(128, 16, fp16, torch.float8_e5m2), Case(128, 16, bf16, torch.int8), Case(128, 64, bf16, e4m3)]
CASES += [Case(128, 16, bf16, kv, group) for group in (1, 16, 32) for kv in (None, e4m3)] + [Case(256, group_size=32)]
CASES += [Case(d, 16, bf16, kv, modified=True) for d in (64, 128, 256) for kv in (None, e4m3)]
CASES += [Case(d, 16, bf16, kv, scale="token") for d in (64, 128, 256) for kv in (e4m3, torch.int8)]
CASES += [Case(128, 16, fp16, torch.int8, 32, True, "token"), Case(128, 16, bf16, e4m3, 16, False, "token")]


def planned(case: Case, num_requests: int = 64, num_pages: int = 64) -> Launch:
    driver.set_active(NoDevice(90))
    launch.device_of = lambda device: launch.Device(90, 132)
    heads = NUM_KV_HEADS * case.group_size
    q = torch.empty(num_requests, heads, case.head_dim, dtype=case.dtype)
    shape = (num_pages, case.page_size, NUM_KV_HEADS, case.head_dim)
    caches = [torch.empty(shape, dtype=case.kv_dtype or case.dtype) for _ in range(2)]
    table, lens = (torch.zeros(n, dtype=torch.int32) for n in ((num_requests, 64), num_requests))
    scales = {"head": torch.ones(NUM_KV_HEADS), "token": torch.ones(shape[:3])}
    scale = None if case.kv_dtype is None else scales[case.scale]
    m = Modifiers(0.1, k_scale=scale, v_scale=scale)
    lse = None
    if case.modified:
        m = m._replace(
            window_left=50, softcap=3.0, alibi_slopes=torch.ones(num_requests, heads), sinks=torch.ones(heads)
        )
        lse = torch.empty(q.shape[:2])
    tensors = launch.Tensors(q, *caches, table, lens, None, q, lse, m.sinks, m.alibi_slopes, scale, scale)
    (only,) = decode.plan(tensors, m, torch.zeros(1, dtype=torch.int64)).bound(*tensors)
    assert "k_matrix" in only.arguments
    return only


def facts(case: Case) -> dict:
    of = planned(case)
    kernel = compiling.compiled(of)
    code = sass.of(kernel)
    (loop,) = sass.loops(code)[:1]
    return compiling.facts(kernel, code) | {
        "case": case.id, "threads": 32 * kernel.metadata.num_warps, "maxnreg": of.options["maxnreg"],
        "programs": -(-of.grid[0] * of.grid[1] // 132),  # of a processor
        "keys": of.arguments["spec"].BLOCK_N, "length": len(loop), "order": sass.order(loop),
        "handed": sass.order(loop, HANDED), "spills": sass.spills(loop),
        "products": sum("HGMMA" in text for text in loop), "stores": sum(" STS" in f" {text}" for text in loop),
        "loads": {f"{8 * size}": sum(word in text for text in loop) for size, word in WIDTHS.items()},
    }  # fmt: skip


def others() -> list[Launch]:
    """They differ in requests and pages alone."""
    return [planned(Case(128), *sizes) for sizes in ((64, 64), (1, 1), (3, 1000), (257, 33))]


if __name__ == "__main__":
    compiling.main(CASES, facts, others)
