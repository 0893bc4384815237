"""PAGEWIRE_* variables that every call looks at, and heeds when they change.

`os.environ.get` takes 1.5 µs, most of it for an exception inside when the variable is missing; the dict behind it,
which every change of `os.environ` goes through, takes 0.1 µs.
"""

from __future__ import annotations

import os
from typing import Any

_behind: dict[Any, bytes] = getattr(os.environ, "_data", {})
_is_known = os.name == "posix" and b"PATH" in _behind  # an implementation of Python's: as it should be, or not used


def lookup(name: str) -> str | None:
    if not _is_known:
        return os.environ.get(name)
    value = _behind.get(name.encode())
    return None if value is None else os.fsdecode(value)
