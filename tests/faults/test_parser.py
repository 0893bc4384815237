"""The frame parser under bytes that nobody would send: libFuzzer (atheris), and mutations of valid frames."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults import parser
from pagewire.transfer import frames
from transfer.test_frames import FRAMES

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
STATS = ("-print_final_stats=1",)


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: no wheel of it here")
def test_nothing_but_a_refusal_under_libfuzzer(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, frame in enumerate(FRAMES):
        (corpus / f"frame{number}").write_bytes(frames.encode(frame, number))
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, parser.__file__, corpus, f"-max_total_time={SECONDS}", "-max_len=2048", *STATS],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    print("\n".join(line for line in done.stderr.splitlines() if line.startswith(("stat::number", "Done"))))
    assert len(list(corpus.iterdir())) > 2 * len(FRAMES), "it found no new ways through the parser"


edits = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 400), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), st.integers(0, 400), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("cut"), st.integers(0, 400), st.integers(1, 40)),
    st.tuples(st.just("splice"), st.integers(0, 400), st.sampled_from(FRAMES)),
)


@settings(max_examples=5_000, deadline=None)
@given(frame=st.sampled_from(FRAMES), sequence=st.integers(0, (1 << 32) - 1), edits=st.lists(edits, max_size=5))
def test_nothing_but_a_refusal_of_mutations(frame: frames.Frame, sequence: int, edits: list) -> None:
    data = bytearray(frames.encode(frame, sequence))
    assert parser.check(bytes(data))
    for how, at, what in edits:
        at %= max(1, len(data))
        if how == "put":
            data[at : at + len(what)] = what
        elif how == "insert":
            data[at:at] = what
        elif how == "cut":
            del data[at : at + what]
        else:
            data[at:] = frames.encode(what, 0)[at:]
    parser.check_both(bytes(data))


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_nothing_but_a_refusal_of_any_value_of_any_byte(frame: frames.Frame) -> None:
    data = bytearray(frames.encode(frame, 0))
    for at, was in enumerate(data):
        for value in range(256):
            data[at] = value
            parser.check(parser.resealed(bytes(data)))
        data[at] = was
