"""Infinities and NaN in keys that a row does not see leave it alone; rows that see them get what IEEE gives."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import cases
from cases import Attention, bf16, e4m3, e5m2, fp16, fp32, int8

_cpu = pytest.importorskip("pagewire._cpu")
inf, nan = torch.inf, torch.nan

WINDOWS = {
    "causal": {},
    "left": {"window": (30, -1)},
    "right": {"causal": False, "window": (-1, 5)},
    "both": {"causal": False, "window": (40, 9)},
}
SHAPES = {  # (seq_len, q_len), group 2: up to 4 and 16 rows, tiles, several row blocks of a tile
    "four": Attention((100,), (2,), head_dim_v=72),
    "few": Attention((135,), (8,), head_dim=128, page_size=3),
    "few, split": Attention((300,), (7,), split_size=64),
    "few, empty rows": Attention((3,), (8,)),
    "tile": Attention((300,), (40,), head_dim=40, head_dim_v=24, page_size=3),
    "tile, split": Attention((300,), (40,), head_dim_v=128, split_size=64),
    "tile, empty rows": Attention((20,), (40,)),
    "row blocks": Attention((500,), (210,), heads=(2, 1)),
}
DTYPES = {
    "fp32": {"dtype": fp32},
    "fp16": {"dtype": fp16},
    "bf16": {"dtype": bf16},
    "bf16-e4m3": {"dtype": bf16, "kv_dtype": e4m3, "scale": "token_head"},
    "fp32-e5m2": {"dtype": fp32, "kv_dtype": e5m2, "scale": "token_head"},
    "bf16-int8": {"dtype": bf16, "kv_dtype": int8, "scale": "token_head"},
}


@pytest.fixture(params=_cpu.usable_isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_CPU_ISA", request.param)
    return request.param


def case_of(shape: str, dtype: str, window: str) -> Attention:
    return replace(SHAPES[shape], out_dtype=fp32, **DTYPES[dtype], **WINDOWS[window])


def ranges(case: Attention) -> list[tuple[int, int]]:
    """Keys [begin, end) that each row sees."""
    (seq_len,), (q_len,), (left, right) = case.seq_lens, case.q_lens, case.window
    seen = []
    for position in range(seq_len - q_len, seq_len):
        begin = max(position - left, 0) if left >= 0 else 0
        end = min(position + right + 1, seq_len) if right >= 0 else seq_len
        end = min(position + 1, end) if case.causal else end
        seen.append((begin, max(begin, end)))
    return seen


def at(call: cases.Call, key: int) -> tuple[int, int]:
    page_size = call.case.page_size
    return int(call.args[3][0, key // page_size]), key % page_size


def poison(call: cases.Call, key: int, value: float, tensor: str = "v") -> None:
    """One element of the key in all heads; where the type has no such value, the key's scale."""
    cache = call.args["_kv".index(tensor)]
    if cache.dtype == int8:
        call.kwargs[f"{tensor}_scale"][at(call, key)] = value
        return
    cache[at(call, key)][:, 5] = torch.tensor(value).to(cache.dtype)


def dequantised(call: cases.Call, tensor: str) -> Tensor:
    """[seq_len, kv_heads, width] in fp64"""
    slots = [at(call, key) for key in range(call.case.seq_lens[0])]
    x = torch.stack([call.args["_kv".index(tensor)][slot].double() for slot in slots])
    scale = call.kwargs.get(f"{tensor}_scale")
    if scale is not None:
        x *= torch.stack([scale[slot].double() for slot in slots])[..., None]
    return x


def weights(call: cases.Call) -> list[Tensor]:
    """[q heads, visible keys] of each row; for a clean cache"""
    q, k = call.args[0].double(), dequantised(call, "k")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("qhd,khd->qhk", q, k) * q.shape[2] ** -0.5
    return [logits[row, :, begin:end].softmax(-1) for row, (begin, end) in enumerate(ranges(call.case))]


def outputs(call: cases.Call, rows: list[Tensor]) -> Tensor:
    v = dequantised(call, "v")
    v = v.repeat_interleave(call.args[0].shape[1] // v.shape[1], 1).transpose(0, 1)
    return torch.stack(
        [(w[:, None] @ v[:, begin:end])[:, 0] for w, (begin, end) in zip(rows, ranges(call.case), strict=True)]
    )


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, window, isa):
    case = case_of(shape, dtype, window)
    (seq_len,), (q_len,) = case.seq_lens, case.q_lens
    clean_call = cases.build(case)
    clean, clean_lse = clean_call.run("cpu")
    rows = weights(clean_call)
    first = ranges(case)[0][0]
    places = (
        (seq_len - 1, max(seq_len - q_len // 2, 0)),
        (min(first + 1, seq_len - 1), min(first + q_len // 2, seq_len - 1)),  # left ends of windows
        (max(first - 1, 0), max(seq_len - q_len - 1, 0)),  # the first one often unseen by all
    )
    for keys, values in product(places, ((inf, -inf), (nan, inf))):
        call = cases.build(case)
        for key, value in zip(keys, values, strict=True):
            poison(call, key, value)
        out, lse = call.run("cpu")
        where = f"{keys} {values}"
        torch.testing.assert_close(
            out.double(), outputs(call, rows), rtol=0, atol=2e-2, equal_nan=True,
            msg=lambda text, where=where: f"{where}: {text}",
        )  # fmt: skip
        assert torch.equal(lse, clean_lse), where
        blind = torch.tensor([all(not b <= key < e for key in keys) for b, e in ranges(case)])
        assert out[blind].isfinite().all(), where
        # AMX tiles round weights to bf16, but not in a block that is taken row by row
        limit = 2e-2 if isa == "amx" and shape.startswith(("tile", "row blocks")) else 0.0
        torch.testing.assert_close(out[blind], clean[blind], rtol=0, atol=limit)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-int8"])
@pytest.mark.parametrize("shape", ["four", "few", "tile", "row blocks"])
def test_keys(shape, dtype, window, isa):
    case = case_of(shape, dtype, window)
    clean, clean_lse = cases.build(case).run("cpu")
    for key, value in product((case.seq_lens[0] - 1, ranges(case)[0][0]), (inf, -inf, nan)):
        call = cases.build(case)
        poison(call, key, value, "k")
        out, lse = call.run("cpu")
        blind = torch.tensor([not b <= key < e for b, e in ranges(case)])
        assert torch.equal(out[blind], clean[blind]), (key, value)
        assert torch.equal(lse[blind], clean_lse[blind]), (key, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["few, empty rows", "tile, empty rows"])
def test_rows_that_see_nothing(shape, dtype, isa):
    case = case_of(shape, dtype, "causal")
    empty = case.q_lens[0] - case.seq_lens[0]
    for value in (inf, -inf, nan):
        call = cases.build(case)
        for key in range(case.seq_lens[0]):
            poison(call, key, value)
        out, lse = call.run("cpu")
        assert torch.equal(out[:empty], torch.zeros_like(out[:empty]))
        assert torch.equal(lse[:empty], torch.full_like(lse[:empty], -inf))
