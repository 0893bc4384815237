"""What the shared cases leave out of the CUDA kernel: every modifier and scale in both dtypes, every way of sharing
a tile among warps, work that is cut in the middle, blocks in another order.

The shared cases run it too (tests/ops), those of fp32 queries with fp16 ones.
"""

import dataclasses

import pytest
import torch

import cases
import pagewire as pw
import tolerance
from cases import Attention, bf16, e4m3, e5m2, fp16, int8


@pytest.fixture(autouse=True)
def runs_here(device):
    reason = pw.backends(device.type)["cuda"]
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["80", "90"])
def arch(request, device, monkeypatch):
    """sm_80 has the portable kernel alone, sm_90 another one for decode; a real device is what it is."""
    if device.type != "cpu" and request.param == "80":
        pytest.skip("a real device has one architecture")
    monkeypatch.setenv("PAGEWIRE_EMULATION_ARCH", request.param)


def check(case, device):
    call = cases.build(case, device)
    tolerance.check(call, *call.run("cuda"))


MODIFIERS = {
    "window": {"window": (7, -1)},
    "window00": {"window": (0, 0)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": 1},
    "all": {"alibi": 2, "softcap": 5.0, "sinks": True, "window": (12, 3)},
    "full": {"window": (4, 6), "causal": False, "sinks": True},
    "full_alibi": {"alibi": 2, "causal": False},
}


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("q_lens", [None, (3, 1, 16)], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=cases.SHORT.get)
@pytest.mark.parametrize("name", MODIFIERS)
def test_modifiers(name, dtype, q_lens, device):
    check(Attention((90, 5, 33), q_lens, dtype=dtype, **MODIFIERS[name]), device)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("scale", ["float", "head", "batch_head", "token_head"])
@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=cases.SHORT.get)
@pytest.mark.parametrize("head_dim", [80, 128])  # 128: rows for the TMA
def test_quantised_caches(head_dim, dtype, kv_dtype, scale, device):
    case = Attention((150, 40), dtype=dtype, kv_dtype=kv_dtype, scale=scale, head_dim=head_dim)
    check(case, device)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
@pytest.mark.parametrize("kv_dtype", [e4m3, int8], ids=cases.SHORT.get)
def test_queries_of_any_size(kv_dtype, size, device):
    """Beyond fp16, which an 8-bit cache's kernels multiply in."""
    call = cases.build(Attention((150, 40), dtype=bf16, kv_dtype=kv_dtype, scale="head", head_dim=128), device)
    call.args[0].mul_(size)
    call.kwargs["softmax_scale"] = 128**-0.5 / size
    tolerance.check(call, *call.run("cuda"))


# splits of fewer keys than a tile are a tile
PAGES = ((3, None), (8, 72), (12, None), (16, 72), (24, 88), (24, 64), (48, None), (80, 64), (128, None), (256, 100))


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("q_lens", [None, (3, 8)], ids=["decode", "prefill"])
@pytest.mark.parametrize("page_size, split_size", PAGES, ids=str)
def test_pages_and_splits_that_do_not_divide_a_tile(page_size, split_size, q_lens, device):
    check(
        Attention((275, 77), q_lens, dtype=bf16, page_size=page_size, split_size=split_size, window=(230, -1)), device
    )


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("window", [(-1, -1), (31, -1), (32, -1), (62, -1)], ids=str)
@pytest.mark.parametrize("caches", [{}, {"kv_dtype": e4m3, "scale": "head"}], ids=["same", "e4m3"])
def test_lengths_and_windows_around_a_step(caches, window, device):
    """Of 16 or 32 keys, of which each has to see whether all rows see all of it."""
    lens = tuple(n + d for n in (32, 64, 128) for d in (-1, 0, 1))
    check(Attention(lens, dtype=bf16, head_dim=128, window=window, **caches), device)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("heads", [(3, 1), (10, 2), (14, 2), (12, 1)], ids=str)
@pytest.mark.parametrize("kv_dtype", [None, e4m3], ids=["same", "e4m3"])
def test_group_sizes(heads, kv_dtype, device):
    case = Attention((90, 5), heads=heads, dtype=fp16, head_dim=128, kv_dtype=kv_dtype, scale=kv_dtype and "head")
    check(case, device)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("q_lens", [None, (3, 8)], ids=["decode", "prefill"])
@pytest.mark.parametrize("out_dtype", [bf16, torch.float32], ids=cases.SHORT.get)
def test_every_stride_and_address(out_dtype, q_lens, device):
    """q and out off 16 bytes, lse and sinks with strides between heads, NaN between the caches' narrow rows."""
    case = Attention((70, 33), q_lens, dtype=bf16, head_dim=72, head_dim_v=40, sinks=True, strided=True)
    call = cases.build(case, device)
    q, *rest = call.args
    late = torch.empty(*q.shape[:2], 73, dtype=bf16, device=device)[..., 1:]
    sinks = torch.empty(4, 2, device=device)[:, 0]
    call = dataclasses.replace(
        call, args=(late.copy_(q), *rest), kwargs={**call.kwargs, "sinks": sinks.copy_(call.kwargs["sinks"])}
    )
    out = torch.full((*q.shape[:2], 41), torch.nan, dtype=out_dtype, device=device)[..., 1:]
    lse = torch.full((*q.shape[:2], 2), torch.nan, device=device)[..., 0]
    tolerance.check(call, *call.run("cuda", out=out, lse=lse))


