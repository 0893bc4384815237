"""PyTorch's scaled_dot_product_attention: on K/V gathered in the timed call, and on K/V gathered beforehand (dense)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work

_MAX_CALLS = 64  # requests of unequal lengths are one call each

Dense = list[tuple[Tensor, Tensor]]  # per call: k, v [batch, num_kv_heads, seq_len, head_dim]


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if not case.uniform and len(case.requests) > _MAX_CALLS:
        return f"{len(case.requests)} requests of unequal lengths would be as many calls"
    return None


def _gather(work: AttentionWork, copy: int) -> Dense:
    case = work.case
    if not case.uniform:
        pairs = (work.gather(copy, request) for request in range(len(case.requests)))
        return [(k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in pairs]
    seq_len = case.requests[0].seq_len
    pages = work.page_tables[copy].flatten().long()
    found = []
    for cache in (work.k_cache, work.v_cache):
        dense = cache.index_select(0, pages).view(len(case.requests), -1, *cache.shape[2:])[:, :seq_len]
        found.append(dense if work.kv_scale is None else dense.to(case.dtype) * work.kv_scale)
    return [(found[0].transpose(1, 2), found[1].transpose(1, 2))]


def _attend(work: AttentionWork, dense: Dense) -> Tensor:
    """Queries of one group side by side as rows of its kv head where there is no mask: PyTorch's fastest way."""
    case = work.case
    q_heads, kv_heads = case.heads
    outs = []
    batch = len(case.requests) if case.uniform else 1
    for call, (k, v) in enumerate(dense):
        q_len, seq_len = case.requests[call]
        first = work.rows[call]
        q = work.q[first : first + batch * q_len]
        if q_len == 1:
            rows = q.view(batch, kv_heads, q_heads // kv_heads, case.head_dim)
            out = scaled_dot_product_attention(rows, k, v, scale=work.softmax_scale)
            outs.append(out.reshape(batch, q_heads, case.head_dim))
            continue
        rows = q.view(batch, q_len, q_heads, case.head_dim).transpose(1, 2)
        square = q_len == seq_len
        out = scaled_dot_product_attention(
            rows, k, v, scale=work.softmax_scale, enable_gqa=q_heads != kv_heads, is_causal=square,
            attn_mask=None if square else causal_lower_right(q_len, seq_len),
        )  # fmt: skip
        outs.append(out.transpose(1, 2).reshape(-1, q_heads, case.head_dim))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _with_gather(work: Work) -> Contender:
    assert isinstance(work, AttentionWork)
    return Contender("sdpa", lambda copy: _attend(work, _gather(work, copy)), version=torch.__version__)


def _dense(name: str, context: Callable[[], AbstractContextManager[None]]) -> Callable[[Work], Contender]:
    def prepare(work: Work) -> Contender:
        assert isinstance(work, AttentionWork)
        # as many sets as keep the caches cold, in memory of their own
        sets = [_gather(work, copy) for copy in range(min(work.copies, 64))]

        def call(copy: int) -> Tensor:
            with context():
                return _attend(work, sets[copy % len(sets)])

        return Contender(name, call, version=torch.__version__)

    return prepare


def _needs_cuda(device: str) -> str | None:
    return None if device == "cuda" else "needs a GPU"


def _half_only(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.dtype == torch.float32:
        return "takes fp16 and bf16"
    return _refuses(case)


def _cudnn(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if any(1 < r.q_len < r.seq_len for r in case.requests):
        return "PyTorch gives it no mask for queries behind a past"
    return _half_only(case)


PEERS = (
    Peer("sdpa", ATTENTION, lambda device: None, _refuses, _with_gather),
    Peer("sdpa-dense", ATTENTION, lambda device: None, _refuses, _dense("sdpa-dense", nullcontext)),
    Peer(
        "sdpa-flash", ATTENTION, _needs_cuda, _half_only,
        _dense("sdpa-flash", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)), ("cuda",),
    ),
    Peer(
        "sdpa-cudnn", ATTENTION, _needs_cuda, _cudnn,
        _dense("sdpa-cudnn", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)), ("cuda",),
    ),
)  # fmt: skip
