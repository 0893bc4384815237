"""What KV is on the wire. Both ends compute it, from the two HELLOs; no frame says it, but every CHUNK repeats it."""

from pagewire.transfer.frames import DTYPES, SCALED_DTYPES, ChecksumKind, Held, Hello
from pagewire.transfer.handoff import DTYPE_BYTES, Wire, mismatch
from pagewire.transfer.shares import common


def negotiate(ours: Hello, theirs: Hello, checksum_kind: ChecksumKind = "crc32c") -> Wire:
    """Per group of layers, what both hold, in the dtype that both take: the narrower cache's (P's, if they are as
    wide), or the other cache's, or the first that D names. Its scales are what P's cache gives: its own, if its bytes
    go as they are, else one per token and head. D takes any.

    Raises ValueError, with both values, when they are not of one model and tenant or have nothing in common.
    """
    if problem := mismatch(ours, theirs, ("fingerprint", "tenant")):
        raise ValueError(problem)
    if len(ours.groups) != len(theirs.groups):
        raise ValueError(f"groups: expected {len(ours.groups)}, got {len(theirs.groups)}")
    p, d = (ours, theirs) if ours.role == "prefill" else (theirs, ours)
    both = sorted(set(DTYPES).intersection(p.wire_dtypes, d.wire_dtypes), key=d.wire_dtypes.index)
    if not both:
        raise ValueError(f"wire dtype: D takes {', '.join(d.wire_dtypes)}, P takes {', '.join(p.wire_dtypes)}")
    groups = []
    for number, (mine, other) in enumerate(zip(ours.groups, theirs.groups, strict=True)):
        of_p, of_d = (mine, other) if ours is p else (other, mine)
        layers, heads = common(of_p, of_d)
        if layers[1] and (problem := mismatch(mine, other, ("head_dim", "head_dim_v"))):
            raise ValueError(f"group {number}: {problem}")
        caches = sorted((of_p.dtype, of_d.dtype), key=DTYPE_BYTES.__getitem__)
        dtype = next(dtype for dtype in (*caches, *both) if dtype in both)
        kind = of_p.scale_kind if dtype == of_p.dtype else "token_head" if dtype in SCALED_DTYPES else "none"
        groups.append(Held(*layers, *heads, of_p.head_dim, of_p.head_dim_v, dtype, kind))
    if not any(group.layer_stop for group in groups):
        held = [" and ".join(f"layers {g.layers} x heads {g.heads}" for g in of.groups) for of in (ours, theirs)]
        raise ValueError(f"nothing is held by both: {held[0]} here, {held[1]} there")
    return Wire(p.fingerprint, tuple(groups), checksum_kind)
