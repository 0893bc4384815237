"""Prefill's Hopper kernel on the simulator, behind the public function: exact by the shared rule, any interleaving."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import cases  # noqa: E402
import pagewire as pw  # noqa: E402
import tolerance  # noqa: E402
from cases import Attention, bf16, e4m3, e5m2, fp16, int8  # noqa: E402
from gluon.prefill_faults import FAULTS, OF_BYTES, OF_ITEMS, OF_PARTS, OF_ROWS, OF_STRIPS, OF_TOKENS, OF_TURNS  # noqa: E402
from gluon.simulated import imported, on_hopper  # noqa: E402
from pagewire import memo  # noqa: E402
from pagewire.kernels import counters, hopper, launch  # noqa: E402
from pagewire.kernels.hopper import FLAGS, matrices, prefill, prefill_launch, supported  # noqa: E402
from pagewire.types import Modifiers  # noqa: E402

pytestmark = pytest.mark.skipif(pw.backends("cpu")["triton"] is not None, reason="the interpreter is off")


@pytest.fixture(scope="module")
def source():
    return imported("prefill")._prefill_kernel


@pytest.fixture
def kernel(source, monkeypatch):
    """What Plan launches in place of the kernel."""
    with on_hopper(monkeypatch, prefill, "_prefill_kernel", source) as kernel:
        yield kernel


def finite(call, seed=5):
    """What nobody owns is large instead of NaN: no tile is left over because of it."""
    g = torch.Generator().manual_seed(seed)
    for cache in call.args[1:3]:
        x = cache.float()
        cache.copy_(torch.where(x.isnan(), 300 * torch.randn(cache.shape, generator=g), x).to(cache.dtype))
    return call


def left_over(kernel) -> int:
    """Of the kernel's tiles, how many it left to the other one; every one must have said so or not."""
    redo = kernel.given["results"].redo
    said = redo[redo >= 0].view(-1, FLAGS)
    assert len(said) and ((said == 0) | (said == 1)).all()
    return int((said > 0).any(1).sum())


CASES = [
    Attention((300, 40), (90, 40), dtype=bf16, note="causal"),
    Attention((300, 40), (90, 40), dtype=fp16, causal=False, layout="HND"),
    Attention((260,), (140,), heads=(2, 2), head_dim=128, dtype=bf16, note="several tiles of rows and keys"),
    Attention((150, 70), (60, 33), heads=(6, 2), head_dim=256, dtype=bf16, page_size=64),
    Attention((500,), (35,), dtype=bf16, page_size=8, window=(100, -1), note="left"),
    Attention((500,), (200,), heads=(2, 1), dtype=fp16, page_size=32, window=(130, 0), causal=False, note="both"),
    Attention((300,), (70,), dtype=bf16, causal=False, window=(-1, 20), note="right"),
    Attention((300, 100), (40, 60), dtype=bf16, softcap=5.0, head_dim=128, page_size=128),
    Attention((200, 90), (40, 60), dtype=fp16, alibi=2, sinks=True, heads=(8, 2)),
    Attention((200, 90), (40, 60), dtype=bf16, alibi=1, softcap=20.0, sinks=True, window=(70, -1)),
    Attention((20, 300, 0), (50, 20, 12), dtype=bf16, note="rows that see no key, a request without any"),
    Attention((300, 0, 77, 65), (17, 0, 30, 65), dtype=bf16, padding_rows=5, note="rows that nobody owns"),
    Attention((300, 9, 80), (90, 2, 1), dtype=fp16, note="short ones between"),
    Attention((200, 100), (80, 30), dtype=bf16, strided=True, note="every stride free"),
    Attention((300, 200), (40, 60), dtype=fp16, out_dtype=torch.float32, split_size=64, heads=(3, 1)),
    Attention((130,), (9,), heads=(48, 1), dtype=bf16, page_size=16, note="large group"),
    Attention((300, 40), (90, 40), dtype=bf16, kv_dtype=e4m3, scale="float", head_dim=128, note="from 8 bits"),
    Attention((300, 40), (90, 40), dtype=fp16, kv_dtype=e5m2, scale="float", page_size=3, window=(99, 0)),
    Attention((150,), (60,), dtype=bf16, kv_dtype=int8, scale="float", head_dim=256, sinks=True, layout="HND"),
    Attention((300, 40), (90, 40), dtype=bf16, kv_dtype=e4m3, scale="head", head_dim=128),
    Attention((300, 40), (90, 40), dtype=fp16, kv_dtype=int8, scale="batch_head", alibi=1),
    Attention((500, 40), (90, 40), dtype=bf16, kv_dtype=e4m3, scale="token_head", head_dim=128),
    Attention((700, 40), (90, 40), dtype=bf16, kv_dtype=int8, scale="token_head", page_size=3, window=(300, 0)),
    Attention((300,), (90,), dtype=bf16, kv_dtype=e5m2, scale="token_head", softcap=3.0, layout="HND", strided=True),
    Attention((300, 40), (90, 40), dtype=bf16, head_dim=192, head_dim_v=128),
    Attention((300, 40), (90, 40), dtype=fp16, head_dim=192, head_dim_v=128, page_size=3, window=(99, 0)),
    Attention((300, 40), (90, 40), dtype=bf16, head_dim=192, head_dim_v=128, kv_dtype=e4m3, scale="token_head"),
    Attention((300, 40), (90, 40), dtype=bf16, head_dim=192, head_dim_v=128, softcap=9.0, layout="HND"),
    Attention((300, 40), (90, 40), dtype=bf16, page_size=1, note="row by row"),
    Attention((700,), (90,), dtype=fp16, page_size=3, head_dim=128, window=(400, 0), layout="HND", note="row by row"),
    Attention((260,), (140,), heads=(2, 1), head_dim=256, dtype=bf16, page_size=48, softcap=5.0, note="row by row"),
]


