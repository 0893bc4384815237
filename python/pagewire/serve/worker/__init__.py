"""A model process: P prefills, D decodes, or one of them does both. `python -m pagewire.serve.worker` starts it."""
