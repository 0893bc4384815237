"""One merge problem against the fp64 oracle."""

from __future__ import annotations

import math

import numpy as np
import torch

import pagewire as pw
from fuzz import compare, oracle
from fuzz.contents import filled, generator, normal, pick
from fuzz.formats import bits, decode
from fuzz.problems import SPECIALS, Merge
from fuzz.tensors import carve, ship


def check(p: Merge, backend: str, device: torch.device | str = "cpu") -> None:
    given = build(p)
    sent = ship(given, device)
    results = {"out": sent.get("out"), "lse": sent.get("lse")}
    if p.pair:
        if p.in_place:
            results = {"out": sent["out_a"], "lse": sent["lse_a"]}
        states = (sent["out_a"], sent["lse_a"], sent["out_b"], sent["lse_b"])
        out, lse = pw.merge_state(*states, **results, backend=backend)
    else:
        out, lse = pw.merge_states(sent["outs"], sent["lses"], **results, backend=backend)
    pw.check_errors()

    if p.pair:
        outs = torch.stack([given["out_a"], given["out_b"]])
        lses = torch.stack([given["lse_a"], given["lse_b"]])
    else:
        outs, lses = given["outs"], given["lses"]
    out_dtype = p.dtype if p.in_place or p.out_dtype is None else p.out_dtype
    expected = oracle.merge(decode(bits(outs), p.dtype), lses.double().numpy(), out_dtype)
    compare.close("lse", lse, expected[1])
    compare.close("out", out, expected[0])
    written = ("out_a", "lse_a") if p.in_place else ("out", "lse")
    for name in given:
        compare.unchanged(name, sent[name], given[name], around=name in written)


def build(p: Merge) -> dict:
    g = generator(p.seed)
    rows = (p.num_tokens, p.num_heads)
    outs = normal(g, p.num_states, *rows, p.head_dim)
    lses = (p.lse_size * normal(g, p.num_states, *rows)).astype(np.float32)
    if lses.size:
        for special in p.specials:  # each in a place of its own, whatever the others are
            own = generator(p.seed + SPECIALS.index(special))
            _special(special, outs, lses, tuple(pick(own, n) for n in lses.shape))

    def tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
        view = filled(x.shape, x, dtype, p.gap, p.offset)
        view[torch.from_numpy(~np.isfinite(x))] = torch.from_numpy(x[~np.isfinite(x)]).to(view.dtype)
        return view

    given = {}
    if p.pair:
        for i, name in enumerate("ab"):
            given[f"out_{name}"] = tensor(outs[i], p.dtype)
            given[f"lse_{name}"] = tensor(lses[i], "fp32")
    else:
        given["outs"], given["lses"] = tensor(outs, p.dtype), tensor(lses, "fp32")
    if p.out_dtype is not None and not p.in_place:
        given["out"] = carve((*rows, p.head_dim), p.out_dtype, p.gap, p.offset).fill_(torch.nan)
        given["lse"] = carve(rows, "fp32", p.gap, p.offset).fill_(torch.nan)
    return given


def _special(kind: str, outs: np.ndarray, lses: np.ndarray, at: tuple[int, ...]) -> None:
    """What an empty state holds does not matter: it holds NaN."""
    match kind:
        case "empty" | "inf":
            lses[at], outs[at] = -math.inf if kind == "empty" else math.inf, math.nan
        case "nan_lse":
            lses[at] = math.nan
        case "nan_out":
            outs[at][0] = math.nan
        case "inf_out":
            outs[at][-1] = math.inf
