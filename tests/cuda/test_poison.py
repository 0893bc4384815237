"""What is not finite, and where it may go: NaN stays NaN, a key reaches only the rows that see it, and V's per-token
scales neither leave fp16's range nor lose digits in it.

The oracle takes each row's visible keys and no others, in fp64.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import pagewire as pw
from cases import SHORT, bf16, e4m3, e5m2, fp16, int8
from pagewire.quant import quantise, token_head_scale

NAN, INF = math.nan, math.inf
PAGE = 16


@pytest.fixture(autouse=True, params=["80", "90"])
def runs_here(request, device, monkeypatch):
    """On sm_80 the portable kernel alone, on sm_90 another one for decode; a real device is what it is."""
    if device.type != "cpu" and request.param == "80":
        pytest.skip("a real device has one architecture")
    monkeypatch.setenv("PAGEWIRE_EMULATION_ARCH", request.param)
    reason = pw.backends(device.type)["cuda"]
    if reason is not None:
        pytest.skip(reason)


@dataclass
class Problem:
    """One request; `k` and `v` are [seq_len, kv_heads, width] as stored, scales fp32 [seq_len, kv_heads]."""

    q: Tensor  # [q_len, heads, width]
    k: Tensor
    v: Tensor
    v_scale: Tensor | None = None
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    sinks: Tensor | None = None

    def run(self, device: torch.device, **extra) -> tuple[Tensor, Tensor]:
        seq_len = len(self.k)
        order = torch.randperm(
            -(-seq_len // PAGE), generator=torch.Generator().manual_seed(1)
        )  # page of every PAGE keys

        def paged(x: Tensor) -> Tensor:
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
            flat = torch.zeros(len(order) * PAGE, *x.shape[1:], dtype=bits)
            flat[:seq_len] = x.contiguous().view(bits)
            pages = torch.empty(len(order), PAGE, *x.shape[1:], dtype=bits)
            pages[order] = flat.view(-1, PAGE, *x.shape[1:])
            return pages.view(x.dtype).to(device)

        def int32(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        keywords = {"return_lse": True, "backend": "cuda", "window_size": self.window, **extra}
        if self.sinks is not None:
            keywords["sinks"] = self.sinks.to(device)
        if self.v_scale is not None:
            keywords["k_scale"] = paged(torch.ones_like(self.v_scale))
            keywords["v_scale"] = paged(self.v_scale)
        args = (self.q.to(device), paged(self.k), paged(self.v), order.int()[None].to(device), int32(seq_len))
        if len(self.q) == 1:
            out, lse = pw.decode(*args, **keywords)
        else:
            out, lse = pw.prefill(*args, int32(0, len(self.q)), causal=self.causal, max_q_len=16, **keywords)
        return out.cpu(), lse.cpu()

    def visible(self, row: int) -> Tensor:
        """The keys that query row `row` sees, ascending."""
        seq_len, q_len = len(self.k), len(self.q)
        position = seq_len - q_len + row
        key = torch.arange(seq_len)
        seen = torch.ones(seq_len, dtype=torch.bool)
        if self.causal or q_len == 1:
            seen &= key <= position
        left, right = self.window
        if left >= 0:
            seen &= key >= position - left
        if right >= 0:
            seen &= key <= position + right
        return key[seen]

    def exact(self) -> tuple[Tensor, Tensor]:
        q_len, heads, width = self.q.shape
        group = heads // self.k.shape[1]
        v = self.v.double()
        if self.v_scale is not None:
            v = v * self.v_scale.double()[..., None]
        out = torch.zeros(q_len, heads, v.shape[-1], dtype=torch.float64)
        lse = torch.full((q_len, heads), -INF, dtype=torch.float64)
        for row in range(q_len):
            seen = self.visible(row)
            for head in range(heads if len(seen) else 0):
                x = self.q[row, head].double() @ self.k[seen, head // group].double().T / width**0.5
                lse[row, head] = x.logsumexp(0)
                out[row, head] = (x.softmax(0)[:, None] * v[seen, head // group]).sum(0)
        return out, lse


def problem(
    seq_len: int, q_len: int = 1, heads: tuple[int, int] = (2, 1), dtype=fp16, kv_dtype=None, width: int = 64,
    v_scale: Tensor | float | None = None, **more,
) -> Problem:  # fmt: skip
    g = torch.Generator().manual_seed(seq_len + 100 * q_len)
    kv_dtype = kv_dtype or dtype

    def stored() -> Tensor:
        x = torch.randn(seq_len, heads[1], width, generator=g)
        return (20 * x).round().clamp(-127, 127).to(int8) if kv_dtype == int8 else x.to(kv_dtype)

    q = torch.randn(q_len, heads[0], width, generator=g)
    q = (q / 20 if kv_dtype == int8 else q).to(dtype)
    k, v = stored(), stored()
    if isinstance(v_scale, float):
        v_scale = torch.full((seq_len, heads[1]), v_scale)
    return Problem(q, k, v, v_scale, **more)


def agree(p: Problem, got: tuple[Tensor, Tensor], rtol: float = 0.0) -> None:
    """NaN and infinities where the oracle has them; the rest within `rtol` of the row's largest value."""
    rtol = rtol or (2e-2 if p.q.dtype == bf16 else 4e-3)
    out, lse = p.exact()
    limit = rtol * torch.where(out.isfinite(), out.abs(), 0.0).amax(-1, keepdim=True)
    for name, x, want, error in (("out", got[0], out, limit), ("lse", got[1], lse, 2e-3)):
        x = x.double()
        same = (x.isnan() & want.isnan()) | (x == want) | ((x - want).abs() <= error)
        at = (~same).nonzero()
        assert not len(at), (
            f"{name}{at[0].tolist()} = {float(x[tuple(at[0])])}, expected {float(want[tuple(at[0])])}; "
            f"{len(at)} of {same.numel()} wrong"
        )


