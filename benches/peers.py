"""Unpacks a bundle of peers: python benches/peers.py BUNDLE SITE (benches/README.md says how a bundle is made)."""

from __future__ import annotations

import lzma
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BROKEN = (OSError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError)


def unpack(bundle: Path, site: Path) -> list[str]:
    """Wheels, `*.tar.xz` and `*.so.xz` of a bundle into one folder on the Python path; what is absent is named.

    Returns:
        What could not be unpacked, and why; the rest has been.
    Raises:
        NotADirectoryError: there is no such bundle.
    """
    if not bundle.is_dir():
        raise NotADirectoryError(f"--peers: {bundle} is not a folder")
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    how: dict[str, Callable[[Path, Path], None]] = {".tar.xz": _tar, ".whl": _wheel, ".so.xz": _library}
    found = [(path, act) for end, act in how.items() for path in sorted(bundle.glob(f"*{end}"))]
    with ThreadPoolExecutor() as pool:  # lzma lets the GIL go
        started = [(path, pool.submit(act, path, site)) for path, act in found]
    broken = []
    for path, done in started:
        error = done.exception()
        if error is None:
            print(f"unpacked {path.name}", flush=True)
        elif isinstance(error, _BROKEN):
            broken.append(f"{path}: {str(error).splitlines()[0]}")
        else:
            raise error
    if not (bundle / "vllm_triton").is_dir():
        print("no vllm_triton folder in the bundle: that peer will be skipped")
    return broken


def _tar(path: Path, site: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(site, filter="data")


def _wheel(path: Path, site: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(site)


def _library(path: Path, site: Path) -> None:
    with lzma.open(path) as packed, (site / path.name.removesuffix(".xz")).open("wb") as file:
        shutil.copyfileobj(packed, file)


def environment(bundle: Path, site: Path) -> dict[str, str]:
    """What the benchmark's adapters look at, once a bundle is unpacked."""
    return {
        "PAGEWIRE_PEER_FA3": str(site / "fa3.so"),
        "PAGEWIRE_PEER_VLLM_TRITON": str(bundle / "vllm_triton"),
        # prebuilt modules only: a compilation would eat the minutes
        "FLASHINFER_DISABLE_JIT": "1",
    }


if __name__ == "__main__":
    try:
        wrong = unpack(*map(Path, sys.argv[1:3]))
    except NotADirectoryError as error:
        wrong = [str(error)]
    sys.exit(f"peers.py: {'; '.join(wrong)}" if wrong else 0)
