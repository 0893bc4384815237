"""append_kv: bitwise equal to the reference, nothing else touched."""

import pytest
import torch

import cases
import pagewire as pw
from cases import bf16, e4m3, e5m2, fp16, fp32, int8

CASES = [
    # dtype, kv_dtype, scale, layout, page_size, head_dim, head_dim_v
    (fp32, None, None, "NHD", 16, 64, 64),
    (bf16, None, None, "HND", 3, 80, 24),
    (fp16, None, None, "NHD", 1, 128, 128),
    (bf16, e4m3, "float", "NHD", 16, 64, 64),
    (fp16, e5m2, "tensor", "HND", 4, 48, 64),
    (bf16, int8, "head", "NHD", 16, 128, 128),
    (bf16, e4m3, "token_head", "NHD", 16, 64, 64),
    (fp32, int8, "token_head", "HND", 3, 96, 40),
    (fp16, e5m2, "token_head", "NHD", 5, 256, 64),
]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def make(dtype, kv_dtype, scale, layout, page_size, head_dim, head_dim_v, device, strided=False):
    g = torch.Generator().manual_seed(1)
    num_pages, heads, tokens = 5, 3, 9
    kv_dtype = kv_dtype or dtype
    rows = (page_size, heads) if layout == "NHD" else (heads, page_size)
    caches = []
    for width in (head_dim, head_dim_v):
        cache = cases.gaps(num_pages, *rows, width, dtype=kv_dtype, device=device, on=strided)
        bits(cache).fill_(0x11)
        caches.append(cache)
    new = []
    for width in (head_dim, head_dim_v):
        x = cases.gaps(tokens, heads, width, dtype=dtype, device=device, on=strided)
        x.copy_(40 * torch.randn(tokens, heads, width, generator=g))
        x[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
        x[1] = 0
        new.append(x)
    slots = torch.randperm(num_pages * page_size, generator=g)[: tokens - 2]
    slots[min(2, len(slots) - 1)] = -1
    scales = {}
    if scale is not None:
        for name in ("k_scale", "v_scale"):
            shape = {"float": (), "tensor": (), "head": (heads,), "token_head": (num_pages, page_size, heads)}[scale]
            s = torch.rand(shape, generator=g) + 0.1
            scales[name] = float(s) if scale == "float" else s.to(device)
    return (*new, *caches, slots.to(device)), {"layout": layout, **scales}


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(cases.SHORT.get(x, str(x)) for x in c))
def test_append(case, strided, backend, device):
    args, kwargs = make(*case, device=device, strided=strided)
    expected, expected_kw = make(*case, device=device, strided=strided)
    pw.append_kv(*args, **kwargs, backend=backend)
    pw.append_kv(*expected, **expected_kw, backend="reference")
    for name, got, want in (("k_cache", args[2], expected[2]), ("v_cache", args[3], expected[3])):
        assert torch.equal(bits(got), bits(want)), name
    for name in ("k_scale", "v_scale"):
        if isinstance(kwargs.get(name), torch.Tensor):
            assert torch.equal(kwargs[name], expected_kw[name]), name


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_slot_dtypes_and_padding(index_dtype, backend, device):
    """Rows beyond the slot mapping are padding, -1 skips, the rest of the cache keeps its bytes."""
    cache = torch.full((2, 4, 1, 16), 7.0, device=device)
    v_cache = cache.clone()
    k = torch.arange(5.0, device=device)[:, None, None].expand(5, 1, 16).contiguous()
    pw.append_kv(k, -k, cache, v_cache, torch.tensor([6, -1, 0], dtype=index_dtype, device=device), backend=backend)
    assert cache[..., 0].flatten().tolist() == [2, 7, 7, 7, 7, 7, 0, 7]
    assert v_cache[..., 0].flatten().tolist() == [-2, 7, 7, 7, 7, 7, 0, 7]


def test_no_tokens(backend, device):
    cache = torch.zeros(1, 4, 1, 16, device=device)
    k = torch.empty(0, 1, 16, device=device)
    pw.append_kv(k, k, cache, cache.clone(), torch.empty(0, dtype=torch.int64, device=device), backend=backend)
    assert not cache.any()


@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=cases.SHORT.get)
def test_every_bit_pattern_quantises_as_defined(dtype, kv_dtype, backend, device):
    """All 65536 values of a 16-bit dtype, two scales: ties, subnormals, -0, overflow, NaN."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(1, 256, 256).to(device)
    for scale in (1.0, 0.37):
        results = []
        for name in (backend, "reference"):
            cache = torch.zeros(1, 1, 256, 256, dtype=kv_dtype, device=device)
            slot = torch.zeros(1, dtype=torch.int64, device=device)
            pw.append_kv(x, x, cache, cache.clone(), slot, k_scale=scale, v_scale=scale, backend=name)
            results.append(bits(cache))
        assert torch.equal(*results)


@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
def test_quotients_next_to_a_tie_quantise_as_defined(kv_dtype, backend, device):
    """A scale a head, of any size and sign; values whose quotients are ties between codes, a few fp32 steps around
    them, and any."""
    torch.manual_seed(20261127)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kv_dtype).float()
    codes = codes[codes.isfinite()].sort().values.unique()
    ties = (codes[1:] + codes[:-1]) / 2
    exponents = torch.arange(-149, 128).repeat(2).double()
    scales = (torch.rand(len(exponents), dtype=torch.float64) + 1) * 2**exponents
    scales[::3] *= -1
    scales[1::7] = 2 ** exponents[1::7]
    scales = torch.cat((scales.float(), torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1 - 2**-24, 2 - 2**-23])))
    near = (ties.double() * scales[:, None].double()).float()  # [num_heads, num_ties]
    steps = torch.randint(-3, 4, near.shape, dtype=torch.int32)
    near = torch.where(near.abs() > 1e-44, (near.view(torch.int32) + steps).view(torch.float32), near)
    any_bits = torch.randint(-(2**31), 2**31, (len(scales), 512 - near.shape[1])).to(torch.int32).view(torch.float32)
    k, v = torch.cat((near, any_bits), 1).unsqueeze(0).to(device).split(256, 2)
    results = []
    for name in (backend, "reference"):
        caches = [torch.zeros(1, 1, len(scales), 256, dtype=kv_dtype, device=device) for _ in "kv"]
        slot = torch.zeros(1, dtype=torch.int64, device=device)
        scale = scales.to(device)
        pw.append_kv(k, v, *caches, slot, k_scale=scale, v_scale=scale, backend=name)
        results.append(torch.cat([bits(cache) for cache in caches]))
    assert torch.equal(*results)
