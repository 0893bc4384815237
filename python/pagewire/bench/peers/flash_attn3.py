"""FlashAttention 3: the `flash_attn_interface` package, or the extension vLLM ships.

PAGEWIRE_PEER_FA3 names an unpacked `_vllm_fa3_C.abi3.so`; without it an installed vLLM's is used. It is loaded as a
torch library; vLLM itself is never imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.machine import version
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work


def _extension() -> Path | None:
    named = os.environ.get("PAGEWIRE_PEER_FA3")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = (Path(f) / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so" for f in folders)
    return next((p for p in found if p.exists()), None)


def _missing(device: str) -> str | None:
    if device != "cuda":
        return "needs a GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "runs on sm_90 only"
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return None
    extension = _extension()
    if extension is None:
        return "neither flash_attn_interface nor vLLM's extension is here (PAGEWIRE_PEER_FA3 can name it)"
    return None if extension.exists() else f"PAGEWIRE_PEER_FA3: {extension} does not exist"


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.dtype == torch.float32 or case.stored != case.dtype:
        return "takes caches of q's dtype, fp16 or bf16"
    return None


@functools.cache
def _vllm_op() -> tuple[Any, tuple[str, ...]]:
    """(the op, its argument names): versions differ in arguments, so they are passed by name."""
    torch.ops.load_library(str(_extension()))
    op = torch.ops._vllm_fa3_C.fwd.default
    return op, tuple(a.name for a in op._schema.arguments)


def _from_vllm(work: AttentionWork, num_splits: int) -> Callable[[int], Tensor]:
    op, names = _vllm_op()
    out = torch.empty_like(work.q)
    known: dict[str, Any] = {
        "q": work.q, "k": work.k_cache, "v": work.v_cache, "out": out, "out_": out,
        "cu_seqlens_q": work.cu_seqlens_q, "seqused_k": work.seq_lens, "max_seqlen_q": work.max_q_len,
        "max_seqlen_k": work.max_seq_len, "softmax_scale": work.softmax_scale, "is_causal": True,
        "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True,
        "rotary_interleaved": True, "num_splits": num_splits, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
    }  # fmt: skip
    table_name = "page_table" if "page_table" in names else "block_table"
    fixed = [known.get(name) for name in names]
    at = names.index(table_name)

    def call(copy: int) -> Tensor:
        op(*fixed[:at], work.page_tables[copy], *fixed[at + 1 :])
        return out

    return call


def _from_package(work: AttentionWork) -> Callable[[int], Tensor]:
    from flash_attn_interface import flash_attn_with_kvcache

    def call(copy: int) -> Tensor:
        out: Tensor = flash_attn_with_kvcache(
            work.q, work.k_cache, work.v_cache, cache_seqlens=work.seq_lens, page_table=work.page_tables[copy],
            cu_seqlens_q=work.cu_seqlens_q, max_seqlen_q=work.max_q_len, softmax_scale=work.softmax_scale, causal=True,
        )  # fmt: skip
        return out

    return call


def _prepare(work: Work) -> Contender:
    assert isinstance(work, AttentionWork)
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return Contender("flash_attn3", _from_package(work), version=version("flash-attn-3"))
    return Contender("flash_attn3", _from_vllm(work, 0), version=f"vllm {version('vllm')}")


PEERS = (Peer("flash_attn3", ATTENTION, _missing, _refuses, _prepare, default=("cuda",)),)
