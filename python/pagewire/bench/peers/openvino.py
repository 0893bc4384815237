"""OpenVINO's PagedAttention on a CPU: pages of 32 tokens, fp32 caches, or fp16 ones where the case has bf16.

It takes q, k and v of the new tokens in fp32 and writes k and v itself; the older tokens are put into its own pages
beforehand.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.machine import version
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work

_PAGE = 32


def _missing(device: str) -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed (pip install openvino)"
    return None if device == "cpu" else "runs on CPU tensors"


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.stored != case.dtype:
        return "not called on quantised caches"
    return None


def _compile(case: Attention, max_seq_len: int) -> Any:
    """An infer request of a model that is one PagedAttention; its 28 inputs are those of OpenVINO 2026.4."""
    import numpy as np
    import openvino as ov
    from openvino import op, opset13

    q_heads, kv_heads = case.heads
    f32, i32 = ov.Type.f32, ov.Type.i32

    def parameter(name: str, shape: list[int], dtype: Any) -> Any:
        node = opset13.parameter(shape, dtype)
        node.set_friendly_name(name)
        node.output(0).get_tensor().set_names({name})
        return node

    def constant(values: Any, dtype: Any) -> Any:
        return opset13.constant(np.array(values, dtype=dtype))

    def empty(dtype: Any = np.int32) -> Any:
        return opset13.constant(np.zeros((0,), dtype))

    parameters = [
        parameter("q", [-1, q_heads * case.head_dim], f32),
        parameter("k", [-1, kv_heads * case.head_dim], f32),
        parameter("v", [-1, kv_heads * case.head_dim], f32),
        parameter("key_cache", [-1, -1, -1, -1], ov.Type.dynamic),
        parameter("value_cache", [-1, -1, -1, -1], ov.Type.dynamic),
        *(
            parameter(name, [-1], i32)
            for name in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
        ),
    ]
    fixed = [
        constant(case.head_dim**-0.5, np.float32),
        constant(0, np.int32),  # sliding window
        empty(np.float32),  # alibi
        constant(max_seq_len, np.int32),  # sizes a scratch buffer that is cleared in every call
        *(empty() for _ in range(3)),  # score window, rotated blocks, rotation deltas
        empty(np.float32),  # rotation table
        empty(np.float32),  # sparse attention: threshold, block, stride
        constant(64, np.int32),
        constant(8, np.int32),
        empty(np.float32),  # sinks
        constant(0, np.int32),  # cache eviction
        *(empty() for _ in range(4)),
        empty(np.uint8),
        empty(),
    ]
    node = op._PagedAttentionExtension([x.output(0) for x in (*parameters, *fixed)])
    for name, value in (
        ("num_k_heads", kv_heads), ("num_v_heads", kv_heads), ("k_head_size", case.head_dim),
        ("v_head_size", case.head_dim),
    ):  # fmt: skip
        node.get_rt_info()[name] = value
    settings = {
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "KV_CACHE_PRECISION": "f32" if case.dtype == torch.float32 else "f16",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = ov.Model([node.output(0)], parameters, "paged_attention")
    return ov.Core().compile_model(model, "CPU", settings).create_infer_request()


def _prepare(work: Work) -> Contender:
    import openvino as ov

    assert isinstance(work, AttentionWork)
    case = work.case
    request = _compile(case, work.max_seq_len)
    stored = torch.float32 if case.dtype == torch.float32 else torch.float16
    counts = [-(-r.seq_len // _PAGE) for r in case.requests]
    copies = min(work.copies, 64)
    pages = torch.randperm(copies * sum(counts))
    caches = [torch.zeros(len(pages), case.heads[1], _PAGE, case.head_dim, dtype=stored) for _ in range(2)]
    # per copy: k and v of the new tokens, [num_tokens, num_kv_heads * head_dim] fp32
    new: list[list[Tensor]] = []
    tables: list[Tensor] = []
    at = 0
    for copy in range(copies):
        fresh: tuple[list[Tensor], list[Tensor]] = ([], [])
        start = at
        for b, (q_len, seq_len) in enumerate(case.requests):
            taken = pages[at : at + counts[b]]
            at += counts[b]
            for cache, dense, rows in zip(caches, work.gather(copy, b), fresh, strict=True):
                padded = torch.zeros(counts[b] * _PAGE, *dense.shape[1:], dtype=stored)
                padded[:seq_len] = dense
                cache[taken] = padded.view(counts[b], _PAGE, *dense.shape[1:]).transpose(1, 2)
                rows.append(dense[seq_len - q_len :].float().flatten(1))
        new.append([torch.cat(rows).contiguous() for rows in fresh])
        tables.append(pages[start:at].int())

    fixed = {
        "q": work.q.float().flatten(1),
        "past_lens": torch.tensor([r.seq_len - r.q_len for r in case.requests], dtype=torch.int32),
        "subsequence_begins": work.cu_seqlens_q,
        "block_indices_begins": torch.tensor([0, *counts]).cumsum(0).int(),
    }
    for name, tensor in fixed.items():
        request.set_tensor(name, ov.Tensor(tensor.numpy()))  # copies

    def before(copy: int) -> None:
        k, v = new[copy % copies]
        for name, tensor in (
            ("k", k), ("v", v), ("block_indices", tables[copy % copies]), ("key_cache", caches[0]),
            ("value_cache", caches[1]),
        ):  # fmt: skip
            # not copied: this closure keeps the tensors alive
            request.set_tensor(name, ov.Tensor(tensor.numpy(), shared_memory=True))

    def call(copy: int) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data).view(work.q.shape)

    return Contender("openvino", call, before, version=version("openvino"))


PEERS = (Peer("openvino", ATTENTION, _missing, _refuses, _prepare, default=("cpu",)),)
