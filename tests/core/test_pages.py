"""page_slots and page_table_from_csr."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagewire as pw

quick = settings(max_examples=60, deadline=None)


@quick
@given(data=st.data(), page_size=st.integers(1, 20), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_page_slots(data, page_size, dtype):
    row = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=0, max_size=6))
    stop = data.draw(st.integers(0, len(row) * page_size))
    start = data.draw(st.integers(0, stop))
    slots = pw.page_slots(torch.tensor(row, dtype=dtype), start, stop, page_size)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [row[t // page_size] * page_size + t % page_size for t in range(start, stop)]


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 9)])
def test_page_slots_outside_the_row(start, stop):
    with pytest.raises(ValueError, match="0 <= start <= stop <= 8"):
        pw.page_slots(torch.tensor([0, 1], dtype=torch.int32), start, stop, 4)


@pytest.mark.parametrize("row", [torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2)], ids=["two dims", "float"])
def test_page_slots_of_something_else(row):
    with pytest.raises(ValueError, match="page_table_row: expected"):
        pw.page_slots(row, 0, 1, 4)


def test_page_slots_needs_a_page_size():
    with pytest.raises(ValueError, match="page_size: expected >= 1, got 0"):
        pw.page_slots(torch.tensor([0]), 0, 0, 0)


@quick
@given(
    rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=6),
    spare=st.integers(0, 3),
    given_width=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_table_from_csr(rows, spare, given_width, dtype):
    indptr = torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()], dtype=dtype)
    indices = torch.tensor([page for r in rows for page in r] + [7] * spare, dtype=dtype)
    longest = max(map(len, rows), default=0)
    width = longest + spare if given_width else None
    table = pw.page_table_from_csr(indptr, indices, width)
    width = longest if width is None else width
    assert table.dtype == torch.int32 and table.shape == (len(rows), width)
    assert table.tolist() == [r + [-1] * (width - len(r)) for r in rows]


@pytest.mark.parametrize(
    "indptr, width, words",
    [
        ([1, 2], None, r"kv_indptr\[0\]: expected 0, got 1"),
        ([0, 2, 1], None, "expected non-decreasing values, got a decrease after entry 1"),
        ([0, 4], None, r"kv_indptr\[-1\]: expected at most 3"),
        ([0, 3], 2, "max_pages_per_seq = 2, but request 0 has 3 pages"),
        ([0, 3], -1, "max_pages_per_seq: expected >= 0"),
        ([], None, r"expected \[batch_size \+ 1\]"),
    ],
)
def test_table_from_bad_csr(indptr, width, words):
    with pytest.raises(ValueError, match=words):
        pw.page_table_from_csr(
            torch.tensor(indptr, dtype=torch.int32), torch.tensor([5, 6, 7], dtype=torch.int32), width
        )


@pytest.mark.parametrize("name", ["kv_indptr", "kv_indices"])
def test_table_from_csr_of_floats(name):
    good = {"kv_indptr": torch.tensor([0, 1]), "kv_indices": torch.tensor([3])}
    with pytest.raises(ValueError, match=f"{name}: expected a 1-d int32 or int64 tensor"):
        pw.page_table_from_csr(**{**good, name: good[name].float()})
