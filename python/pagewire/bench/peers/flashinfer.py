"""FlashInfer's paged wrappers, planned outside the timed call; `flashinfer+plan` plans inside it, as each step must."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case, Merge
from pagewire.bench.machine import version
from pagewire.bench.movement import MergeWork
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work
from pagewire.types import QUANT_MAX

_WORKSPACE_BYTES = 384 << 20
_PACKAGE = "flashinfer-python"


def _missing(device: str) -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed (pip install flashinfer-python)"
    return None if device == "cuda" else "needs a GPU"


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.dtype == torch.float32:
        return "takes fp16 and bf16"
    if os.environ.get("FLASHINFER_DISABLE_JIT") == "1" and (case.head_dim != 128 or case.stored in QUANT_MAX):
        return "FLASHINFER_DISABLE_JIT=1: only prebuilt modules, bf16 head_dim 128"
    return None


def _decode_only(case: Case) -> str | None:
    assert isinstance(case, Attention)
    return None if case.op == "decode" else "this wrapper decodes"


def _group_fits(case: Case) -> str | None:
    assert isinstance(case, Attention)
    group_size = case.heads[0] // case.heads[1]
    return None if group_size in (1, 2, 4, 8) else f"group size {group_size} is not one of 1, 2, 4, 8"


@functools.cache
def _workspace() -> Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


class _Tables:
    """The page table as CSR, per copy: indices on the device, everything the host plans with on the host."""

    def __init__(self, work: AttentionWork) -> None:
        case = work.case
        counts = torch.tensor([-(-r.seq_len // case.page_size) for r in case.requests])
        self.indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        lasts = [(r.seq_len - 1) % case.page_size + 1 for r in case.requests]
        self.last_page_len = torch.tensor(lasts, dtype=torch.int32)
        self.qo_indptr = work.cu_seqlens_q.cpu()
        owned = torch.arange(int(counts.max()))[None, :] < counts[:, None]
        self.indices = [table[owned.to(table.device)].contiguous() for table in work.page_tables]


def _decode(name: str, tensor_cores: bool, inside: bool) -> Callable[[Work], Contender]:
    def prepare(work: Work) -> Contender:
        import flashinfer

        assert isinstance(work, AttentionWork)
        case, tables = work.case, _Tables(work)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(), "NHD", use_tensor_cores=tensor_cores, **({"backend": "fa2"} if tensor_cores else {})
        )

        def plan(copy: int) -> None:
            wrapper.plan(
                tables.indptr, tables.indices[copy], tables.last_page_len, *case.heads, case.head_dim, case.page_size,
                q_data_type=case.dtype, kv_data_type=case.stored, sm_scale=work.softmax_scale,
            )  # fmt: skip

        return _contender(name, work, wrapper, plan, inside)

    return prepare


def _prefill(name: str, backend: str, inside: bool) -> Callable[[Work], Contender]:
    def prepare(work: Work) -> Contender:
        import flashinfer

        assert isinstance(work, AttentionWork)
        case, tables = work.case, _Tables(work)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend=backend)

        def plan(copy: int) -> None:
            wrapper.plan(
                tables.qo_indptr, tables.indptr, tables.indices[copy], tables.last_page_len, *case.heads,
                case.head_dim, case.page_size, causal=True, q_data_type=case.dtype, kv_data_type=case.stored,
                sm_scale=work.softmax_scale,
            )  # fmt: skip

        return _contender(name, work, wrapper, plan, inside)

    return prepare


def _contender(name: str, work: AttentionWork, wrapper: Any, plan: Callable[[int], None], inside: bool) -> Contender:
    scales = {} if work.kv_scale is None else {"k_scale": work.kv_scale, "v_scale": work.kv_scale}

    def run(copy: int) -> Tensor:
        out: Tensor = wrapper.run(work.q, (work.k_cache, work.v_cache), **scales)
        return out

    def plan_and_run(copy: int) -> Tensor:
        plan(copy)
        return run(copy)

    if inside:
        return Contender(name, plan_and_run, syncs=True, version=version(_PACKAGE))
    return Contender(name, run, before=plan, version=version(_PACKAGE))


def _with_plan(work: Work) -> Contender:
    decodes = work.case.op == "decode"
    prepare = _decode("flashinfer+plan", True, True) if decodes else _prefill("flashinfer+plan", "fa2", True)
    return prepare(work)


def _merge(work: Work) -> Contender:
    import flashinfer

    assert isinstance(work, MergeWork)
    # its states are [num_tokens, num_states, ...] and its lse is base 2
    lses = [lse.transpose(0, 1).contiguous() * math.log2(math.e) for lse in work.lses]
    outs = [out.transpose(0, 1).contiguous() for out in work.outs]
    return Contender(
        "flashinfer", lambda copy: flashinfer.merge_states(outs[copy], lses[copy])[0], version=version(_PACKAGE)
    )


def _merge_refuses(case: Case) -> str | None:
    assert isinstance(case, Merge)
    return "takes fp16 and bf16" if case.dtype == torch.float32 else None


def _any(*tests: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: next((reason for test in tests if (reason := test(case)) is not None), None)


def _long(case: Case) -> str | None:
    assert isinstance(case, Attention)
    return "decoding is left to the other wrappers" if case.op == "decode" else None


_CUDA = ("cuda",)
PEERS = (
    Peer(
        "flashinfer-cc",
        ATTENTION,
        _missing,
        _any(_refuses, _decode_only, _group_fits),
        _decode("flashinfer-cc", False, False),
        _CUDA,
    ),
    Peer(
        "flashinfer-tc", ATTENTION, _missing, _any(_refuses, _decode_only), _decode("flashinfer-tc", True, False), _CUDA
    ),
    Peer("flashinfer-fa2", ATTENTION, _missing, _any(_refuses, _long), _prefill("flashinfer-fa2", "fa2", False), _CUDA),
    Peer("flashinfer-fa3", ATTENTION, _missing, _any(_refuses, _long), _prefill("flashinfer-fa3", "fa3", False), _CUDA),
    Peer("flashinfer+plan", ATTENTION, _missing, _refuses, _with_plan, _CUDA),
    Peer("flashinfer", frozenset({"merge"}), _missing, _merge_refuses, _merge, _CUDA),
)
