"""What a device guard records: one int64 word per device, `kind << 56 | request << 32 | entry`, kept by atomic_max.

The largest word wins, so the report does not depend on the order in which blocks ran.
"""

# kind -> (op, what is wrong); the sentence is completed with request and entry by pagewire.errors
DECODE_PAGE = 1
PREFILL_PAGE = 2
DECODE_SEQ_LEN = 3
PREFILL_SEQ_LEN = 4
PREFILL_CU_SEQLENS_Q = 5
PREFILL_MAX_Q_LEN = 6
APPEND_SLOT = 7
PACK_SLOT = 8
UNPACK_SLOT = 9
DECODE_COUNTER = 10
PREFILL_COUNTER = 11

KIND_SHIFT = 56
REQUEST_SHIFT = 32
MAX_REQUEST = (1 << 24) - 1
MAX_ENTRY = (1 << 32) - 1
