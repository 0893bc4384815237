"""Paged KV cache on the wire and in the kernels. Touches no device and loads no kernel when imported."""

import pagewire.backends  # the package first: importing it later would replace the function of that name
from pagewire import torch_ops as _torch_ops  # registers torch.ops.pagewire.*
from pagewire.allocator import OutOfPages, PageAllocator
from pagewire.cache import Geometry, PagedKVCache
from pagewire.errors import BackendError, BadIndexError, check_errors
from pagewire.ops import append_kv, decode, merge_state, merge_states, pack_kv, packed_shape, prefill, unpack_kv
from pagewire.packed import PackedKV, PackedShape
from pagewire.pages import page_slots, page_table_from_csr
from pagewire.registry import backends, explain

__version__ = "0.1.0.dev0"

__all__ = [
    "BackendError",
    "BadIndexError",
    "Geometry",
    "OutOfPages",
    "PackedKV",
    "PackedShape",
    "PageAllocator",
    "PagedKVCache",
    "append_kv",
    "backends",
    "check_errors",
    "decode",
    "explain",
    "merge_state",
    "merge_states",
    "pack_kv",
    "packed_shape",
    "page_slots",
    "page_table_from_csr",
    "prefill",
    "unpack_kv",
]
