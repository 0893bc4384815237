"""The model behind the reference server: files and text in, logits and tokens out, KV through pagewire ops only.

Torch is imported by `llama`, `rope` and `sampling` alone: `serve/cli.py` reads a model's tokenizer for the front, which
stays without it.
"""

from pagewire.serve.model.config import ModelConfig, ModelError, RopeScaling
from pagewire.serve.model.default import default_model_path
from pagewire.serve.model.files import load_config
from pagewire.serve.model.fingerprint import fingerprint

__all__ = ["ModelConfig", "ModelError", "RopeScaling", "default_model_path", "fingerprint", "load_config"]
