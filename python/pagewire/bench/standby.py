"""A process beside a sweep that compiles its candidates, several at a time, while nothing is being timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from pagewire.kernels.tuning import KernelConfig, Key


class Compiler:
    """`python -m pagewire.bench.ahead --serve`: started once, since its imports take seconds, and asked often.

    It has no device, so a sweep's own one is not disturbed, and it may fork, which a process with a device may not.
    """

    def __init__(self, arch: int) -> None:
        command = [sys.executable, "-m", "pagewire.bench.ahead", "--serve", "--arch", str(arch)]
        # the device stays the sweep's: nothing in there may touch it
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def compile(self, kernel: str, key: Key, configs: Sequence[KernelConfig], seconds: float) -> list[str]:
        """Compiles rows of the tuning table at `key` for the cases of its target; per row "" or why it does not.

        Args:
            kernel: "decode" or "prefill". seconds: what is not compiled by then is an error like any other.
        Raises:
            RuntimeError: the process is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"kernel": kernel, "key": key, "configs": configs, "seconds": seconds}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # seen below
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the compiling process ended with {self._process.wait()}")
        errors: list[str] = json.loads(line)["errors"]
        return errors

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the end of its requests
        self._process.wait()
