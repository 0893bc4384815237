"""Encoding, byte-exact incremental decoding and chat templates."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import AutoTokenizer

from pagewire.serve.front.output import Text
from pagewire.serve.model.config import ModelError
from pagewire.serve.model.default import default_model_path
from pagewire.serve.model.tokenizer import Tokenizer
from serve.tiny import MIN_VOCAB, make_tiny_llama, tiny_tokenizer
from serve.tiny_gguf import make_tiny_gguf

TEXTS = [
    "",
    "hello world and the 1234",
    " the\n\n  def f(x):\n\treturn 'x'",
    "naïve café — 日本語 🎉👩‍👩‍👧",
    "<|im_start|>user\nhello<|im_end|>",
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.load(tiny)


def streamed(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    text = Text(tokenizer.piece)
    return "".join(part for part, _ in [*map(text.push, token_ids), text.finish()])


@pytest.mark.parametrize("text", TEXTS)
def test_same_as_transformers(tiny: Path, tokenizer: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids == theirs(text).input_ids
    expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert streamed(tokenizer, ids) == expected


def test_chat_same_as_transformers(tiny: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(tiny)
    for add in (False, True):
        rendered = tokenizer.render_chat(CHAT, add_generation_prompt=add)
        assert rendered == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add)


@given(st.lists(st.integers(0, MIN_VOCAB - 1), max_size=40))
def test_streaming_equals_the_library_on_any_ids(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    """Also where the bytes are no UTF-8, as a random model's are."""
    expected = tiny_tokenizer().decode(token_ids)
    assert streamed(tokenizer, token_ids) == expected


def test_a_push_holds_back_only_an_unfinished_character(tokenizer: Tokenizer) -> None:
    party = tokenizer.encode("🎉", add_special_tokens=False)
    assert len(party) == 4  # one token per byte
    text = Text(tokenizer.piece)
    hello = tokenizer.encode("hello", add_special_tokens=False)
    pushes = [text.push(i)[0] for i in [*hello, *party, *hello, party[0]]]
    assert pushes == ["hello", "", "", "", "🎉", "hello", ""]
    assert text.finish() == ("\ufffd", False)


