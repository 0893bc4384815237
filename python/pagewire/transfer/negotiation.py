"""What KV is on the wire. Both ends compute it, from the two HELLOs; no frame says it, but every CHUNK repeats it."""

from pagewire.transfer.frames import DTYPES, SCALED_DTYPES, Hello
from pagewire.transfer.handoff import Stored

_BYTES = dict(zip(DTYPES, (4, 2, 2, 1, 1, 1), strict=True))


def negotiate(p: Hello, d: Hello) -> Stored:
    """Of the dtypes that both take: the narrower cache's (P's, if they are as wide), or the other cache's, or the
    first that D names. Its scales are what P's cache gives: its own, if its bytes go as they are, else one per token
    and head. D takes any.

    Raises ValueError when they take none in common.
    """
    both = [dtype for dtype in d.wire_dtypes if dtype in p.wire_dtypes]
    if not both:
        raise ValueError(f"wire dtype: D takes {', '.join(d.wire_dtypes)}, P takes {', '.join(p.wire_dtypes)}")
    caches = sorted((p.cache_dtype, d.cache_dtype), key=_BYTES.__getitem__)
    dtype = next(dtype for dtype in (*caches, *both) if dtype in both)
    if dtype == p.cache_dtype:
        return Stored(dtype, p.cache_scale_kind)
    return Stored(dtype, "token_head" if dtype in SCALED_DTYPES else "none")
