"""The handoff of a request's KV from a sender (P) to a receiver (D): phases and actions.

`Sender` and `Receiver`, each in its file, are two pure state machines. Events are method calls; what
they return is to be carried out in order. There are no sockets, tensors or clocks in there, so every
interleaving can be tested.

    Receiver   waiting --pages free--> receiving --COMMIT covers all--> running --release--> gone
               waiting --pages free, local--> running
    Sender     waiting --RESERVE, pages free--> prefilling --last forward--> draining --ACK--> gone

Both may cancel or fail a request in any state; all it holds is then released, once. Whoever ends a
request answers to the front and sends ABORT to the other, which releases in silence. When the connection is
lost, each drops what needs the other, and nobody answers; a Sender serves one connection, a Receiver
many, one after the other.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from pagewire.transfer.frames import Abort, Chunk, Commit, Frame, Hello, Range

NO_GENERATION = 0  # of an ABORT before any RESERVE


class Stored(NamedTuple):
    """What K and V are in a cache or on the wire."""

    dtype: str
    scale_kind: str


@dataclass(frozen=True)
class Wire:
    """What both ends agree on in HELLO and every chunk repeats."""

    fingerprint: bytes  # of the model, 32 bytes
    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    scale_kind: str
    packed_bytes: Callable[[int, int, int], int]  # (num_layers, num_heads, num_tokens) -> bytes


HELLO_FIELDS = ("fingerprint", "num_layers", "num_kv_heads", "head_dim", "head_dim_v")
CHUNK_FIELDS = ("fingerprint", "head_dim", "head_dim_v", "dtype", "scale_kind")


def mismatch(ours: Hello | Wire, theirs: Hello | Chunk, names: tuple[str, ...]) -> str | None:
    """The first of the fields `names` in which they differ, in words."""
    for name in names:
        expected, got = getattr(ours, name), getattr(theirs, name)
        if expected != got:
            return f"{name}: expected {_show(expected)}, got {_show(got)}"
    return None


def _show(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)


def prompt_sha256(token_ids: tuple[int, ...]) -> bytes:
    """Of the ids, a little-endian u32 each."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


@dataclass(frozen=True)
class Send:
    frame: Frame


@dataclass(frozen=True)
class RequestFailed:
    """Tell the front; everything the request held here is released."""

    request_id: str
    message: str


@dataclass(frozen=True)
class Cancelled:
    """Tell the front; everything the request held here is released."""

    request_id: str


@dataclass(frozen=True)
class Dropped:
    """Not ours to answer for: the other side ended the request or is gone; all it held here is released."""

    request_id: str


@dataclass(frozen=True)
class Refused:
    """A frame that changed nothing, and why."""

    reason: str


@dataclass(frozen=True)
class Unpack:
    """`Packing.unpack` the chunk into `pages`, then call `unpacked`."""

    chunk: Chunk
    pages: list[int]


@dataclass(frozen=True)
class Start:
    """The prompt's KV is complete in `pages`: decode."""

    request_id: str
    pages: list[int]
    commit: Commit


@dataclass(frozen=True)
class Begin:
    """`pages` are ours and whoever takes part has agreed: prefill."""

    request_id: str
    pages: list[int]


@dataclass(frozen=True)
class Push:
    """Pack layers x tokens from `pages` into the staging slot, then send `chunk_frame`."""

    request_id: str
    pages: list[int]
    layers: Range
    tokens: Range
    staging_slot: int


Action = Send | RequestFailed | Cancelled | Dropped | Refused | Unpack | Start | Begin


class Phase(Enum):
    WAITING = 1
    RECEIVING = 2  # receiver: granted, chunks come
    RUNNING = 3  # receiver: committed or local, D's alone
    PREFILLING = 4  # sender: pages owned, forwards run
    DRAINING = 5  # sender: computed, pages leased to the transfer
    GONE = 6


def abort_frame(request_id: str, generation: int, reason: str) -> Send:
    return Send(Abort(request_id, generation, reason[:256]))
