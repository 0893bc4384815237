"""The merge formula in eager PyTorch: softmax over the states' lse, weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.bench.movement import MergeWork
from pagewire.bench.peers import Peer
from pagewire.bench.work import Contender, Work


def _prepare(work: Work) -> Contender:
    assert isinstance(work, MergeWork)

    def call(copy: int) -> Tensor:
        outs, lses = work.outs[copy], work.lses[copy]
        lse = lses.logsumexp(0)
        weights = torch.exp(lses - lse)[..., None]
        return (weights * outs.float()).sum(0).to(outs.dtype)

    return Contender("torch", call, version=torch.__version__)


PEERS = (Peer("torch", frozenset({"merge"}), lambda device: None, lambda case: None, _prepare),)
