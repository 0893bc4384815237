"""Text to token ids, each id's bytes, and the chat template. Loads no torch: the front process works here.

The `tokenizers` library encodes. Decoding is ours: a table from id to bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from pagewire.serve.model.chat_template import compile_template
from pagewire.serve.model.config import ModelConfig, ModelError
from pagewire.serve.model.files import is_gguf, load_config
from pagewire.serve.model.gguf import GGUFFile, config_of
from pagewire.serve.model.hf import read_json
from pagewire.serve.model.pieces import piece_bytes

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        vocab_size: ids below it may come from the model; those without a piece decode to "".
        eos_token_ids: the ids that end a text.
    """

    def __init__(
        self, library: Library, config: ModelConfig, template: str | None, variables: Mapping[str, str], where: str
    ) -> None:
        """
        Args:
            template: of chats; None: there is none. variables: what it may use besides messages, such as bos_token.
            where: named in errors.
        Raises:
            ModelError: ids past vocab_size, an unknown decoder, or a template that does not parse.
        """
        self._tokenizer = library
        self.vocab_size, self.eos_token_ids = config.vocab_size, config.eos_token_ids
        num_pieces = max(library.get_vocab().values(), default=-1) + 1
        if not 0 < num_pieces <= self.vocab_size:
            expected = f"expected token ids from 0 to at most {self.vocab_size - 1} (vocab_size)"
            raise ModelError(f"{where}: {expected}, got {num_pieces} ids")
        self._pieces = piece_bytes(library, self.vocab_size, where)
        self._template = compile_template(template, where) if template is not None else None
        self._variables = variables

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory or a GGUF file. Raises ModelError."""
        return _load_gguf(path) if is_gguf(path) else _load_directory(path)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids.

        Args:
            add_special_tokens: put the model's own start (often one BOS) first. False for a
                rendered chat: its template writes the start.
        Raises:
            ValueError: `text` has a surrogate, which no UTF-8 can hold.
        """
        surrogate = _SURROGATE.search(text)
        if surrogate is not None:
            raise ValueError(f"text: expected Unicode text, got a lone surrogate at character {surrogate.start()}")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def piece(self, token_id: int) -> bytes:
        """The bytes one token adds to a text: none for a special token or an id without a piece."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The model's chat template over `messages`; encode it with add_special_tokens=False.

        Raises:
            ValueError: there is no template, or it does not take these messages; it says why.
        """
        if self._template is None:
            raise ValueError("this model has no chat template: use plain completions")
        try:
            told = {**self._variables, "messages": [dict(message) for message in messages]}
            return self._template.render(told, add_generation_prompt=add_generation_prompt)
        # A template is a program of the model's author: it may fail in any way.
        except Exception as error:
            raise ValueError(f"the model's chat template does not take these messages: {error}") from error


def _load_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    try:
        # from_str, not from_file: an unreadable file should say so as a missing one does
        tokenizer = Library.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file}: expected a tokenizer of the tokenizers library, got {error}") from error
    # Neither a maximum length nor padding may change what a prompt encodes to.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings_file = path / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    template = _chat_template(path / "chat_template.jinja", settings.get("chat_template"), settings_file)
    return Tokenizer(tokenizer, load_config(path), template, _special_tokens(settings), str(path))


def _chat_template(separate: Path, value: Any, file: Path) -> str | None:
    """A file of its own, or in `file` a string, or a list of named ones of which "default" is ours."""
    if separate.exists():
        return separate.read_text(encoding="utf-8")
    if isinstance(value, list):
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{file}: chat_template: expected text, got {type(value).__name__}")
    return value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like: each a string, or an object with one as content."""
    found = {key: settings.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in found.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _load_gguf(path: Path) -> Tokenizer:
    file = GGUFFile(path)
    config = config_of(file)
    pieces = file.get("tokenizer.ggml.tokens", list[str])
    token_types = file.get("tokenizer.ggml.token_type", list[int])
    if len(token_types) != len(pieces):
        expected = f"tokenizer.ggml.token_type: expected {len(pieces)} entries (one per token)"
        raise ModelError(f"{path}: {expected}, got {len(token_types)}")
    # An unused token pads the vocabulary: it has an id but no text.
    vocab = {p: i for i, (p, t) in enumerate(zip(pieces, token_types, strict=True)) if t != _UNUSED}
    num_repeated = len(pieces) - token_types.count(_UNUSED) - len(vocab)
    if num_repeated:
        raise ModelError(f"{path}: tokenizer.ggml.tokens: expected no piece twice, got {num_repeated} repeated")
    tokenizer, adds_bos = _byte_level_bpe(file, vocab)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [p for p, t in zip(pieces, token_types, strict=True) if t == kind]
        tokenizer.add_tokens([AddedToken(p, special=special, normalized=False) for p in added])
    variables = {}
    for name, short in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = file.get(key, int, None)
        if token_id is not None:
            if not 0 <= token_id < len(pieces):
                raise ModelError(f"{path}: {key}: expected 0 to {len(pieces) - 1}, got {token_id}")
            variables[f"{short}_token"] = pieces[token_id]
    if file.get("tokenizer.ggml.add_bos_token", bool, adds_bos):
        if config.bos_token_id is None:
            raise ModelError(f"{path}: tokenizer.ggml.add_bos_token: expected a bos_token_id with it, got none")
        bos, special_tokens = variables["bos_token"], [(variables["bos_token"], config.bos_token_id)]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=special_tokens)
    return Tokenizer(tokenizer, config, file.get("tokenizer.chat_template", str, None), variables, str(path))


def _byte_level_bpe(file: GGUFFile, vocab: dict[str, int]) -> tuple[Library, bool]:
    """(tokenizer, whether this kind puts BOS first if the file does not say)."""
    kind = file.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        expected = f"{file.path}: tokenizer.ggml.model: expected 'gpt2' (byte-level BPE)"
        raise ModelError(f"{expected}, got {kind!r}; serve the model from its Hugging Face directory")
    byte_level = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    splits: dict[str, tuple[list[Any], bool]] = {
        "gpt-2": ([byte_level(use_regex=True)], False),
        "smollm": ([pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)], False),
        "llama-bpe": ([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), byte_level(use_regex=False)], True),
    }
    pre = file.get("tokenizer.ggml.pre", str, "gpt-2")
    if pre not in splits:
        raise ModelError(f"{file.path}: tokenizer.ggml.pre: expected one of {', '.join(splits)}, got {pre!r}")
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list[str])]
    try:
        # Llama 3 takes a whole word that is a token as that token, before any merge.
        model = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file.path}: tokenizer.ggml.merges: expected pairs of pieces, got {error}") from error
    tokenizer = Library(model)
    steps, adds_bos = splits[pre]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, adds_bos
