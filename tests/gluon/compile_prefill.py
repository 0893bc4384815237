"""Compiles prefill's Hopper kernel as its launcher launches it, for sm_90 without a GPU; one JSON line per case.

Run as a script, in a process without TRITON_INTERPRET and with PAGEWIRE_HOPPER=1: `compile_prefill.py [ID ...]` or
`compile_prefill.py shapes`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch
from triton.runtime.driver import driver

from gluon import compiling, sass
from pagewire.bench.pretend import NoDevice
from pagewire.kernels import launch, prefill
from pagewire.kernels.place import Launch
from pagewire.types import Modifiers

bf16, fp16 = torch.bfloat16, torch.float16


class Case(NamedTuple):
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = bf16
    modified: bool = False  # every modifier
    kv_dtype: torch.dtype | None = None  # of the cache; None: dtype
    scale: str = "value"  # of a kv_dtype: value, head or token
    num_tokens: int = 4096  # few: several programs share the keys of a row tile
    turns: bool = False  # PAGEWIRE_HOPPER=2

    @property
    def id(self) -> str:
        words = [f"D{self.head_dim}", f"P{self.page_size}", str(self.dtype).removeprefix("torch.")]
        stored = [] if self.kv_dtype is None else [str(self.kv_dtype).removeprefix("torch.")]
        words += ["modified"] * self.modified + stored + [self.scale] * (self.scale != "value")
        return "-".join(words + ["parts"] * (self.num_tokens < 512) + ["turns"] * self.turns)


CASES = [Case(d) for d in (64, 128, 256)] + [Case(128, 64), Case(128, 8), Case(128, 16, fp16)]
CASES += [Case(128, 1), Case(256, 3)]
CASES += [Case(d, 16, bf16, kv_dtype=torch.float8_e4m3fn) for d in (64, 128, 256)]
CASES += [Case(128, 16, fp16, kv_dtype=torch.int8)]
CASES += [Case(d, 16, bf16, True) for d in (64, 128, 256)]
CASES += [Case(d, 16, bf16, num_tokens=64) for d in (64, 128, 256)] + [Case(128, 3, bf16, True, num_tokens=64)]
CASES += [Case(192), Case(192, 3), Case(192, 16, fp16, True), Case(192, 16, bf16, kv_dtype=torch.float8_e4m3fn)]
CASES += [Case(d, 16, bf16, False, torch.float8_e4m3fn, "token") for d in (64, 128, 192)]
CASES += [Case(128, turns=True), Case(128, 3, num_tokens=64, turns=True), Case(256, turns=True)]
CASES += [Case(128, 16, bf16, False, torch.int8, "head"), Case(128, 16, bf16, True, torch.int8, "token", 64)]


def planned(case: Case) -> Launch:
    driver.set_active(NoDevice(90))
    os.environ["PAGEWIRE_HOPPER"] = "2" if case.turns else "1"
    launch.device_of = lambda device: launch.Device(90, 132)
    q = torch.empty(case.num_tokens, 32, case.head_dim, dtype=case.dtype)
    widths, stored = (case.head_dim, min(case.head_dim, 128) if case.head_dim == 192 else case.head_dim), case.kv_dtype
    caches = [torch.empty(64, case.page_size, 8, width, dtype=stored or case.dtype) for width in widths]
    out = q[..., : widths[1]]
    table, lens, rows = (torch.zeros(n, dtype=torch.int32) for n in ((3, 64), 3, 4))
    scales = {"value": 0.5, "head": torch.ones(8), "token": torch.ones(64, case.page_size, 8)}
    scale = None if case.kv_dtype is None else scales[case.scale]
    m = Modifiers(0.1, causal=True, k_scale=scale, v_scale=scale)
    lse = None
    if case.modified:
        m = m._replace(window_left=50, softcap=3.0, alibi_slopes=torch.ones(3, 32), sinks=torch.ones(32))
        lse = torch.empty(q.shape[:2])
    tensors = launch.Tensors(q, *caches, table, lens, rows, out, lse, m.sinks, m.alibi_slopes, scale, scale)
    first, *_ = prefill.plan(tensors, m, torch.zeros(1, dtype=torch.int64)).bound(*tensors)
    assert first.kernel.__name__ == "_prefill_kernel" and "results" in first.arguments
    return first


def loops(code: str, num_products: int) -> list[list[str]]:
    """Over tiles: so many products, all of them before a wait."""
    found = []
    for texts in sass.loops(code):
        waits = [n for n, text in enumerate(texts) if "WARPGROUP.DEPBAR" in text]
        products = [n for n, text in enumerate(texts) if "HGMMA" in text]
        if len(products) == num_products and waits and products[-1] < waits[0]:
            found.append(texts)
    return found


def facts(case: Case) -> dict:
    of = planned(case)
    kernel = compiling.compiled(of)
    code = sass.of(kernel)
    found = loops(code, case.head_dim // 16 + of.arguments["spec"].BLOCK_N // 16)
    return compiling.facts(kernel, code) | {
        "case": case.id, "rows": len(re.findall(r"\bLDGSTS\S*\.128", code)),
        "loops": [{"length": len(texts), "order": sass.order(texts), "spills": sass.spills(texts)} for texts in found],
    }  # fmt: skip


def others() -> list[Launch]:
    """They differ in rows alone: one kernel, and one that shares keys out."""
    return [planned(Case(128, num_tokens=n)) for n in (4096, 300, 64, 77, 33)]


if __name__ == "__main__":
    compiling.main(CASES, facts, others)
