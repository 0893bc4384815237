from typing import NamedTuple

class KernelConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    programs_per_processor: int = 1

class Problem(NamedTuple):
    arch: int
    head_dim: int
    q_bytes: int
    kv_bytes: int
    page_size: int

def decode_config(problem, rows):
    return KernelConfig(min(64, max(16, 1 << (rows-1).bit_length())), 16 if problem.arch==0 else 64, 4, 3, 1 if problem.arch==0 else 2)

def prefill_config(problem):
    return KernelConfig(16, 16, 4, 3) if problem.arch==0 else KernelConfig(128, 64, 8, 3)

def row_limit(problem):
    return 16 if problem.arch==0 else 64
