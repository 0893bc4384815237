"""The model behind the reference server: files in, logits out, KV through pagewire ops only.

What is re-exported here needs no torch, so the front process may import it. The model itself is
`pagewire.serve.model.llama.Llama`, the sampler `pagewire.serve.model.sampling.sample`.
"""

from pagewire.serve.model.config import ModelConfig, ModelError, RopeScaling
from pagewire.serve.model.default import default_model_path
from pagewire.serve.model.files import load_config
from pagewire.serve.model.fingerprint import fingerprint

__all__ = ["ModelConfig", "ModelError", "RopeScaling", "default_model_path", "fingerprint", "load_config"]
