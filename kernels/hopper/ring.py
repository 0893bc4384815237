"""Tiles of K and V in shared memory, handed round between who loads and who multiplies.

producer:  wait empty[s], load, full[s] by the TMA unit's bytes
consumers: wait full[s], multiply, empty[s] by one arrival each
the i-th tile lies in stage i % STAGES, and it is the (i // STAGES)-th use of its barriers; where STAGES is a power of
two, neither is a division
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


class Ring(NamedTuple):
    tiles: Any  # [STAGES * STRIPS, BLOCK_N, columns of a strip]
    full: Any  # a barrier per stage
    empty: Any


@gluon.jit
def ring_of(
    dtype: gl.constexpr, STAGES: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STRIPS: gl.constexpr = 1,
):  # fmt: skip
    """D: columns of a strip; a tile of 192 columns is three of 64, as shapes are powers of two in Triton."""
    layout: gl.constexpr = swizzled(dtype, D)
    tiles = gl.allocate_shared_memory(dtype, [STAGES * STRIPS, N, D], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return Ring(tiles, full, empty)


@gluon.constexpr_function
def bytes_of(dtype: gl.dtype) -> int:
    return int(getattr(dtype, "itemsize", 0)) or int(dtype.primitive_bitwidth) // 8  # torch's, Triton's


@gluon.constexpr_function
def swizzled(dtype: gl.dtype, columns: int) -> Any:
    """As the TMA unit writes rows and wgmma reads them: in pieces of 128 bytes, or of 64 that are all of a row."""
    size = bytes_of(dtype)
    return gl.NVMMASharedLayout(min(128, size * columns), 8 * size, 2)


@gluon.constexpr_function
def _bits(stages: int) -> int:
    """2 ** bits == stages."""
    return stages.bit_length() - 1


@gluon.jit
def stage_of(ring, i):
    STAGES: gl.constexpr = ring.full.shape[0]
    if STAGES & (STAGES - 1):
        return i % STAGES
    else:
        return i & (STAGES - 1)


@gluon.jit
def _phase(ring, i):
    STAGES: gl.constexpr = ring.full.shape[0]
    if STAGES & (STAGES - 1):
        return (i // STAGES) & 1
    else:
        BITS: gl.constexpr = _bits(STAGES)
        return (i >> BITS) & 1


@gluon.jit
def full_of(ring, i):
    return ring.full.index(stage_of(ring, i))


@gluon.jit
def tile_of(ring, i, STRIP: gl.constexpr = 0):
    STRIPS: gl.constexpr = ring.tiles.shape[0] // ring.full.shape[0]
    return ring.tiles.index(stage_of(ring, i) * STRIPS + STRIP)


@gluon.jit
def wait_full(ring, i, needed):
    mbarrier.wait(full_of(ring, i), _phase(ring, i), pred=needed)


@gluon.jit
def release(ring, i):
    mbarrier.arrive(ring.empty.index(stage_of(ring, i)), count=1)


@gluon.jit
def wait_empty(ring, i):
    """A stage's first use waits for nothing: the phase before the first counts as over."""
    mbarrier.wait(ring.empty.index(stage_of(ring, i)), _phase(ring, i) ^ 1)