def nearest(case: Attention) -> Attention:
    """The nearest that the kernel takes."""
    head_dim = min((64, 128, 256), key=lambda d: abs(d - case.head_dim))
    dtype = fp16 if case.dtype == fp16 else bf16
    wide = {"head_dim": head_dim, "head_dim_v": None, "dtype": dtype}
    return dataclasses.replace(case, **wide, scale=case.kv_dtype and "float")


SHARED = [case for case in map(nearest, cases.PREFILL) if max(case.q_lens) * case.heads[0] // case.heads[1] > 16]


@pytest.mark.parametrize("case", [*CASES, *dict.fromkeys(SHARED)], ids=lambda case: case.id)
def test_prefill(case, kernel):
    call = finite(cases.build(case))
    tolerance.check(call, *call.run("triton"))
    assert kernel.programs > 0 and left_over(kernel) == 0


IN_PARTS = [  # rows that several programs share
    Attention((2000,), (64,), dtype=bf16, head_dim=128, heads=(2, 1)),
    Attention((1500, 3000), (70, 66), heads=(2, 1), dtype=fp16, window=(900, -1), sinks=True, note="left"),
    Attention((1400,), (64,), dtype=bf16, causal=False, window=(-1, 40), page_size=3, heads=(2, 1), note="right"),
    Attention((100, 1500), (90, 64), dtype=bf16, kv_dtype=e4m3, scale="token_head", heads=(2, 1), padding_rows=3),
    Attention((1300,), (80,), dtype=bf16, head_dim=256, softcap=5.0, heads=(2, 1), out_dtype=torch.float32),
    Attention((1300,), (80,), dtype=bf16, head_dim=192, head_dim_v=128, heads=(2, 1), alibi=1),
]


@pytest.fixture
def few(monkeypatch):
    """A device of two processors: a program has many items."""
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device(0, 2))


MANY_ITEMS = [
    Attention((500, 300, 130), (250, 100, 130), dtype=bf16, heads=(6, 3), note="with other keys each"),
    Attention((300, 0, 77, 65), (17, 0, 30, 65), dtype=bf16, padding_rows=5, window=(40, 0)),
    Attention((300, 90), (190, 90), dtype=bf16, kv_dtype=e4m3, scale="token_head", head_dim=128),
    Attention((300, 90), (190, 90), dtype=fp16, head_dim=192, head_dim_v=128, page_size=3),
]