CACHES = {
    "same": {},
    "e4m3": {"kv_dtype": e4m3, "scale": "head"},
    "token_head": {"kv_dtype": e4m3, "scale": "token_head"},
}


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("q_lens", [None, (3, 8)], ids=["decode", "prefill"])
@pytest.mark.parametrize("page", [-1, 2147480000])
@pytest.mark.parametrize("caches", CACHES)
def test_a_page_outside_the_cache(caches, page, q_lens, device):
    """As if its tokens did not exist. Nor is another page read for it: page 0 is NaN."""
    case = Attention((300, 90), q_lens, heads=(8, 2), head_dim=128, dtype=fp16, **CACHES[caches])
    call = cases.build(case, device)
    q, *cache, table, lens = call.args[:5]
    cache = [torch.cat([torch.full(x[:1].shape, torch.nan, device=device).to(x.dtype), x]) for x in cache]
    table.add_(table < cases.PADDING)
    if caches == "token_head":
        for name in ("k_scale", "v_scale"):
            scale = call.kwargs[name]
            call.kwargs[name] = torch.cat([torch.full_like(scale[:1], torch.nan), scale])
    without, fewer = table.clone(), lens.clone()
    without[0, 3:-1] = table[0, 4:]
    fewer[0] -= 16
    expected = dataclasses.replace(call, args=(q, *cache, without, fewer, *call.args[5:]))
    table[0, 3] = page
    got = dataclasses.replace(call, args=(q, *cache, *call.args[3:])).run("cuda")
    with pytest.raises(pw.BadIndexError, match=r"page_table\[0, 3\] is outside"):
        pw.check_errors()
    tolerance.check(expected, *got)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("seq_len", [199, 203])
