"""The HTTP process: requests in, text out, and the life of the model processes. No torch, no model file."""
