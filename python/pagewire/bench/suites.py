"""The lists of cases: `quick` judges a change, `full` makes a table, `smoke` is for tests, `contact` for a machine met
for the first time."""

from __future__ import annotations

from itertools import product

import torch

from pagewire.bench.cases import Append, Attention, Case, Merge, Pack
from pagewire.types import LAYOUTS

SUITES = ("smoke", "contact", "quick", "full")
# how long a suite may take: what does not fit is skipped and named
MINUTES = {
    ("smoke", "cpu"): 1.0, ("contact", "cpu"): 3.0, ("quick", "cpu"): 5.0, ("full", "cpu"): 45.0,
    ("smoke", "cuda"): 1.0, ("contact", "cuda"): 1.0, ("quick", "cuda"): 3.0, ("full", "cuda"): 8.0,
}  # fmt: skip

_BF16, _FP32, _E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
_FP16, _E5M2, _INT8 = torch.float16, torch.float8_e5m2, torch.int8
_GROUPS = ((32, 8), (64, 8), (32, 32), (16, 1))


def cases(suite: str, device: str) -> list[Case]:
    """The cases of a suite on "cpu" or "cuda", those that must not be missed first."""
    return list(dict.fromkeys(_LISTS[suite, device]()))


def _smoke() -> list[Case]:
    return [
        Attention("decode", "2q1s40", (4, 2), 64, 16, _FP32),
        Attention("decode", "2q1s40", (4, 2), 64, 16, _BF16, _E4M3),
        Attention("prefill", "q24", (4, 2), 64, 16, _FP32),
        Attention("mixed", "1q20s33_2q1s40", (4, 2), 64, 16, _FP32),
        Append(33, 2, 64, dtype=_FP32),
        Pack("pack", 37, 2, 2, 1, 64, dtype=_FP32),
        Pack("unpack", 37, 2, 2, 1, 64, layout="HND", dtype=_FP32, wire=_E4M3),
        Merge(2, 16, 4, 64, _FP32),
    ]


# (head_dim, page_size, dtype, of the cache): each dtype pair, class of page sizes and of head widths once
_CONTACT = (
    (128, 16, _BF16, None), (128, 64, _BF16, _E4M3), (64, 1, _FP16, None), (256, 16, _BF16, None),
    (128, 16, _FP16, _INT8), (80, 3, _BF16, _E5M2), (128, 16, _FP32, None),
)  # fmt: skip


def _contact() -> list[Case]:
    """Every op on every kind of row, small. The third batch is what backends for short queries take."""
    found: list[Case] = []
    batches = (
        ("decode", "q1_q1s16_q1s321"),
        ("prefill", "q1_q9_q70_q300s321"),
        ("prefill", "q1s9_2q5s40_q16s130"),
        ("mixed", "q150s200_4q1s130"),
    )
    for group, batch in batches:
        for head_dim, page_size, dtype, kv_dtype in _CONTACT:
            found.append(Attention(group, batch, (32, 8), head_dim, page_size, dtype, kv_dtype))
    for head_dim, page_size, dtype, kv_dtype in _CONTACT:
        found.append(Append(33, 8, head_dim, page_size, dtype=dtype, kv_dtype=kv_dtype))
    for op in ("pack", "unpack"):
        for head_dim, page_size, dtype, wire in _CONTACT:
            found.append(Pack(op, 57, 2, 8, 2, head_dim, page_size, dtype=dtype, wire=wire))
    for num_states in (2, 3):
        for head_dim, _, dtype, _ in _CONTACT:
            found.append(Merge(num_states, 50, 32, head_dim, dtype))
    return found


def _quick_cpu() -> list[Case]:
    found: list[Case] = []
    for dtype in (_BF16, _FP32):
        for batch in ("q1s1k", "q1s4k", "q1s16k", "8q1s1k", "8q1s4k", "32q1s1k"):
            found.append(Attention("decode", batch, dtype=dtype))
    for page_size in (1, 64):
        found.append(Attention("decode", "8q1s1k", page_size=page_size))
    for heads in _GROUPS[1:]:
        found.append(Attention("decode", "8q1s1k", heads))
    for head_dim in (64, 256):
        found.append(Attention("decode", "8q1s1k", head_dim=head_dim))
    found.append(Attention("decode", "8q1s4k", kv_dtype=_E4M3))
    found.append(Attention("skewed", "7q1s256_1q1s25k"))
    for dtype in (_FP32, _BF16):
        for batch in ("q512", "q1k", "q2k", "q512s2k"):
            found.append(Attention("prefill", batch, dtype=dtype))
    found.append(Attention("mixed", "2q512_8q1s1k"))
    found.append(Attention("mixed", "1q1k_8q1s2k", dtype=_FP32))
    found += [Append(32), Append(4096), Append(4096, kv_dtype=_E4M3)]
    for op, layout in product(("pack", "unpack"), LAYOUTS):
        found.append(Pack(op, 1024, 4, layout=layout))
    found += [
        Pack("pack", 1024, 4, heads=1),
        Pack("pack", 1024, 4, page_size=1),
        Pack("pack", 1024, 32),
        Pack("pack", 1024, 4, wire=_E4M3),
        Pack("unpack", 1024, 4, wire=_E4M3),
        Merge(2, 1024),
        Merge(8, 256),
    ]
    return found


