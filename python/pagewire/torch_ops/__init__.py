"""`torch.ops.pagewire.*`, what torch.compile sees of the ops: per op its schema, its fake, what it runs and its caller.

The callers take what the functions of `eager.py` take, and each op runs the function it is named after there.
"""

from pagewire.torch_ops.append import append_kv
from pagewire.torch_ops.attention import decode, prefill
from pagewire.torch_ops.define import traced
from pagewire.torch_ops.merge import merge_state, merge_states
from pagewire.torch_ops.pack import pack_kv, unpack_kv

__all__ = ["append_kv", "decode", "merge_state", "merge_states", "pack_kv", "prefill", "traced", "unpack_kv"]
