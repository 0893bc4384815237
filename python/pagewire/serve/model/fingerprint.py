"""One SHA-256 for "the same model": two processes may exchange KV only if theirs agree."""

import dataclasses
import hashlib
import json
from pathlib import Path

from pagewire.serve.model.config import ModelConfig
from pagewire.serve.model.files import is_gguf
from pagewire.serve.model.hf import weight_files

# What besides the weights decides which ids a text becomes.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def fingerprint(path: Path, config: ModelConfig) -> str:
    """SHA-256 (64 hex digits) over the config with RoPE, the tokenizer files and every weight byte.

    Whole files are hashed, about 1 s per GB: any changed byte changes it. The name of the model and
    of its directory do not matter: two machines may keep it in different places. Raises ModelError.
    config: what was read of `path`.
    """
    canonical = dataclasses.asdict(config)
    del canonical["name"]
    if is_gguf(path):
        files = {"gguf": path}  # holds the tokenizer as well
    else:
        files = {file.name: file for file in weight_files(path)}
        files |= {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}
    digests = {name: _file_digest(file) for name, file in files.items()}
    text = json.dumps({"config": canonical, "files": digests}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
