"""Token id -> the bytes it adds to a text: a table, so every token decodes in constant time."""

import json
import re

import tokenizers
from tokenizers import pre_tokenizers

from pagewire.serve.model.config import ModelError


def piece_bytes(tokenizer: tokenizers.Tokenizer, vocab_size: int, where: str) -> list[bytes]:
    """By id. An output continues a prompt: a first space, which decoding a whole text may drop, is text."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        to_bytes = _byte_level_piece
    elif {"Replace", "ByteFallback"} <= kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        to_bytes = _byte_fallback_piece
    else:
        found = ", ".join(sorted(map(str, kinds)))
        raise ModelError(f"{where}: tokenizer decoder: expected ByteLevel, or ByteFallback with Replace, got {found}")
    pieces = [b""] * vocab_size
    for piece, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        pieces[token_id] = to_bytes(piece)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        pieces[token_id] = b"" if added.special else added.content.encode()
    return pieces


# GPT-2's alphabet: printable bytes stand for themselves, the others, in order, for U+0100 onwards
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_OTHERS = (byte for byte in range(256) if chr(byte) not in _ALPHABET)
_BYTE_OF_CHAR = {char: ord(char) if ord(char) < 256 else next(_OTHERS) for char in _ALPHABET}


def _byte_level_piece(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in piece)
    except KeyError:  # not written in the alphabet: it is literal text
        return piece.encode()


def _byte_fallback_piece(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
