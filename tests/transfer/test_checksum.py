"""fletcher64 against a loop over the words, and what it must find."""

import os
import random
import subprocess
import sys

import pytest
import torch

from pagewire.transfer.checksum import PRIME, checksum, fletcher64
from pagewire.transfer.frames import crc32c


def by_hand(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    words = [data[i] | data[i + 1] << 8 for i in range(0, len(data), 2)]
    plain, weighted = 0, 0
    for number, word in enumerate(words, 1):
        plain, weighted = (plain + word) % PRIME, (weighted + number * word) % PRIME
    return weighted * 2**32 + plain


def tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 64, 8191, 8192, 8194, 40_000])
def test_as_by_hand(num_bytes):
    data = random.Random(num_bytes).randbytes(num_bytes)
    assert fletcher64(tensor(data)) == by_hand(data)
    assert fletcher64(tensor(b"\xff" * num_bytes)) == by_hand(b"\xff" * num_bytes)


def test_large_payloads_do_not_overflow():
    """Their closed form: n words of 0xffff."""
    n = 1 << 22
    plain, weighted = n * 0xFFFF % PRIME, n * (n + 1) // 2 * 0xFFFF % PRIME
    assert fletcher64(torch.full((2 * n,), 255, dtype=torch.uint8)) == weighted << 32 | plain


def test_what_a_plain_sum_or_one_modulo_2_to_the_32_would_miss():
    base = random.Random(5).randbytes(64)
    seen = {fletcher64(tensor(base))}
    for change in (
        base[2:4] + base[:2] + base[4:],  # two words change places
        base[:62] + bytes([base[62], base[63] ^ 0x80]),
        bytes([base[0], base[1] ^ 0x80]) + base[2:8] + bytes([base[8], base[9] ^ 0x80]) + base[10:],  # both top bits
        b"\xff" * 64,
        b"\0" * 64,
    ):
        found = fletcher64(tensor(change))
        assert found == by_hand(change) and found not in seen
        seen.add(found)


def test_the_kernel(monkeypatch):
    """Under the interpreter, or on a device; alignment is that of any view of 16-bit words."""
    triton = pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("no GPU, and Triton's interpreter is off")
    from pagewire.kernels.checksum import sums

    for num_words in (1, 4095, 4096, 4097, 70_001):
        words = torch.randint(-(1 << 15), 1 << 15, (num_words + 1,), dtype=torch.int16, device=device)[1:]
        plain, weighted = sums(words).tolist()
        assert weighted % PRIME << 32 | plain % PRIME == by_hand(words.cpu().numpy().tobytes())


def test_a_kind_that_there_is_not():
    payload = torch.arange(8, dtype=torch.uint8)
    assert checksum("crc32c", payload) == crc32c(payload.numpy())
    with pytest.raises(ValueError, match="expected crc32c .host memory. or fletcher64, got none on cpu"):
        checksum("none", payload)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from pagewire.kernels.checksum import BLOCK, _sums

# as for payloads of whole 32 bytes
aligned = {(0,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]}
signature = {"words": "*i16", "out": "*i64", "num_words": "i32", "BLOCK": "constexpr"}
source = triton.compiler.ASTSource(fn=_sums, signature=signature, constexprs={"BLOCK": BLOCK}, attrs=aligned)
for arch in (80, 90):
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
    loads = [line.split()[1] for line in kernel.asm["ptx"].splitlines() if "ld.global" in line]
    print(arch, *sorted(set(loads)))
"""


def test_the_kernel_compiles_to_reads_of_16_bytes():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["80 ld.global.v4.b32", "90 ld.global.v4.b32"], done.stderr[-2000:]
