"""Everything `import pagewire` offers. Importing this module imports torch and registers the torch ops."""

# ruff: noqa: F401  (names for pagewire/__init__.py)
from pagewire.allocator import OutOfPages, PageAllocator
from pagewire.cache import Geometry, PagedKVCache
from pagewire.errors import BackendError, BadIndexError, check_errors
from pagewire.ops import append_kv, decode, merge_state, merge_states, pack_kv, packed_shape, prefill, unpack_kv
from pagewire.packed import PackedKV, PackedShape
from pagewire.pages import page_slots, page_table_from_csr
from pagewire.registry import backends, explain
