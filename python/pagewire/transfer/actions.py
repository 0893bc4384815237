"""What the machines of a handoff ask for, in the order in which it is to be done."""

from msgspec import Struct

from pagewire.transfer.frames import Block, Chunk, Commit, Frame, Range, Reserve


class Send(Struct, frozen=True):
    frame: Frame
    link: int


class RequestFailed(Struct, frozen=True):
    """Tell the front; everything the request held here is released."""

    request_id: str
    message: str


class Cancelled(Struct, frozen=True):
    """Tell the front; everything the request held here is released."""

    request_id: str


class Dropped(Struct, frozen=True):
    """Not ours to answer for: the other side ended the request or is gone; all it held here is released."""

    request_id: str


class Refused(Struct, frozen=True):
    """A frame that changed nothing, and why."""

    reason: str


class Unpack(Struct, frozen=True):
    """`Packing.unpack` the chunk into `pages`, then call `unpacked`."""

    link: int
    chunk: Chunk
    pages: list[int]


class Share(Struct, frozen=True):
    """What came from one sender."""

    link: int
    reserve: Reserve
    commit: Commit


class Start(Struct, frozen=True):
    """The prompt's KV is complete in `pages`: decode."""

    request_id: str
    pages: list[int]
    shares: tuple[Share, ...]

    @property
    def first_token(self) -> int:
        return self.shares[0].commit.first_token


class Begin(Struct, frozen=True):
    """`pages` are ours and whoever takes part has agreed: prefill."""

    request_id: str
    pages: list[int]


class Push(Struct, frozen=True):
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
