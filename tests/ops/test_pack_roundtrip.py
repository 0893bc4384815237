"""pack and unpack over random geometries: what left a cache in slices arrives in another one, byte for byte."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cases
import pagewire as pw
from pagewire.types import KV_DTYPES, QUANT_MAX

EXAMPLES = {"reference": 60, "triton": 8}  # an interpreted launch takes a second


@st.composite
def geometries(draw) -> dict:
    """Two caches of the same contents but different pages, and the slices that travel."""
    dtype = draw(st.sampled_from(KV_DTYPES))
    num_tokens = draw(st.integers(1, 9))
    heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return {
        "dtype": dtype,
        "scale": draw(st.sampled_from(["tensor", "head", "token_head"])) if dtype in QUANT_MAX else "none",
        "heads": heads,
        "layers": layers,
        "widths": (draw(st.sampled_from([1, 8, 20])), draw(st.sampled_from([8, 3]))),
        "sides": [
            {"layout": draw(st.sampled_from(["NHD", "HND"])), "page_size": draw(st.integers(1, 6)),
             "strided": draw(st.booleans())} for _ in range(2)
        ],
        "num_tokens": num_tokens,
        "cut_heads": draw(st.integers(1, heads)),  # two senders of kv heads, where there are two
        "cut_layers": draw(st.integers(1, layers)),
        "seed": draw(st.integers(0, 2**16)),
    }  # fmt: skip


def make(g: dict, side: dict, generator: torch.Generator, device) -> tuple[pw.PagedKVCache, torch.Tensor]:
    """A cache full of random bytes (NaN patterns too) with random scales, and one slot per token."""
    num_pages = -(-(g["num_tokens"] + 3) // side["page_size"])
    rows = (side["page_size"], g["heads"])
    rows = rows if side["layout"] == "NHD" else rows[::-1]
    sides, scales = [], []
    for width in g["widths"]:
        layers = []
        for _ in range(g["layers"]):
            cache = cases.gaps(num_pages, *rows, width, dtype=g["dtype"], device=device, on=side["strided"])
            noise = torch.randint(0, 256, (*cache.shape[:-1], width * cache.element_size()), generator=generator)
            cache.copy_(noise.to(torch.uint8).view(g["dtype"]))
            layers.append(cache)
        sides.append(layers)
        shape = {"tensor": (), "head": (g["heads"],), "token_head": (num_pages, side["page_size"], g["heads"])}
        if g["scale"] != "none":
            scales.append(
                [(torch.rand(shape[g["scale"]], generator=generator) + 0.1).to(device) for _ in range(g["layers"])]
            )
    k_scales, v_scales = scales or (None, None)
    cache = pw.PagedKVCache(*sides, layout=side["layout"], k_scales=k_scales, v_scales=v_scales)
    slots = torch.randperm(cache.geometry.num_slots, generator=generator)[: g["num_tokens"]]
    return cache, slots.to(device)


@pytest.mark.parametrize("backend", EXAMPLES)
def test_slices_arrive_as_they_left(backend, device):
    reason = pw.backends(device.type)[backend]
    if reason is not None:
        pytest.skip(reason)

    @settings(max_examples=EXAMPLES[backend], deadline=None, suppress_health_check=list(HealthCheck))
    @given(g=geometries())
    def check(g: dict) -> None:
        generator = torch.Generator().manual_seed(g["seed"])
        source, leaving = make(g, g["sides"][0], generator, device)
        target, arriving = make(g, g["sides"][1], generator, device)
        if g["scale"] in ("tensor", "head"):  # belongs to the cache: both sides agree on it
            for mine, theirs in zip(source.k_scale + source.v_scale, target.k_scale + target.v_scale, strict=True):
                theirs.copy_(mine)
            # requantised on the way: values, not a NaN's payload or an infinity
            for x in source.k + source.v:
                finite = torch.randint(-99, 99, x.shape, generator=generator).float()
                x.copy_(finite.to(g["dtype"]))
        for layers in ((0, g["cut_layers"]), (g["cut_layers"], g["layers"])):
            for heads in ((0, g["cut_heads"]), (g["cut_heads"], g["heads"])):
                if layers[0] < layers[1] and heads[0] < heads[1]:
                    part = pw.pack_kv(source, leaving, layers=layers, heads=heads, backend=backend)
                    assert part.num_bytes == part.buffer.numel()
                    pw.unpack_kv(part, target, arriving, layers=layers, heads=heads, backend=backend)
        whole = pw.pack_kv(source, leaving, backend="reference").buffer
        assert torch.equal(whole, pw.pack_kv(target, arriving, backend="reference").buffer)
        assert torch.equal(whole, pw.pack_kv(source, leaving, backend=backend).buffer)

    check()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_slots_outside_the_range_keep_their_bytes(data):
    """unpack writes the named slots and heads, and nothing else."""
    g = data.draw(geometries())
    generator = torch.Generator().manual_seed(g["seed"])
    source, leaving = make(g, g["sides"][0], generator, "cpu")
    target, arriving = make(g, g["sides"][1], generator, "cpu")
    heads = (0, g["cut_heads"])
    before = pw.pack_kv(target, torch.arange(target.geometry.num_slots), backend="reference")
    pw.unpack_kv(
        pw.pack_kv(source, leaving, heads=heads, backend="reference"), target, arriving, heads=heads,
        backend="reference",
    )  # fmt: skip
    after = pw.pack_kv(target, torch.arange(target.geometry.num_slots), backend="reference")
    spared = torch.ones(g["heads"], target.geometry.num_slots, dtype=torch.bool)
    spared[: heads[1], arriving] = False
    for x, y in ((before.k, after.k), (before.v, after.v)):
        assert torch.equal(x.view(torch.uint8)[:, spared], y.view(torch.uint8)[:, spared])
