"""A model path is a Hugging Face directory or a GGUF file; anything else is refused."""

from pathlib import Path

from pagewire.serve.model import gguf, hf
from pagewire.serve.model.config import ModelConfig, ModelError

Weights = gguf.GGUFWeights | hf.HFWeights  # tensors by their Hugging Face names


def is_gguf(path: Path) -> bool:
    """True for a GGUF file, False for a directory; raises ModelError for anything else."""
    gguf_file = path.is_file() and path.suffix == ".gguf"
    if not gguf_file and not path.is_dir():
        found = "another kind of file" if path.exists() else "no such file"
        raise ModelError(f"{path}: expected a Hugging Face directory or a .gguf file, got {found}")
    return gguf_file


def load_config(path: Path) -> ModelConfig:
    """The config of the model at `path`. Raises ModelError. Loads no torch and no weights."""
    return gguf.config_of(gguf.GGUFFile(path)) if is_gguf(path) else hf.read_config(path)


def open_weights(path: Path) -> Weights:
    """The model at `path`, with every tensor's name, shape and dtype checked. Raises ModelError."""
    return gguf.GGUFWeights(path) if is_gguf(path) else hf.HFWeights(path)
