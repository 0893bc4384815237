"""FlexAttention, compiled per shape, on K/V gathered beforehand. A few shapes; on a CPU only when asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work

_BATCHES = ("32q1s4k", "q8k", "8q1s1k", "q1k")


def _missing(device: str) -> str | None:
    try:
        import torch.nn.attention.flex_attention  # noqa: F401
    except ImportError as error:
        return f"this torch has no FlexAttention ({error})"
    return None


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.batch not in _BATCHES or case.stored != case.dtype:
        return f"seconds of compilation per shape: called on {', '.join(_BATCHES)} only"
    return None


def _prepare(work: Work) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert isinstance(work, AttentionWork)
    case = work.case
    batch, (q_len, seq_len) = len(case.requests), case.requests[0]
    past = seq_len - q_len

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx + past

    mask = None if q_len == 1 else create_block_mask(causal, None, None, q_len, seq_len, device=work.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    q = work.q.view(batch, q_len, *work.q.shape[1:]).transpose(1, 2)
    sets = []
    for copy in range(min(work.copies, 64)):
        pairs = [work.gather(copy, request) for request in range(batch)]
        sets.append(tuple(torch.stack([p[i] for p in pairs]).transpose(1, 2) for i in range(2)))

    def call(copy: int) -> Tensor:
        k, v = sets[copy % len(sets)]
        out = compiled(q, k, v, block_mask=mask, scale=work.softmax_scale, enable_gqa=case.heads[0] != case.heads[1])
        return out.transpose(1, 2).reshape(work.q.shape)

    return Contender("flex", call, version=torch.__version__)


PEERS = (Peer("flex", ATTENTION, _missing, _refuses, _prepare, default=("cuda",)),)
