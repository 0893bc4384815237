"""The model behind the reference server: files and text in, logits and tokens out, KV through pagewire ops only.

Torch is imported by `llama`, `rope` and `sampling` alone: `serve/cli.py` reads a model's tokenizer for the front, which
stays without it.
"""
