"""Exceptions, and the error word in which device guards leave their findings."""

from __future__ import annotations

import torch

from pagewire.environment import lookup
from pagewire.kernels import error_codes as codes


class BadIndexError(IndexError):
    """A page id, slot, length or offset points outside the tensors it indexes."""


class BackendError(RuntimeError):
    """No backend takes the problem, or the one asked for by name refuses it; the message says why."""


# kind -> (sentence about {request} and {entry})
_SENTENCES = {
    codes.DECODE_PAGE: "decode: page_table[{request}, {entry}] is outside [0, num_pages)",
    codes.PREFILL_PAGE: "prefill: page_table[{request}, {entry}] is outside [0, num_pages)",
    codes.DECODE_SEQ_LEN: "decode: seq_lens[{request}] is outside [0, max_pages_per_seq * page_size]",
    codes.PREFILL_SEQ_LEN: "prefill: seq_lens[{request}] is outside [0, max_pages_per_seq * page_size]",
    codes.PREFILL_CU_SEQLENS_Q: "prefill: cu_seqlens_q[{request}] is decreasing or outside [0, num_tokens]",
    codes.PREFILL_MAX_Q_LEN: "prefill: request {request} has more query rows than max_q_len",
    codes.APPEND_SLOT: "append_kv: slot_mapping[{entry}] is past the last slot, num_pages * page_size",
    codes.PACK_SLOT: "pack_kv: slots[{entry}] is outside [0, num_pages * page_size)",
    codes.UNPACK_SLOT: "unpack_kv: slots[{entry}] is outside [0, num_pages * page_size)",
    codes.DECODE_COUNTER: "decode: seq_lens changed while a call ran (work counter {entry} was not zero after it)",
    codes.PREFILL_COUNTER: "prefill: seq_lens or cu_seqlens_q changed while a call ran (work counter {entry} was not "
    "zero after it)",
}
_CONSEQUENCE = {
    codes.PACK_SLOT: "its rows were packed as zeros",
    codes.UNPACK_SLOT: "its rows were skipped",
    codes.APPEND_SLOT: "its row was skipped",
    codes.PREFILL_MAX_Q_LEN: "its rows were left empty",
    codes.DECODE_COUNTER: "rows of that call may be wrong, the counters were reset for the next one",
    codes.PREFILL_COUNTER: "rows of that call may be wrong, the counters were reset for the next one",
}

_words: dict[torch.device, torch.Tensor] = {}


def device_word(device: torch.device) -> torch.Tensor:
    """The error word of `device`: int64 [1], 0 = nothing recorded. Allocated eagerly, never in a capture."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    word = _words.get(device)
    if word is None:
        if _is_capturing(device):
            raise RuntimeError(
                f"pagewire: the error word of {device} does not exist yet and cannot be allocated during a CUDA "
                "graph capture; run one pagewire op on this device before capturing"
            )
        with torch.inference_mode(False):  # to be written and cleared in any mode
            word = _words[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return word


def _is_capturing(device: torch.device) -> bool:
    """Asked of the tensors' device, which need not be the current one."""
    from pagewire.kernels.device import is_capturing  # importing pagewire loads nothing of kernels/

    return is_capturing(device)


def describe(word: int) -> str:
    """The sentence for one recorded error word."""
    kind = word >> codes.KIND_SHIFT
    request = (word >> codes.REQUEST_SHIFT) & codes.MAX_REQUEST
    entry = word & codes.MAX_ENTRY
    sentence = _SENTENCES.get(kind, f"unknown device error {word:#x}")
    consequence = _CONSEQUENCE.get(kind, "it was masked or clamped")
    return f"{sentence.format(request=request, entry=entry)}; {consequence} and the device goes on"


def check_errors() -> None:
    """Raise what device guards have recorded since the last call, and clear it. Synchronises with every device used.

    Raises:
        BadIndexError: naming op, request and entry of the recorded fault (of several, the largest word).
    """
    found = []
    for device, word in _words.items():
        value = int(word.item())
        if value:
            word.zero_()
            found.append(f"{describe(value)} (on {device})")
    if found:
        raise BadIndexError("; ".join(found))


def check_after_call(device: torch.device) -> None:
    """Under PAGEWIRE_CHECK=1, `check_errors()` after each call outside a capture."""
    if not _words or lookup("PAGEWIRE_CHECK") != "1":
        return
    if _is_capturing(device):
        return
    check_errors()
