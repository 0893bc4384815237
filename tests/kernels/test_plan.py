"""A plan kept for the next call of a kind hands kernels what one made anew would, by whichever way it launches."""

import itertools
import random
import struct
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import pagewire as pw  # noqa: E402
from core.test_memo import append, attention, fp8, random_call  # noqa: E402
from pagewire import memo, results  # noqa: E402
from pagewire.bench import pretend, tune  # noqa: E402
from pagewire.bench.cases import Attention  # noqa: E402
from pagewire.kernels import again  # noqa: E402
from pagewire.kernels import plan as plans  # noqa: E402
from pagewire.kernels.arguments import UNSPECIALISED  # noqa: E402
from pagewire.kernels.common import Spec  # noqa: E402
from pagewire.kernels.move import Move  # noqa: E402
from pagewire.kernels.place import Launch, Place  # noqa: E402
from pagewire.kernels.plan import Plan  # noqa: E402

pytestmark = pytest.mark.skipif(pw.backends("cpu")["triton"] is not None, reason="the interpreter is off")
CALLS = 2_000


class Host:
    """pagewire._host in Python: what kernels are started with is told."""

    Launch = SimpleNamespace

    def __init__(self):
        self.told = []

    def Launches(self, launches, aligned):  # noqa: N802
        def start(tensors, scratch, stream):
            if any(tensors[index].data_ptr() % 16 for index in aligned):
                return False
            for of in launches:
                values = [*of.values]
                for parameter, place, behind in of.places:
                    values[parameter] = (tensors[place] if place >= 0 else scratch).data_ptr() + behind
                self.told.append(of.__dict__ | {"values": values[:-2], "stream": stream})
                assert values[-2:] == [0, 0]  # Triton's own scratch memory
            return True

        return SimpleNamespace(start=start)


class Kernel(plans.CompiledKernel):
    """Compiled, it seems."""

    function = 7

    def __init__(self, signature, **more):
        self.src = SimpleNamespace(signature=signature)
        plain = {"num_ctas": 1, "launch_pdl": False, "launch_cooperative_grid": False, "global_scratch_size": 0}
        plain |= {"name": "its name", "num_warps": 8, "shared": 1000, "profile_scratch_size": 0}
        self.metadata = SimpleNamespace(**plain | more)

    def __del__(self):
        pass


class Jit:
    """A JITFunction that compiles to Kernel."""

    arg_names, do_not_specialize = ["x", "n", "free", "room"], ["free"]

    def __init__(self, compiled):
        self.compiled, self.calls = compiled, []

    def __getitem__(self, grid):
        return lambda **given: self.calls.append((grid, given)) or self.compiled


