"""Every instruction set of this machine: the shared cases, and conversions over all bit patterns."""

import pytest
import torch

import cases
import pagewire as pw
import tolerance
from cases import Attention, bf16, e4m3, e5m2, fp16, fp32, int8
from pagewire.quant import quantise

_cpu = pytest.importorskip("pagewire._cpu")
ISAS = _cpu.usable_isas()
EVERY_FEW = (cases.DECODE + cases.PREFILL)[::3]
# several tiles of rows and blocks of keys, none of them full, in the dtype that has matrix instructions
TILES = (
    Attention((301, 45), (77, 45), heads=(8, 2), head_dim=40, page_size=3, dtype=bf16),
    Attention((270,), (203,), heads=(3, 3), head_dim=80, head_dim_v=24, dtype=bf16, layout="HND"),
    Attention((161,), (23,), heads=(2, 1), head_dim=96, head_dim_v=256, dtype=bf16, strided=True),
    Attention((385,), (97,), heads=(2, 2), head_dim=256, head_dim_v=72, dtype=bf16, sinks=True),
    Attention((400,), (130,), head_dim=128, dtype=bf16, window=(150, -1), softcap=4.0, alibi=1),
    Attention((33, 300), (20, 201), dtype=bf16, causal=False, window=(40, 9), out_dtype=fp32),
    Attention((9, 140), (12, 131), dtype=bf16, kv_dtype=int8, scale="token_head", page_size=3),
    Attention((141,), (33,), head_dim=56, dtype=bf16, kv_dtype=e4m3, scale="token_head"),
    Attention((300,), (33,), head_dim=72, head_dim_v=17, dtype=bf16, kv_dtype=e5m2, scale="head"),
    Attention((140, 90), (2, 1), heads=(216, 1), head_dim=48, dtype=bf16, split_size=32),
)
# few rows in that dtype: up to four side by side and more, blocks cut by windows, ends and pages
FEW = (
    Attention((300, 1, 33), heads=(4, 1), head_dim=128, dtype=bf16, page_size=32),
    Attention((65, 31), (2, 1), heads=(16, 2), head_dim=80, dtype=bf16, page_size=3, strided=True),
    Attention((96, 200), (4, 3), heads=(8, 2), dtype=bf16, causal=False, window=(50, 2)),
    Attention((130,), heads=(16, 1), head_dim=96, head_dim_v=136, dtype=bf16, softcap=4.0, alibi=2),
    Attention((77, 0, 64), heads=(3, 3), dtype=bf16, window=(40, -1), sinks=True, layout="HND"),
    Attention((100, 64), heads=(12, 2), head_dim=128, dtype=bf16, kv_dtype=e4m3, scale="token_head"),
    Attention((45, 1), (3, 1), dtype=bf16, kv_dtype=int8, scale="token_head", alibi=1),
    Attention((70,), heads=(5, 1), head_dim=72, head_dim_v=17, dtype=bf16, kv_dtype=e5m2, scale="head"),
    Attention((700, 90), heads=(8, 2), dtype=bf16, kv_dtype=int8, scale="head", split_size=64),
)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_CPU_ISA", request.param)
    return request.param


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Of a NaN only that it is one: torch itself keeps or drops its sign depending on where it stands."""
    nan = expected.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan])


@pytest.mark.parametrize("case", [*EVERY_FEW, *TILES, *FEW], ids=lambda c: c.id)
def test_attention(case, isa):
    call = cases.build(case)
    tolerance.check(call, *call.run("cpu"))


def test_a_page_twice_in_a_table(isa):
    """Its rows follow each other only within one entry, not from one to the next."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(4, 24, 1, 64, generator=g).to(bf16) for _ in range(2))
    table = torch.tensor([[2, 2, 2]], dtype=torch.int32)
    q = torch.randn(1, 4, 64, generator=g).to(bf16)
    q[:, 0] = 4 * k[2, 3, 0]  # most of its weight is on the keys 3, 27 and 51
    args = (q, k, v, table, torch.tensor([70], dtype=torch.int32))
    results = [torch.empty(1, 4, 64) for _ in range(2)]
    for out, backend in zip(results, ("cpu", "reference"), strict=True):
        pw.decode(*args, out=out, backend=backend)
    torch.testing.assert_close(*results, rtol=0, atol=2e-2)


