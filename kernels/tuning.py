"""Tile shapes per kind of problem: a table, and a pure rule that reads it.

Nothing here knows the batch or a length, so a request is computed the same way in whatever company.

A row that was measured names the run. The reason of the others is static: the tile compiles without
register spills that count for every dtype and modifier (tests/kernels/test_attention_compile.py),
`programs_per_processor` programs fit a processor's registers and shared memory at once, and decode keeps
at least 32 KiB of KV in flight per processor.
"""

from collections.abc import Hashable
from typing import NamedTuple


class KernelConfig(NamedTuple):
    BLOCK_M: int  # packed query rows
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    programs_per_processor: int = 1  # they share its registers; decode's grid: all resident at once
    # decode on sm_90 and newer: the merge of splits is a dependent launch, whose programs find their rows while the
    # splits are computed. No row has it: 8q1s4k took 46.5 µs without and 48.4 with it, 16k 30.9 and 33.2 (H200,
    # benches/results/h200-2026-11-26)
    dependent_merge: bool = False


class Traits(NamedTuple):
    """What a tile's shape may depend on."""

    arch: int  # 90 for sm_90; 0: the interpreter
    head_dim: int  # the larger of head_dim and head_dim_v
    q_bytes: int  # of an element
    kv_bytes: int
    page_size: int


class Key(NamedTuple):
    arch: int  # 80: 8.x and 12.x, 99 KiB of shared memory on the smallest; 90: 9.x to 11.x, 227 KiB; 0
    operands: str  # "16": fp16 or bf16; "16x8": the same over an fp8 or int8 cache; "32": fp32; "32x8"
    head_dim: int  # 64, 128 or 256, rounded up
    rows: int = 0  # decode: 16, 32 or 64 packed rows, rounded up, more take several tiles; prefill: 0
    page_size: int = 0  # 0: any; else 1, 16 or 64, rounded down: a row of that class alone


# what tells the tables apart from those of other calls: a plan is kept for one of them (bench/tune.py changes both)
variant: Hashable = None


def key(traits: Traits, rows: int = 0) -> Key:
    arch = 0 if traits.arch == 0 else 90 if 90 <= traits.arch < 120 else 80
    operands = ("32" if traits.q_bytes == 4 else "16") + ("x8" if traits.kv_bytes == 1 else "")
    head_dim = next(d for d in (64, 128, 256) if traits.head_dim <= d)
    return Key(arch, operands, head_dim, min(64, max(16, 1 << (rows - 1).bit_length())) if rows else 0)


def decode_config(traits: Traits, rows: int) -> KernelConfig:
    """rows: the most packed rows a request can have."""
    found = key(traits, rows)
    if found.arch == 0:
        return _INTERPRETER._replace(BLOCK_M=found.rows)
    small = found.arch == 80 and traits.arch not in (80, 87)  # 100 KiB of shared memory for all programs together
    config = _row(DECODE, found, traits)
    return config._replace(programs_per_processor=1) if small else config


def prefill_config(traits: Traits) -> KernelConfig:
    found = key(traits)
    return _INTERPRETER if found.arch == 0 else _row(PREFILL, found, traits)


def _row(table: dict[Key, KernelConfig], found: Key, traits: Traits) -> KernelConfig:
    page_size = next(size for size in (64, 16, 1) if traits.page_size >= size)
    return table.get(found._replace(page_size=page_size)) or table[found]


def row_limit(traits: Traits) -> int:
    """A prefill's requests with at most this many packed rows are split over KV like decode."""
    return 64 if traits.arch else 16


_INTERPRETER = KernelConfig(16, 16, 4, 1)  # small tiles, so that small tests have several

