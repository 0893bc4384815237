"""The handoff of a request's KV from senders (P) to a receiver (D): phases and actions.

`Sender` and `Receiver`, each in its file, are two pure state machines. Events are method calls; what
they return is to be carried out in order. There are no sockets, tensors or clocks in there, so every
interleaving can be tested.

    Receiver   waiting --pages free--> receiving --every sender's COMMIT--> running --release--> gone
               waiting --pages free, no senders--> running
    Sender     waiting --every RESERVE, pages free--> prefilling --last forward--> draining --every ACK--> gone

Both may cancel or fail a request in any state; all it holds is then released, once. Whoever ends a
request answers to the front and sends ABORT to the others, which release in silence. When a link is
lost, each drops what still needs it and tells the others, and nobody answers. Each serves many links
at once; a link has a number that is never used again, staging slots of its own, and its own `Wire`.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import Enum

from pagewire.transfer.frames import DTYPES, Abort, Block, ChecksumKind, Chunk, Commit, Frame, Held, Range, Reserve

NO_GENERATION = 0  # of an ABORT before any RESERVE
DTYPE_BYTES = dict(zip(DTYPES, (4, 2, 2, 1, 1, 1), strict=True))


@dataclass(frozen=True)
class Wire:
    """What both ends of a link make of their HELLOs; every chunk repeats what concerns it."""

    fingerprint: bytes  # of the model, 32 bytes
    groups: tuple[Held, ...]  # what both hold of each, in the dtype and with the scales that travel
    checksum_kind: ChecksumKind = "crc32c"

    def packed_bytes(self, group: int, num_layers: int, num_heads: int, num_tokens: int) -> int:
        """Of a payload; the layout is `PackedShape`'s."""
        held, rows = self.groups[group], num_layers * num_heads * num_tokens
        num_bytes = rows * (held.head_dim + held.head_dim_v) * DTYPE_BYTES[held.dtype]
        if held.scale_kind == "none":
            return num_bytes
        num_scales = {"tensor": num_layers, "head": num_layers * num_heads, "token_head": rows}[held.scale_kind]
        return -(-num_bytes // 16) * 16 + 4 * num_scales * (2 if held.head_dim_v else 1)

    def block_bytes(self, block: Block, num_tokens: int) -> int:
        num_layers, num_heads = block.layer_stop - block.layer_start, block.head_stop - block.head_start
        return self.packed_bytes(block.group, num_layers, num_heads, num_tokens)


def mismatch(ours: object, theirs: object, names: tuple[str, ...]) -> str | None:
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
    link: int


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

    link: int
    chunk: Chunk
    pages: list[int]


@dataclass(frozen=True)
class Share:
    """What came from one sender."""

    link: int
    reserve: Reserve
    commit: Commit


@dataclass(frozen=True)
class Start:
    """The prompt's KV is complete in `pages`: decode."""

    request_id: str
    pages: list[int]
    shares: tuple[Share, ...]

    @property
    def first_token(self) -> int:
        return self.shares[0].commit.first_token


@dataclass(frozen=True)
class Begin:
    """`pages` are ours and whoever takes part has agreed: prefill."""

    request_id: str
    pages: list[int]


@dataclass(frozen=True)
class Push:
    """Pack the tokens of the block from `pages` into the link's staging slot, then call `pushed`; the pages stay as
    they are until then.
    """

    request_id: str
    link: int
    pages: list[int]
    block: Block
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


def abort_frame(link: int, request_id: str, generation: int, reason: str) -> Send:
    return Send(Abort(request_id, generation, reason[:256]), link)
