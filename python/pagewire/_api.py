"""Everything `import pagewire` offers. Importing this module imports torch and registers the torch ops."""

# ruff: noqa: I001  (`name as name`: a re-export, which isort would give a line each)
from pagewire.allocator import OutOfPages as OutOfPages, PageAllocator as PageAllocator
from pagewire.cache import Geometry as Geometry, PagedKVCache as PagedKVCache
from pagewire.errors import BackendError as BackendError, BadIndexError as BadIndexError, check_errors as check_errors
from pagewire.ops import (
    append_kv as append_kv,
    decode as decode,
    merge_state as merge_state,
    merge_states as merge_states,
    pack_kv as pack_kv,
    packed_shape as packed_shape,
    prefill as prefill,
    unpack_kv as unpack_kv,
)
from pagewire.packed import PackedKV as PackedKV, PackedShape as PackedShape
from pagewire.pages import page_slots as page_slots, page_table_from_csr as page_table_from_csr
from pagewire.registry import backends as backends, explain as explain
