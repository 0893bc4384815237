"""Values of a model's files by key, each checked as it is taken."""

import reprlib
from collections.abc import Callable
from typing import Any

import msgspec

from pagewire.serve.model.config import ModelError

_REQUIRED = object()
_WORDS: dict[Any, str] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "null or an object",
    list[int]: "an array of integers", list[str]: "an array of texts", int | list[int]: "an integer or a list of them",
}  # fmt: skip


class Metadata:
    """`read` gives the value of a key, None for none; `where` is named in errors."""

    def __init__(self, read: Callable[[str], Any], where: str) -> None:
        self._read, self.where = read, where

    def get(self, key: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """The value of `key`, which must be of `kind`: nothing is converted but an integer to a float."""
        value = self._read(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"{self.where}: expected {key}, got nothing")
            return default
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            raise ModelError(f"{self.where}: {key}: expected {_WORDS[kind]}, got {reprlib.repr(value)}") from None
