"""Divisions without a division, on the CPU that the emulation runs on."""

import subprocess
from pathlib import Path

import pytest

from pagewire import emulation

SOURCE = Path(__file__).with_name("arithmetic.cpp")


@pytest.fixture(scope="module")
def program() -> Path:
    reason = emulation.unavailable()
    if reason is not None:
        pytest.skip(reason)
    folder = emulation.cache_dir() / "plain"
    objects = emulation.compile_objects([SOURCE], "plain", [], folder)
    target = folder / f"arithmetic-{objects[0].stem[-16:]}"
    if not target.exists():
        runtime = sorted((emulation.CSRC / "emulation").glob("*.cpp"))
        objects += emulation.compile_objects(runtime, "plain", [], folder)
        emulation.link(objects, "plain", target, shared=False)
    return target


# 26 million quotients: every exponent of x with every exponent of the divisor
@pytest.mark.parametrize("name, compared", [("divisors32", 8e6), ("divisors64", 8e6), ("quotients", 26e6)])
def test_is_what_ieee_or_c_divides(name, compared, program):
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > compared
