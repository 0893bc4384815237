"""No op depends on what its caller has switched on: autocast, gradients, inference, default dtype, determinism."""

import contextlib

import pytest
import torch

import pagewire as pw
from pagewire import errors
from pagewire.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default_dtype": default_dtype,
    "default_device": default_device,
    "deterministic": deterministic,
}


def made(device) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = {name: torch.randn(*shape, generator=g) for name, shape in {
        "q": (5, 4, 16), "k": (5, 2, 16), "v": (5, 2, 16), "k_cache": (4, 4, 2, 16), "v_cache": (4, 4, 2, 16),
        "sinks": (4,), "alibi": (4,), "lse": (5, 4),
    }.items()}  # fmt: skip
    x["int8"] = torch.zeros(4, 4, 2, 16, dtype=torch.int8)
    x["slots"] = torch.tensor([3, 9, -1, 0, 15])
    x["table"] = torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1]], dtype=torch.int32)
    x["lens"] = torch.tensor([14, 9], dtype=torch.int32)
    x["cu"] = torch.tensor([0, 3, 5], dtype=torch.int32)
    return {name: t.to(device) for name, t in x.items()}


def every_op(x: dict[str, torch.Tensor], backend: str, bodies=contextlib.nullcontext) -> dict:
    """Results and written caches of each op; inputs are made outside of the context, results inside."""
    half = {n: x[n].half() for n in ("q", "k_cache", "v_cache")}  # cuda takes no fp32
    caches = [x["int8"].clone() for _ in range(4)]
    scales = [torch.ones(4, 4, 2, dtype=torch.float32, device=x["q"].device) for _ in range(2)]
    float_cache = [x[n].detach().clone() for n in ("k_cache", "v_cache")]
    pair = pw.PagedKVCache(caches[:1], caches[1:2], k_scales=scales[:1], v_scales=scales[1:])
    with bodies():
        r = {}
        pw.append_kv(x["k"], x["v"], *caches[:2], x["slots"], k_scale=scales[0], v_scale=scales[1], backend=backend)
        pw.append_kv(x["k"], x["v"], *caches[2:], x["slots"], k_scale=0.0123, v_scale=0.02, backend=backend)
        pw.append_kv(x["k"], x["v"], *float_cache, x["slots"], backend=backend)
        kw = {"sinks": x["sinks"], "alibi_slopes": x["alibi"], "softcap": 20.0, "return_lse": True}
        keys = (half["k_cache"], half["v_cache"], x["table"], x["lens"])
        r["decode"] = pw.decode(half["q"][:2], *keys, **kw, backend=backend)
        r["prefill"] = pw.prefill(half["q"], *keys, x["cu"], max_q_len=16, **kw, backend=backend)
        r["merge_state"] = pw.merge_state(x["q"], x["lse"], x["q"], x["lse"], backend=backend)
        r["merge_states"] = pw.merge_states(x["q"][None], x["lse"][None], backend=backend)
        good = torch.where(x["slots"] < 0, 1, x["slots"])
        for dtype in (None, torch.float32, torch.float8_e4m3fn):
            packed = pw.pack_kv(pair, good, dtype=dtype, backend=backend)
            pw.unpack_kv(packed, pair, good.flip(0), backend=backend)
            r[f"pack {dtype}"] = (packed.buffer,)
    r["caches"] = (*caches, *scales, *float_cache)
    return r


@pytest.mark.parametrize("name", CONTEXTS)
def test_every_op_in_every_context(name, backend, device):
    x = made(device)
    expected = every_op(x, backend)
    for t in (x["q"], x["k"], x["v"], x["k_cache"]):
        t.requires_grad_(name == "grad")
    got = every_op(x, backend, CONTEXTS[name])
    for op, tensors in expected.items():
        for i, (a, b) in enumerate(zip(got[op], tensors, strict=True)):
            assert a.dtype == b.dtype and a.device == b.device, (op, i)
            assert torch.equal(a.detach().contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), (op, i)
            assert a.grad_fn is None, f"{op} joined the graph of gradients"


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_drop_in_in_every_context(name, device):
    x = made(device)

    def calls():
        cache = [x["k_cache"].detach().clone(), x["v_cache"].detach().clone()]
        new = x["k"][:2].view(2, 1, 2, 16), x["v"][:2].view(2, 1, 2, 16)
        with CONTEXTS[name]() if inside else contextlib.nullcontext():
            a = flash_attn_with_kvcache(
                x["q"][:2].view(2, 1, 4, 16), *cache, *new, cache_seqlens=x["lens"], block_table=x["table"],
                causal=True, return_softmax_lse=True,
            )  # fmt: skip
            b = flash_attn_varlen_func(
                x["q"], *cache, x["cu"], max_seqlen_q=3, seqused_k=x["lens"], block_table=x["table"],
                causal=True, return_softmax_lse=True,
            )  # fmt: skip
        return (*a, *b, *cache)

    inside = False
    expected = calls()
    x["q"].requires_grad_(name == "grad")
    inside = True
    for got, wanted in zip(calls(), expected, strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype and got.grad_fn is None


def test_what_was_made_in_inference_mode_is_written_outside_and_the_other_way(backend, device):
    """Caches of `allocate`, results and buffers of the caller."""
    with torch.inference_mode():
        x = made(device)
        cache = pw.PagedKVCache.allocate(
            num_layers=1, num_pages=4, page_size=4, num_kv_heads=2, head_dim=16, dtype=torch.int8, device=device,
            scale="head",
        )  # fmt: skip
        own = [torch.zeros_like(x["k_cache"]) for _ in range(2)]
        out, lse = torch.empty_like(x["q"]), torch.empty_like(x["lse"])
        buffer = torch.empty(4096, dtype=torch.uint8, device=device)
    assert not cache.k[0].is_inference() and own[0].is_inference()
    slots = torch.tensor([3, 9, 2, 0, 15], device=device)
    pw.append_kv(x["k"], x["v"], *own, slots, backend=backend)
    pw.append_kv(
        x["k"], x["v"], cache.k[0], cache.v[0], slots, k_scale=cache.k_scale[0], v_scale=cache.v_scale[0],
        backend=backend,
    )  # fmt: skip
    pw.merge_state(x["q"], x["lse"], x["q"], x["lse"], out=out, lse=lse, backend=backend)
    pw.merge_states(x["q"][None][:0], x["lse"][None][:0], out=out, lse=lse, backend=backend)
    for chosen in (slots, slots[:0], slots[:1]):
        packed = pw.pack_kv(cache, chosen, out=buffer, backend=backend)
        pw.unpack_kv(packed, cache, chosen, backend=backend)
    cache.k[0].zero_()


@pytest.mark.parametrize("first", [torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("then", [torch.inference_mode, contextlib.nullcontext])
def test_the_error_word_is_read_in_any_mode(first, then, device, monkeypatch):
    monkeypatch.setattr(errors, "_words", {})
    with first():
        word = errors.device_word(torch.device(device))
    with then():
        word.fill_(1 << 56)  # what a kernel leaves
        with pytest.raises(pw.BadIndexError):
            pw.check_errors()
        pw.check_errors()
