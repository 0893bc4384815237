"""The tuning tables: complete, rounded the right way, blind to the batch."""

import itertools

import pytest

pytest.importorskip("triton")
from pagewire.kernels import tuning  # noqa: E402
from pagewire.kernels.tuning import Key, Traits  # noqa: E402

KINDS = list(itertools.product((80, 90), ("16", "16x8", "32", "32x8"), (64, 128, 256)))


def test_tables_are_complete():
    assert set(tuning.DECODE) == {Key(*kind, rows) for kind in KINDS for rows in (16, 32, 64)}
    assert set(tuning.PREFILL) == {Key(*kind) for kind in KINDS}


@pytest.mark.parametrize(
    "problem, rows, expected",
    [
        (Traits(90, 128, 2, 2, 16), 4, Key(90, "16", 128, 16)),
        (Traits(90, 80, 2, 1, 16), 17, Key(90, "16x8", 128, 32)),
        (Traits(100, 40, 4, 4, 1), 33, Key(90, "32", 64, 64)),
        (Traits(80, 129, 4, 1, 3), 500, Key(80, "32x8", 256, 64)),
        (Traits(89, 256, 2, 2, 64), 16, Key(80, "16", 256, 16)),
        (Traits(120, 64, 2, 2, 64), 0, Key(80, "16", 64, 0)),
    ],
)
def test_key(problem, rows, expected):
    assert tuning.key(problem, rows) == expected


@pytest.mark.parametrize(("page_size", "special"), [(1, False), (15, False), (16, True), (63, True), (64, False)])
def test_a_row_of_one_class_of_page_sizes(page_size, special, monkeypatch):
    config = tuning.KernelConfig(16, 128, 8, 2)
    monkeypatch.setitem(tuning.DECODE, Key(90, "16", 128, 16, 16), config)
    assert (tuning.decode_config(Traits(90, 128, 2, 2, page_size), 4) == config) is special


def test_a_problem_does_not_know_its_batch():
    """Or a request's bits would depend on the company it keeps."""
    assert Traits._fields == ("arch", "head_dim", "q_bytes", "kv_bytes", "page_size")


def test_small_shared_memory_holds_one_program():
    key = Key(80, "16", 128, 16)
    assert tuning.DECODE[key].programs_per_processor == 2
    assert tuning.decode_config(Traits(89, 128, 2, 2, 16), 4).programs_per_processor == 1
    assert tuning.decode_config(Traits(80, 128, 2, 2, 16), 4).programs_per_processor == 2


@pytest.mark.parametrize("key", [key for key in tuning.DECODE if key.operands != "32x8"], ids=str)
def test_enough_bytes_in_flight(key):
    """Latency times bandwidth: about 1 us of a processor's share of HBM."""
    config = tuning.DECODE[key]
    element = {"16": 2, "16x8": 1, "32": 4}[key.operands]
    tile = config.BLOCK_N * 2 * key.head_dim * element
    assert (config.num_stages - 1) * tile * config.programs_per_processor >= 32 << 10


@pytest.mark.parametrize("config", {*tuning.DECODE.values(), *tuning.PREFILL.values()}, ids=str)
def test_tiles_fit_the_tensor_cores(config):
    assert config.BLOCK_M >= 16 and config.BLOCK_M & (config.BLOCK_M - 1) == 0
    assert config.BLOCK_N >= 16 and config.BLOCK_N & (config.BLOCK_N - 1) == 0
    assert config.num_warps in (4, 8, 16)


def test_the_interpreter_has_small_tiles():
    problem = Traits(0, 128, 4, 4, 16)
    assert tuning.decode_config(problem, 40).BLOCK_M == 64
    assert tuning.decode_config(problem, 40).BLOCK_N == tuning.prefill_config(problem).BLOCK_N == 16
