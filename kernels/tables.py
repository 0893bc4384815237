"""A table of int64 values (addresses, strides) on the device, made without a host copy or a synchronisation."""

import functools
from collections import OrderedDict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pagewire.kernels.device import current, is_capturing

_MAX_TABLES = 256  # a few KiB each; a serving process has one or two per cache
_PER_LAUNCH = 32


class TableValues(tuple[int, ...]):
    """Of hundreds of numbers: hashed once."""

    @functools.cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


@dataclass
class _Table:
    values: torch.Tensor  # int64 [n]
    stream: torch.cuda.Stream  # which wrote it
    written: torch.cuda.Event
    settled: bool = False  # the write is known to be over: every stream, and a capture, may read

    def read_from(self, stream: torch.cuda.Stream) -> None:
        self.settled = self.settled or self.written.query()
        if stream != self.stream:
            if not self.settled:
                stream.wait_event(self.written)
            self.values.record_stream(stream)


_tables: OrderedDict[tuple[torch.device, tuple[int, ...]], _Table] = OrderedDict()
_captured: dict[int, torch.Tensor] = {}  # graphs hold these addresses: kept for good


def device_table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`values` as int64 on `device`, readable by the next kernel of the current stream.

    Keyed by the values themselves: the same tensors find their table again, and other tensors never do.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device=device)
    key, stream = (device, values), torch.cuda.current_stream(device)
    table = _tables.get(key)
    if is_capturing(device):
        if table is not None and table.settled:
            _captured[table.values.data_ptr()] = table.values
            return table.values
        return _write(values, device)  # by nodes of the graph in its own memory: no other call's
    if table is None:
        table = _tables[key] = _Table(_write(values, device), stream, torch.cuda.Event())
        table.written.record(stream)
        if len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
        table.read_from(stream)
    return table.values


def _write(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The values travel as kernel arguments: no pinned memory that must outlive a copy or a graph."""
    padded = (*values, *values[-1:] * (-len(values) % _PER_LAUNCH))
    with torch.inference_mode(False):  # kept for calls in any mode
        table = torch.empty(len(padded), dtype=torch.int64, device=device)
    with current(device):
        for start in range(0, len(padded), _PER_LAUNCH):
            _write_kernel[(1,)](table[start:], *padded[start : start + _PER_LAUNCH], num_warps=1)
    return table


_VALUES = [f"v{i}" for i in range(_PER_LAUNCH)]


@triton.jit(do_not_specialize=_VALUES)
def _write_kernel(
    table_ptr,
    v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64,
    v6: tl.int64, v7: tl.int64, v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64,
    v12: tl.int64, v13: tl.int64, v14: tl.int64, v15: tl.int64, v16: tl.int64, v17: tl.int64,
    v18: tl.int64, v19: tl.int64, v20: tl.int64, v21: tl.int64, v22: tl.int64, v23: tl.int64,
    v24: tl.int64, v25: tl.int64, v26: tl.int64, v27: tl.int64, v28: tl.int64, v29: tl.int64,
    v30: tl.int64, v31: tl.int64,
):  # fmt: skip
    """grid: [1]; table[i] = v<i>. Typed and unspecialised: one compilation whatever the values are."""
    tl.store(table_ptr + 0, v0)
    tl.store(table_ptr + 1, v1)
    tl.store(table_ptr + 2, v2)
    tl.store(table_ptr + 3, v3)
    tl.store(table_ptr + 4, v4)
    tl.store(table_ptr + 5, v5)
    tl.store(table_ptr + 6, v6)
    tl.store(table_ptr + 7, v7)
    tl.store(table_ptr + 8, v8)
    tl.store(table_ptr + 9, v9)
    tl.store(table_ptr + 10, v10)
    tl.store(table_ptr + 11, v11)
    tl.store(table_ptr + 12, v12)
    tl.store(table_ptr + 13, v13)
    tl.store(table_ptr + 14, v14)
    tl.store(table_ptr + 15, v15)
    tl.store(table_ptr + 16, v16)
    tl.store(table_ptr + 17, v17)
    tl.store(table_ptr + 18, v18)
    tl.store(table_ptr + 19, v19)
    tl.store(table_ptr + 20, v20)
    tl.store(table_ptr + 21, v21)
    tl.store(table_ptr + 22, v22)
    tl.store(table_ptr + 23, v23)
    tl.store(table_ptr + 24, v24)
    tl.store(table_ptr + 25, v25)
    tl.store(table_ptr + 26, v26)
    tl.store(table_ptr + 27, v27)
    tl.store(table_ptr + 28, v28)
    tl.store(table_ptr + 29, v29)
    tl.store(table_ptr + 30, v30)
    tl.store(table_ptr + 31, v31)
