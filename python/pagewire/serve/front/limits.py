"""Every cap the front puts on a request before it does any work for it."""

import msgspec


class Limits(msgspec.Struct, frozen=True):
    max_body_bytes: int = 2 << 20
    body_timeout_s: float = 30.0  # a body must arrive within this
    request_timeout_s: float = 600.0  # a request must end within this
    max_inflight: int = 256  # outputs (prompts x n) admitted and not yet ended; more are answered 429
    max_n: int = 16
    max_prompts: int = 16  # prompts of one /v1/completions body
    max_stop: int = 4
    max_stop_chars: int = 256
    # Text is refused before it is tokenised when even long tokens could not make it fit.
    max_chars_per_context_token: int = 16
    default_max_tokens: int = 16  # /v1/completions, as OpenAI's
    default_max_chat_tokens: int = 512  # /v1/chat/completions, or what still fits the context
