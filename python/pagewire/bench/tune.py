"""`--tune`: tries configurations of the Triton kernels and prints rows for the tuning table. A person commits them."""

from __future__ import annotations

import sys


def main(kernels: str, device: str) -> int:
    print("pagewire bench --tune: not yet", file=sys.stderr)
    return 1
