"""What the front and a model process say to each other: one msgpack-encoded struct per frame.

The front sends `FrontMessage`s down a worker's control socket and reads `WorkerMessage`s back. P and D speak
`pagewire.transfer` among themselves; nothing here carries KV.
"""

import msgspec


class Sampling(msgspec.Struct, frozen=True):
    """How a token is drawn. Sampling is counter-based: (seed, position) decides, never a hidden stream."""

    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    seed: int = 0


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """A request. The front sends the same one to D (which reserves pages) and to P (which waits for D's grant).

    With link 0 only D gets it, and prefills it too. One whose link is lost is dropped in silence: the front, which
    hears of the loss, makes a new attempt of it.
    """

    request_id: str
    token_ids: list[int]  # the prompt, non-empty
    max_tokens: int  # >= 1; prompt + max_tokens fits the context and the pool (the front checked)
    stop_token_ids: list[int]  # generation ends with one of these; it is not sent to the client
    sampling: Sampling
    link: int = 0  # the Pair between P and D that its KV travels on


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """The client went away or a stop string matched: release everything, then answer Finished(reason="cancelled")."""

    request_id: str


class Pair(msgspec.Struct, tag="pair", frozen=True):
    """Be joined with this peer, beside those of other links. P connects to `address`; D is connected to."""

    link: int  # grows
    incarnation: str  # of the peer: what its HELLO must say
    address: str


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    pass


FrontMessage = Submit | Cancel | Pair | Shutdown


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded; P and D still have to be joined."""

    role: str  # "prefill" | "decode" | "colocated"
    pid: int
    model: str
    max_context: int  # tokens a request may ever span
    pool_tokens: int  # KV tokens this process's page pool holds
    vocab_size: int
    incarnation: str  # of this process, random
    address: str  # where D is connected to
    fingerprint: str = ""  # of the model, see model/fingerprint.py; "": not asked for
    now_us: int = 0  # CLOCK_MONOTONIC, as the events have it


class Linked(msgspec.Struct, tag="linked", frozen=True):
    """The peers have said HELLO: KV can travel."""

    link: int


class Unlinked(msgspec.Struct, tag="unlinked", frozen=True):
    """The connection is lost, or never was one; the requests that needed it were dropped here."""

    link: int
    reason: str


class Token(msgspec.Struct, tag="token", frozen=True):
    """Token `index` of a request's output: P sends index 0, D the rest; the front puts them in order."""

    request_id: str
    index: int
    token_id: int


class Finished(msgspec.Struct, tag="finished", frozen=True):
    """The last word on a request from the process that ends it. `num_tokens` output tokens were emitted in all."""

    request_id: str
    reason: str  # "stop" | "length" | "cancelled"
    num_tokens: int


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The request cannot go on; its resources here are already released."""

    request_id: str
    message: str
    retry: bool = False  # the handoff failed, not the request: another attempt can do better


Arg = int | float | str


class Event(msgspec.Struct, tag="event", frozen=True, omit_defaults=True):
    """One span or instant of the timeline. The same list feeds metrics, /debug and the trace."""

    name: str  # "queue_p" "prefill" "transfer_late" "join_wait" "queue_d" "decode_step" ...
    start_us: int  # CLOCK_MONOTONIC, one host
    duration_us: int = 0
    request_id: str = ""
    args: dict[str, Arg] = {}
    role: str = ""  # "front", or the front's name for the process, which only the front knows


class Events(msgspec.Struct, tag="events", frozen=True):
    events: list[Event]


class Gauges(msgspec.Struct, tag="gauges", frozen=True):
    """The beat: sent at least every BEAT_US, in the middle of a forward too.

    Pages: free + active + cached + leased == total.
    """

    num_pages: dict[str, int]  # "free" "active" "cached" "leased" "total"
    num_running: int
    num_waiting: int
    progress: int = 0  # grows with every layer computed and frame handled


WorkerMessage = Ready | Linked | Unlinked | Token | Finished | Failed | Events | Gauges
