"""What a model process is told at its start. Neither torch nor a model is needed to check it.

The front runs

    python -m pagewire.serve.worker --role prefill|decode|colocated --config-json JSON
                                    --control-fd N | --listen HOST:PORT

with JSON a `WorkerConfig`. The descriptor is an end of an AF_UNIX SOCK_STREAM pair, handed over with `pass_fds`, that
leads to the front; without one, fronts connect. A config that cannot work ends the process with one sentence on stderr
and exit code 2, before `Ready`.
"""

import re

import msgspec

from pagewire.net.tls import Tls

DTYPES = ("float32", "bfloat16", "float16")
SCALED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
KV_DTYPES = (*DTYPES, *SCALED_DTYPES)  # of a cache, and of the wire
KV_ADDRESSES = {"shm": "unix:", "cuda-ipc": "cuda-ipc:"}  # by kv_transport: what a D on P's machine listens at
EXIT_BAD_CONFIG = 2  # the config, the model files or the descriptors: restarting will not help


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str  # a Hugging Face directory or a GGUF file
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: the first GPU if there is one
    dtype: str = "float32"  # of weights and activations
    kv_dtype: str | None = None  # of P's and D's KV cache; None: dtype. 8 bits have a scale per token and head
    page_size: int = 16
    pool_tokens: int = 8192  # KV tokens of this process's pool; rounded down to whole pages
    max_batch_size: int = 16  # requests decoded in one step
    max_waiting: int = 256  # requests queued for pages; one more is Failed at once
    prefill_chunk: int = 512  # prompt tokens in one forward
    num_threads: int = 1
    kv_wire_dtype: str | None = None  # None: as P and D agree, see transfer/negotiation.py
    kv_transport: str = "shm"  # of P and D on one machine; cuda-ipc: and on one GPU, see KV_ADDRESSES
    backend: str | None = None  # PAGEWIRE_BACKEND of the process
    staging_bytes: int = 64 << 20  # D's memory that P writes into
    handoff_timeout_ms: int = 60_000  # how long a handoff may make no progress
    start_timeout_s: float = 600.0  # from spawn to Ready; the first Triton compilations are in it
    worker_timeout_s: float = 30.0  # a process that is silent, or does not advance, for so long is killed
    tls: Tls | None = None  # of the control port and of KV between machines
    kv_port: int = 0  # D's, where P's on other machines connect; 0: any
    tenant: str = ""  # P and D of different ones do not exchange KV
    record_dir: str | None = None  # write every request's logits here; never set from HTTP
    verify_kv: bool = False  # compare SHA-256 of P's and D's KV after every handoff

    @property
    def num_pages(self) -> int:
        return self.pool_tokens // self.page_size

    def check(self) -> None:
        """Raises ValueError with one sentence naming the field, what it must be and what came."""
        for name in ("page_size", "max_batch_size", "max_waiting", "prefill_chunk", "num_threads", "staging_bytes",
                     "handoff_timeout_ms"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("start_timeout_s", "worker_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.num_pages < 1:
            page = f"at least one page of {self.page_size} tokens"
            raise ValueError(f"pool_tokens: expected {page}, got {self.pool_tokens}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:<index>, got {self.device!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.kv_transport not in KV_ADDRESSES:
            raise ValueError(f"kv_transport: expected one of {', '.join(KV_ADDRESSES)}, got {self.kv_transport!r}")
        for name, dtypes in (("kv_dtype", (self.dtype, *SCALED_DTYPES)), ("kv_wire_dtype", KV_DTYPES)):
            if getattr(self, name) not in (None, *dtypes):
                raise ValueError(f"{name}: expected null or one of {', '.join(dtypes)}, got {getattr(self, name)!r}")
