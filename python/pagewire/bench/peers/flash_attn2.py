"""FlashAttention 2 (`pip install flash-attn`): its paged path wants pages of a multiple of 256 tokens."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.machine import version
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work

_PAGE = 256


def _missing(device: str) -> str | None:
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn_2_cuda") is None:
        return "flash_attn 2 is not installed (pip install flash-attn)"
    return None if device == "cuda" else "needs a GPU"


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.dtype == torch.float32 or case.stored != case.dtype:
        return "takes fp16 and bf16 caches"
    if case.page_size % _PAGE:
        return f"pages of {case.page_size}: it takes multiples of {_PAGE}"
    return None


def _prepare(work: Work) -> Contender:
    from flash_attn import flash_attn_varlen_func

    assert isinstance(work, AttentionWork)
    cu_seqlens_k = torch.cat([work.seq_lens.new_zeros(1), work.seq_lens.cumsum(0).int()])

    def call(copy: int) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            work.q, work.k_cache, work.v_cache, work.cu_seqlens_q, cu_seqlens_k, work.max_q_len, work.max_seq_len,
            softmax_scale=work.softmax_scale, causal=True, block_table=work.page_tables[copy],
        )  # fmt: skip
        return out

    return Contender("flash_attn2", call, version=version("flash-attn"))


PEERS = (Peer("flash_attn2", ATTENTION, _missing, _refuses, _prepare, default=("cuda",)),)
