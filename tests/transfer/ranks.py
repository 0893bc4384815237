"""m ranks of P and n of D, joined by real frames, real packing and staging slots; nothing happens in a fixed order."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

import pagewire as pw
from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import Begin, Dropped, Push, Refused, Send, Start, Unpack
from pagewire.transfer.codec import FrameCodec
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Frame, Held, Hello, Reserve
from pagewire.transfer.packing import Packing, new_hello
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender

NUM_PAGES_FOR = 2  # requests at once
FIRST_TOKEN = 5


@dataclass(frozen=True)
class Group:
    """Layers of one geometry, of the whole model. head_dim_v 0: V is a view of K."""

    num_layers: int
    num_heads: int
    head_dim: int
    head_dim_v: int


@dataclass(frozen=True)
class Storage:
    page_size: int
    layout: str
    dtype: torch.dtype
    num_ranks: int
    num_stages: int  # of the ranks; the others split or repeat heads


@dataclass
class Prompt:
    length: int
    num_tokens: int
    num_cached: int
    kv: dict[tuple[int, int, int], tuple[Tensor, Tensor]]  # group, layer, head -> K, V fp32 [length, dim]


def span(size: int, parts: int, part: int) -> tuple[int, int]:
    """Of `size` things in order; repeated where there are fewer of them than parts."""
    if size < parts:
        return size * part // parts, size * part // parts + 1
    return size * part // parts, size * (part + 1) // parts


class Rank:
    """Its caches, and what it holds in the model's numbers."""

    def __init__(self, role: str, groups: list[Group], storage: Storage, rank: int, num_tokens: int) -> None:
        stage, part = divmod(rank, storage.num_ranks // storage.num_stages)
        self.page_size = storage.page_size
        self.layout = storage.layout
        num_pages = NUM_PAGES_FOR * -(-num_tokens // storage.page_size) + 1
        self.pages = PageAllocator(num_pages)
        shuffled = self.pages.alloc(num_pages)
        random.Random(rank).shuffle(shuffled)
        self.pages.free(shuffled)
        self.caches: list[pw.PagedKVCache | None] = []
        self.held: list[Held] = []
        for group in groups:
            layers = (
                group.num_layers * stage // storage.num_stages,
                group.num_layers * (stage + 1) // storage.num_stages,
            )
            heads = span(group.num_heads, storage.num_ranks // storage.num_stages, part)
            stored = str(storage.dtype).removeprefix("torch."), "token_head" if storage.dtype == torch.int8 else "none"
            if layers[0] == layers[1]:
                self.caches.append(None)
                self.held.append(Held(0, 0, 0, 0, group.head_dim, group.head_dim_v, *stored))
                continue
            self.held.append(Held(*layers, *heads, group.head_dim, group.head_dim_v, *stored))
            self.caches.append(self._cache(group, layers[1] - layers[0], heads[1] - heads[0], num_pages, storage.dtype))
        self.hello = new_hello(role, self.caches, b"f" * 32, groups=tuple(self.held), tenant="t")

    def _cache(self, group: Group, num_layers: int, num_heads: int, num_pages: int, dtype: torch.dtype):
        rows = (self.page_size, num_heads) if self.layout == "NHD" else (num_heads, self.page_size)
        k = [torch.full((num_pages, *rows, group.head_dim), 7, dtype=dtype) for _ in range(num_layers)]
        v = [torch.full((num_pages, *rows, group.head_dim_v or 1), 7, dtype=dtype) for _ in range(num_layers)]
        if not group.head_dim_v:
            v = [of[..., : group.head_dim - 1] for of in k]
        if dtype != torch.int8:
            return pw.PagedKVCache(k, v, layout=self.layout)
        k_scales = [torch.full((num_pages, self.page_size, num_heads), 7.0) for _ in range(num_layers)]
        v_scales = [of.clone() for of in k_scales] if group.head_dim_v else k_scales
        return pw.PagedKVCache(k, v, layout=self.layout, k_scales=k_scales, v_scales=v_scales)

    def cells(self):
        """(group, layer, head) in the model's numbers, rows of K and V [num_pages, page_size, dim], and their scales
        [num_pages, page_size] if they have any.
        """
        for group, (held, cache) in enumerate(zip(self.held, self.caches, strict=True)):
            for layer, head in product(range(*held.layers), range(*held.heads)):
                at, local = head - held.head_start, layer - held.layer_start
                rows = [of[local][:, :, at] if self.layout == "NHD" else of[local][:, at] for of in (cache.k, cache.v)]
                scales = [of[local][:, :, at] for of in (cache.k_scale, cache.v_scale) if of[local] is not None]
                yield (group, layer, head), rows, scales

    def write(
        self, prompt: Prompt, pages: list[int], start: int, stop: int, through: torch.dtype | None = None
    ) -> None:
        """Token by token, number by number; `through`: a dtype that they went through."""
        for cell, of, of_scales in self.cells():
            for rows, values in zip(of, prompt.kv[cell], strict=True):
                for token in range(start, stop):
                    value = values[token] if through is None else values[token].to(through)
                    if of_scales:  # 8 bits: as they are, in any unit
                        value = (values[token] * 20).round().clamp(-127, 127)
                    rows[pages[token // self.page_size], token % self.page_size] = value.to(rows.dtype)
            for plane, scales in enumerate(of_scales):
                for token in range(start, stop):
                    scale = 1 + token + (0 if scales.data_ptr() == of_scales[0].data_ptr() else plane / 2)
                    scales[pages[token // self.page_size], token % self.page_size] = scale + cell[1] / 8 + cell[2] / 64


@dataclass
class Wire:
    """A link between two ranks."""

    p: int
    d: int
    at_p: Packing
    at_d: Packing
    staging: Tensor  # uint8 [num_staging_slots, staging_slot_bytes]
    to_p: deque[bytes] = field(default_factory=deque)
    to_d: deque[bytes] = field(default_factory=deque)
    p_codec: FrameCodec = field(default_factory=FrameCodec)
    d_codec: FrameCodec = field(default_factory=FrameCodec)


class Ranks:
    """Everything that can happen is in `moves`; `play` does it in the order of the dice."""

    def __init__(
        self, groups: list[Group], p: Storage, d: Storage, prompts: dict[str, Prompt], dice: random.Random,
        *, thin: bool, num_staging_slots: int, slot_tokens: int, forward_tokens: int,
    ) -> None:  # fmt: skip
        """thin: a D rank has no more links than it needs. slot_tokens: of its widest layer, in a staging slot."""
        self.groups, self.prompts, self.dice, self.forward_tokens = groups, prompts, dice, forward_tokens
        most = max(prompt.num_tokens for prompt in prompts.values())
        self.p = [Rank("prefill", groups, p, rank, most) for rank in range(p.num_ranks)]
        self.d = [Rank("decode", groups, d, rank, most) for rank in range(d.num_ranks)]
        self.now_ms = 0
        self.senders = [Sender(rank.pages, rank.page_size, now_ms=lambda: 0) for rank in self.p]
        self.receivers = [
            Receiver(
                rank.pages, rank.page_size, tuple(rank.held), vocab_size=10, max_waiting=9, timeout_ms=100,
                now_ms=lambda: 0, new_capability=lambda: dice.randbytes(16),
            )
            for rank in self.d
        ]  # fmt: skip
        self.links: dict[int, Wire] = {}
        for d_rank in range(len(self.d)):
            for p_rank in self._sources(d_rank, thin):
                self._join(p_rank, d_rank, num_staging_slots, slot_tokens)
        self.computing: list[tuple[int, str, int]] = []  # P rank, request, tokens computed
        self.pushing: list[tuple[int, Push]] = []
        self.unpacking: list[tuple[int, Unpack]] = []
        self.started: dict[tuple[int, str], Start] = {}
        self.p_pages: dict[tuple[int, str], list[int]] = {}
        self.num_chunks = 0

    def _sources(self, d_rank: int, thin: bool) -> list[int]:
        def needed(ranks: list[int]) -> set:
            return {cell for rank in ranks for cell, *_ in self.p[rank].cells()} & wanted

        wanted = {cell for cell, *_ in self.d[d_rank].cells()}
        ranks = [rank for rank in range(len(self.p)) if needed([rank])]
        for rank in self.dice.sample(ranks, len(ranks)) if thin else ():
            if needed([other for other in ranks if other != rank]) == wanted:
                ranks.remove(rank)
        return ranks

    def _join(self, p_rank: int, d_rank: int, num_staging_slots: int, slot_tokens: int) -> None:
        p, d = self.p[p_rank], self.d[d_rank]
        hellos: list[Hello] = [FrameCodec().decode(FrameCodec().encode(rank.hello)) for rank in (p, d)]
        at_p, at_d = Packing(p.caches, *hellos), Packing(d.caches, *hellos[::-1])
        assert at_p.wire == at_d.wire
        held = enumerate(at_p.wire.groups)
        slot_bytes = slot_tokens * max(at_p.wire.packed_bytes(g, 1, of.head_stop - of.head_start, 1) for g, of in held)
        slot_bytes = -(-slot_bytes // 64) * 64
        staging = torch.full((num_staging_slots, slot_bytes), 255, dtype=torch.uint8)
        number = len(self.links) + 1
        self.links[number] = Wire(p_rank, d_rank, at_p, at_d, staging)
        self.senders[p_rank].link(number, at_p.wire, num_staging_slots, slot_bytes)
        self.receivers[d_rank].link(number, at_d.wire, num_staging_slots)

    # ------------------------------------------------------------------ what the front does

    def submits(self) -> list[Callable[[], None]]:
        return [
            *(lambda r=r, i=i: self.submit_d(r, i) for r in range(len(self.d)) for i in self.prompts),
            *(lambda r=r, i=i: self.submit_p(r, i) for r in range(len(self.p)) for i in self.prompts),
        ]

    def submit_d(self, rank: int, request_id: str) -> None:
        prompt, d = self.prompts[request_id], self.d[rank]
        cached = tuple(d.pages.alloc(-(-prompt.num_cached // d.page_size)))
        links = tuple(number for number, wire in self.links.items() if wire.d == rank)
        token_ids = tuple(range(prompt.length))
        fields = dict(links=links, num_cached=prompt.num_cached, prefix=cached)
        self.do_d(rank, self.receivers[rank].submit(request_id, token_ids, prompt.num_tokens, **fields))

    def submit_p(self, rank: int, request_id: str) -> None:
        links = tuple(number for number, wire in self.links.items() if wire.p == rank)
        if links:
            self.do_p(rank, self.senders[rank].submit(request_id, tuple(range(self.prompts[request_id].length)), links))

    # ------------------------------------------------------------------ what the machines ask for

    def do_p(self, rank: int, actions: list) -> None:
        for action in actions:
            match action:
                case Send(frame, number):
                    wire = self.links[number]
                    assert wire.p == rank
                    self.num_chunks += isinstance(frame, Chunk)
                    wire.to_d.append(wire.p_codec.encode(frame))
                case Begin(request_id, pages):
                    self.p_pages[rank, request_id] = pages
                    self.computing.append((rank, request_id, 0))
                case Dropped():
                    pass
                case _:
                    raise AssertionError(action)

    def do_d(self, rank: int, actions: list) -> None:
        for action in actions:
            match action:
                case Send(frame, number):
                    wire = self.links[number]
                    assert wire.d == rank
                    wire.to_p.append(wire.d_codec.encode(frame))
                case Unpack():
                    self.unpacking.append((rank, action))
                case Start(request_id):
                    self.started[rank, request_id] = action
                case Refused(reason):
                    raise AssertionError(reason)
                case _:
                    raise AssertionError(action)

    def frame_to_p(self, number: int) -> None:
        wire = self.links[number]
        frame: Frame = wire.p_codec.decode(wire.to_p.popleft())
        sender = self.senders[wire.p]
        handlers = {Reserve: sender.reserve, Credit: sender.credit, Ack: sender.ack, Abort: sender.abort}
        self.do_p(wire.p, handlers[type(frame)](number, frame))

    def frame_to_d(self, number: int) -> None:
        wire = self.links[number]
        frame: Frame = wire.d_codec.decode(wire.to_d.popleft())
        receiver = self.receivers[wire.d]
        handlers = {Chunk: receiver.chunk, Commit: receiver.commit, Abort: receiver.abort}
        self.do_d(wire.d, handlers[type(frame)](number, frame))

    def forward(self, at: int) -> None:
        rank, request_id, start = self.computing.pop(at)
        prompt, sender = self.prompts[request_id], self.senders[rank]
        stop = min(start + self.dice.randint(1, self.forward_tokens), prompt.length)
        pages = self.p_pages[rank, request_id]
        self.p[rank].write(prompt, pages, start, stop)
        layers = [(g, layer) for g, held in enumerate(self.p[rank].held) for layer in range(*held.layers)]
        if self.dice.random() < 0.5:  # as in a hybrid model: layers of the groups in turn
            layers.sort(key=lambda of: of[1])
        for group, layer in layers:
            sender.layer_ready(request_id, layer, start, stop, group)
        if stop < prompt.length:
            self.computing.append((rank, request_id, stop))
            return
        digests = {
            number: self.links[number].at_p.digests(pages, of.blocks, (of.num_cached, of.num_tokens))
            for number, of in sender.reserves(request_id).items()
        }
        self.do_p(rank, sender.prefilled(request_id, FIRST_TOKEN, digests))

    def next_send(self, rank: int) -> bool:
        send = self.senders[rank].next_send()
        if isinstance(send, Push):
            self.pushing.append((rank, send))
        elif send is not None:
            self.do_p(rank, [send])
        return send is not None

    def pushed(self, at: int) -> None:
        rank, push = self.pushing.pop(at)
        wire = self.links[push.link]
        packed = wire.at_p.pack(push.pages, push.block, push.tokens, wire.staging[push.staging_slot])
        self.do_p(rank, self.senders[rank].pushed(push, *packed))

    def unpacked(self, at: int) -> None:
        rank, unpack = self.unpacking.pop(at)
        wire = self.links[unpack.link]
        problem = wire.at_d.unpack(unpack.chunk, unpack.pages, wire.staging[unpack.chunk.slot])
        assert problem is None
        wire.staging[unpack.chunk.slot].fill_(255)
        self.do_d(rank, self.receivers[rank].unpacked(unpack))

    def play(self) -> None:
        todo = self.submits()
        while True:
            moves = [lambda i=i: todo.pop(i)() for i in range(len(todo))]
            moves += [lambda i=i: self.forward(i) for i in range(len(self.computing))]
            moves += [lambda i=i: self.pushed(i) for i in range(len(self.pushing))]
            moves += [lambda i=i: self.unpacked(i) for i in range(len(self.unpacking))]
            moves += [lambda n=n: self.frame_to_p(n) for n, wire in self.links.items() if wire.to_p]
            moves += [lambda n=n: self.frame_to_d(n) for n, wire in self.links.items() if wire.to_d]
            self.check_pages()
            sent = self.dice.random() < 0.5 and self.next_send(self.dice.randrange(len(self.p)))
            if not sent and moves:
                self.dice.choice(moves)()
            elif not sent and not any(self.next_send(rank) for rank in range(len(self.p))):
                return

    def check_pages(self) -> None:
        for rank in (*self.p, *self.d):
            assert sum(rank.pages.counts().values()) == rank.pages.num_pages

    def check_clean(self) -> None:
        for rank, sender in zip(self.p, self.senders, strict=True):
            assert sender.request_ids() == [] and rank.pages.num_free == rank.pages.num_pages
        for number, wire in self.links.items():
            every = set(range(len(wire.staging)))
            assert set(self.senders[wire.p]._links[number].credits) == every
            assert self.receivers[wire.d]._links[number].granted_staging == every


def through(p: torch.dtype, d: torch.dtype) -> torch.dtype:
    """The wire's: the narrower cache's, P's if they are as wide."""
    return d if d.itemsize < p.itemsize else p


def copies(rank: Rank) -> Rank:
    """The same with tensors of its own."""
    found = Rank.__new__(Rank)
    found.__dict__.update(rank.__dict__)
    found.caches = [cache and _copy(cache) for cache in rank.caches]
    return found


def _copy(cache: pw.PagedKVCache) -> pw.PagedKVCache:
    k = [of.clone() for of in cache.k]
    shared = cache.geometry.shares_kv
    v = [of[..., : cache.v[0].shape[-1]] for of in k] if shared else [of.clone() for of in cache.v]
    if cache.k_scale[0] is None:
        return pw.PagedKVCache(k, v, layout=cache.layout)
    k_scales = [of.clone() for of in cache.k_scale]
    v_scales = k_scales if shared else [of.clone() for of in cache.v_scale]
    return pw.PagedKVCache(k, v, layout=cache.layout, k_scales=k_scales, v_scales=v_scales)