# ------------------------------------------------------------------------------- NaN stays NaN


@pytest.mark.parametrize("split_size", [None, 32])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=SHORT.get)
@pytest.mark.parametrize("kind", ["nan_key", "inf_logits", "inf_logit", "nan_query", "nan_value"])
def test_decode_keeps_nan(kind, dtype, split_size, device):
    p = problem(200, dtype=dtype, heads=(4, 2))
    nan = torch.zeros(4, dtype=torch.bool)
    nan[:2] = True  # the heads of kv head 0
    if kind == "nan_key":
        p.k[70, 0, 3] = NAN
    elif kind == "nan_query":
        p.q[0, :2, 5] = NAN
    elif kind == "nan_value":
        p.v[70, 0] = NAN
    else:
        p.q[0, :2] = p.q[0, :2].abs()
        p.k[slice(None) if kind == "inf_logits" else 70, 0] = INF
    out, lse = p.run(device, split_size=split_size)
    assert out[0, nan].isnan().all() and not out[0, ~nan].isnan().any()
    assert torch.equal(lse[0].isnan(), nan & (kind != "nan_value"))


@pytest.mark.parametrize("sink", [INF, -INF, 2.0])
@pytest.mark.parametrize("seq_len", [0, 2], ids=["no_keys", "more_rows_than_keys"])
def test_rows_without_keys_have_the_sink_alone(seq_len, sink, device):
    p = problem(seq_len or 16, 5, sinks=torch.tensor([sink, 0.5]))
    if seq_len:
        out, lse = p.run(device)
        out, lse = out[:3], lse[:3]
    else:
        args = [x.to(device) for x in (p.q, p.k[None], p.v[None])]
        table, lens, offsets = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0]], [0], [0, 5]))
        out, lse = pw.prefill(
            *args, table, lens, offsets, sinks=p.sinks.to(device), max_q_len=16, return_lse=True, backend="cuda"
        )
        out, lse = out.cpu(), lse.cpu()
    torch.testing.assert_close(lse, torch.tensor([sink, 0.5]).expand(len(lse), 2))
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, fp16, bf16], ids=SHORT.get)
def test_merges_keep_nan(dtype, device):
    g = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 4, 2, 40, generator=g).to(dtype).to(device)
    lses = torch.randn(3, 4, 2, generator=g).to(device)
    outs[1, 1, 0], lses[1, 1, 0] = NAN, NAN
    lses[1, 2, 1] = NAN  # out is clean
    lses[:, 3, 0], outs[:, 3, 0] = -INF, NAN  # empty: out may be anything
    nan = torch.zeros(4, 2, dtype=torch.bool)
    nan[1, 0] = nan[2, 1] = True
    for first, second in ((0, 1), (1, 0)):
        a = pw.merge_state(outs[first], lses[first], outs[second], lses[second], backend="cuda")
        b = pw.merge_states(outs, lses, backend="cuda")
        for out, lse in (a, b):
            out, lse = out.cpu(), lse.cpu()
            assert torch.equal(out.isnan(), nan[..., None].expand(out.shape))
            assert torch.equal(lse.isnan(), nan)
            assert (out[3, 0] == 0).all() and lse[3, 0] == -INF


