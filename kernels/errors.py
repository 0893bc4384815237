"""How a kernel reports a bad index: it goes on, and leaves one int64 word for `pagewire.check_errors()`."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from pagewire.kernels import error_codes as codes

WordOf = Callable[[torch.device], torch.Tensor]  # int64 [1] of a device
_KIND_SHIFT = tl.constexpr(codes.KIND_SHIFT)
_REQUEST_SHIFT = tl.constexpr(codes.REQUEST_SHIFT)
_MAX_REQUEST = tl.constexpr(codes.MAX_REQUEST)
_MAX_ENTRY = tl.constexpr(codes.MAX_ENTRY)


@triton.jit
def record_error(word_ptr, kind: tl.constexpr, request, entry, mask):
    """Record `kind` at (request, entry) wherever `mask` is set; request or entry has mask's shape.

    word_ptr: int64, the device's error word. The largest word wins, so the report does not depend on block order.
    """
    request = tl.minimum(tl.cast(request, tl.int64), _MAX_REQUEST)
    entry = tl.minimum(tl.cast(entry, tl.int64), _MAX_ENTRY)
    word = (tl.cast(kind, tl.int64) << _KIND_SHIFT) | (request << _REQUEST_SHIFT) | entry
    # relaxed: nobody reads anything else because of this word
    tl.atomic_max(word_ptr + (word & 0), word, mask=mask, sem="relaxed")