def test_ids_without_a_piece(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320 > MIN_VOCAB
    assert streamed(tokenizer, [MIN_VOCAB, 319, 320, -1, 10**9, 0, 1, 2]) == ""
    assert tokenizer.eos_token_ids == (2,)


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    """JSON can spell one; UTF-8 cannot."""
    with pytest.raises(ValueError, match="text: .* lone surrogate at character 2"):
        tokenizer.encode(json.loads('"ab\\ud83c"'), add_special_tokens=False)


def byte_fallback_model(tmp_path: Path) -> Path:
    """A directory whose tokenizer is of Llama 2's kind: ▁ for the space, <0x..> for bytes."""
    path = make_tiny_llama(tmp_path / "fallback")
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    library = LibraryTokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, [("▁", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>"
        )
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    library.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("text", ["a ab b", "aé日🎉 a", " a"])
def test_byte_fallback_tokenizers(tmp_path: Path, text: str) -> None:
    path = byte_fallback_model(tmp_path)
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert LibraryTokenizer.from_file(str(path / "tokenizer.json")).decode(ids) == text
    # An output continues a prompt: its first space is text.
    assert streamed(tokenizer, ids) == " " + text


def test_gguf_tokenizer_is_the_directorys(tiny: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = Tokenizer.load(make_tiny_gguf(tiny, tmp_path / "tiny.gguf"))
    for text in TEXTS:
        ids = loaded.encode(text, add_special_tokens=True)
        assert ids == tokenizer.encode(text, add_special_tokens=True)
        assert streamed(loaded, ids) == streamed(tokenizer, ids)
    assert (loaded.vocab_size, loaded.eos_token_ids) == (320, (2,))
    assert loaded.piece(MIN_VOCAB) == b""  # "[PAD279]" is of the unused type
    assert loaded.render_chat(CHAT) == tokenizer.render_chat(CHAT)


def test_gguf_llama3_splits(tiny: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Llama 3 puts BOS first and keeps newlines with the punctuation before them."""
    file = make_tiny_gguf(tiny, tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": "llama-bpe"})
    loaded = Tokenizer.load(file)
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert loaded.encode("hello", add_special_tokens=True) == [1, *hello]
    assert loaded.encode("hello", add_special_tokens=False) == hello
    split = loaded._tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345!\n\nhe")
    assert [piece for piece, _ in split] == ["it", "'s", "Ġ", "123", "45", "!ĊĊ", "he"]


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"tokenizer.ggml.model": "llama"}, r"expected 'gpt2' \(byte-level BPE\), got 'llama'"),
        ({"tokenizer.ggml.pre": "deepseek"}, "tokenizer.ggml.pre: expected one of gpt-2, .*, got 'deepseek'"),
        ({"llama.vocab_size": 200}, r"expected token ids from 0 to at most 199 \(vocab_size\), got 279"),
        ({"tokenizer.chat_template": "{% if"}, "chat template: expected a jinja2 template"),
    ],
    ids=["model", "pre", "vocab_size", "template"],
)
def test_gguf_tokenizers_we_cannot_build(tiny: Path, tmp_path: Path, metadata: dict, message: str) -> None:
    file = make_tiny_gguf(tiny, tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(file)


def with_template(tmp_path: Path, template: object, *, as_file: bool = False) -> Path:
    path = make_tiny_llama(tmp_path / "templated")
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = template if not as_file else "not this one"
    if as_file:
        (path / "chat_template.jinja").write_text(str(template))
    settings["eos_token"] = {"content": "<|im_end|>", "special": True}
    file.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "template, rendered",
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<|im_start|>Be brief.<|im_end|>"),
        ([{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ 1 + 1 }}"}], "2"),
        ("{% for m in messages %}\n  {% if loop.last %}{{ m | tojson }}{% endif %}\n{% endfor %}", None),
        ("{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}.{% endfor %}", "."),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
    ids=["tokens", "named", "tojson-trimmed", "loopcontrols", "strftime_now"],
)
def test_templates(tmp_path: Path, template: object, rendered: str | None) -> None:
    expected = rendered or '{"role": "user", "content": "hello"}'
    assert Tokenizer.load(with_template(tmp_path, template)).render_chat(CHAT) == expected


def test_template_file_comes_first(tmp_path: Path) -> None:
    path = with_template(tmp_path, "{{ messages | length }}", as_file=True)
    assert Tokenizer.load(path).render_chat(CHAT) == "2"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "does not take these messages: can only concatenate str"),
        ("{{ messages.append(1) }}", "does not take these messages: .*append.* is not safe|.*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages: access to attribute '__class__'"),
        (None, "no chat template"),
    ],
    ids=["raise", "type", "mutation", "escape", "none"],
)
def test_a_template_error_is_a_value_error(tmp_path: Path, template: str | None, message: str) -> None:
    tokenizer = Tokenizer.load(with_template(tmp_path, template))
    with pytest.raises(ValueError, match=message) as refused:
        tokenizer.render_chat(CHAT)
    assert not isinstance(refused.value, ModelError)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "tokenizer.json: expected a tokenizer of the tokenizers library, got .*No such file"),
        ("{}", "tokenizer.json: expected a tokenizer of the tokenizers library, got .+"),
        ("wordpiece", "tokenizer decoder: expected ByteLevel, or ByteFallback with Replace, got WordPiece"),
    ],
    ids=["missing", "empty", "wordpiece"],
)
def test_a_bad_tokenizer_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = make_tiny_llama(tmp_path / "tiny")
    file = path / "tokenizer.json"
    if content is None:
        file.unlink()
    elif content == "wordpiece":
        library = tiny_tokenizer()
        library.decoder = decoders.WordPiece()
        library.save(str(file))
    else:
        file.write_text(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(path)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "tiny")
    library = tiny_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(path / "tokenizer.json"))
    assert len(Tokenizer.load(path).encode("12345", add_special_tokens=True)) == 5


def test_smollm2() -> None:
    try:
        path = default_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    tokenizer = Tokenizer.load(path)
    for text in TEXTS[:4]:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert streamed(tokenizer, ids) == text
    # Digits are split singly; "Hello" and " world" are whole tokens of SmolLM2.
    assert tokenizer.encode("Hello world 2024", add_special_tokens=True) == [19556, 905, 216, 34, 32, 34, 36]
    assert tokenizer.eos_token_ids == (2,)
    rendered = tokenizer.render_chat(CHAT)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
