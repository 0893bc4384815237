"""The staging arena: shared, of one size for good, and refused when it is not."""

import os

import pytest
import torch

from pagewire.transfer.shm import Arena


def test_both_sides_see_the_same_bytes() -> None:
    ours = Arena.create(3, 128)
    theirs = Arena(os.dup(ours.fd), 3, 128)
    theirs.staging_slot(1)[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert ours.staging_slot(1)[:4].tolist() == [1, 2, 3, 4]
    assert ours.staging_slot(0).sum() == ours.staging_slot(2).sum() == 0
    assert ours.staging_slot(2).shape == (128,)


def test_its_size_cannot_change() -> None:
    arena = Arena.create(2, 64)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)


@pytest.mark.parametrize(("num_staging_slots", "staging_slot_bytes"), [(3, 64), (1, 64), (2, 128), (4, 32)])
def test_another_size_than_agreed_is_refused(num_staging_slots: int, staging_slot_bytes: int) -> None:
    arena = Arena.create(2, 64)
    with pytest.raises(ValueError, match=f"expected {num_staging_slots} slots of {staging_slot_bytes} bytes"):
        Arena(os.dup(arena.fd), num_staging_slots, staging_slot_bytes)


def test_memory_that_can_shrink_is_refused() -> None:
    fd = os.memfd_create("plain", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 128)
    with pytest.raises(ValueError, match="sealed"):
        Arena(fd, 2, 64)
    os.close(fd)