# "in flight": bytes of K and V that a program has requested ahead, (num_stages - 1) tiles
DECODE = {
    # 16 bit: 64 keys are 4 warps' MMA columns twice over; 32 where 64 do not fit the registers
    Key(90, "16", 64, 16): KernelConfig(16, 64, 4, 4, 2),  # in flight 48 KiB
    Key(90, "16", 64, 32): KernelConfig(32, 32, 4, 4, 2),  # 24 KiB
    Key(90, "16", 64, 64): KernelConfig(64, 64, 4, 4, 2),  # 48 KiB; wgmma
    Key(90, "16", 128, 16): KernelConfig(16, 64, 4, 3, 2),  # 64 KiB
    Key(90, "16", 128, 32): KernelConfig(32, 32, 4, 4, 2),  # 48 KiB
    Key(90, "16", 128, 64): KernelConfig(64, 32, 4, 4, 2),  # 48 KiB; wgmma
    Key(90, "16", 256, 16): KernelConfig(16, 32, 4, 3, 2),  # 64 KiB
    Key(90, "16", 256, 32): KernelConfig(32, 32, 8, 3),  # 64 KiB
    Key(90, "16", 256, 64): KernelConfig(32, 32, 8, 3),  # 64 rows of 256 spill: two tiles share K and V through L2
    # 8 bit: the converted tile passes through registers, half the bytes a key
    Key(90, "16x8", 64, 16): KernelConfig(16, 128, 4, 4, 2),  # 1.07x of 64 keys (H200, as below)
    Key(90, "16x8", 64, 32): KernelConfig(32, 32, 4, 6, 2),  # 20 KiB
    Key(90, "16x8", 64, 64): KernelConfig(64, 32, 4, 6, 2),  # 20 KiB
    # 1.20x of 32 keys in 6 stages (H200, benches/results/h200-2026-11-26)
    Key(90, "16x8", 128, 16): KernelConfig(16, 128, 4, 3, 2),
    Key(90, "16x8", 128, 32): KernelConfig(32, 32, 4, 4, 2),  # 24 KiB
    Key(90, "16x8", 128, 64): KernelConfig(64, 32, 4, 4, 2),  # 24 KiB
    Key(90, "16x8", 256, 16): KernelConfig(16, 32, 4, 4, 2),  # 48 KiB
    Key(90, "16x8", 256, 32): KernelConfig(32, 32, 8, 4),  # 48 KiB
    Key(90, "16x8", 256, 64): KernelConfig(32, 32, 8, 4),  # 48 KiB
    # 32 bit: exact multiplication runs on the FMA units, whose operands live in registers: 8 warps share them
    Key(90, "32", 64, 16): KernelConfig(16, 32, 8, 3),
    Key(90, "32", 64, 32): KernelConfig(32, 32, 8, 3),
    Key(90, "32", 64, 64): KernelConfig(64, 32, 8, 3),
    Key(90, "32", 128, 16): KernelConfig(16, 16, 8, 3),
    Key(90, "32", 128, 32): KernelConfig(32, 16, 8, 3),
    Key(90, "32", 128, 64): KernelConfig(32, 16, 8, 3),
    Key(90, "32", 256, 16): KernelConfig(16, 16, 8, 3),
    Key(90, "32", 256, 32): KernelConfig(16, 16, 8, 3),
    Key(90, "32", 256, 64): KernelConfig(16, 16, 8, 3),
    # converted as well as exact: without room for a pipeline
    Key(90, "32x8", 64, 16): KernelConfig(16, 32, 8, 1),
    Key(90, "32x8", 64, 32): KernelConfig(32, 32, 8, 1),
    Key(90, "32x8", 64, 64): KernelConfig(32, 32, 8, 1),
    Key(90, "32x8", 128, 16): KernelConfig(16, 16, 8, 1),
    Key(90, "32x8", 128, 32): KernelConfig(32, 16, 8, 1),
    Key(90, "32x8", 128, 64): KernelConfig(32, 16, 8, 1),
    Key(90, "32x8", 256, 16): KernelConfig(16, 16, 16, 1),
    Key(90, "32x8", 256, 32): KernelConfig(16, 16, 16, 1),
    Key(90, "32x8", 256, 64): KernelConfig(16, 16, 16, 1),
}
DECODE |= {k._replace(arch=80): c for k, c in DECODE.items()}
DECODE |= {  # e4m3 is decoded from its bits there: narrower tiles, and a fourth stage of 256 dims spills 8 bytes
    Key(80, "16x8", 64, 16): KernelConfig(16, 64, 4, 4, 2),  # in flight 24 KiB
    Key(80, "16x8", 128, 16): KernelConfig(16, 32, 4, 6, 2),  # 40 KiB
    Key(80, "16x8", 256, 32): KernelConfig(32, 32, 8, 3),
    Key(80, "16x8", 256, 64): KernelConfig(32, 32, 8, 3),
}

PREFILL = {
    # 128 rows: two warpgroups of wgmma, 64 accumulator registers a thread at 128 dims
    Key(90, "16", 64): KernelConfig(128, 64, 8, 3),
    Key(90, "16", 128): KernelConfig(128, 64, 8, 3),
    Key(90, "16", 256): KernelConfig(128, 32, 8, 3),  # 1.88x of 64 rows (H200, benches/results/h200-2026-11-26)
    Key(90, "16x8", 64): KernelConfig(128, 64, 8, 3),
    Key(90, "16x8", 128): KernelConfig(128, 64, 8, 3),  # 1.18x of 32 keys (H200); 128 keys in 2 stages 1.21x
    Key(90, "16x8", 256): KernelConfig(64, 16, 8, 3),
    # mma.sync: every warp reads the whole K tile into registers, so that tiles are narrower
    Key(80, "16", 64): KernelConfig(128, 64, 8, 3),
    Key(80, "16", 128): KernelConfig(128, 32, 8, 2),
    Key(80, "16", 256): KernelConfig(64, 32, 8, 2),
    Key(80, "16x8", 64): KernelConfig(128, 32, 8, 3),
    Key(80, "16x8", 128): KernelConfig(64, 32, 8, 3),
    Key(80, "16x8", 256): KernelConfig(32, 16, 8, 2),
}
_EXACT = {  # FMA units, as in DECODE
    ("32", 64): KernelConfig(32, 32, 8, 2),
    ("32", 128): KernelConfig(32, 16, 8, 2),
    ("32", 256): KernelConfig(16, 16, 8, 2),
    ("32x8", 64): KernelConfig(32, 32, 8, 1),
    ("32x8", 128): KernelConfig(32, 32, 8, 1),
    ("32x8", 256): KernelConfig(16, 16, 8, 1),
}
PREFILL |= {Key(arch, *kind): config for arch in (80, 90) for kind, config in _EXACT.items()}

# one row, 16 partials of it at a time: 8 KiB in flight at 128 dims, 96 registers a thread
COMBINE = KernelConfig(1, 16, 4, 2, 5)
