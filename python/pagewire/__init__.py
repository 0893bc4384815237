"""Paged KV cache on the wire and in the kernels. Touches no device and loads no kernel when imported.

Where torch is already imported the whole API is there at once, `torch.ops.pagewire` included. Elsewhere it loads at
the first use of one of its names: the server's front process imports only `pagewire.serve` and stays without torch.
"""

import sys
from typing import TYPE_CHECKING, Any

import pagewire.backends  # noqa: F401
from pagewire.version import __version__

del backends  # noqa: F821  the package, already imported, gives its name up to the function

if TYPE_CHECKING:
    from pagewire._api import *  # noqa: F403

__all__ = [  # noqa: F405
    "__version__",
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


def _load() -> None:
    from pagewire import _api

    globals().update({name: getattr(_api, name) for name in __all__ if name != "__version__"})


if not TYPE_CHECKING:  # with it, a type checker would believe every name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load()
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    _load()
