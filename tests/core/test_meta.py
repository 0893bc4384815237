"""Tensors without memory, and subclasses of Tensor: shapes come out, or a sentence; never a recursion."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import cases
import pagewire as pw


class Named(torch.Tensor):
    """No more than a name."""


class Logged(torch.Tensor):
    """Sees every torch op and passes it on."""

    seen: list = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """Holds its tensor inside, as quantised and distributed tensors do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def bare(x):
            return x.inner if isinstance(x, cls) else x

        return func(*map(bare, args), **{k: bare(v) for k, v in (kwargs or {}).items()})


def every_op(call, convert):
    """Shapes of all results of all ops, their tensors made by `convert`."""
    args = [convert(a) for a in call.args]
    q, k_cache, v_cache, table, lens = args[:5]
    cu = convert(torch.tensor([0, 2], dtype=torch.int32))
    k = convert(torch.randn(2, 2, 16))
    slots = convert(torch.tensor([1, 2]))
    cache = pw.PagedKVCache([k_cache], [v_cache])
    r = [pw.decode(q, k_cache, v_cache, table, lens)]
    r += pw.decode(q, k_cache, v_cache, table, lens, return_lse=True)
    rows = convert(torch.randn(2, 4, 16))
    r += pw.prefill(rows, k_cache, v_cache, table, lens, cu, return_lse=True)
    r += pw.merge_state(r[1], r[2], r[1], r[2])
    states = convert(torch.randn(3, 2, 4, 16)), convert(torch.randn(3, 2, 4))
    r += pw.merge_states(*states)
    assert pw.append_kv(k, k, k_cache, v_cache, slots) is None
    packed = pw.pack_kv(cache, slots)
    pw.unpack_kv(packed, cache, slots)
    return [tuple(t.shape) for t in (*r, packed.buffer, packed.k)]


@pytest.fixture
def call():
    call = cases.build(cases.Attention((20,), head_dim=16))
    for cache in call.args[1:3]:
        cache.nan_to_num_()
    return call


CONVERT = {
    "meta": lambda t: t.to("meta"),
    "named": lambda t: t.clone().as_subclass(Named),
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
}


@pytest.mark.parametrize("kind", CONVERT)
def test_shapes_are_those_of_plain_tensors(kind, call):
    assert every_op(call, CONVERT[kind]) == every_op(call, torch.clone)


def test_fake_tensors(call):
    expected = every_op(call, torch.clone)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert every_op(call, mode.from_tensor) == expected


@pytest.mark.parametrize("op", ["decode", "append_kv", "merge_states", "pack_kv"])
def test_checks_hold_without_memory(op):
    e = lambda *shape, dtype=torch.float16: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    cache = [e(8, 4, 2, 16), e(8, 4, 2, 16)]
    with pytest.raises((ValueError, TypeError), match="expected"):
        if op == "decode":
            pw.decode(e(2, 3, 16), *cache, e(2, 2, dtype=torch.int32), e(2, dtype=torch.int32))
        elif op == "append_kv":
            pw.append_kv(e(2, 2, 8), e(2, 2, 16), *cache, e(2, dtype=torch.int64))
        elif op == "merge_states":
            pw.merge_states(e(2, 3, 4, 16), e(2, 3, 4))
        else:
            pw.pack_kv(pw.PagedKVCache(cache[:1], cache[1:]), torch.tensor([1]))


def test_a_subclass_that_passes_ops_on_sees_one_and_gets_the_result_or_a_sentence(call):
    q, *rest = call.args
    logged = torch.Tensor._make_subclass(Logged, q)
    Logged.seen.clear()
    with pytest.raises(TypeError, match="q: expected a plain torch.Tensor .* got Logged"):
        pw.decode(logged, *rest)
    assert Logged.seen == ["pagewire.decode.default"]


def test_a_wrapper_unwraps(call):
    q, *rest = call.args
    assert torch.equal(pw.decode(Wrapped(q), *rest), pw.decode(q, *rest))


def test_a_tensor_of_its_own_kind_behind_a_plain_one_is_refused(call):
    q, k, *rest = call.args
    with pytest.raises(TypeError, match="k_cache: expected a plain torch.Tensor .* got Wrapped"):
        pw.decode(q, Wrapped(k), *rest)
    cache = pw.PagedKVCache([Wrapped(k)], [k.clone()])
    for op in (pw.pack_kv, lambda c, s: pw.unpack_kv(pw.pack_kv(c, s), c, s)):
        with pytest.raises(TypeError, match=r"k_caches\[0\] of the cache: expected a plain"):
            op(cache, torch.tensor([1]))