@pytest.mark.parametrize("switch", ["1", "2"])
@pytest.mark.parametrize("case", MANY_ITEMS, ids=lambda case: case.id)
def test_many_items(case, switch, kernel, few, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_HOPPER", switch)
    call = finite(cases.build(case))
    for _ in range(2):  # in both halves of the counters
        tolerance.check(call, *call.run("triton"))
        assert kernel.spec.TURNS == (switch == "2") and left_over(kernel) == 0
    assert not any(half.any() for halves in counters._halves.values() for half in halves)


@pytest.fixture
def parts(monkeypatch):
    """A device with more processors than tiles."""
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device(0, 16))


@pytest.mark.parametrize("case", IN_PARTS, ids=lambda case: case.id)
def test_parts(case, kernel, parts):
    call = finite(cases.build(case))
    for _ in range(2):  # in both halves of the counters
        tolerance.check(call, *call.run("triton"))
        assert kernel.spec.PARTS and left_over(kernel) == 0
    assert not any(half.any() for halves in counters._halves.values() for half in halves)


def test_with_a_split_size_rows_are_not_shared(kernel, parts):
    """A result depends on its request alone."""
    call = finite(cases.build(Attention((1500,), (64,), dtype=bf16, split_size=64)))
    tolerance.check(call, *call.run("triton"))
    assert not kernel.spec.PARTS


@pytest.mark.parametrize("what", ["page", "value"])
def test_one_part_leaves_the_rows_to_the_other_kernel(what, kernel, parts):
    call = cases.build(Attention((1990,), (64,), dtype=bf16, heads=(2, 1)))
    if what == "page":
        finite(call).args[3][0, 3] = -1
    out, _ = call.run("triton")
    assert kernel.spec.PARTS and left_over(kernel) > 0 and out.isfinite().all()
    if what == "page":
        with pytest.raises(pw.BadIndexError, match=r"page_table\[0, 3\] is outside"):
            pw.check_errors()
    else:
        tolerance.check(call, *call.run("triton"))


@pytest.mark.parametrize("switch", ["1", "2"])
@pytest.mark.parametrize("seed", range(1000, 6000, 1000))
def test_any_interleaving_gives_the_same_bits(seed, switch, kernel, few, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_HOPPER", switch)
    call = finite(cases.build(Attention((300, 40), (90, 40), dtype=bf16, head_dim=128, window=(150, 0))))
    expected = call.run("triton")
    kernel.seed = seed
    assert all(map(torch.equal, call.run("triton"), expected))


def test_values_that_are_not_finite_where_nobody_owns_a_slot(kernel):
    """0 * NaN is NaN: such a tile is left to the other kernel."""
    call = cases.build(Attention((140, 70), (40, 40), dtype=bf16))
    tolerance.check(call, *call.run("triton"))
    assert left_over(kernel) > 0


@pytest.mark.parametrize("page", [-1, 99, 2147480000])
def test_a_page_that_does_not_exist_is_left_to_the_other_kernel(page, kernel, monkeypatch):
    call = finite(cases.build(Attention((140, 70), (40, 40), dtype=bf16)))
    call.args[3][0, 5] = page
    found = call.run("triton")
    with pytest.raises(pw.BadIndexError, match=r"page_table\[0, 5\] is outside"):
        pw.check_errors()
    assert 0 < left_over(kernel) < len(kernel.given["results"].redo) // FLAGS
    monkeypatch.setenv("PAGEWIRE_HOPPER", "0")
    memo.forget()
    programs = kernel.programs
    expected = call.run("triton")
    assert kernel.programs == programs
    with pytest.raises(pw.BadIndexError):
        pw.check_errors()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=1e-2, atol=1e-2)


def test_longer_than_max_q_len_is_left_empty(kernel):
    call = finite(cases.build(Attention((200, 100), (80, 30), dtype=bf16)))
    call.kwargs["max_q_len"] = 64
    out, lse = call.run("triton")
    with pytest.raises(pw.BadIndexError, match="request 0 has more query rows than max_q_len"):
        pw.check_errors()
    assert (out[:80] == 0).all() and (lse[:80] == -torch.inf).all() and (out[80:] != 0).any()


