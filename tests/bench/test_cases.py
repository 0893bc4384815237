"""Cases say truly what they move and compute, and suites are lists of distinct, parsable cases."""

import pytest
import torch

from pagewire.bench import batch, suites
from pagewire.bench.cases import Append, Attention, Merge, Pack


def test_batches_read_as_the_field_writes_them():
    assert batch.parse("2q2k_8q1s1k") == ((2048, 2048),) * 2 + ((1, 1024),) * 8
    assert batch.parse("q1ks2k") == ((1024, 2048),)
    assert batch.parse("3q5s7") == ((5, 7),) * 3


@pytest.mark.parametrize("text", ["", "q", "2k", "q1s", "q1_", "q4s2", "1 q1", "q1K"])
def test_a_batch_that_does_not_read_is_refused(text):
    with pytest.raises(ValueError, match="batch"):
        batch.parse(text)


@pytest.mark.parametrize("text", ["q7", "3q1s9", "2q3s8_1q5", "1q1"])
def test_flops_count_the_visible_pairs(text):
    case = Attention("x", text, heads=(6, 2), head_dim=64)
    visible = 0
    for q_len, seq_len in case.requests:
        visible += sum(j <= seq_len - q_len + i for i in range(q_len) for j in range(seq_len))
    assert case.flops == 2 * 2 * 6 * 64 * visible  # q.k and p.v, a multiplication and an addition each


def test_bytes_count_each_byte_once():
    case = Attention("x", "2q1s10", (4, 2), 64, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    assert case.bytes == 2 * 20 * 2 * 64 + 2 * 2 * 4 * 64 * 2
    assert Append(3, 2, 64, dtype=torch.float32).bytes == 2 * 3 * 2 * 64 * (4 + 4)
    pack = Pack("pack", 5, 3, 8, 2, 64, wire=torch.float8_e4m3fn)
    assert pack.bytes == 2 * 3 * 5 * 2 * (64 * (2 + 1) + 4)
    assert Merge(3, 5, 2, 64, torch.float32).bytes == (3 + 1) * 5 * 2 * (64 * 4 + 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", suites.SUITES)
def test_suites_hold_distinct_cases(suite, device):
    cases = suites.cases(suite, device)
    ids = [case.id for case in cases]
    assert len(set(ids)) == len(ids) > 0
    assert all(case.bytes > 0 for case in cases)
    assert all(len(case.id) <= 52 for case in cases)  # the table's column and the gap behind it


def test_the_suites_cover_what_the_table_is_made_of():
    for device in ("cpu", "cuda"):
        cases = suites.cases("quick", device)
        attention = [c for c in cases if isinstance(c, Attention)]
        groups = {c.group for c in cases}
        assert groups >= {"decode", "prefill", "mixed", "skewed", "append", "pack", "unpack", "merge"}
        assert {c.heads for c in attention} == {(32, 8), (64, 8), (32, 32), (16, 1)}
        assert {c.head_dim for c in attention} == {64, 128, 256}
        assert {c.page_size for c in attention} == {1, 16, 64}
        assert torch.float8_e4m3fn in {c.stored for c in attention}
        longest, *others = sorted(
            (r.seq_len for c in attention if c.group == "skewed" for r in c.requests), reverse=True
        )
        assert longest >= 100 * others[0]
    full = suites.cases("full", "cuda")
    packs = [c for c in full if isinstance(c, Pack)]
    assert {c.page_size for c in packs} == {1, 16, 64}
    assert {c.layout for c in packs} == {"NHD", "HND"}
    assert {c.heads for c in packs} >= {1, 8}
    assert {c.num_layers for c in packs} >= {1, 80}