@pytest.fixture(autouse=True)
def host(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(plans, "driver", SimpleNamespace(active=active))
    host = Host()
    monkeypatch.setattr(again, "_host", host)
    return host


SIGNATURE = {"x": ("*i8", "i32", "*fp32"), "n": "constexpr", "free": "*i8", "room": ("*fp32", "*fp32", "constexpr")}


def plan_of(jit, **more):
    scale = torch.ones(1)
    arguments = {"x": (Place(1), 5, scale), "n": 16, "free": Place(0), "room": (Place(-1), Place(-2), "word")}
    arguments = {name: Pair._make(x) if isinstance(x, tuple) else x for name, x in arguments.items()}
    return Plan([Launch(jit, (2, 1, 1), arguments, {"num_warps": 8})], torch.device("cpu"), (5, 100)), scale


class Pair(NamedTuple):
    a: object
    b: object
    c: object


def test_the_second_call_is_told_to_the_compiled_kernel(host):
    jit = Jit(Kernel(SIGNATURE))
    plan, scale = plan_of(jit)
    first, second = (torch.zeros(64, dtype=torch.uint8).split(32) for _ in range(2))
    plan.run(first[0], first[1])
    ((grid, given),) = jit.calls
    assert grid == (2, 1, 1) and given["num_warps"] == 8 and given["n"] == 16
    assert given["x"] == Pair(first[1], 5, scale) and given["free"] is first[0]
    start, behind = given["room"][:2]
    assert (start.numel(), behind.numel()) == (16, 112) and behind.data_ptr() == start.data_ptr() + 4 * 16
    assert host.told == []
    plan.run(second[0], second[1])
    assert len(jit.calls) == 1
    (told,) = host.told
    assert (told["name"], told["function"], told["grid"]) == ("its name", 7, (2, 1, 1))
    assert (told["num_threads"], told["shared_bytes"], told["stream"]) == (256, 1000, "stream of 3")
    *x, free, start, behind = told["values"]
    assert x == [second[1].data_ptr(), 5, scale.data_ptr()] and free == second[0].data_ptr()
    assert behind == start + 4 * 16


def test_numbers_become_the_bits_of_their_types():
    launch = Launch(None, (1, 1, 1), {"x": Pair(-1, 0.5, True), "y": -2, "z": 3}, {})
    found = again.parameters(launch, {"x": ("i64", "fp32", "i1"), "y": "i32", "z": "constexpr"}, ())
    assert found == ([(1 << 64) - 1, 0x3F000000, 1, (1 << 64) - 2, 0, 0], [], [])


def test_what_triton_compiles_for_goes_through_triton(host):
    jit = Jit(Kernel(SIGNATURE))
    plan, _ = plan_of(jit)
    x = torch.zeros(128, dtype=torch.uint8)
    for turn in range(2):  # a kernel compiled for odd addresses is not kept: it would be slow for the others
        plan.run(x[16:], x[8:])
        assert len(jit.calls) == turn + 1
    plan.run(x[8:], x[16:])  # `free` is not specialised
    plan.run(x[4:], x[32:])
    assert (len(jit.calls), len(host.told)) == (3, 1)
    plan.run(x, x[8:])
    assert (len(jit.calls), len(host.told)) == (4, 1)
    plan.run(x, x)
    assert (len(jit.calls), len(host.told)) == (4, 2)


@pytest.mark.parametrize(
    "more",
    [{"num_ctas": 2}, {"launch_pdl": True}, {"launch_cooperative_grid": True}, {"global_scratch_size": 8},
     {"profile_scratch_size": 8}, {"gsan": True}],
)  # fmt: skip
def test_what_only_triton_launches_goes_through_triton(host, more, monkeypatch):
    """Found out once."""
    asked, launches_again = [], again.launches_again
    monkeypatch.setattr(plans, "launches_again", lambda *of: asked.append(of) or launches_again(*of))
    jit = Jit(Kernel(SIGNATURE, **more))
    plan, _ = plan_of(jit)
    for turn in range(4):
        plan.run(torch.zeros(4), torch.zeros(4))
        assert (len(jit.calls), host.told, len(asked)) == (turn + 1, [], min(turn, 1))


def test_without_the_extension_all_goes_through_triton(monkeypatch):
    monkeypatch.setattr(again, "_host", None)
    test_what_only_triton_launches_goes_through_triton(Host(), {}, monkeypatch)


def test_a_profiler_is_told_by_triton(host, monkeypatch):
    jit = Jit(Kernel(SIGNATURE))
    plan, _ = plan_of(jit)
    x = torch.zeros(64)
    plan.run(x, x)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(plans.triton.knobs.runtime, name)
        hook.add(print)
        plan.run(x, x)
        hook.remove(print)
    monkeypatch.setattr(plans.triton.knobs.runtime, "launch_enter_hook", print)
    plan.run(x, x)
    assert (len(jit.calls), len(host.told)) == (4, 0)
    monkeypatch.setattr(plans.triton.knobs.runtime, "launch_enter_hook", None)
    plan.run(x, x)
    assert len(host.told) == 1


def test_what_was_not_compiled_is_not_kept():
    jit = Jit(None)  # as bench/ahead.py answers
    plan, _ = plan_of(jit)
    for _ in range(3):
        plan.run(torch.zeros(4), torch.zeros(4))
    assert len(jit.calls) == 3


def addresses(value):
    if isinstance(value, tuple):
        return getattr(value, "_make", tuple)(map(addresses, value))
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def by_triton(plan, tensors):
    """What each kernel is given, by name, as addresses."""
    return [
        (launch.kernel.fn.__name__, launch.grid, {n: addresses(launch.arguments[n]) for n in launch.kernel.arg_names})
        for launch in plan.bound(*tensors)
    ]


def by_compiled(plan, tensors):
    """The same values, told to compiled kernels; None: an address is not aligned."""
    launches = [
        launch._replace(kernel=SimpleNamespace(arg_names=launch.kernel.arg_names, do_not_specialize=UNSPECIALISED))
        for launch in plan.launches
    ]
    kernels = [Kernel({name: typed(launch.arguments[name]) for name in launch.kernel.arg_names}) for launch in launches]
    again._host.told.clear()
    if not again.launches_again(launches, kernels, plan._areas).start(tensors, plan._scratch(), 0):
        return None
    return [(told["grid"], told["values"]) for told in again._host.told]


def typed(value):
    """As Triton would type it, if it specialised for no number."""
    if isinstance(value, tuple) and not isinstance(value, (Spec, Move)):
        return tuple(map(typed, value))
    kinds = {bool: "i1", int: "i64", float: "fp32", torch.Tensor: "*i8", Place: "*i8"}
    return kinds.get(type(value), "constexpr")


def bits(launches):
    """What `by_triton` says, as `by_compiled` does."""

    def leaves(value):
        if isinstance(value, tuple) and not isinstance(value, (Spec, Move)):
            return list(itertools.chain(*map(leaves, value)))
        if isinstance(value, float):
            return [int.from_bytes(struct.pack("<f", value), "little")]
        return [value & (1 << 64) - 1] if isinstance(value, int) else []

    return [(grid, [n for x in given.values() for n in leaves(x)]) for _, grid, given in launches]


def zeros(of):
    return torch.zeros(of._shape, dtype=of._dtype, device=of._device)


@pytest.fixture
def launched(monkeypatch):
    """What every call would launch; nothing is."""
    seen, scratch = [], torch.zeros(1 << 22)

    def run(plan, *tensors):
        given, started = by_triton(plan, tensors), by_compiled(plan, tensors)
        assert started is None or started == bits(given)
        seen.append(given)
        aligned.append(started is not None)

    aligned = []
    made: dict = {}
    monkeypatch.setattr(results.Result, "new", lambda of: made.setdefault((*of._shape, of._dtype), zeros(of)))
    monkeypatch.setattr(Plan, "run", run)
    monkeypatch.setattr(Plan, "_scratch", lambda plan: scratch[: sum(plan._areas)] if plan._areas else None)
    memo.forget()
    yield seen, aligned
    memo.forget()


def test_a_kept_plan_launches_what_a_new_one_would(launched, monkeypatch):
    seen, aligned = launched
    rng = random.Random(20261127)
    every_time, compared = memo.once, 0
    for _ in range(CALLS):
        op, call = random_call(rng)
        call["backend"] = "triton"
        if op in ("decode", "prefill") and rng.random() < 0.5:
            call["return_lse"] = True
        if rng.random() < 0.3:
            call = moved(rng, call)
        seen.clear()
        try:
            getattr(pw, op)(**call)
            kept = [*seen]
            monkeypatch.setattr(memo, "once", lambda of, check: check())
            seen.clear()
            getattr(pw, op)(**call)
        except (TypeError, ValueError, pw.BackendError):
            continue
        finally:
            monkeypatch.setattr(memo, "once", every_time)
        assert kept == seen
        compared += bool(kept)
    assert compared > CALLS // 4 and 0 < aligned.count(False) < len(aligned) / 2


def moved(rng, call):
    """The same call with a tensor elsewhere, on whatever boundary."""
    name = rng.choice([name for name, x in call.items() if isinstance(x, torch.Tensor)])
    x = call[name]
    if x.layout != torch.strided or x.is_meta:
        return call
    room = torch.zeros(x.numel() + 64, dtype=x.dtype)
    start = rng.choice((0, 1, 4, 16))
    return call | {name: room[start : start + x.numel()].view(x.shape)}


def test_rows_that_lie_in_the_cache_have_a_plan_of_their_own(launched):
    """They are copied, and a copy has other strides than a call of the kind."""
    seen, _ = launched
    caches = [torch.zeros(3, 4, 2, 16, dtype=torch.bfloat16) for _ in "kv"]
    inside, apart = ([x.view(12, 2, 16)[8::2] for x in of] for of in (caches, [x.clone() for x in caches]))
    for order in ((apart, inside), (inside, apart)):
        memo.forget()
        seen.clear()
        for rows in order:
            pw.append_kv(*rows, *caches, torch.arange(2), backend="triton")
        strides = [launches[0][2]["rows"][1] for launches in seen]
        assert strides == [128 if rows is apart else 64 for rows in order]


def test_new_rows_are_copied_as_widely_as_their_addresses_allow(launched):
    seen, _ = launched
    call = append()
    for offset, align in ((0, 16), (1, 2), (4, 8), (8, 16)):
        x = torch.zeros(64 + offset, dtype=torch.bfloat16)[offset:].view(2, 2, 16)
        pw.append_kv(**call | {"k": x}, backend="triton")
        assert seen[-1][0][2]["ALIGN"] == align


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float8_e4m3fn, None])
@pytest.mark.parametrize("scale", ["none", "head", "token_head"])
def test_a_kept_plan_moves_what_a_new_one_would(launched, wire, scale):
    seen, _ = launched
    dtype = torch.bfloat16 if scale == "none" else torch.float8_e4m3fn
    cache = pw.PagedKVCache.allocate(
        num_layers=3, num_pages=4, page_size=4, num_kv_heads=2, head_dim=16, dtype=dtype, device="cpu", scale=scale
    )
    k_scales, v_scales = (None if scale == "none" else x for x in (cache.k_scale, cache.v_scale))
    for part, count in itertools.product(({}, {"layers": (1, 3)}, {"heads": (0, 1)}), (5, 1, 5, 5)):
        another = pw.PagedKVCache(cache.k, cache.v, k_scales=k_scales, v_scales=v_scales)  # nothing kept
        slots = torch.randperm(16)[:count]
        packed = pw.PackedKV.empty(pw.packed_shape(cache, count, dtype=wire, **part), "cpu")
        given = []
        for of in (cache, another):
            seen.clear()
            pw.pack_kv(of, slots, out=packed, dtype=wire, backend="triton", **part)
            pw.unpack_kv(packed, of, slots, backend="triton", **part)
            assert [len(launches) for launches in seen] == [1, 1]
            given.append([without_table(launches) for launches in seen])
        assert given[0] == given[1]