def test_a_cache_off_its_boundary_goes_to_the_other_kernel(kernel):
    """In the second call of a kind as in the first."""
    case = Attention((100,), (40,), dtype=bf16)
    for first in (True, False):
        memo.forget()
        for aligned in (first, not first):
            call = finite(cases.build(case))
            if not aligned:
                wide = torch.zeros(call.args[1].numel() + 1, dtype=bf16)[1:].view_as(call.args[1])
                call = dataclasses.replace(call, args=(call.args[0], wide.copy_(call.args[1]), *call.args[2:]))
            programs = kernel.programs
            tolerance.check(call, *call.run("triton"))
            assert (kernel.programs > programs) == aligned


# ------------------------------------------------------------------------------------------- what it does not take


REFUSED = {
    "off": (Attention((100,), (40,), dtype=bf16), {"PAGEWIRE_HOPPER": "0"}, "PAGEWIRE_HOPPER is 0"),
    "fp32": (Attention((100,), (40,)), {}, "torch.float32 over torch.float32"),
    "fp16": (Attention((100,), (40,), dtype=fp16, kv_dtype=e4m3, scale="token_head"), {}, "bf16 over 8 bits"),
    "16 bits": (Attention((100,), (40,), dtype=bf16, kv_dtype=bf16, scale="token_head"), {}, "bf16 over 8 bits"),
    "256": (Attention((9,), (40,), dtype=bf16, kv_dtype=e4m3, scale="token_head", head_dim=256), {}, "no registers"),
    "D80": (Attention((100,), (40,), dtype=bf16, head_dim=80), {}, "head_dim 80"),
    "V": (
        Attention((100,), (40,), dtype=bf16, head_dim_v=128),
        {},
        "head_dim 64, 128 of V: 64/64, 128/128, 192/128, 256/256",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_goes_to_the_other_kernel(name, kernel, monkeypatch):
    case, switch, reason = REFUSED[name]
    for variable, value in switch.items():
        monkeypatch.setenv(variable, value)
    told = []
    why_not = hopper.why_no_prefill
    monkeypatch.setattr(hopper, "why_no_prefill", lambda *of: told.append(why_not(*of)) or told[-1])
    call = cases.build(case)
    tolerance.check(call, *call.run("triton"))
    assert kernel.programs == 0 and reason in told[0]


def test_strides_that_are_no_multiples_of_16_go_to_the_other_kernel(kernel):
    call = finite(cases.build(Attention((100,), (40,), dtype=bf16)))
    caches = [torch.zeros(*x.shape[:-1], 72, dtype=bf16)[..., :64].copy_(x) for x in call.args[1:3]]
    call = dataclasses.replace(call, args=(call.args[0], *caches, *call.args[3:]))
    tolerance.check(call, *call.run("triton"))
    assert kernel.programs == 0


@pytest.mark.parametrize("scale", [0.0, -0.125])
def test_any_scale(scale, kernel):
    call = finite(cases.build(Attention((100,), (40,), dtype=bf16)))
    call.kwargs["softmax_scale"] = scale
    tolerance.check(call, *call.run("triton"))
    assert kernel.programs > 0


def test_another_device_and_another_triton(monkeypatch):
    case = cases.build(Attention((100,), (40,), dtype=bf16))
    q, k, v, table, lens, rows = case.args
    t = launch.Tensors(q, k, v, table, lens, rows, q, None, None, None, None, None)
    m = Modifiers(0.125)
    assert prefill_launch.why_not(t, m, launch.Device(90, 132)) is None
    assert prefill_launch.why_not(t, m, launch.Device(100, 148)) == "sm_100 is not sm_90"
    monkeypatch.setattr(supported.triton, "__version__", "3.10.1")
    assert "tested with Triton 3.6 to 3.9, this is 3.10.1" in prefill_launch.why_not(t, m, launch.Device(90, 132))


def cache(*shape, strides=None):
    return torch.empty_strided(shape, strides or torch.empty(shape).stride(), dtype=bf16)


MATRICES = {  # as NHD views: what the TMA unit is told, or why not
    "NHD": (cache(5, 16, 2, 64), (80, 128, 16, 0, 64)),
    "HND": (cache(5, 2, 16, 64).transpose(1, 2), (160, 64, 32, 16, 0)),
    "fused": (cache(5, 2, 16, 2, 64)[:, 0], (144, 128, 32, 0, 64)),
    "interleaved": (cache(5, 16, 2, 128)[..., :64], (80, 192, 16, 0, 128)),
    "one head": (cache(5, 16, 1, 64), (80, 64, 16, 0, 64)),
    "pages apart": (cache(5, 16, 2, 64, strides=(2050, 128, 64, 1)), None),
    "rows off 16 bytes": (cache(5, 16, 2, 64, strides=(16 * 132, 132, 64, 1)), None),
    "one page for all": (cache(1, 16, 2, 64).expand(5, 16, 2, 64), None),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_cache_as_a_matrix(name):
    x, expected = MATRICES[name]
    found = matrices._matrix(x)
    assert (found and tuple(found)) == expected
    if found is None:
        return
    x.copy_(torch.randn(x.shape))
    whole = torch.as_strided(x, found[:2], (x.stride(1), 1), x.storage_offset())
    for page, token, head in ((0, 0, 0), (4, 15, x.shape[2] - 1), (2, 7, 0)):
        row = page * found.per_page + head * found.per_head + token
        column = head * found.per_head_column
        assert torch.equal(whole[row, column : column + 64], x[page, token, head])


# ------------------------------------------------------------------------------------------- faults to be found


HARD = {  # what finds them
    **dict.fromkeys(OF_PARTS, Attention((1500, 3000), (70, 66), heads=(4, 2), dtype=bf16, window=(1100, 0))),
    "a part of no tiles": Attention((1700,), (70,), heads=(4, 2), dtype=bf16),
    **dict.fromkeys(OF_STRIPS, Attention((300,), (90,), heads=(2, 1), dtype=bf16, head_dim=192, head_dim_v=128)),
    **dict.fromkeys(OF_TOKENS, Attention((700,), (90,), dtype=bf16, kv_dtype=int8, scale="token_head", head_dim=128)),
}


@pytest.mark.parametrize("name", [*OF_PARTS, *OF_STRIPS, *OF_TOKENS])
def test_a_fault_of_what_is_hard_is_found(name, kernel, parts):
    file, before, after = (OF_PARTS | OF_STRIPS | OF_TOKENS)[name]
    kernel.function = imported("prefill", (f"{file}.py", before, after))._prefill_kernel
    call = finite(cases.build(HARD[name]))
    with pytest.raises(AssertionError):
        for _ in range(2):
            tolerance.check(call, *call.run("triton"))
            assert left_over(kernel) == 0
            assert not any(half.any() for halves in counters._halves.values() for half in halves)


@pytest.mark.parametrize("name", [*OF_ITEMS, *OF_TURNS])
def test_a_fault_between_items_is_found(name, kernel, few, monkeypatch):
    file, before, after = (OF_ITEMS | OF_TURNS)[name]
    monkeypatch.setenv("PAGEWIRE_HOPPER", "2" if name in OF_TURNS else "1")
    kernel.function = imported("prefill", (f"{file}.py", before, after))._prefill_kernel
    # few tiles an item: who loads could be some items ahead
    call = finite(cases.build(Attention((400, 60, 60, 60, 60), (90, 40, 40, 40, 40), dtype=bf16, heads=(4, 2))))
    with pytest.raises(AssertionError):
        for seed in (100, 200):
            kernel.seed = seed
            tolerance.check(call, *call.run("triton"))
            assert left_over(kernel) == 0
            assert not any(half.any() for halves in counters._halves.values() for half in halves)


@pytest.mark.parametrize("name", [*FAULTS, *OF_ROWS, *OF_BYTES])
def test_a_fault_is_found(name, kernel):
    file, before, after = (FAULTS | OF_ROWS | OF_BYTES)[name]
    kernel.function = imported("prefill", (f"{file}.py", before, after))._prefill_kernel
    page_size = 3 if name in OF_ROWS else 16
    case = Attention((900,), (150,), heads=(1, 1), dtype=bf16, head_dim=128, window=(600, 0), page_size=page_size)
    if name in OF_BYTES:
        case = dataclasses.replace(case, kv_dtype=e4m3, scale="float")
    call = finite(cases.build(case))
    with pytest.raises(AssertionError):
        for _ in range(3):
            tolerance.check(call, *call.run("triton"))
            assert left_over(kernel) == 0
