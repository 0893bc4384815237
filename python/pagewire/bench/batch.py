"""A batch in the field's words: `2q2k_8q1s1k` is 2 prompts of 2048 tokens and 8 decodes at 1024 tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

_PART = re.compile(r"(\d+)?q(\d+)(k?)(?:s(\d+)(k?))?")


class Request(NamedTuple):
    q_len: int
    seq_len: int  # K/V tokens, the new ones included


def parse(text: str) -> tuple[Request, ...]:
    """Requests of `[COUNT]qQ_LEN[sSEQ_LEN]` joined by `_`; `k` is 1024; without `s` the sequence is the query.

    >>> parse("q2_2q1s1k")
    (Request(q_len=2, seq_len=2), Request(q_len=1, seq_len=1024), Request(q_len=1, seq_len=1024))
    """
    requests: list[Request] = []
    for part in text.split("_"):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError(f"batch: expected [COUNT]qQ_LEN[k][sSEQ_LEN[k]], got {part!r} in {text!r}")
        count, q, q_k, s, s_k = found.groups()
        q_len = int(q) * (1024 if q_k else 1)
        seq_len = q_len if s is None else int(s) * (1024 if s_k else 1)
        if seq_len < q_len:
            raise ValueError(f"batch: {part!r} has fewer K/V tokens ({seq_len}) than queries ({q_len})")
        requests += [Request(q_len, seq_len)] * int(count or 1)
    return tuple(requests)
