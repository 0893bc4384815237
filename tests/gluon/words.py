"""The words of Gluon that our Hopper kernels use, as a `Machine` does them. Layouts mean nothing here."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gluon.machine import Machine, Partition, Product, Race
from gluon.values import Pointer, Value, plain
from pagewire.overlap import meet, span

machine = Machine(0)  # the one whose program runs: set by `program`
program_ids: tuple[int, ...] = ()
grid: tuple[int, ...] = ()


class Shared:
    """A piece of shared memory; what nobody has written is NaN."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    dtype = property(lambda self: self.memory.dtype)
    shape = property(lambda self: list(self.memory.shape))

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.memory.shape[0], "a stage that there is not"
        return Shared(self.memory[int(i)])

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory.narrow(dim, int(start), length))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.memory.permute(order))

    def store(self, value: Value) -> None:
        machine.write(self.memory)
        self.memory.copy_(value.x)
        unseen.append((self.memory, {"fence", "barrier"}, machine.current))

    def load(self, layout: Any) -> Value:
        """By threads, which see what others of them wrote after a barrier."""
        for memory, missing, _writer in unseen:
            if "barrier" in missing and meet(span(memory), span(self.memory)):
                raise Race("written and loaded without barrier")
        return Value(self.memory.clone())

    def read(self) -> Tensor:
        """By the tensor cores, which see what threads wrote after a fence."""
        for memory, missing, _writer in unseen:
            if missing and meet(span(memory), span(self.memory)):
                raise Race(f"written and read without {' and '.join(sorted(missing))}")
        return self.memory


# what threads have written, what is missing before it can be read, and whose they are
unseen: list[tuple[Tensor, set[str], Partition]] = []


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    memory = torch.empty(shape, dtype=dtype)
    spoil(memory)
    return Shared(memory)


def spoil(memory: Tensor) -> None:
    """Nobody has written there: NaN, of bytes the one of e4m3."""
    memory.fill_(torch.nan if memory.is_floating_point() else 0x7F)


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = 0
        self.phase = 0  # of the one that is not over
        self.bytes = 0  # that are still to come
        self.name = "a barrier"

    def arrive(self, count: int) -> None:
        assert self.count, "a barrier that was not initialised"
        self.pending -= count
        assert self.pending >= 0, f"{self.name}: more arrivals than {self.count}"
        self.close()

    def close(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Barriers:
    def __init__(self, count: int) -> None:
        self._all = [Barrier() for _ in range(count)]
        self.shape = [count, 1]

    def index(self, i: Any) -> Barrier:
        assert 0 <= int(i) < len(self._all), "a stage that there is not"
        return self._all[int(i)]


def _init(barrier: Barrier, count: Any) -> None:
    barrier.count = barrier.pending = int(count)


def _expect(barrier: Barrier, num_bytes: int, pred: Any = True) -> None:
    if pred:
        barrier.bytes += num_bytes
        barrier.arrive(1)


def _arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
    """One of a partition's threads, after all of them came here."""
    machine.pause()
    _done("barrier")
    if pred:
        barrier.arrive(int(count))


def _wait(barrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        wanted = int(phase)
        assert wanted in (0, 1), "a phase is 0 or 1"
        machine.wait(lambda: barrier.phase != wanted, f"phase {wanted} of {barrier.name}")


mbarrier = SimpleNamespace(MBarrierLayout=lambda: "barriers", init=_init, expect=_expect, arrive=_arrive, wait=_wait)


def load_box(matrix: Any, where: list[Any], barrier: Barrier, target: Shared, pred: Any = True) -> None:
    """Beyond the matrix it brings zeros."""
    rows, columns = matrix.block_type.shape
    assert target.shape == [rows, columns], "a box of another shape than its place"
    machine.write(target.memory)
    spoil(target.memory)
    row, column = (int(plain(x)) for x in where)
    box = torch.zeros(rows, columns, dtype=target.dtype)
    whole = matrix.whole
    part = whole[max(row, 0) : max(row + rows, 0), max(column, 0) : max(column + columns, 0)]
    box[max(-row, 0) :, max(-column, 0) :][: part.shape[0], : part.shape[1]] = part

    def land() -> None:
        machine.write(target.memory)
        target.memory.copy_(box)
        barrier.bytes -= box.nbytes
        assert barrier.bytes >= 0, f"{barrier.name}: more bytes than it was told to expect"
        barrier.close()

    machine.later(land)


def _copy_rows(target: Shared, at: Pointer, mask: Any = None) -> None:
    """Masked rows become zeros. It lands when its group is waited for, or before."""
    machine.write(target.memory)
    spoil(target.memory)
    values = at.load(mask, 0).x
    assert list(values.shape) == target.shape, "rows of another shape than their place"

    def land() -> None:
        machine.write(target.memory)
        target.memory.copy_(values)
        unseen.append((target.memory, {"fence"}, machine.current))

    machine.current.asked.append(land)


def _commit_group() -> None:
    machine.current.groups.append([*machine.current.asked])
    machine.current.asked.clear()


def _wait_group(left: int) -> None:
    groups = machine.current.groups
    while len(groups) > left:
        for land in groups.pop(0):
            land()
    machine.pause()


async_copy = SimpleNamespace(async_load=_copy_rows, commit_group=_commit_group, wait_group=_wait_group)


def _mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    reads = [x.memory for x in (a, b) if isinstance(x, Shared)]
    left = a.read() if isinstance(a, Shared) else a.x
    right = b.read()
    before = machine.current.products[-1:]
    assert not isinstance(acc, Product) or [acc] == before, "a sum that is still under way"

    def run() -> Tensor:
        product = left.float() @ right.float()
        if not use_acc:
            return product
        return (acc.force() if isinstance(acc, Product) else acc.x) + product

    product = Product(run, reads)
    if machine.random.random() < 0.5:
        product.force()
    machine.current.products.append(product)
    machine.pause()
    return product if is_async else _mma_wait(0, [product])


def _mma_wait(left: int, deps: list[Any]) -> Any:
    products = machine.current.products
    machine.pause()  # they may read until here
    while len(products) > left:
        products.pop(0).force()
    assert all(d not in products for d in deps if isinstance(d, Product)), "a result before it was waited for"
    found = [Value(d.force()) if isinstance(d, Product) else d for d in deps]
    return found[0] if len(found) == 1 else tuple(found)


def _fence() -> None:
    _done("fence")


def _barrier() -> None:
    _done("barrier")


def _done(what: str) -> None:
    """By the threads that run: it is about what they have written."""
    for _, missing, writer in unseen:
        if writer is machine.current:
            missing.discard(what)
    unseen[:] = [of for of in unseen if of[1]]


def _specialize(functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    assert len(warps) == len(registers) == len(functions) - 1
    names = [f"{function.__name__} {i}" for i, (function, _) in enumerate(functions)]
    machine.run([(n, lambda f=f, a=a: f(*a)) for n, (f, a) in zip(names, functions, strict=True)])


def _scan(x: Value, axis: int, combine: Any) -> Value:
    found = [x[0]]
    for i in range(1, x.x.shape[0]):
        found.append(combine(found[-1], x[i]))
    return Value(torch.stack([f.x for f in found]))


def _where(condition: Any, a: Any, b: Any) -> Value:
    a, b = plain(a), plain(b)
    dtype = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), None)
    return Value(
        torch.where(torch.as_tensor(plain(condition)), torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype))
    )


