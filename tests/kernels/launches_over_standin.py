"""Launches as the driver is told of them, by Triton's own launcher and by ours; one JSON line per call.

Run as a script, in a process with the stand-in's environment (benches/standin).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import host
import torch
from standin import driver as standin
from triton.compiler import CompiledKernel

import pagewire as pw
from pagewire import memo, results
from pagewire.bench import pretend
from pagewire.kernels import again, plan


class Config(ctypes.Structure):
    """As much of a CUlaunchConfig."""

    _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")] + [
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


WATCH = ctypes.CFUNCTYPE(None, ctypes.POINTER(Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
sizes: dict[int, tuple[str, list[int]]] = {}  # function -> its name, bytes of its parameters
told: list[dict[str, Any]] = []
by_ours: list[bool] = []


def watch(config: Any, function: int, parameters: Any) -> None:
    if function not in sizes:  # it writes a table
        return
    name, its_sizes = sizes[function]
    fields = [getattr(config.contents, field) or 0 for field, _ in Config._fields_ if field != "attributes"]
    values = [ctypes.string_at(parameters[i], size).hex() for i, size in enumerate(its_sizes)]
    told.append({"kernel": name, "config": fields, "values": values})
    by_ours.append(config.contents.attributes is None)  # Triton's launcher has a list of them, if an empty one


def sizes_of(kernel: CompiledKernel) -> list[int]:
    """As the machine code has its parameters, whatever the launchers take them to be."""
    head = kernel.asm["ptx"].split("\n)", 1)[0]
    found = re.findall(r"\.param (?:\.align \d+ )?\.[a-z](\d+)[^,\n\[]* \w+_param_\d+(?:\[(\d+)\])?", head)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def more_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What benches/host.py has not: every modifier, prefill's own kernel, HND, 32-bit slots, unaligned tables."""
    bf16, int32 = torch.bfloat16, torch.int32
    caches = [torch.zeros(64, 8, 16, 128, dtype=bf16) for _ in range(2)]
    table, lens = torch.zeros(65, dtype=int32)[1:].view(8, 8), torch.ones(9, dtype=int32)[1:]
    q, slots = torch.zeros(8, 32, 128, dtype=bf16), torch.zeros(8, dtype=int32)
    every = {
        "layout": "HND", "softcap": 30.0, "window_size": (17, -1), "alibi_slopes": torch.ones(8, 32),
        "sinks": torch.ones(32), "split_size": 64, "return_lse": True,
    }  # fmt: skip
    yield "decode, every modifier", lambda: pw.decode(q, *caches, table, lens, **every)
    rows, (k, v) = torch.arange(10, dtype=int32)[1:] - 1, torch.zeros(2, 8, 8, 128, dtype=bf16)
    yield "prefill, long", lambda: pw.prefill(q, *caches, table, lens, rows, layout="HND", softmax_scale=0.25)
    yield "append_kv, HND", lambda: pw.append_kv(k, v, *caches, slots, layout="HND")


def on_hopper() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Kernels in Gluon: pages as boxes, whose matrices Triton's launcher hands over, and, of a long prefill, rows."""
    int32 = torch.int32
    for name, page_size in (("boxes", 16), ("rows", 3)):
        caches = [torch.zeros(64, page_size, 8, 128, dtype=torch.bfloat16) for _ in range(2)]
        table, lens, rows = torch.zeros(1, 8, dtype=int32), torch.ones(1, dtype=int32), torch.tensor([0, 64]).int()
        q = torch.zeros(64, 32, 128, dtype=torch.bfloat16)
        yield f"Hopper, {name}", partial(pw.prefill, q, *caches, table, lens, rows, return_lse=True)
    for dtype, width in ((torch.bfloat16, 128), (torch.int8, 256), (torch.float8_e4m3fn, 64)):
        caches = [torch.zeros(64, 16, 8, width).to(dtype) for _ in range(2)]
        table, lens = torch.zeros(8, 8, dtype=int32), torch.ones(8, dtype=int32)
        q = torch.zeros(8, 32, width, dtype=torch.bfloat16)
        scales = {} if dtype == torch.bfloat16 else {"k_scale": 0.5, "v_scale": torch.ones(8)}
        yield f"Hopper decode, {dtype}", partial(pw.decode, q, *caches, table, lens, **scales)


def calls() -> list[tuple[str, Callable[[], Any]]]:
    return [*host.calls().items(), *more_calls(), *on_hopper()]


def main() -> None:
    launched = standin.activate()
    library = standin.library()
    watcher = WATCH(watch)
    watching = ctypes.c_void_p.in_dll(library, "standin_watch")
    made: dict[Any, torch.Tensor] = {}
    scratch = torch.zeros(1 << 23)
    results.Result.new = lambda of: made.setdefault((*of._shape, of._dtype), torch.zeros(of._shape, dtype=of._dtype))
    plan.Plan._scratch = lambda of: scratch[: sum(of._areas)] if of._areas else None

    def launches_again(launches: Any, kernels: list[CompiledKernel], areas: Any) -> Any:
        for kernel in kernels:
            sizes[kernel.function] = kernel.metadata.name, sizes_of(kernel)
        return again.launches_again(launches, kernels, areas)

    plan.launches_again = launches_again
    halves = torch.zeros(1 << 10, dtype=torch.int32), torch.zeros(1 << 10, dtype=torch.int32)
    plan.counters = lambda device, stream, count: halves  # else they change places from call to call
    with pretend.gpu(90), torch.inference_mode():
        for (name, same), (_, call) in zip(calls(), calls(), strict=True):
            os.environ["PAGEWIRE_HOPPER"] = str(int(name.startswith("Hopper")))
            for _ in range(2):  # Triton compiles; ours is made, and with it `sizes` known
                same()
            memo.forget()
            watching.value = ctypes.cast(watcher, ctypes.c_void_p).value
            told.clear()
            by_ours.clear()
            for _ in range(2):  # by Triton, by ours
                call()
            watching.value = None
            print(json.dumps({"name": name, "told": told, "by_ours": by_ours}))
        call = dict(calls())["append_kv, HND"]
        call()
        call()
        refused(library, call)
        without_context(library, call, launched)


def refused(library: ctypes.CDLL, call: Callable[[], Any]) -> None:
    """A driver that says no."""
    answer = ctypes.c_int.in_dll(library, "standin_refusal")
    answer.value = 700
    try:
        call()
        print(json.dumps({"refused": "no error"}))
    except RuntimeError as error:
        print(json.dumps({"refused": str(error)}))
    answer.value = 0


def without_context(library: ctypes.CDLL, call: Callable[[], Any], launched: Callable[[], int]) -> None:
    """A thread that has none yet: Triton's launcher makes one."""
    library.cuCtxSetCurrent(ctypes.c_void_p(0))
    before = launched()
    thread = threading.Thread(target=lambda: torch.inference_mode()(call)())
    thread.start()
    thread.join()
    context = ctypes.c_void_p()
    library.cuCtxGetCurrent(ctypes.byref(context))
    print(json.dumps({"launches": launched() - before, "context": context.value or 0}))


if __name__ == "__main__":
    main()
