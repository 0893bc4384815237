"""Frames on one connection, counted: a frame that is missing, repeated or damaged means that the connection is lost."""

from pagewire.transfer.frames import Frame, FrameError, decode, encode

SEQUENCES = 1 << 32


class ConnectionLost(Exception):
    """What came is not what the peer sent next, so a grant, a credit or an ACK may be gone: nothing after it counts."""


class FrameCodec:
    """One end of one connection."""

    def __init__(self) -> None:
        self._num_sent = self._num_received = 0

    def encode(self, frame: Frame) -> bytes:
        data = encode(frame, self._num_sent % SEQUENCES)
        self._num_sent += 1
        return data

    def decode(self, data: bytes) -> Frame:
        """Raises ConnectionLost."""
        expected = self._num_received % SEQUENCES
        try:
            frame, sequence = decode(data)
        except FrameError as error:
            raise ConnectionLost(f"frame {expected} cannot be read: {error}") from error
        if sequence != expected:
            raise ConnectionLost(f"sequence: expected {expected}, got {sequence} ({type(frame).__name__})")
        self._num_received += 1
        return frame
