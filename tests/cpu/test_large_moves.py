"""Moves so large that they go past the caches: bytes as the reference moves them, on every instruction set."""

import os
import platform
import re
import shutil
import subprocess

import pytest
import torch

import pagewire as pw
from pagewire.types import Layout

_cpu = pytest.importorskip("pagewire._cpu")
NUM_PAGES, TOKENS = 270, 4200  # of 2 layers of 4 heads: 17 MB at a width of 128


@pytest.mark.parametrize("isa", _cpu.usable_isas())
@pytest.mark.parametrize(("width", "layout"), [(128, "NHD"), (128, "HND"), (129, "NHD")])
def test_pack_and_unpack(width: int, layout: Layout, isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PAGEWIRE_CPU_ISA", isa)
    g = torch.Generator().manual_seed(0)
    caches = [
        pw.PagedKVCache.allocate(
            num_layers=2, num_pages=NUM_PAGES, page_size=16, num_kv_heads=4, head_dim=width,
            dtype=torch.bfloat16, device="cpu", layout=layout,
        )
        for _ in range(2)
    ]  # fmt: skip
    for x in (*caches[0].k, *caches[0].v):
        x.copy_(torch.randn(x.shape, generator=g))
    for x in (*caches[1].k, *caches[1].v):
        x.zero_()
    slots = torch.randperm(NUM_PAGES * 16, generator=g)[:TOKENS]
    packed = pw.pack_kv(caches[0], slots, backend="cpu")
    expected = pw.pack_kv(caches[0], slots, backend="reference")
    assert torch.equal(packed.k, expected.k) and torch.equal(packed.v, expected.v)
    pw.unpack_kv(packed, caches[1], slots, backend="cpu")
    again = pw.pack_kv(caches[1], slots, backend="reference")
    assert torch.equal(again.k, expected.k) and torch.equal(again.v, expected.v)
    untouched = torch.ones(NUM_PAGES * 16, dtype=torch.bool)
    untouched[slots] = False
    left = pw.pack_kv(caches[1], untouched.nonzero()[:, 0], backend="reference")
    assert not left.k.any() and not left.v.any()


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitized build is not what ships")
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="reads x86 with objdump")
def test_moves_out_of_pages_fetch_ahead():
    """GCC drops a call whose only effect is to fetch."""
    listing = subprocess.run(["objdump", "-dC", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    whole = re.compile(r"\w+ <[^\[]*::move_rows\([^\[]*>:")  # GCC may split a cold part off, named [clone ...]
    functions = [text for text in listing.split("\n\n") if whole.match(text)]
    assert len(functions) >= 3  # one for each instruction set
    assert all("prefetch" in text for text in functions)
