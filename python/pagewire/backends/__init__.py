"""The modules that `registry.py` names; each is an `Implementation`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what mypy holds them to
    from pagewire.backends import cpu, cuda, meta, reference, triton
    from pagewire.registry import Implementation

    _ALL: tuple[Implementation, ...] = (cpu, cuda, meta, reference, triton)
