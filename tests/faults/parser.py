"""What every input of the frame parser must lead to; as a script, libFuzzer's target: `parser.py CORPUS -runs=N`."""

import struct
import sys
from contextlib import nullcontext

try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(include=["pagewire.transfer"]) if atheris and __name__ == "__main__" else nullcontext():
    from pagewire.transfer import frames
    from pagewire.transfer.codec import ConnectionLost, FrameCodec

BODY = 24  # a frame without a body: prefix and CRC


def resealed(data: bytes) -> bytes:
    """With magic, versions, frame_bytes and CRC made right, so that only the parser is in the way."""
    head = frames.MAGIC + struct.pack("<HHI", frames.VERSION, frames.VERSION, 0)
    data = head + struct.pack("<I", len(data)) + data[16:-4]
    return data + struct.pack("<I", frames.crc32c(data))


LAYERS = HEADS = HEAD_DIM = 4096
TOKENS, PAYLOAD = 1 << 24, 1 << 31
BOUNDS = {  # written out: the parser's own say nothing against themselves. At most so many, or so long
    "layer_stop": LAYERS, "digests": LAYERS, "head_stop": HEADS, "group": 63, "groups": 64, "blocks": 64,
    "head_dim": HEAD_DIM, "head_dim_v": HEAD_DIM, "num_tokens": TOKENS, "token_stop": TOKENS, "num_slots": 1 << 16,
    "slot": (1 << 16) - 1, "slot_bytes": PAYLOAD, "payload_bytes": PAYLOAD, "request_id": 128, "reason": 256,
    "capability": 16, "incarnation": 16, "fingerprint": 32, "prompt_sha256": 32, "wire_dtypes": 32, "tenant": 128,
    "staging": 16 << 10,
}  # fmt: skip
AT_LEAST_ONE = {"groups", "head_dim", "num_tokens", "payload_bytes", "wire_dtypes"}


def check_bounds(frame: frames.Frame | frames.Held | frames.Block) -> None:
    values = {name: getattr(frame, name) for name in frame.__struct_fields__}
    for record in (*values.get("groups", ()), *values.get("blocks", ())):
        check_bounds(record)
    for name, value in values.items():
        size = value if isinstance(value, int) else len(value)
        assert (name in AT_LEAST_ONE) <= size <= BOUNDS.get(name, 1 << 64), f"{name}: {value!r:.99}"
        if name.endswith("_stop"):
            empty = isinstance(frame, frames.Held) and value == values[name.replace("_stop", "_start")]
            assert empty or values[name.replace("_stop", "_start")] < value, f"{name}: {value}"


def check(data: bytes) -> bool:
    """Whether it is a frame. Raises if the parser does anything but return one within its bounds, or refuse."""
    try:
        frame, sequence = frames.decode(data)
    except frames.FrameError:
        lost = True
    else:
        lost = False
        check_bounds(frame)
        again = frames.encode(frame, sequence)  # which only what is within its bounds can be
        assert len(again) <= frames.MAX_FRAME_BYTES and frames.decode(again) == (frame, sequence), frame
    codec = FrameCodec()
    if len(data) >= BODY:
        codec._num_received = struct.unpack_from("<I", data, 16)[0]
    try:
        taken = codec.decode(data)
    except ConnectionLost:
        assert lost
    else:
        assert not lost and taken == frame
    return not lost


def check_both(data: bytes) -> None:
    check(data)
    if len(data) >= BODY:
        check(resealed(data))


if __name__ == "__main__":
    atheris.Setup(sys.argv, check_both)
    atheris.Fuzz()