# ------------------------------------------------------------------- a key reaches those that see it

MASKS = {
    "causal": {},
    "window": {"window": (6, -1)},
    "full_window": {"causal": False, "window": (9, 4)},
    "look_ahead": {"causal": False, "window": (-1, 0)},
}
TYPES = {
    "fp16": (fp16, None), "bf16": (bf16, None), "fp16-e4m3": (fp16, e4m3), "fp16-e5m2": (fp16, e5m2),
    "bf16-e5m2": (bf16, e5m2), "bf16-e4m3": (bf16, e4m3),
}  # fmt: skip
# (heads, q_len): group_size * q_len of 15 .. 64, that is one, two and four warps over a tile, then two chunks
SHAPES = (((1, 1), 15), ((4, 2), 16), ((4, 1), 16), ((6, 1), 16))
POISON = {"inf": (INF,), "-inf": (-INF,), "nan": (NAN,), "both": (INF, -INF)}


def poisoned(p: Problem, at: tuple[int, ...], values: tuple[float, ...]) -> Problem:
    """`values` one after another in some columns of the keys `at`, counted from the end."""
    clean = p.v.clone()
    for i, key in enumerate(at):
        column = torch.arange(0, p.v.shape[-1], 3 + i % 2)
        p.v[-key, :, column] = torch.tensor(values[i % len(values)]).to(p.v.dtype)
    return Problem(p.q, p.k, clean, p.v_scale, p.causal, p.window)


def check_poison(p: Problem, clean: Problem, device: torch.device, **extra) -> None:
    got, before = p.run(device, **extra), clean.run(device, **extra)
    agree(p, got)
    untouched = [row for row in range(len(p.q)) if torch.equal(p.exact()[0][row], clean.exact()[0][row])]
    for x, y in zip(got, before, strict=True):
        assert torch.equal(x[untouched], y[untouched])


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_value_that_some_rows_do_not_see(mask, types, poison, device):
    dtype, kv_dtype = TYPES[types]
    if kv_dtype == e4m3 and poison != "nan":
        pytest.skip("e4m3 has no infinity")
    scale = 0.5 if kv_dtype else None
    p = problem(45, 16, (4, 2), dtype, kv_dtype, v_scale=scale, **MASKS[mask])
    check_poison(p, poisoned(p, (1, 2, 7, 15, 20, 22), POISON[poison]), device)


@pytest.mark.parametrize("width", [64, 80, 256])
@pytest.mark.parametrize("types", ["bf16", "fp16-e5m2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_however_the_rows_share_a_tile(shape, types, width, device):
    heads, q_len = shape
    dtype, kv_dtype = TYPES[types]
    p = problem(140, q_len, heads, dtype, kv_dtype, width=width, v_scale=0.25 if kv_dtype else None)
    clean = poisoned(p, (1, 6, 13, 17), (INF, NAN, -INF))
    check_poison(p, clean, device)
    check_poison(p, clean, device, split_size=64)


@pytest.mark.parametrize("types", ["bf16", "fp16-e5m2"])
def test_rows_whose_windows_begin_in_two_steps(types, device):
    """All lanes of a warp take the same way, though only some of their rows see all of the second step."""
    dtype, kv_dtype = TYPES[types]
    p = problem(140, 15, (1, 1), dtype, kv_dtype, window=(73, -1), v_scale=0.25 if kv_dtype else None)
    check_poison(p, poisoned(p, (1, 13, 74), (INF, NAN)), device)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=SHORT.get)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=SHORT.get)
