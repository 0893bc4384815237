"""The checksums that a CHUNK can name: CRC32C for bytes in host memory, fletcher64 for bytes on a device."""

import torch
from torch import Tensor

from pagewire.transfer.frames import crc32c

PRIME = (1 << 31) - 1


def checksum(kind: str, payload: Tensor) -> int:
    """payload: uint8, contiguous. Raises ValueError for a kind that this device does not compute."""
    if kind == "crc32c" and payload.device.type == "cpu":
        return crc32c(payload.numpy())
    if kind == "fletcher64":
        return fletcher64(payload)
    raise ValueError(f"checksum_kind: expected crc32c (host memory) or fletcher64, got {kind} on {payload.device}")


def fletcher64(payload: Tensor) -> int:
    """Of the little-endian 16-bit words w[0..n), a zero byte added to an odd number of bytes:

        sum of w[i] mod p, plus 2^32 times the sum of (i + 1) * w[i] mod p, with p = 2^31 - 1.

    After Fletcher, IEEE Transactions on Communications 30 (1982), with a prime above the words: any change of one or
    two words is found (their differences a and b would need a + b = 0 and (i - j) * a = 0 modulo p), any other with a
    chance of 2^-62 to miss it. Words add up in any order, so a device computes it at the speed of its memory.
    """
    if payload.numel() % 2:
        payload = torch.nn.functional.pad(payload, (0, 1))
    words = payload.view(torch.int16)
    if payload.device.type == "cuda":
        from pagewire.kernels.checksum import sums

        plain, weighted = sums(words).tolist()
    else:
        unsigned = words.to(torch.int64) & 0xFFFF
        weights = torch.arange(1, len(words) + 1)
        plain, weighted = int(unsigned.sum()), int((unsigned * weights % PRIME).sum())
    return int(weighted % PRIME << 32 | plain % PRIME)
