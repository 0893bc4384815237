"""FlashAttention 4 (CuTe DSL; `pip install flash-attn-4`): compiles in process, no split over K/V on sm_90."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.machine import version
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work


def _missing(device: str) -> str | None:
    found = importlib.util.find_spec("flash_attn")
    if found is None or importlib.util.find_spec("flash_attn.cute") is None:
        return "flash_attn.cute is not installed (pip install --pre flash-attn-4)"
    return None if device == "cuda" else "needs a GPU"


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.dtype == torch.float32 or case.stored != case.dtype:
        return "takes fp16 and bf16 caches"
    return None


def _prepare(work: Work) -> Contender:
    from flash_attn.cute import flash_attn_varlen_func

    assert isinstance(work, AttentionWork)

    def call(copy: int) -> Tensor:
        result = flash_attn_varlen_func(
            work.q, work.k_cache, work.v_cache, cu_seqlens_q=work.cu_seqlens_q, seqused_k=work.seq_lens,
            max_seqlen_q=work.max_q_len, max_seqlen_k=work.max_seq_len, page_table=work.page_tables[copy],
            softmax_scale=work.softmax_scale, causal=True,
        )  # fmt: skip
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return Contender("flash_attn4", call, version=version("flash-attn-4"))


PEERS = (Peer("flash_attn4", ATTENTION, _missing, _refuses, _prepare, default=("cuda",)),)