def _full_cpu() -> list[Case]:
    found = _quick_cpu()
    for dtype, heads, page_size in product((_BF16, _FP32), _GROUPS, (16, 1, 64)):
        for batch in ("q1s4k", "16q1s2k"):
            found.append(Attention("decode", batch, heads, page_size=page_size, dtype=dtype))
    for dtype in (_BF16, _FP32):
        for batch in ("q4k", "4q512", "q64s4k"):
            found.append(Attention("prefill", batch, dtype=dtype))
    found.append(Attention("mixed", "2q2k_8q1s1k"))
    found += _pack_grid(1024, layers=(1, 8), heads=(8, 2, 1))
    return found


def _quick_cuda() -> list[Case]:
    """Few head widths and page sizes: each is a compilation, and a compilation is seconds; those come last."""
    found: list[Case] = []
    for batch in ("32q1s4k", "q1s1k", "q1s16k", "q1s64k", "8q1s4k", "8q1s16k", "64q1s4k", "128q1s2k", "256q1s1k"):
        found.append(Attention("decode", batch))
    for batch in ("q8k", "q512", "q1k", "q2k", "q4k", "4q2k", "q1ks2k", "q512s8k"):
        found.append(Attention("prefill", batch))
    found.append(Attention("mixed", "2q2k_8q1s1k"))
    found.append(Attention("mixed", "4q1k_16q1s2k"))
    found += [Append(64), Append(8192), Append(8192, kv_dtype=_E4M3)]
    for op, layout in product(("pack", "unpack"), LAYOUTS):
        found.append(Pack(op, 2048, 32, layout=layout))
    found += [
        Pack("pack", 2048, 80),
        Pack("pack", 2048, 1),
        Pack("pack", 2048, 32, heads=1),
        Pack("pack", 2048, 32, page_size=1),
        Pack("pack", 2048, 32, wire=_E4M3),
        Pack("unpack", 2048, 32, wire=_E4M3),
        Merge(2, 8192),
        Merge(8, 1024),
    ]
    found.append(Attention("skewed", "31q1s512_1q1s50k"))
    for page_size in (1, 64):
        found.append(Attention("decode", "32q1s4k", page_size=page_size))
    for heads in _GROUPS[1:]:
        found.append(Attention("decode", "32q1s4k", heads))
    for head_dim in (64, 256):
        found.append(Attention("decode", "32q1s4k", head_dim=head_dim))
    for batch in ("32q1s4k", "q1s16k", "64q1s4k"):
        found.append(Attention("decode", batch, kv_dtype=_E4M3))
    return found


def _full_cuda() -> list[Case]:
    found = _quick_cuda()
    shapes = [*product(_GROUPS, (128,)), *product(_GROUPS[:1], (64, 256))]
    for (heads, head_dim), page_size, kv_dtype in product(shapes, (16, 1, 64), (None, _E4M3)):
        for batch in ("32q1s4k", "q1s16k"):
            found.append(Attention("decode", batch, heads, head_dim, page_size, kv_dtype=kv_dtype))
    for batch in ("8q1s1k", "8q1s64k", "32q1s16k", "256q1s4k", "64q1s16k"):
        found.append(Attention("decode", batch))
    for head_dim, page_size in product((128, 64, 256), (16, 1, 64)):
        for batch in ("q8k", "4q2k"):
            found.append(Attention("prefill", batch, head_dim=head_dim, page_size=page_size))
    for batch in ("q16k", "q2ks16k", "16q512", "8q64s8k"):
        found.append(Attention("prefill", batch))
    for batch in ("2q2k_64q1s4k", "1q4k_128q1s1k", "8q16s4k_8q1s4k"):
        found.append(Attention("mixed", batch))
    found += _pack_grid(2048, layers=(1, 8, 80), heads=(8, 1))
    found += [Merge(32, 1024), Append(1), Append(8192, layout="HND"), Append(8192, page_size=1)]
    return found


def _pack_grid(num_tokens: int, *, layers: tuple[int, ...], heads: tuple[int, ...]) -> list[Case]:
    return [
        Pack(op, num_tokens, num_layers, heads=taken, page_size=page_size, layout=layout, wire=wire)
        for op, wire, layout, page_size, taken, num_layers in product(
            ("pack", "unpack"), (None, _E4M3), LAYOUTS, (16, 1, 64), heads, layers
        )
    ]


_LISTS = {
    ("smoke", "cpu"): _smoke, ("quick", "cpu"): _quick_cpu, ("full", "cpu"): _full_cpu,
    ("smoke", "cuda"): _smoke, ("quick", "cuda"): _quick_cuda, ("full", "cuda"): _full_cuda,
    ("contact", "cpu"): _contact, ("contact", "cuda"): _contact,
}  # fmt: skip
