"""vLLM's Triton unified attention, from an installed vLLM or from its two files alone.

PAGEWIRE_PEER_VLLM_TRITON names a folder with `triton_unified_attention.py` and `triton_attention_helpers.py`; the few
modules they import from vLLM are stood in for while they load.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import inspect
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Case
from pagewire.bench.machine import version
from pagewire.bench.peers import ATTENTION, Peer
from pagewire.bench.work import Contender, Work
from pagewire.types import QUANT_MAX

_FILES = ("triton_attention_helpers", "triton_unified_attention")  # in the order they import each other
_OPS = "vllm.v1.attention.ops"
_SEGMENTS = 16  # of the split over K/V; what vLLM allocates for
# vLLM splits over K/V while the 2-D grid would leave processors idle
_GRID_TO_FILL = 128


def _folder() -> Path | None:
    named = os.environ.get("PAGEWIRE_PEER_VLLM_TRITON")
    return Path(named) if named else None


def _missing(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    folder = _folder()
    if folder is not None:
        absent = [f"{name}.py" for name in _FILES if not (folder / f"{name}.py").exists()]
        if absent:
            return f"PAGEWIRE_PEER_VLLM_TRITON: {folder} has no {', '.join(absent)}"
    elif importlib.util.find_spec("vllm") is None:
        return "vllm is not installed (PAGEWIRE_PEER_VLLM_TRITON can name its two files)"
    return None if device == "cuda" else "needs a GPU"


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Attention)
    if case.stored in QUANT_MAX:
        return "not called on quantised caches"
    if case.page_size & (case.page_size - 1):
        return f"pages of {case.page_size}: it takes powers of two"
    return None


@functools.cache
def _unified_attention() -> Any:
    from pagewire.kernels import cache_keys  # it imports triton, without which the other peers are still there

    folder = _folder()
    if folder is None:
        return importlib.import_module(f"{_OPS}.triton_unified_attention").unified_attention
    stand_ins = _stand_ins()
    added = [name for name in stand_ins if name not in sys.modules]
    sys.modules.update({name: stand_ins[name] for name in added})
    try:
        for name in _FILES:
            full = f"{_OPS}.{name}"
            spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
            assert spec is not None and spec.loader is not None
            sys.modules[full] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        cache_keys.settle(_OPS)
        return module.unified_attention
    finally:
        for name in added:
            del sys.modules[name]


class _Logger(logging.Logger):
    def _once(self, *_: Any, **__: Any) -> None:
        """vLLM's loggers have methods that speak once."""

    info_once = warning_once = debug_once = _once


class _QuantMode(enum.IntEnum):
    """The members and the property that the kernels' launcher reads."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4

    @property
    def is_per_token_head(self) -> bool:
        return self >= 2


def _stand_ins() -> dict[str, ModuleType]:
    import triton
    import triton.language as tl

    def at_least(wanted: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= wanted

    platform = SimpleNamespace(
        fp8_dtype=lambda: torch.float8_e4m3fn,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        is_cuda=lambda: True,
        is_cuda_alike=lambda: True,
        has_device_capability=at_least,
        is_device_capability_family=lambda family: at_least(family) and not at_least(family + 10),
    )
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.logger": {"init_logger": _Logger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.ops": {},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": _QuantMode},
    }
    modules = {}
    for name, names in contents.items():
        modules[name] = module = ModuleType(name)
        module.__path__ = []  # a package, so that its children are found in sys.modules
        vars(module).update(names)
    modules["vllm"].envs = modules["vllm.envs"]  # type: ignore[attr-defined]
    return modules


def _prepare(work: Work) -> Contender:
    assert isinstance(work, AttentionWork)
    unified_attention = _unified_attention()
    out = torch.empty_like(work.q)
    fixed: dict[str, Any] = {
        "q": work.q, "k": work.k_cache, "v": work.v_cache, "out": out, "cu_seqlens_q": work.cu_seqlens_q,
        "max_seqlen_q": work.max_q_len, "seqused_k": work.seq_lens, "max_seqlen_k": work.max_seq_len,
        "softmax_scale": work.softmax_scale, "causal": True, "window_size": (-1, -1), "softcap": 0.0,
        "q_descale": None, "k_descale": None, "v_descale": None, "sinks": None, **_segments(work),
    }  # fmt: skip
    accepted = inspect.signature(unified_attention).parameters
    fixed = {name: value for name, value in fixed.items() if name in accepted}

    def call(copy: int) -> Tensor:
        unified_attention(**fixed, block_table=work.page_tables[copy])
        return out

    return Contender("vllm-triton", call, version=version("vllm"))


def _segments(work: AttentionWork) -> dict[str, Any]:
    """Room for the partial results of a split decode."""
    case = work.case
    if case.op != "decode":
        return {}
    padded = 1 << (case.head_dim - 1).bit_length()
    states = (case.num_tokens, case.heads[0], _SEGMENTS)
    return {
        "seq_threshold_3D": _GRID_TO_FILL // case.heads[1],
        "num_par_softmax_segments": _SEGMENTS,
        "softmax_segm_output": torch.empty((*states, padded), dtype=torch.float32, device=work.device),
        "softmax_segm_max": torch.empty(states, dtype=torch.float32, device=work.device),
        "softmax_segm_expsum": torch.empty(states, dtype=torch.float32, device=work.device),
    }


PEERS = (Peer("vllm-triton", ATTENTION, _missing, _refuses, _prepare, default=("cuda",)),)
