"""Decode's Hopper kernel on the simulator, behind the public function: exact by the shared rule, in any order."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import cases  # noqa: E402
import pagewire as pw  # noqa: E402
import tolerance  # noqa: E402
from cases import Attention, bf16, e4m3, e5m2, fp16, int8  # noqa: E402
from gluon.decode_faults import FAULTS, OF_BYTES, OF_TOKENS  # noqa: E402
from gluon.simulated import imported, on_hopper  # noqa: E402
from ops import test_token_scales as scales  # noqa: E402
from pagewire import memo  # noqa: E402
from pagewire.kernels import counters, hopper, launch  # noqa: E402
from pagewire.kernels.hopper import decode  # noqa: E402

pytestmark = pytest.mark.skipif(pw.backends("cpu")["triton"] is not None, reason="the interpreter is off")


@pytest.fixture(scope="module")
def source():
    return imported("decode")._decode_kernel


@pytest.fixture
def kernel(source, monkeypatch):
    """What Plan launches in place of the kernel."""
    with on_hopper(monkeypatch, decode, "_decode_kernel", source) as kernel:
        yield kernel
        for halves in counters._halves.values():
            assert not any(half.any() for half in halves), "counters that are not zero after a call"


CASES = [
    Attention((300, 40), dtype=bf16),
    Attention((300, 40), dtype=fp16, layout="HND", head_dim=128),
    Attention((700,), heads=(2, 2), dtype=bf16, head_dim=256, page_size=64),
    Attention((130, 1, 64, 65, 63, 0, 128), dtype=bf16, head_dim=128, page_size=8, note="edges of pages and tiles"),
    Attention((0, 0), dtype=bf16, sinks=True, note="no keys"),
    Attention((500,), dtype=bf16, window=(100, -1), note="left"),
    Attention((500, 20), dtype=fp16, window=(0, 0), page_size=32, note="its own key"),
    Attention((300, 100), dtype=bf16, softcap=5.0, head_dim=128, page_size=128),
    Attention((200, 90), dtype=fp16, alibi=2, sinks=True, heads=(8, 2)),
    Attention((200, 90), dtype=bf16, alibi=1, softcap=20.0, sinks=True, window=(70, -1)),
    Attention((200, 100), dtype=bf16, strided=True, note="every stride free"),
    Attention((300, 200), dtype=fp16, out_dtype=torch.float32, heads=(3, 1), shared_prefix=True),
    Attention((130, 9), heads=(32, 1), dtype=bf16, head_dim=128, note="large group"),
    Attention((1, 1, 3000, 2), heads=(2, 1), dtype=bf16, note="one in many programs"),
    Attention((300, 40), dtype=bf16, kv_dtype=e4m3, scale="float", head_dim=128),
    Attention((300, 40), dtype=fp16, kv_dtype=e5m2, scale="tensor", window=(99, 0)),
    Attention((350, 7), dtype=bf16, kv_dtype=int8, scale="head", head_dim=256, sinks=True, layout="HND"),
    Attention((350, 7, 0), dtype=fp16, kv_dtype=int8, scale="batch_head", heads=(12, 1), alibi=1, page_size=64),
    Attention((300, 40), dtype=bf16, kv_dtype=e4m3, scale="batch_head", strided=True, softcap=3.0),
    Attention((700, 40), dtype=bf16, kv_dtype=e4m3, scale="token_head", head_dim=128),
    Attention((700, 0, 40), dtype=fp16, kv_dtype=int8, scale="token_head", page_size=8, window=(300, 0), strided=True),
]


def nearest(case: Attention) -> Attention:
    """The nearest that the kernel takes."""
    return dataclasses.replace(
        case,
        head_dim=min((64, 128, 256), key=lambda d: abs(d - case.head_dim)),
        head_dim_v=None,
        dtype=fp16 if case.dtype == fp16 else bf16,
        page_size=min((8, 16, 64, 128), key=lambda n: abs(n - case.page_size)),
        heads=(min(case.heads[0], 32), case.heads[1]),
        split_size=None,
    )


SHARED = list(map(nearest, cases.DECODE))


@pytest.mark.parametrize("case", [*CASES, *dict.fromkeys(SHARED)], ids=lambda case: case.id)
def test_decode(case, kernel):
    """Slots that nobody owns hold NaN."""
    call = cases.build(case)
    tolerance.check(call, *call.run("triton"))
    assert kernel.programs > 0


TOKEN_SCALES = [  # of every backend's tests
    *((scales.test_scales_of_one_size, x, size) for x, size in ((fp16, 2.0**-20), (fp16, 2.0**12), (bf16, 2.0**-90))),
    *((scales.test_k_scales_of_one_size, power) for power in (-90, 116)),
    *((scales.test_scales_of_many_sizes, order, None) for order in ("up", "down", "mixed")),
    *((scales.test_an_empty_row_beside_others, amax) for amax in (1e-3, 60000.0)),
]


def of_tokens(check, *given, kv_dtype=e4m3) -> None:
    """check: a test of ops/test_token_scales.py."""
    if check is scales.test_scales_of_one_size:
        check(*given, kv_dtype, None, "triton", torch.device("cpu"))
    else:
        check(*given, kv_dtype, "triton", torch.device("cpu"))


@pytest.mark.parametrize("kv_dtype", [e4m3, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("case", TOKEN_SCALES, ids=lambda case: "-".join(map(str, (case[0].__name__, *case[1:]))))
def test_scales_per_token(case, kv_dtype, kernel):
    of_tokens(*case, kv_dtype=kv_dtype)
    assert kernel.programs > 0


@pytest.mark.parametrize("seed", range(1000, 6000, 1000))
def test_any_interleaving_gives_the_same_bits(seed, kernel):
    call = cases.build(Attention((300, 40, 900), dtype=bf16, head_dim=128, window=(450, 0)))
    expected = call.run("triton")
    kernel.seed = seed
    assert all(map(torch.equal, call.run("triton"), expected))


@pytest.mark.parametrize("scale", [0.0, -0.125])
def test_any_scale(scale, kernel):
    call = cases.build(Attention((100,), dtype=bf16))
    call.kwargs["softmax_scale"] = scale
    tolerance.check(call, *call.run("triton"))
    assert kernel.programs > 0


@pytest.mark.parametrize("page", [-1, 99, 2147480000])
def test_a_page_that_does_not_exist_is_left_out_and_said(page, kernel, monkeypatch):
    call = cases.build(Attention((140, 70), dtype=bf16))
    call.args[3][0, 5] = page
    found = call.run("triton")
    assert kernel.programs > 0
    with pytest.raises(pw.BadIndexError, match=r"page_table\[0, 5\] is outside"):
        pw.check_errors()
    monkeypatch.setenv("PAGEWIRE_HOPPER", "0")
    memo.forget()
    programs = kernel.programs
    expected = call.run("triton")
    assert kernel.programs == programs
    with pytest.raises(pw.BadIndexError):
        pw.check_errors()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=2e-2, atol=2e-2)


def test_a_length_that_is_none_is_said(kernel):
    call = cases.build(Attention((140, 70), dtype=bf16))
    call.args[4][1] = -3
    out, lse = call.run("triton")
    assert kernel.programs > 0 and (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    with pytest.raises(pw.BadIndexError, match=r"seq_lens\[1\]"):
        pw.check_errors()
    call.args[4][1] = 100000  # beyond the table
    call.run("triton")
    with pytest.raises(pw.BadIndexError, match=r"seq_lens\[1\]"):
        pw.check_errors()


def test_counters_that_a_call_left_behind_are_said_by_the_next_one_but_one(kernel):
    call = cases.build(Attention((700,), dtype=bf16))
    call.run("triton")
    (halves,) = counters._halves.values()
    halves[1][0] = 1  # the call before: its lengths changed while it ran
    tolerance.check(call, *call.run("triton"))
    with pytest.raises(pw.BadIndexError, match="seq_lens changed while a call ran"):
        pw.check_errors()
    tolerance.check(call, *call.run("triton"))


def test_lengths_that_change_while_it_runs_end_all_the_same(kernel):
    """Every program reads others: wrong rows, but no wait without end, and the next call is right."""
    call = cases.build(Attention((700, 300, 40), dtype=bf16))
    lens, run = call.args[4], kernel.run
    g = torch.Generator().manual_seed(3)

    def changing(*given, **named):
        named["seq_lens"].flat[: len(lens)] = torch.randint(0, 700, (len(lens),), generator=g, dtype=torch.int32)
        run(*given, **named)

    kept = lens.clone()
    kernel.run = changing
    for _ in range(4):
        call.run("triton")
    kernel.run = run
    lens.copy_(kept)
    for _ in range(2):
        tolerance.check(call, *call.run("triton"))
    with pytest.raises(pw.BadIndexError, match="seq_lens changed while a call ran"):
        pw.check_errors()


# ------------------------------------------------------------------------------------------- what it does not take


REFUSED = {
    "off": (Attention((100,), dtype=bf16), {"PAGEWIRE_HOPPER": "0"}, "PAGEWIRE_HOPPER is 0"),
    "fp32": (Attention((100,)), {}, "torch.float32 over torch.float32"),
    "scales": (
        Attention((100,), dtype=bf16, kv_dtype=bf16, scale="token_head"),
        {},
        "scales per token of torch.bfloat16",
    ),
    "D80": (Attention((100,), dtype=bf16, head_dim=80), {}, "head_dim 80"),
    "V": (Attention((100,), dtype=bf16, head_dim_v=128), {}, "head_dim 64, 128 of V"),
    "pages": (Attention((100,), dtype=bf16, page_size=3), {}, "k_cache with pages of 3"),
    "group": (Attention((100,), dtype=bf16, heads=(48, 1)), {}, "48 query heads to a kv head: at most 32"),
    "splits": (Attention((100,), dtype=bf16, split_size=64), {}, "split_size 64"),
    "rows": (Attention((100, 30), (2, 1), dtype=bf16, max_q_len=2), {}, "rows in cu_seqlens_q"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_goes_to_the_other_kernels(name, kernel, monkeypatch):
    case, switch, reason = REFUSED[name]
    for variable, value in switch.items():
        monkeypatch.setenv(variable, value)
    told = []
    why_not = hopper.why_no_decode
    monkeypatch.setattr(hopper, "why_no_decode", lambda *of: told.append(why_not(*of)) or told[-1])
    call = cases.build(case)
    tolerance.check(call, *call.run("triton"))
    assert kernel.programs == 0 and reason in told[0]


# ------------------------------------------------------------------------------------------- faults to be found


FAULT_CASES = {  # and processors
    Attention((0, 500, 70, 900), dtype=bf16, head_dim=128, window=(600, 0)): 3,
    Attention((130, 130, 130), dtype=bf16, window=(10, 0), note="few keys"): 3,
    Attention((1300,), heads=(2, 1), dtype=bf16, head_dim=128, note="many pieces"): 12,
}


@pytest.mark.parametrize("name", [*FAULTS, *OF_BYTES])
def test_a_fault_is_found(name, kernel, monkeypatch):
    file, before, after = (FAULTS | OF_BYTES)[name]
    kernel.function = imported("decode", (f"{file}.py", before, after))._decode_kernel
    with pytest.raises(AssertionError):
        for case, processors in FAULT_CASES.items():
            monkeypatch.setattr(launch, "device_of", lambda device, n=processors: launch.Device(0, n))
            if name in OF_BYTES:
                case = dataclasses.replace(case, kv_dtype=e4m3, scale="head")
            call = cases.build(case)
            for _ in range(2):
                tolerance.check(call, *call.run("triton"))
                assert not any(half.any() for halves in counters._halves.values() for half in halves)
    counters._halves.clear()


@pytest.mark.parametrize("case", FAULT_CASES, ids=lambda case: case.id)
def test_without_a_fault_none_is_found(case, kernel, monkeypatch):
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device(0, FAULT_CASES[case]))
    for scale in (None, "head", "token_head"):
        call = cases.build(dataclasses.replace(case, kv_dtype=scale and e4m3, scale=scale))
        tolerance.check(call, *call.run("triton"))


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_fault_with_scales_per_token_is_found(name, kernel):
    file, before, after = OF_TOKENS[name]
    kernel.function = imported("decode", (f"{file}.py", before, after))._decode_kernel
    call = cases.build(Attention((900, 300), dtype=bf16, kv_dtype=int8, scale="token_head", head_dim=128))
    with pytest.raises(AssertionError):
        for _ in range(3):
            tolerance.check(call, *call.run("triton"))
        for case in TOKEN_SCALES:
            of_tokens(*case)