def without_table(launches):
    """On a CPU it is made for each call."""
    ((kernel, grid, given),) = launches
    return kernel, grid, {name: x for name, x in given.items() if name not in "kv"}


def test_a_sweep_times_the_row_it_puts_into_the_table(launched, monkeypatch):
    seen, _ = launched
    monkeypatch.setenv("PAGEWIRE_HOPPER", "0")  # rows are of the `tl` kernels
    case = Attention("x", "2q1s40")
    (target,) = (t for t in tune.targets(["decode"], 90) if t.key == tune.key_of("decode", case, 90))
    present = target.table[target.key]
    other = present._replace(BLOCK_N=present.BLOCK_N // 2)
    with pretend.gpu(90):
        work, ours = pretend.prepared(case, pretend.Blank("cpu", 1))
        for row in (None, other, None, other):
            with tune.row(target, row) if row else nullcontext():
                ours.call(0)
    assert [launches[0][2]["spec"].BLOCK_N for launches in seen] == 2 * [present.BLOCK_N, other.BLOCK_N]
    memo.forget()


def test_tensors_in_each_others_place_are_told_apart(launched):
    """The same tensor for K and V in the first call, two in the next."""
    seen, _ = launched
    call = fp8(attention(False)) | {"out": torch.zeros(2, 4, 16, dtype=torch.bfloat16)}
    pw.decode(**call | {"v_cache": call["k_cache"]}, backend="triton")
    pw.decode(**call, backend="triton")
    (_, _, first), (_, _, second) = seen[0][0], seen[1][0]
    assert first["k"] == first["v"] and second["k"][0] != second["v"][0] == call["v_cache"].data_ptr()