@pytest.mark.parametrize("mask", ["causal", "full_window"])
def test_a_scale_that_some_rows_do_not_see(mask, dtype, kv_dtype, value, device):
    p = problem(45, 16, (4, 2), dtype, kv_dtype, v_scale=0.5, **MASKS[mask])
    clean = Problem(p.q, p.k, p.v, p.v_scale.clone(), p.causal, p.window)
    p.v_scale[[-3, -12]] = value
    check_poison(p, clean, device)


def test_a_scale_and_a_value(device):
    """Both in one key: inf * inf, inf * 0 and NaN."""
    p = problem(45, 16, (4, 2), fp16, e5m2, v_scale=0.5)
    clean = poisoned(p, (3, 9), (INF, -INF))
    clean.v_scale = p.v_scale.clone()
    p.v_scale[-3], p.v_scale[-9] = INF, 0.0
    p.v[-3, :, 1] = 0.0
    check_poison(p, clean, device)


@pytest.mark.parametrize("types", TYPES)
def test_rows_that_see_nothing_are_zero(types, device):
    dtype, kv_dtype = TYPES[types]
    p = problem(5, 16, (4, 2), dtype, kv_dtype, v_scale=0.5 if kv_dtype else None)
    p.v[:] = torch.tensor(NAN).to(p.v.dtype)
    if p.v_scale is not None:
        p.v_scale[2] = NAN
    out, lse = p.run(device)
    assert (out[:11] == 0).all() and (lse[:11] == -INF).all()
    assert out[11:].isnan().all() and lse[11:].isfinite().all()


def test_a_scale_per_head_does_not_reach_rows_that_see_nothing(device):
    p = problem(5, 16, (4, 2), fp16, e4m3)
    scale = torch.tensor([NAN, 1.0], device=device)
    out, _ = p.run(device, k_scale=torch.ones(2, device=device), v_scale=scale)
    assert (out[:11] == 0).all()
    assert out[11:, :2].isnan().all() and out[11:, 2:].isfinite().all()


# ---------------------------------------------------------------- fp16 weights and per-token scales


# 4 parts of 3 tiles, one of 10, 36 parts (a warp merges 32 at a time); without split_size a block would get one tile
@pytest.mark.parametrize("seq_len, split_size", [(600, 192), (600, 640), (2300, 64)])
@pytest.mark.parametrize("dtype", [fp16, bf16], ids=SHORT.get)
@pytest.mark.parametrize("width", [64, 256])
def test_logits_that_rise_and_fall(width, dtype, seq_len, split_size, device):
    """From tile to tile by more than a weight may grow, in neighbouring rows in opposite directions."""
    p = problem(seq_len, 1, (4, 1), dtype, width=width)
    direction = torch.randn(width, generator=torch.Generator().manual_seed(7))
    direction /= direction.norm()
    p.q[0] = (width**0.5 * torch.tensor([1.0, -1.0, 1.5, -0.25])[:, None] * direction).to(dtype)
    p.k[:, 0] = (torch.linspace(-60, 60, seq_len)[:, None] * direction).to(dtype)
    agree(p, p.run(device, split_size=split_size))


@pytest.mark.parametrize("dtype", [fp16, bf16], ids=SHORT.get)
def test_many_small_weights(dtype, device):
    """2^-22.5 of the largest, 2.8 of fp16's smallest steps; the largest, which every warp has, have V = 0."""
    p = problem(500, 1, (2, 1), dtype)
    p.q[0] = 1.0
    p.k[:] = -15.6 / 8
    p.k[:64:8] = p.v[:64:8] = 0.0
    agree(p, p.run(device, split_size=512, out=float_out(p, device)))