def _pairwise(op: Any) -> Any:
    def of(a: Any, b: Any) -> Value:
        a, b = plain(a), plain(b)
        like = a if isinstance(a, Tensor) else b
        dtype = like.dtype if isinstance(like, Tensor) else None
        return Value(op(torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype)))

    return of


def _atomic_add(at: Pointer, value: int, sem: str, scope: str) -> Value:
    assert sem in ("acq_rel", "relaxed") and scope == "gpu"
    before = at.load(None, 0)
    at.store(before + value, None)
    return before


def _atomic_max(at: Pointer, value: Value, mask: Any, sem: str) -> None:
    """All lanes at one place."""
    taken, values = torch.broadcast_tensors(torch.as_tensor(plain(mask)), value.x)
    if taken.any():
        at.store(torch.maximum(at.load(mask, 0).x, values)[taken].max(), mask)


def _none(*given: Any) -> None:
    return None


language = {
    "constexpr": lambda x: x, "static_range": range, "num_warps": lambda: 4,
    "dtype": torch.dtype, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64, "int8": torch.int8, "int16": torch.int16, "uint8": torch.uint8,
    "float8e4nv": torch.float8_e4m3fn, "float8e5": torch.float8_e5m2,
    **dict.fromkeys(
        (
            "BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "NVMMASharedLayout",
            "DistributedLinearLayout", "SwizzledSharedLayout",
        ),
        _none,
    ),
    "arange": lambda start, stop, layout=None: Value(torch.arange(start, stop, dtype=torch.int32)),
    "zeros": lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
    "full": lambda shape, value, dtype, layout=None: Value(torch.full(shape, value, dtype=dtype)),
    "load": lambda at, mask=None, other=0, cache_modifier="": at.load(mask, other),
    "store": lambda at, value, mask=None: at.store(value, mask),
    "where": _where, "maximum": _pairwise(torch.maximum), "minimum": _pairwise(torch.minimum),
    "max": lambda x, axis: Value(x.x.amax(axis)), "sum": lambda x, axis: Value(x.x.sum(axis, dtype=x.x.dtype)),
    "abs": lambda x: Value(x.x.abs()), "exp2": lambda x: Value(x.x.exp2()), "log2": lambda x: Value(x.x.log2()),
    "associative_scan": _scan, "convert_layout": lambda x, layout, assert_trivial=False: x,
    "permute": lambda x, order: Value(x.x.permute(order)), "reshape": lambda x, shape: Value(x.x.reshape(shape)),
    "atomic_add": _atomic_add, "atomic_max": _atomic_max,
    "program_id": lambda axis: Value(program_ids[axis]), "num_programs": lambda axis: Value(grid[axis]),
    "allocate_shared_memory": _allocate, "warp_specialize": _specialize,
    "barrier": _barrier,
}  # fmt: skip


def modules() -> dict[str, ModuleType]:
    """What `import` finds instead of Triton's."""

    def module(name: str, **words: Any) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(words)
        made.__path__ = []  # type: ignore[attr-defined]
        return made

    def jit(function: Any = None, **options: Any) -> Any:
        return jit if function is None else function

    root = "triton.experimental.gluon"
    gl = module(f"{root}.language", **language)
    hopper = module(
        f"{root}.language.nvidia.hopper", mbarrier=mbarrier, warpgroup_mma=_mma, warpgroup_mma_wait=_mma_wait,
        fence_async_shared=_fence, tma=SimpleNamespace(async_load=load_box),
    )  # fmt: skip
    gluon = module(root, jit=jit, constexpr_function=jit, language=gl)
    ampere = module(f"{root}.language.nvidia.ampere", async_copy=async_copy)
    nvidia = module(f"{root}.language.nvidia", hopper=hopper, ampere=ampere)
    experimental = module("triton.experimental", gluon=gluon)
    return {m.__name__: m for m in (experimental, gluon, gl, nvidia, hopper, ampere)}
