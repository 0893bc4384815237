"""Peers: one file each, none needed. What is not installed, or does not take a case, is skipped with its reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from pagewire.bench.cases import Case
from pagewire.bench.work import Contender, Work

# as printed, from left to right
_MODULES = (
    "sdpa", "flex", "flashinfer", "flash_attn2", "flash_attn3", "flash_attn4", "vllm_triton", "vllm_cpu", "openvino",
    "index_select", "memcpy", "torch_merge",
)  # fmt: skip

ATTENTION = frozenset({"decode", "prefill"})


@dataclass(frozen=True)
class Peer:
    """Another way to do the same work.

    name: as printed and given to --peers. ops: which kinds of case it has. missing(device): why it cannot run here, or
    None. refuses(case): why it does not take a case, or None. prepare(work): the contender; an exception here is a
    reason like any other.
    """

    name: str
    ops: frozenset[str]
    missing: Callable[[str], str | None]
    refuses: Callable[[Case], str | None]
    prepare: Callable[[Work], Contender]
    default: tuple[str, ...] = ("cpu", "cuda")  # devices where it runs without being asked for


def all_peers() -> tuple[Peer, ...]:
    modules = (importlib.import_module(f"pagewire.bench.peers.{name}") for name in _MODULES)
    return tuple(peer for module in modules for peer in module.PEERS)


def chosen(names: str | None, device: str) -> tuple[Peer, ...]:
    """`names`: comma separated, "none", "all", or None for those that run by default on the device.

    Raises:
        ValueError: an unknown name.
    """
    peers = all_peers()
    if names is None:
        return tuple(p for p in peers if device in p.default)
    if names == "all":
        return peers
    wanted = [] if names == "none" else names.split(",")
    unknown = set(wanted) - {p.name for p in peers}
    if unknown:
        known = ", ".join(p.name for p in peers)
        raise ValueError(f"--peers: expected none, all or some of {known}; got {', '.join(sorted(unknown))}")
    return tuple(p for p in peers if p.name in wanted)