QUANTISED = [e4m3, e5m2, int8]


def float_out(p: Problem, device: torch.device) -> Tensor:
    """fp16 results would lose what the tests look at."""
    return torch.empty(*p.q.shape, dtype=torch.float32, device=device)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 256.0, 1024.0, 60000 / 57344, 2.0**-60, 1e-38])
@pytest.mark.parametrize("kv_dtype", QUANTISED, ids=SHORT.get)
def test_one_scale(kv_dtype, scale, device):
    p = problem(150, 1, (4, 2), fp16, kv_dtype, v_scale=scale)
    if kv_dtype == e5m2 and scale == 60000 / 57344:
        p.v[:, :, 0] = 57344.0
    agree(p, p.run(device, out=float_out(p, device)))


@pytest.mark.parametrize("size", [1.0, 2.0**-24])
@pytest.mark.parametrize("kv_dtype", QUANTISED, ids=SHORT.get)
def test_a_row_of_zeros_beside_natural_scales(kv_dtype, size, device):
    """The quantising rule gives such a row scale 1; it has the largest logit."""
    p = problem(40, 1, (2, 1), fp16, kv_dtype)
    x = size * torch.randn(40, 1, 64, generator=torch.Generator().manual_seed(3))
    x[3] = 0.0
    p.v_scale = token_head_scale(x, kv_dtype)
    p.v = quantise(x, p.v_scale[..., None], kv_dtype)
    assert p.v_scale[3] == 1.0
    k = p.k[3].float()
    p.q[0, :] = (k / k.square().mean() / 2).to(fp16)  # its logit is 4
    agree(p, p.run(device, out=float_out(p, device)))


@pytest.mark.parametrize("split_size", [None, 64])
@pytest.mark.parametrize("trend", ["mixed", "rising", "falling"])
@pytest.mark.parametrize("kv_dtype", QUANTISED, ids=SHORT.get)
def test_scales_that_change(kv_dtype, trend, split_size, device):
    """Over 2^20, within a step or from tile to tile; the small ones are what some columns are made of."""
    n = 600
    exponent = torch.linspace(-10, 10, n)
    if trend == "falling":
        exponent = exponent.flip(0)
    if trend == "mixed":
        exponent = exponent[torch.randperm(n, generator=torch.Generator().manual_seed(5))]
    p = problem(n, 1, (4, 2), fp16, kv_dtype, v_scale=torch.exp2(exponent)[:, None].repeat(1, 2))
    p.v.view(torch.uint8)[p.v_scale[:, 0] > 2.0**-9, :, :8] = 0
    got, lse = p.run(device, out=float_out(p, device), split_size=split_size)
    agree(p, (got, lse))
    want = p.exact()[0][..., :8]
    assert ((got[..., :8] - want).abs() <= 4e-3 * want.abs().amax(-1, keepdim=True)).all()


def test_a_small_scale_after_a_large_one_that_no_longer_counts(device):
    """The largest logit comes last: what the early keys leave in the sums is nothing."""
    p = problem(400, 1, (2, 1), fp16, e4m3, v_scale=1.0)
    p.v_scale[:200], p.v_scale[200:] = 1000.0, 2.0**-40
    p.k[:200] = (-p.q[0, :1].float() * 15).to(e4m3)
    p.k[200:] = (p.q[0, :1].float() * 15).to(e4m3)
    p.q[0, 1] = p.q[0, 0]
    agree(p, p.run(device, out=float_out(p, device), split_size=512))  # one block's


@pytest.mark.parametrize("types", ["fp16-e4m3", "fp16-e5m2", "fp16-int8", "fp16-fp16"])
def test_a_large_scale_that_only_later_rows_see(types, device):
    kv_dtype = {"fp16-int8": int8, "fp16-fp16": fp16}.get(types) or TYPES[types][1]
    p = problem(80, 16, (4, 2), fp16, kv_dtype, v_scale=2.0**-20)
    p.v_scale[-8] = 2.0**14
    agree(p, p.run(device, out=float_out(p, device)))
