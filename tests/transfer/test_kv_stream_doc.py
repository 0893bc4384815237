"""docs/kv-stream.md is the format: its vectors and its table are what the code writes."""

import re
from pathlib import Path

import pytest

from pagewire.transfer import frames
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Hello, Reserve
from pagewire.transfer.handoff import prompt_sha256

DOC = (Path(__file__).parents[2] / "docs" / "kv-stream.md").read_text()
VECTORS = {
    name: bytes.fromhex("".join(lines.split()))
    for name, lines in re.findall(r"^([A-Z]+)\n((?:    [0-9a-f]+\n)+)", DOC, re.MULTILINE)
}
VALUES: dict[str, frames.Frame] = {
    "HELLO": Hello("decode", "bfloat16", "none", 30, 3, 64, 64, 16, 1 << 20, b"i" * 16, b"f" * 32,
                   ("float8_e4m3fn", "bfloat16")),
    "RESERVE": Reserve("cmpl-1-0", 7, b"c" * 16, 0, 300, 5000),
    "CHUNK": Chunk(
        request_id="cmpl-1-0", generation=7, capability=b"c" * 16, fingerprint=b"f" * 32, group=0,
        layer_start=3, layer_stop=4, head_start=0, head_stop=3, head_dim=64, head_dim_v=64,
        token_start=128, token_stop=256, dtype="bfloat16", scale_kind="none",
        checksum_kind="crc32c", checksum=0xDEADBEEF, payload_bytes=98304, slot=5,
    ),
    "COMMIT": Commit("cmpl-1-0", 7, b"c" * 16, 42, prompt_sha256((1, 2, 49151)), ()),
    "ACK": Ack("r", 1),
    "CREDIT": Credit(3),
    "ABORT": Abort("r", 0, "too late"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_vector(name: str) -> None:
    sequence = list(VALUES).index(name)
    assert frames.encode(VALUES[name], sequence) == VECTORS[name]
    assert frames.decode(VECTORS[name]) == (VALUES[name], sequence)


@pytest.mark.parametrize("cls", frames._LAYOUTS, ids=lambda cls: cls.__name__)
def test_table_row(cls: type) -> None:
    sizes = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "16s": "16 bytes", "32s": "32 bytes"}
    layout = frames._LAYOUTS[cls]
    fixed = ", ".join(f"{name} {sizes[field.code]}" for name, field in layout.fixed.items())
    tlvs = ", ".join(f"{name} ({tlv.tag})" for name, tlv in layout.tlvs.items()) or "–"
    assert f"| {layout.kind} | {cls.__name__.upper()} | {fixed} | {tlvs} |" in DOC