def convert(x: torch.Tensor, dtype: torch.dtype, scale: float | None) -> torch.Tensor:
    """[rows, width] through append_kv (quantising) or pack_kv (a plain cast)."""
    rows, width = x.shape
    if scale is not None:
        cache = torch.zeros(rows, 1, 1, width, dtype=dtype)
        pw.append_kv(
            x[:, None], x[:, None], cache, cache.clone(), torch.arange(rows),
            k_scale=scale, v_scale=scale, backend="cpu",
        )  # fmt: skip
        return cache[:, 0, 0]
    # no scales for an fp8 cache: 1.0
    one = [torch.ones(())] if x.dtype.itemsize == 1 else None
    kv = x.reshape(rows, 1, 1, width).contiguous()
    cache = pw.PagedKVCache([kv], [kv.clone()], layout="NHD", k_scales=one, v_scales=one)
    return pw.pack_kv(cache, torch.arange(rows), dtype=dtype, backend="cpu").k[0, 0]


@pytest.mark.parametrize("width", [256, 61], ids=["whole vectors", "a tail"])
@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=cases.SHORT.get)
def test_quantising_is_bitwise_as_defined(dtype, kv_dtype, width, isa):
    """All values of a 16-bit dtype: NaN, infinities, ties and subnormals."""
    x = torch.arange(65536 // width * width, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = x.reshape(-1, width)
    for scale in (1.0, 0.37):
        same_bits(convert(x, kv_dtype, scale), quantise(x, scale, kv_dtype))


@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
def test_quantising_fp32_between_neighbours(kv_dtype, isa):
    """Around every stored value and every midpoint of two: the exact tie and its fp32 neighbours."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kv_dtype).float()
    values = codes[codes.isfinite()].sort().values
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    around = [torch.nextafter(points, torch.full_like(points, s * torch.inf)) for s in (-1, 1)]
    x = torch.stack([points, *around])
    same_bits(convert(x, kv_dtype, 1.0), quantise(x, 1.0, kv_dtype))


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=cases.SHORT.get)
@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
def test_reading_every_stored_byte(kv_dtype, dtype, isa):
    """As one row of 256 (whole wide loads) and as rows of 13 (tails), packed and read by attention."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kv_dtype)
    for x in (codes[None], codes[: 256 // 13 * 13].reshape(-1, 13)):
        same_bits(convert(x, fp32, None), x.float())
    # one key per code: its weight is 1, so that out is the value
    v = codes.reshape(256, 1, 1, 1).repeat(1, 1, 1, 96)
    out = torch.full((256, 1, 96), torch.nan)
    table = torch.arange(256, dtype=torch.int32)[:, None]
    k = torch.zeros_like(v.view(torch.uint8)).view(kv_dtype)
    one = torch.ones(256, dtype=torch.int32)
    pw.decode(torch.ones(256, 1, 96, dtype=dtype), k, v, table, one, k_scale=1.0, v_scale=1.0, out=out, backend="cpu")
    torch.testing.assert_close(out, codes.float()[:, None, None].expand_as(out), rtol=0, atol=0, equal_nan=True)
    # the queries are unit vectors and there is one key: lse is its element
    finite = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(kv_dtype)
    _, lse = pw.decode(
        torch.eye(256, dtype=dtype)[:, None], finite.reshape(1, 1, 1, 256), v[:1], 0 * table, one,
        softmax_scale=1.0, k_scale=1.0, v_scale=1.0, return_lse=True, backend="cpu",
    )  # fmt: skip
    torch.testing.assert_close(lse[:, 0], finite.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("to", [bf16, fp16], ids=cases.SHORT.get)
def test_rounding_fp32(to, isa):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (64, 80), generator=g).to(torch.int32).view(fp32)
    x[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65520.0, 65519.996])
    tie = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25])
    x[1, :6] = tie
    same_bits(convert(x, to, None), x.to(to))


def test_unknown_isa(monkeypatch):
    monkeypatch.setenv("PAGEWIRE_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="PAGEWIRE_CPU_ISA=sse9: .* have .*scalar"):
        cases.build(cases.Attention((3,))).run("cpu")
