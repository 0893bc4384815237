"""Paged KV cache on the wire and in the kernels. Touches no device and loads no kernel when imported.

Where torch is already imported the whole API is there at once, `torch.ops.pagewire` included. Elsewhere it loads at
the first use of one of its names: the server's front process imports only `pagewire.serve` and stays without torch.
"""

# ruff: noqa: F403, F405
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagewire._api import *


__all__ = [
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


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # importing the package pagewire.backends must not replace the function of that name
        if name != "backends" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def _load() -> None:
    from pagewire import _api

    for name in __all__:
        globals()[name] = getattr(_api, name)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
if "torch" in sys.modules:
    _load()
