"""docs/kv-stream.md is the format: its table is what the code writes, and so are the vectors in tests/data."""

import re
from pathlib import Path
from typing import get_args

import pytest

from pagewire.transfer import frames
from pagewire.transfer.frames import Abort, Ack, Block, Chunk, Commit, Credit, Held, Hello, Reserve
from pagewire.transfer.handoff import prompt_sha256

DOC = (Path(__file__).parents[2] / "docs" / "kv-stream.md").read_text()
DATA = (Path(__file__).parents[1] / "data" / "kv-stream-3.txt").read_text()
VECTORS = {
    name: bytes.fromhex("".join(lines.split()))
    for name, lines in re.findall(r"^([A-Z]+)\n((?:    [0-9a-f]+\n)+)", DATA, re.MULTILINE)
}
VALUES: dict[str, frames.Frame] = {
    "HELLO": Hello(
        "decode", 16, 1 << 20, b"i" * 16, b"f" * 32,
        (Held(0, 15, 2, 4, 64, 64, "bfloat16", "none"), Held(0, 3, 0, 1, 576, 0, "int8", "token_head")),
        ("float8_e4m3fn", "bfloat16"), "team-a", b"",
    ),
    "RESERVE": Reserve("cmpl-1-0", 7, b"c" * 16, 100, 300, 5000, (Block(0, 0, 15, 2, 3), Block(1, 0, 3, 0, 1))),
    "CHUNK": Chunk(
        request_id="cmpl-1-0", generation=7, capability=b"c" * 16, fingerprint=b"f" * 32, group=0,
        layer_start=3, layer_stop=9, head_start=2, head_stop=3, head_dim=64, head_dim_v=64,
        token_start=128, token_stop=256, dtype="bfloat16", scale_kind="none",
        checksum_kind="crc32c", checksum=0xDEADBEEF, payload_bytes=196608, slot=5,
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


@pytest.mark.parametrize("cls", [*get_args(frames.Frame), Held, Block], ids=lambda cls: cls.__name__)
def test_table_row(cls: type) -> None:
    name = cls.__name__.upper() if cls.__struct_config__.tag else cls.__name__.lower()
    assert f"| {name} | {', '.join(cls.__struct_fields__)} |" in DOC


@pytest.mark.parametrize("names", [frames.Dtype, frames.ScaleKind, frames.ChecksumKind])
def test_enumerations_are_spelled_out(names: object) -> None:
    assert ", ".join(f"`{name}`" for name in get_args(names)) in " ".join(DOC.split())
