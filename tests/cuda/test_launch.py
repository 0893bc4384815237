"""What a launch asks of its device, and what it leaves to the next one: under the emulation, which refuses what a
device of the given architecture would refuse.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import cases
import pagewire as pw
import tolerance
from cases import Attention, bf16, e4m3, fp16
from pagewire import emulation
from pagewire.backends import cuda


@pytest.fixture(autouse=True)
def emulated(device):
    """The extension whose launches the tests look into."""
    if device.type != "cpu":
        pytest.skip("the emulation's own tests")
    reason = pw.backends("cpu")["cuda"]
    if reason is not None:
        pytest.skip(reason)
    extension = emulation.load(emulation.mode())
    yield extension
    extension.after_each_block(None)


def run(case):
    call = cases.build(case)
    got = call.run("cuda")
    tolerance.check(call, *got)
    return got


def test_a_larger_launch_after_a_smaller_one(emulated):
    """One kernel, another amount of shared memory by the number of rows: verify, decode, verify."""
    verify = Attention((90, 33), (16, 9), heads=(8, 2), dtype=bf16, head_dim=128, max_q_len=16)
    decode = Attention((90, 33), heads=(8, 2), dtype=bf16, head_dim=128)
    needed = []
    for case in (verify, decode, verify, decode):
        run(case)
        needed.append(emulated.last_launch()["shared_bytes"])
    assert needed[0] == needed[2] > needed[1] == needed[3]


# bytes of shared memory of a block
DEVICES = {"80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90": 227 << 10, "120": 99 << 10}


def fits_sm90(arch: str, head_dim: int, kv_dtype: torch.dtype | None) -> bool:
    """Rows of whole 128 bytes, and two stages, of 64 KiB at 256, in a block's shared memory."""
    return int(arch) >= 90 and head_dim * (1 if kv_dtype else 2) % 128 == 0 and (head_dim < 256 or arch == "90")


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("dtypes", [(bf16, None), (fp16, e4m3)], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", DEVICES)
def test_every_width_fits_every_device(arch, head_dim, dtypes, rows, emulated, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_EMULATION_ARCH", arch)
    dtype, kv_dtype = dtypes
    q_len = rows // 4
    case = Attention(
        (300, 40), (q_len, 1), heads=(8, 2), head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype,
        scale="head" if kv_dtype else None, max_q_len=q_len,
    )  # fmt: skip
    run(case)
    launched = emulated.last_launch()
    assert launched["shared_bytes"] <= DEVICES[arch]
    # decode's copies in flight take two blocks of a large multiprocessor, and at 256 one of three stages
    assert launched["kernel"] == (
        "decode_sm90_kernel" if rows == 4 and fits_sm90(arch, head_dim, kv_dtype) else "decode_kernel"
    )
    assert launched["blocks_that_fit"] >= (2 if arch == "90" and rows == 4 and head_dim < 256 else 1)


KERNELS = {  # what differs from a decode that the TMA takes
    "page8": ({"page_size": 8}, True),
    "page24": ({"page_size": 24}, True),
    "page12": ({"page_size": 12}, False),
    "split64": ({"split_size": 64}, True),
    "split96": ({"split_size": 96}, False),
    "rows16": ({"heads": (16, 1)}, True),
    "rows17": ({"heads": (17, 1)}, False),
    "head_dim_v": ({"head_dim_v": 48}, False),
    "softcap": ({"softcap": 2.0}, False),
    "alibi": ({"alibi": 1}, False),
    "sinks": ({"sinks": True, "window": (30, -1)}, True),
    "HND": ({"layout": "HND", "strided": True}, True),
    "e4m3": ({"kv_dtype": e4m3, "scale": "head", "head_dim": 128}, True),
    "token_head": ({"kv_dtype": e4m3, "scale": "token_head", "head_dim": 128}, False),
}


@pytest.mark.parametrize("name", KERNELS)
def test_which_decode_the_tma_takes(name, emulated):
    more, taken = KERNELS[name]
    run(Attention((150, 40), **{"dtype": bf16, **more}))
    assert emulated.last_launch()["kernel"] == ("decode_sm90_kernel" if taken else "decode_kernel")


def test_strides_of_one_head_and_of_many(emulated):
    """Nothing is reached by a stride of a dimension of one; heads that lie in one place are nothing for the TMA."""
    q, lens = torch.ones(1, 4, 64, dtype=bf16), torch.tensor([9], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    caches = [torch.ones(1, 16, 64, dtype=bf16).as_strided((1, 16, 1, 64), (1023, 64, 0, 1)) for _ in range(2)]
    for heads, kernel in ((1, "decode_sm90_kernel"), (2, "decode_kernel")):
        out = pw.decode(q, *(x.expand(-1, -1, heads, -1) for x in caches), table, lens, backend="cuda")
        assert (out == 1).all() and emulated.last_launch()["kernel"] == kernel


def test_an_unknown_device_is_refused(monkeypatch):
    monkeypatch.setenv("PAGEWIRE_EMULATION_ARCH", "75")
    with pytest.raises(RuntimeError, match="PAGEWIRE_EMULATION_ARCH: expected 80, 86.* got 75"):
        cases.build(Attention((9,), dtype=bf16)).run("cuda")


def counters_at_zero() -> bool:
    buffers = cuda._counter_buffers.values()
    return not any(int(c.of_items.sum()) + int(c.of_blocks) for c in buffers)


CHANGES = {  # lengths before, after the first block
    "shorter": ((700,), (100,)),
    "longer": ((100,), (700,)),
    "gone": ((700, 300), (0, 0)),
    "another": ((700, 5), (5, 700)),
}


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_counters_are_forgotten_with_a_launch_that_raises(op, emulated, monkeypatch):
    """It may have ended between any two counts."""
    call = cases.build(Attention((700,), None if op == "decode" else (1,), dtype=bf16, max_q_len=4))
    expected = call.run("cuda")
    of_blocks = [c.of_blocks for c in cuda._counter_buffers.values()]

    def ends(*given):
        for count in of_blocks:
            count.fill_(1)
        raise RuntimeError("in the middle")

    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="in the middle"):
        m.setattr(cuda, "_extension", lambda device: SimpleNamespace(decode=ends, prefill=ends))
        call.run("cuda")
    assert all(map(torch.equal, call.run("cuda"), expected)) and counters_at_zero()


@pytest.mark.parametrize("split_size", [None, 64], ids=["even", "split64"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("change", CHANGES)
def test_lengths_that_change_under_a_launch(change, op, split_size, emulated):
    """That call may be wrong, and says so if it left something; the next is right, bit for bit."""
    before, after = CHANGES[change]
    q_lens = None if op == "decode" else (1,) * len(before)
    case = Attention(tuple(map(max, before, after)), q_lens, dtype=bf16, split_size=split_size, max_q_len=4)
    call = cases.build(case)
    seq_lens = call.args[4]
    expected = call.run("cuda")
    pw.check_errors()
    recorded = []
    for when in (1, 2, 3):
        changed = torch.tensor(after, dtype=torch.int32)
        emulated.after_each_block(lambda done, when=when, to=changed: done == when and seq_lens.copy_(to))
        own = seq_lens.clone()
        seq_lens.copy_(torch.tensor(before, dtype=torch.int32))
        call.run("cuda")
        emulated.after_each_block(None)
        assert counters_at_zero()
        try:
            pw.check_errors()
        except pw.BadIndexError as error:
            recorded.append(str(error))
        seq_lens.copy_(own)
        got = call.run("cuda")
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        pw.check_errors()
    assert all(f"{op}: seq_lens" in text and "changed while a call ran" in text for text in recorded)
    if change == "shorter" and split_size is None:
        assert recorded


def test_counters_of_an_aborted_call_do_not_outlive_the_next_one():
    """Whatever left them: the next call may be wrong, and says so; the one after it is right."""
    call = cases.build(Attention((700, 300), dtype=bf16))
    expected = call.run("cuda")
    for buffers in cuda._counter_buffers.values():
        buffers.of_items[:4] = 1  # one a block
    call.run("cuda")
    assert counters_at_zero()
    with pytest.raises(pw.BadIndexError, match="decode: seq_lens changed while a call ran .work counter"):
        pw.check_errors()
    got = call.run("cuda")
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_counters_left_by_many_items_are_found(monkeypatch):
    """A lane looks at 16 of them at a time, a warp at 512."""
    monkeypatch.setenv("PAGEWIRE_EMULATION_SMS", "3")
    call = cases.build(Attention((200, *[0] * 69), heads=(8, 8), dtype=bf16, split_size=64))
    expected = call.run("cuda")
    for buffers in cuda._counter_buffers.values():
        buffers.of_items[550] = 1
    call.run("cuda")
    assert counters_at_zero()
    with pytest.raises(pw.BadIndexError, match="changed while a call ran"):
        pw.check_errors()
    assert all(map(torch.equal, call.run("cuda"), expected))


def workspace(monkeypatch, extension, case) -> int:
    """Bytes of partial results that a call allocates."""
    found = []

    class Watched:
        def __getattr__(self, op):
            def call(*arguments):
                *given, allocate = arguments

                def watched(partial_floats, num_counters):
                    found.append(4 * partial_floats)
                    return allocate(partial_floats, num_counters)

                return getattr(extension, op)(*given, watched)

            return call

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_extension", lambda device: Watched())
        run(case)
    return found[0]


def test_workspace_holds_the_rows_that_exist(emulated, monkeypatch):
    """Not the 16 of a tensor core's tile, nor what other requests could have."""
    lens = (1030, *(1 + i % 40 for i in range(63)))
    case = Attention(lens, heads=(8, 2), dtype=bf16, head_dim=64, split_size=16)
    rows, splits = 64 * 4, 64
    assert workspace(monkeypatch, emulated, case) == 2 * splits * rows * (64 + 4) * 4
    q_lens = (16, *[1] * 63)  # tokens are the smaller bound
    verify = dataclasses.replace(case, q_lens=q_lens, max_q_len=16)
    assert workspace(monkeypatch, emulated, verify) == 2 * splits * sum(q_lens) * 4 * (64 + 4) * 4
    padded = dataclasses.replace(verify, q_lens=(1,) * 64, max_q_len=1, padding_rows=500)  # requests are
    assert workspace(monkeypatch, emulated, padded) == 2 * splits * rows * (64 + 4) * 4


def test_what_is_read_again_is_not_evicted_first(emulated):
    case = Attention((90, 33), heads=(8, 2), dtype=bf16)
    run(case)
    launched = emulated.last_launch()
    assert 0 < launched["evict_first_bytes"] == launched["copied_bytes"]
    run(dataclasses.replace(case, q_lens=(16, 9), max_q_len=16))  # 64 rows: four warps, one tile
    launched = emulated.last_launch()
    assert launched["evict_first_bytes"] == launched["copied_bytes"]
    run(dataclasses.replace(case, heads=(16, 2), q_lens=(16, 9), max_q_len=16))  # 128 rows: two chunks
    launched = emulated.last_launch()
    assert launched["evict_first_bytes"] == 0 < launched["copied_bytes"]


SPLITS = {  # q_lens, the rest
    "decode": (None, {}),
    "short": ((4, 1, 3, 2, 0, 1), {"max_q_len": 4}),  # fewer tokens than six times four
    "padded": ((1,) * 6, {"max_q_len": 1, "padding_rows": 50}),  # more than six times one
}


@pytest.mark.parametrize("call", SPLITS)
def test_every_partial_has_a_place_of_its_own(call, monkeypatch):
    """Counted: blocks run one after another here, so that rows in one place would still give right results."""
    q_lens, more = SPLITS[call]
    lens, width, group, heads = (300, 900, 5, 0, 65, 640), 64, 4, 2
    built = cases.build(Attention(lens, q_lens, (group * heads, heads), width, dtype=bf16, split_size=64, **more))
    workspace = []
    empty = torch.empty

    def poisoned(*size, **keywords):
        workspace.append(empty(*size, **keywords).fill_(torch.nan))
        return workspace[-1]

    with monkeypatch.context() as patch:
        patch.setattr(cuda.torch, "empty", poisoned)
        cuda_allocates = built.run("cuda")
    tolerance.check(built, *cuda_allocates)
    rows = 0
    for n, q_len in zip(lens, q_lens or (1,) * 6, strict=True):
        parts = -(-n // 64)
        rows += parts * q_len * group * heads if parts > 1 else 0
    partial = [x for x in workspace if x.dtype == torch.float32 and x.dim() == 1]
    assert sum(int((~x.isnan()).sum()) for x in partial) == rows * (width + 2)
