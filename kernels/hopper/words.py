"""Words of Gluon that Triton has renamed between 3.6 and 3.9, the versions these kernels are tested with."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # 3.9, 3.6
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
