"""Page-table helpers: slots of a token range, and a dense table from CSR."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.scalars import integer, show
from pagewire.types import dense


def page_slots(page_table_row: Tensor, start: int, stop: int, page_size: int) -> Tensor:
    """Slots of tokens `[start, stop)` of one request: `page * page_size + offset`.

    Args:
        page_table_row: [max_pages_per_seq] int32 or int64, the request's row of the page table.
        start, stop: token range, `0 <= start <= stop <= max_pages_per_seq * page_size`.
    Returns:
        [stop - start] int64 on the row's device; no synchronisation.
    Raises:
        ValueError: shape, dtype or range.

    >>> page_slots(torch.tensor([7, 2], dtype=torch.int32), 3, 6, page_size=4).tolist()
    [31, 8, 9]
    """
    if not isinstance(page_table_row, Tensor):
        raise TypeError(f"page_table_row: expected a torch.Tensor, got {show(page_table_row)}")
    dense("page_table_row", page_table_row)
    if page_table_row.dim() != 1 or page_table_row.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "page_table_row: expected [max_pages_per_seq] int32 or int64, got "
            f"{tuple(page_table_row.shape)} {page_table_row.dtype}"
        )
    page_size = integer("page_size", page_size, least=1)
    start, stop = integer("start", start), integer("stop", stop)
    capacity = page_table_row.shape[0] * page_size
    if not 0 <= start <= stop <= capacity:
        raise ValueError(
            f"token range: expected 0 <= start <= stop <= {capacity} ({page_table_row.shape[0]} pages of "
            f"{page_size}, from page_table_row), got start={start}, stop={stop}"
        )
    token = torch.arange(start, stop, device=page_table_row.device)
    return page_table_row.to(torch.int64)[token // page_size] * page_size + token % page_size


def page_table_from_csr(kv_indptr: Tensor, kv_indices: Tensor, max_pages_per_seq: int | None = None) -> Tensor:
    """A dense padded page table from CSR (`kv_indptr`, `kv_indices`), the form FlashInfer uses.

    Args:
        kv_indptr: [batch_size + 1] int32 or int64, non-decreasing from 0.
        kv_indices: [num_indices] int32 or int64 page ids.
        max_pages_per_seq: row width; a longer request loses its tail entries. None takes the longest request,
            which synchronises with the device.
    Returns:
        [batch_size, max_pages_per_seq] int32, padded with -1.
    Raises:
        ValueError: shape or dtype; on the CPU also a decreasing or out-of-range indptr, or a row that is too narrow.

    >>> page_table_from_csr(torch.tensor([0, 2, 2, 3]), torch.tensor([5, 1, 4])).tolist()
    [[5, 1], [-1, -1], [4, -1]]
    """
    for name, tensor in (("kv_indptr", kv_indptr), ("kv_indices", kv_indices)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {show(tensor)}")
        if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected a 1-d int32 or int64 tensor, got {tuple(tensor.shape)} {tensor.dtype}")
    if kv_indptr.shape[0] < 1:
        raise ValueError("kv_indptr: expected [batch_size + 1], got an empty tensor")
    if kv_indptr.device != kv_indices.device:
        raise ValueError(f"kv_indices: expected device {kv_indptr.device} (from kv_indptr), got {kv_indices.device}")
    if max_pages_per_seq is not None:
        max_pages_per_seq = integer("max_pages_per_seq", max_pages_per_seq, least=0)
    num_pages = kv_indptr[1:] - kv_indptr[:-1]  # [batch_size]
    if kv_indptr.device.type == "cpu":
        _check_csr(kv_indptr, num_pages, kv_indices.shape[0], max_pages_per_seq)
    if max_pages_per_seq is None:
        max_pages_per_seq = int(num_pages.max()) if num_pages.numel() else 0
    column = torch.arange(max_pages_per_seq, device=kv_indptr.device)
    owned = column < num_pages[:, None]  # [batch_size, max_pages_per_seq]
    if kv_indices.shape[0] == 0:
        return torch.full(owned.shape, -1, dtype=torch.int32, device=kv_indptr.device)
    source = (kv_indptr[:-1, None] + column).clamp(0, kv_indices.shape[0] - 1)
    pages = torch.where(owned, kv_indices[source], -1)
    # a page id past 32 bits stays one that is out of range
    return pages.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)


def _check_csr(kv_indptr: Tensor, num_pages: Tensor, num_indices: int, max_pages_per_seq: int | None) -> None:
    if int(kv_indptr[0]) != 0:
        raise ValueError(f"kv_indptr[0]: expected 0, got {int(kv_indptr[0])}")
    if bool((num_pages < 0).any()):
        request = int((num_pages < 0).nonzero()[0])
        raise ValueError(f"kv_indptr: expected non-decreasing values, got a decrease after entry {request}")
    if int(kv_indptr[-1]) > num_indices:
        raise ValueError(
            f"kv_indptr[-1]: expected at most {num_indices} (the length of kv_indices), got {int(kv_indptr[-1])}"
        )
    if max_pages_per_seq is not None and bool((num_pages > max_pages_per_seq).any()):
        request = int((num_pages > max_pages_per_seq).nonzero()[0])
        raise ValueError(
            f"max_pages_per_seq = {max_pages_per_seq}, but request {request} has {int(num_pages[request])} pages"
        )
