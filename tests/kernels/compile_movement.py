"""Compiles what the movement launchers launch, for a GPU that need not be there; one JSON line per kernel.

Run as a script, in a process without TRITON_INTERPRET: `compile_movement.py quick|full`. The launchers are called with
CPU tensors; the launch itself is replaced by its compilation.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import pagewire as pw
from pagewire import moves
from pagewire.backends import triton as backend
from pagewire.bench.pretend import NoDevice
from pagewire.cache_part import CachePart
from pagewire.kernels import append, pack, tables
from pagewire.types import dtype_name

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
e4m3, e5m2, int8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8


def facts(kernel: triton.compiler.CompiledKernel, counts: bool) -> dict:
    """counts: instructions too, which takes longer than compiling."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()

        def dump(what: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, what, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("-sass") if counts else ""
    used = {name.lower(): int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    code = [text for _, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", sass)]
    accesses = re.findall(r"\b((?:ld|st)\.global[.\w]*)", ptx)
    words = sorted({a for a in accesses if a.endswith(("b32", "b16", "b8"))})
    return {
        **used,
        "words": words,
        "div_full": "div.full" in ptx,
        "native": "cvt.rn.satfinite" in ptx,
        "instructions": sum("NOP" not in text for text in code),
    }


# ------------------------------------------------------------------------------------------------ calls


def append_call(dtype, kv_dtype, scale, dim, dim_v=None, pad=0) -> None:
    x = [torch.empty(40, 2, n + pad, dtype=dtype)[..., :n] for n in (dim, dim_v or dim)]
    caches = [torch.empty(8, 16, 2, n, dtype=kv_dtype) for n in (dim, dim_v or dim)]
    shape = {"tensor": (), "head": (2,), "token_head": (8, 16, 2)}.get(scale)
    s = 1.0 if scale == "float" else None if shape is None else torch.ones(shape)
    backend.move(moves.append(*x, *caches, torch.arange(40), s, s), {})


def move_call(op, kv_dtype, scale, wire, dim, dim_v=None, heads=(0, 4), page_size=16) -> None:
    cache = pw.PagedKVCache.allocate(
        num_layers=2, num_pages=8, page_size=page_size, num_kv_heads=4, head_dim=dim, head_dim_v=dim_v,
        dtype=kv_dtype, device="cpu", scale=scale,
    )  # fmt: skip
    slots = torch.arange(page_size * 6)
    packed = pw.PackedKV.empty(pw.packed_shape(cache, len(slots), heads=heads, dtype=wire), "cpu")
    views = CachePart.of(cache, None, heads).views
    backend.move(moves.pack(views, slots, packed) if op == "pack" else moves.unpack(packed, views, slots), {})


def merge_call(num_states, dtype, out_dtype, dim) -> None:
    outs, lses = torch.empty(num_states, 9, 4, dim, dtype=dtype), torch.empty(num_states, 9, 4)
    out, lse = torch.empty(9, 4, dim, dtype=out_dtype), torch.empty(9, 4)
    if num_states == 2:
        backend.merge_state(outs[0], lses[0], outs[1], lses[1], out, lse, {})
    else:
        backend.merge_states(outs, lses, out, lse, {})


def table_call() -> None:
    tables._write(tuple(range(2**40, 2**40 + 40)), torch.device("cpu"))


QUICK = [
    (append_call, bf16, bf16, None, 128),
    (append_call, bf16, e4m3, "token_head", 128),
    (append_call, bf16, e4m3, "float", 128),
    (move_call, "pack", bf16, "none", bf16, 128, None, (1, 2)),
    (move_call, "unpack", bf16, "none", bf16, 80, 64),
    (move_call, "pack", bf16, "none", e4m3, 128),
    (move_call, "pack", e4m3, "token_head", bf16, 128),
    (move_call, "unpack", e5m2, "token_head", bf16, 128),
    (merge_call, 2, bf16, bf16, 128),
    (merge_call, 5, fp32, fp32, 128),
    (table_call,),
]


def full() -> Iterator[tuple]:
    yield from QUICK
    for dtype, dim in itertools.product((bf16, fp16, fp32), (64, 72, 80, 256)):
        yield append_call, dtype, dtype, None, dim
        yield append_call, dtype, dtype, None, dim, 24, 3  # odd strides: narrow accesses
        yield move_call, "pack", dtype, "none", dtype, dim, None, (0, 4), 3
        yield move_call, "unpack", dtype, "none", dtype, dim
        yield merge_call, 2, dtype, fp32, dim
        yield merge_call, 3, dtype, dtype, dim
    for dtype, kv_dtype in itertools.product((bf16, fp16, fp32), (e4m3, e5m2, int8)):
        for scale in ("float", "tensor", "head", "token_head"):
            yield append_call, dtype, kv_dtype, scale, 128
        for scale, dim in itertools.product(("tensor", "token_head"), (96, 256)):
            yield append_call, dtype, kv_dtype, scale, dim, 40
            yield move_call, "pack", kv_dtype, scale, dtype, dim
            yield move_call, "unpack", kv_dtype, scale, dtype, dim
    for kv_dtype, wire in itertools.permutations((e4m3, e5m2, int8), 2):
        yield move_call, "pack", kv_dtype, "head", wire, 128
        yield move_call, "unpack", kv_dtype, "head", wire, 128
    for kv_dtype in (e4m3, e5m2, int8):
        for scale in ("tensor", "head", "token_head"):
            yield move_call, "pack", kv_dtype, scale, kv_dtype, 128
            yield move_call, "unpack", kv_dtype, scale, kv_dtype, 128


def name_of(call: tuple) -> str:
    words = [dtype_name(x) if isinstance(x, torch.dtype) else str(x) for x in call[1:]]
    return "-".join([call[0].__name__.removesuffix("_call"), *words])


def main() -> None:
    run = JITFunction.run
    for arch in (80, 90):
        driver.set_active(NoDevice(arch))
        for call in QUICK if sys.argv[1] == "quick" else full():

            def launch(fn, *args, grid, warmup, _call=call, _arch=arch, **kwargs):
                line = {"arch": _arch, "call": name_of(_call), "kernel": fn.__name__}
                kernel = run(fn, *args, grid=grid, warmup=True, **kwargs)
                print(json.dumps(line | facts(kernel, _arch == 90 and _call in QUICK)), flush=True)

            JITFunction.run = launch
            append.native_fp8 = pack.native_fp8 = lambda device, native=arch >= 90: native
            call[0](*call[1:])


if __name__ == "__main__":
    main()
