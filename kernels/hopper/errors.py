"""As `kernels/errors.py`, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pagewire.kernels import error_codes as codes

_KIND_SHIFT = gl.constexpr(codes.KIND_SHIFT)
_REQUEST_SHIFT = gl.constexpr(codes.REQUEST_SHIFT)
_MAX_REQUEST = gl.constexpr(codes.MAX_REQUEST)
_MAX_ENTRY = gl.constexpr(codes.MAX_ENTRY)


@gluon.jit
def record_error(word_ptr, kind: gl.constexpr, request, entry, mask):
    """request, entry and mask: of one shape. The largest word stays."""
    request = gl.minimum(request.to(gl.int64), _MAX_REQUEST)
    entry = gl.minimum(entry.to(gl.int64), _MAX_ENTRY)
    word = (request << _REQUEST_SHIFT) | entry
    word = word | (gl.full([], kind, gl.int64) << _KIND_SHIFT)
    gl.atomic_max(word_ptr + (word & 0), word, mask=mask, sem="relaxed")
