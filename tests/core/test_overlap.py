"""Overlap of strided tensors against the sets of bytes they cover."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire import overlap

BYTES = 4096
STORAGE = torch.zeros(BYTES, dtype=torch.uint8)


@st.composite
def views(draw) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.float32]))
    dims = draw(st.integers(0, 4))
    shape = draw(st.lists(st.integers(0, 4), min_size=dims, max_size=dims))
    stride = draw(st.lists(st.integers(0, 30), min_size=dims, max_size=dims))
    start = draw(st.integers(0, 60))
    return STORAGE.view(dtype).as_strided(shape, stride, start)


def bytes_of(x: torch.Tensor) -> list[int]:
    """One entry per byte of each element."""
    found = []
    for index in itertools.product(*map(range, x.shape)):
        element = x.storage_offset() + sum(i * s for i, s in zip(index, x.stride(), strict=True))
        found += range(element * x.element_size(), (element + 1) * x.element_size())
    return found


@settings(max_examples=400, deadline=None)
@given(views(), views())
def test_two_views_overlap_when_they_share_a_byte(a, b):
    expected = bool(set(bytes_of(a)) & set(bytes_of(b)))
    assert overlap.overlap(a, b) == overlap.overlap(b, a) == expected
    touching = overlap.touches(overlap.merged([overlap.span(a)]), overlap.span(b))
    assert touching or not expected


@settings(max_examples=400, deadline=None)
@given(views())
def test_a_view_overlaps_itself_when_it_names_a_byte_twice(x):
    named = bytes_of(x)
    assert overlap.overlaps_itself(x) == (len(set(named)) != len(named))


def test_keys_and_values_of_one_fused_cache_lie_side_by_side():
    fused = torch.empty(1000, 2, 16, 8, 128, dtype=torch.float16)
    k, v = fused[:, 0], fused[:, 1]
    assert not overlap.overlap(k, v) and not overlap.overlaps_itself(k.transpose(1, 2))
    assert overlap.overlap(k, fused[:, :, 3]) and not overlap.is_prefix(v, k)
    assert overlap.is_prefix(k[..., :64], k) and not overlap.is_prefix(k[..., 64:], k)
    assert overlap.overlap(k, k[..., 64:])


def test_strides_without_order_give_up_in_time_and_say_overlap(monkeypatch):
    monkeypatch.setattr(overlap, "_MOST_STEPS", 3)
    overlap._overlap.cache_clear()
    a = STORAGE.as_strided((5, 5, 5), (7, 11, 13), 0)
    b = STORAGE.as_strided((5, 5, 5), (17, 19, 3), 1)
    assert overlap.overlap(a, b)
    overlap._overlap.cache_clear()


def test_a_stride_of_an_extent_of_one_means_nothing():
    x, y = STORAGE.as_strided((1, 1, 8), (0, 0, 1), 0), STORAGE.as_strided((1, 1, 8), (9, 9, 1), 0)
    assert not overlap.overlaps_itself(x) and overlap.same(x, y) and overlap.is_prefix(x, y)