@pytest.mark.parametrize("q_lens", [None, (3,)], ids=["decode", "prefill"])
def test_pages_before_the_window_are_not_looked_up(q_lens, seq_len, device):
    call = cases.build(Attention((seq_len,), q_lens, dtype=bf16, window=(40, -1)), device)
    expected = call.run("cuda")
    call.args[3][0, : (seq_len - (q_lens or (1,))[0] - 40) // 16] = cases.PADDING
    got = call.run("cuda")
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


WIDTHS = ((48, 32), (64, 64), (80, 80), (96, 128), (128, 48), (192, 128), (256, 256))


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("kv_dtype", [None, int8], ids=["same", "int8"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths(widths, kv_dtype, device):
    head_dim, head_dim_v = widths
    scale = "head" if kv_dtype else None
    case = Attention(
        (70, 33), heads=(5, 1), dtype=bf16, head_dim=head_dim, head_dim_v=head_dim_v, kv_dtype=kv_dtype, scale=scale
    )
    check(case, device)


@pytest.mark.parametrize("split_size", [None, 48], ids=["even", "split48"])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("rows", [(12, 16), (20, 1), (33, 1), (8, 12), (48, 3)], ids=str)
def test_rows_beyond_one_tile(rows, head_dim, split_size, device):
    """group_size * q_len of 17 .. 192: two and four warps over one tile, then several chunks."""
    group, q_len = rows
    case = Attention(
        (100, 19), (q_len, min(q_len, 2)), heads=(group, 1), dtype=bf16, head_dim=head_dim, split_size=split_size,
        max_q_len=16,
    )  # fmt: skip
    check(case, device)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("num_sms", ["1", "3", "7", "64"])
@pytest.mark.parametrize("lens", [(1, 700, 0, 64, 65), (513,), (3,) * 20], ids=["mixed", "one", "short"])
def test_however_the_work_is_cut(lens, num_sms, device, monkeypatch):
    """Items cut in the middle, cut into many, several to a block, blocks without work."""
    if device.type != "cpu":
        pytest.skip("a real device has its own number of multiprocessors")
    monkeypatch.setenv("PAGEWIRE_EMULATION_SMS", num_sms)
    check(Attention(lens, dtype=bf16, heads=(4, 2), sinks=True), device)


@pytest.mark.usefixtures("arch")
def test_more_requests_than_threads(device):
    """The scan over seq_lens takes several rounds; empty requests lie between the others."""
    lens = tuple((7 * i) % 23 if i % 5 else 0 for i in range(140))
    check(Attention(lens, dtype=bf16, heads=(2, 1), head_dim=64), device)
    q_lens = tuple((3 * i) % 4 for i in range(140))
    check(Attention(lens, q_lens, dtype=bf16, heads=(2, 1), max_q_len=16, padding_rows=3), device)


def test_more_requests_than_two_rounds_share_out(device, monkeypatch):
    """A third round, from 1025 requests on; whichever of a lane's requests is wrong is reported."""
    monkeypatch.setenv("PAGEWIRE_EMULATION_SMS", "3")
    lens = tuple((7 * i) % 23 if i % 9 == 4 else 0 for i in range(1100))
    q_lens = tuple((3 * i) % 4 for i in range(1100))
    call = cases.build(Attention(lens, q_lens, dtype=bf16, heads=(2, 1), max_q_len=16, padding_rows=3), device)
    tolerance.check(call, *call.run("cuda"))
    call.args[4][1097] = -1
    call.run("cuda")
    with pytest.raises(pw.BadIndexError, match=r"seq_lens\[1097\]"):
        pw.check_errors()


def test_an_offset_that_goes_back_takes_no_rows(device):
    """The next request begins at the largest offset before it, which another lane of the scan has read."""
    call = cases.build(Attention((20,) * 40, (1,) * 40, dtype=bf16, heads=(2, 1), max_q_len=2), device)
    call.args[5][21] = 20
    expected = call.run("cuda")
    call.args[5][21] = 0
    got = call.run("cuda")
    with pytest.raises(pw.BadIndexError, match=r"cu_seqlens_q\[21\]"):
        pw.check_errors()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("split_size", [None, 64])
def test_blocks_and_threads_in_reverse(split_size, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("the emulation's switch")
    case = Attention((300, 90), dtype=bf16, split_size=split_size, kv_dtype=e4m3, scale="token_head")
    call = cases.build(case, device)
    forward = call.run("cuda")
    monkeypatch.setenv("PAGEWIRE_EMULATION_ORDER", "reverse")
    backward = call.run("cuda")
    assert torch.equal(forward[0], backward[0]) and torch.equal(forward[1], backward[1])


def test_split_size_bits_do_not_depend_on_the_batch(device):
    """prefill of short queries: alone and among others."""
    lens, q_lens = (150, 3, 700), (2, 3, 16)
    call = cases.build(Attention(lens, q_lens, dtype=bf16, split_size=32, max_q_len=16), device)
    together, together_lse = call.run("cuda")
    row = 0
    for b, n in enumerate(q_lens):
        q, k, v, table, seq_lens = call.args[:5]
        offsets = torch.tensor([0, n], dtype=torch.int32, device=device)
        args = (q[row : row + n], k, v, table[b : b + 1], seq_lens[b : b + 1], offsets)
        alone, lse = dataclasses.replace(call, args=args).run("cuda")
        assert torch.equal(alone, together[row : row + n]), f"request {b}"
        assert torch.equal(lse, together_lse[row : row + n]), f"request {b}"
        row += n


def test_rows_off_sixteen_bytes_are_refused(device):
    """By their strides, which the choice of a backend knows, or by an address, which it does not."""
    call = cases.build(Attention((70, 33), dtype=bf16, head_dim=72), device)
    q, k, v, *rest = call.args
    wide = torch.zeros((*k.shape[:-1], 73), dtype=bf16, device=device)
    late = torch.zeros(k.numel() + 1, dtype=bf16, device=device)[1:].view(k.shape)
    for caches in ((wide[..., 1:], v), (k, wide[..., 1:])):
        with pytest.raises(
            pw.BackendError, match="refuses this decode: rows of the caches lie 2 bytes or a multiple apart"
        ):
            dataclasses.replace(call, args=(q, *caches, *rest)).run("cuda")
    for name, caches in (("k_cache", (late, v)), ("v_cache", (k, late))):
        with pytest.raises(pw.BackendError, match=f"{name} begins at 0x[0-9a-f]*[^0]: expected a multiple of 16 bytes"):
            dataclasses.replace(call, args=(q, *caches, *rest)).run("cuda")
    one_page = [torch.zeros(1, 1, 1, 73, dtype=bf16, device=device)[..., :72]] * 2  # strides that nothing is reached by
    table, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0]], [1]))
    out = pw.decode(q[:1, :1].contiguous(), *one_page, table, lens, backend="cuda")
    assert (out == 0).all()


def test_counters_are_left_at_zero(device):
    from pagewire.backends import cuda

    check(Attention((700, 3), dtype=bf16), device)
    check(Attention((700, 3), dtype=bf16, split_size=64), device)
    assert cuda._counter_buffers and not any(
        int(c.of_items.sum()) + int(c.of_blocks) for c in cuda._counter_buffers.values()
    )


def test_long_prefill_is_refused_with_its_reason(device):
    call = cases.build(Attention((40,), (40,), dtype=bf16, max_q_len=17), device)
    with pytest.raises(pw.BackendError, match="max_q_len <= 16"):
        call.run("cuda")


def test_emulation_is_never_chosen_silently(device):
    if device.type != "cpu":
        pytest.skip("on a GPU it is no emulation")
    assert "-> cuda" not in pw.explain("decode", device="cpu", dtype=bf16)
