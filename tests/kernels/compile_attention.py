"""Compiles what the attention launchers launch, for a GPU that need not be there; one JSON line per kernel.

Run as a script, in a process without TRITON_INTERPRET: `compile_attention.py quick|full [SHARD NUM_SHARDS [WORD]]`,
WORD being part of the wanted ids, or `compile_attention.py shapes`. The launches are the launchers' own, specialised
as they would be; only the device is made up.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton.runtime.driver import driver

from pagewire.bench.pretend import NoDevice
from pagewire.kernels import decode, launch, prefill, tuning
from pagewire.kernels.place import Launch
from pagewire.types import QUANT_MAX, Modifiers, dtype_name

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
e4m3, e5m2, int8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
GROUP = {16: 4, 32: 24, 64: 64}  # a group size for each class of rows
_decode_config = tuning.decode_config


@dataclasses.dataclass(frozen=True)
class Case:
    arch: int
    op: str
    dtype: torch.dtype = bf16
    kv_dtype: torch.dtype = bf16
    head_dim: int = 128
    rows: int = 16
    page_size: int = 16
    modified: bool = False  # every modifier, ragged rows, odd page size, padded head dims
    dependent: bool = False  # the merge is a dependent launch, which no row of the table asks for

    @property
    def id(self) -> str:
        words = [f"sm_{self.arch}", self.op, dtype_name(self.dtype), dtype_name(self.kv_dtype)]
        words += [f"D{self.head_dim}", f"M{self.rows}", f"P{self.page_size}"]
        return "-".join(words + ["modified"] * self.modified + ["dependent"] * self.dependent)


def launches(
    case: Case, batch_size: int = 3, num_tokens: int | None = None, num_pages: int = 8, max_pages: int = 8
) -> list[Launch]:
    driver.set_active(NoDevice(case.arch))
    os.environ["PAGEWIRE_HOPPER"] = "0"
    tuning.decode_config = lambda *of: _decode_config(*of)._replace(dependent_merge=case.dependent)
    launch.device_of = lambda device: launch.Device(case.arch, 132)
    ragged = case.op == "prefill" or case.modified
    num_kv_heads, group = 8, GROUP[case.rows] if case.op == "decode" else 4
    if num_tokens is None:
        num_tokens = 4096 if case.op == "prefill" else batch_size
    head_dim = case.head_dim - 16 * case.modified
    page_size = 3 if case.modified else case.page_size
    q = torch.empty(num_tokens, num_kv_heads * group, head_dim, dtype=case.dtype)
    caches = [torch.empty(num_pages, page_size, num_kv_heads, head_dim, dtype=case.kv_dtype) for _ in range(2)]
    out = torch.empty_like(q, dtype=fp32 if case.modified else case.dtype)
    lse = torch.empty(q.shape[:2]) if case.modified else None
    table, lens, rows = (
        torch.zeros(s, dtype=torch.int32) for s in ((batch_size, max_pages), batch_size, batch_size + 1)
    )
    scale: torch.Tensor | float | None = 1.0 if case.kv_dtype in QUANT_MAX else None
    m = Modifiers(0.1, causal=ragged, k_scale=scale, v_scale=scale)
    if case.modified:
        if scale is not None:
            scale = torch.ones(num_pages, page_size, num_kv_heads)
        m = m._replace(
            window_left=50, softcap=3.0, alibi_slopes=torch.ones(batch_size, q.shape[1]),
            sinks=torch.ones(q.shape[1]), k_scale=scale, v_scale=scale,
            max_q_len=case.rows // group if case.op == "decode" else None,
        )  # fmt: skip
    word = torch.zeros(1, dtype=torch.int64)
    made = (m.sinks, m.alibi_slopes, m.k_scale, m.v_scale)
    tensors = launch.Tensors(q, *caches, table, lens, rows if ragged else None, out, lse, *made)
    plan = decode.plan if case.op == "decode" else prefill.plan
    return plan(tensors, m, word).bound(*tensors)


class Loop(NamedTuple):
    """An innermost loop over tiles of keys: instructions in all, and of these on local memory, which are spills."""

    length: int
    local: int
    wgmma: int


def tile_loops(sass: str) -> list[Loop]:
    """Those with a softmax (an EX2)."""
    code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", sass)
    at = {int(address, 16): i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (_, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        start = at.get(int(target.group(1), 16)) if target else None
        if start is not None and start < i:
            loops.append((start, i + 1))
    loops = [(a, b) for a, b in loops if any("MUFU.EX2" in text for _, text in code[a:b])]
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    texts = [[text for _, text in code[a:b]] for a, b in inner]
    return [
        Loop(len(t), sum(bool(re.search(r"\b(STL|LDL)", x)) for x in t), sum("HGMMA" in x for x in t)) for t in texts
    ]


def facts(case: Case, planned: Launch) -> dict:
    kernel = planned.kernel.warmup(**planned.arguments, grid=planned.grid, **planned.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()

        def dump(what: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, what, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("--dump-resource-usage")
        # disassembling takes longer than compiling: only where there is something to look for
        looked_at = "STACK:0" not in usage or "wgmma" in kernel.asm["ptx"] or case in BUDGETED
        sass = dump("-sass") if looked_at and planned.kernel.__name__ != "_combine_kernel" else ""
    loops = tile_loops(sass)
    used = {name.lower(): int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x[0-9a-f]+|\d+)(?:, [^;]*)?;", ptx)
    return {
        "case": case.id,
        "arch": case.arch,
        "kernel": planned.kernel.__name__,
        **used,
        "spills": max((loop.local / loop.length for loop in loops), default=0.0) if "STACK:0" not in usage else 0.0,
        # without masks: of the tiles between the first and the last, not of rows looked at alone
        "loop": min((loop.length for loop in loops if loop.wgmma or not any(x.wgmma for x in loops)), default=0),
        "shared": kernel.metadata.shared,
        "num_warps": planned.options["num_warps"],
        "programs_per_processor": planned.grid[0] * planned.grid[1] / 132,
        "copies": sorted({int(n, 0) for n in copies}),
        "evict_first": len(re.findall(r"cp\.async\.c[^;]*cache_hint", ptx)),
        "wgmma": "wgmma" in ptx,
        "dependent": kernel.metadata.launch_pdl,
        # in order: what other kernels have left (rows of fp32) is read, results are written
        "order": re.findall(r"griddepcontrol\.\w+|ld\.global[.\w]*\.v4|st\.global", ptx),
        "serialised": sass.count("WARPGROUP.ARRIVE") * 2 > sass.count("HGMMA") > 0,
    }


def every_row() -> Iterator[Case]:
    """Each row of the tables with the dtypes it stands for, plain and with every modifier."""
    dtypes = {
        "16": ((bf16, bf16), (fp16, fp16)),
        "16x8": ((bf16, e4m3), (bf16, e5m2), (fp16, int8)),
        "32": ((fp32, fp32),),
        "32x8": ((fp32, e4m3), (fp32, int8)),
    }
    for op, table in (("decode", tuning.DECODE), ("prefill", tuning.PREFILL)):
        for key in table:
            # but for 128 dims and few packed rows the first dtype stands for the rest, and on sm_80, of many packed
            # rows, plain: the rest takes a quarter of an hour
            less = key.rows in (32, 64)
            one = less or key.head_dim != 128
            for i, (dtype, kv_dtype) in enumerate(dtypes[key.operands][: 1 if one else None]):
                sizes = key.head_dim, key.rows or 16, key.page_size or 16
                case = Case(key.arch, op, dtype, kv_dtype, *sizes)
                yield case
                if i == 0 and not (less and key.arch == 80):
                    yield dataclasses.replace(case, modified=True)


QUICK = [
    Case(arch, op, *dtypes, page_size=page_size)
    for arch in (80, 90)
    for op, *dtypes, page_size in (("decode", bf16, bf16, 16), ("decode", bf16, e4m3, 64), ("prefill", bf16, bf16, 16))
]
QUICK += [Case(90, "decode", modified=True), Case(80, "decode", fp32, fp32)]
QUICK += [Case(90, "prefill", page_size=page_size) for page_size in (1, 64)]
QUICK += [Case(90, "decode", head_dim=256, rows=64)]  # two tiles read the same K and V
QUICK += [Case(arch, "decode", dependent=True) for arch in (80, 90)]


# whose instructions are counted (docs/tuning/instructions.md)
BUDGETED = [case for case in QUICK if case.arch == 90 and not (case.modified or case.dependent)]
BUDGETED += [Case(90, "decode", kv_dtype=e4m3), Case(90, "decode", page_size=1), Case(90, "prefill", kv_dtype=e4m3)]


def compilations() -> None:
    """How often each kernel is compiled for calls that differ only in batch, rows, pages and alignment."""
    counts = {}
    shapes = [(3, 128, 8, 8), (1, 1, 1, 1), (16, 256, 1024, 64), (7, 77, 999, 33)]
    for case in (Case(90, "decode"), Case(90, "prefill", modified=True)):
        for batch_size, num_tokens, *pages in shapes:
            rows = batch_size if case.op == "decode" else num_tokens
            for kernel, grid, arguments, options in launches(case, batch_size, rows, *pages):
                kernel.warmup(**arguments, grid=grid, **options)
                counts[kernel.__name__] = len(kernel.device_caches[90][0])
    print(json.dumps(counts), flush=True)


def main() -> None:
    if sys.argv[1] == "shapes":
        compilations()
        return
    wanted = sys.argv[4] if len(sys.argv) > 4 else ""
    chosen = {"quick": [*dict.fromkeys([*QUICK, *BUDGETED])], "full": every_row()}[sys.argv[1]]
    cases = [case for case in chosen if wanted in case.id]
    cases.sort(key=lambda case: case.modified)  # these take three times as long: shared out evenly
    shard, num_shards = (int(n) for n in (sys.argv[2:4] or (0, 1)))
    for case in itertools.islice(cases, shard, None, num_shards):
        # a prefill's other launches are decode's, and the merge of more packed rows is that of few
        for planned in launches(case)[: 2 if case.op == "decode" and case.rows == 16 else 1]:
            print(json.dumps(facts(case, planned)), flush=True)


if __name__ == "__main__":
    main()
