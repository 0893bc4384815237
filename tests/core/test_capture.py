"""Whether a stream is being captured is asked of the tensors' device: the current one may be another."""

import pytest
import torch

from pagewire import errors
from pagewire.backends import cuda
from pagewire.kernels import device as devices

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Current:
    """torch.cuda's current device; the stream of `captured` is being captured, no other."""

    def __init__(self, captured: torch.device) -> None:
        self.index, self.captured = 0, captured.index

    def device(self, device: torch.device):
        current = self

        class Use:
            def __enter__(self) -> None:
                self.before, current.index = current.index, device.index

            def __exit__(self, *_) -> None:
                current.index = self.before

        return Use()


@pytest.fixture(params=[FIRST, SECOND], ids=str)
def captured(request, monkeypatch) -> torch.device:
    current = Current(request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.index)
    monkeypatch.setattr(torch.cuda, "device", current.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.index == current.captured)
    yield request.param
    assert current.index == 0, "the current device is as it was"


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_is_capturing(device, captured):
    assert devices.is_capturing(device) is (device == captured)
    assert devices.is_capturing(torch.device("cpu")) is False


@pytest.fixture
def on_cpu(monkeypatch):
    """Tensors of a made-up GPU are made on the CPU."""
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **more: real(*size, **more))


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_a_table_is_written_on_its_device(device, captured, monkeypatch):
    tables = pytest.importorskip("pagewire.kernels.tables")
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **options: launched.append(torch.cuda.current_device())

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **more: empty(*size, **more))
    monkeypatch.setattr(tables, "_write_kernel", Kernel())
    tables._write(tuple(range(40)), device)
    assert launched == [device.index] * 2


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_error_word(device, captured, on_cpu, monkeypatch):
    monkeypatch.setattr(errors, "_words", {})
    if device == captured:
        with pytest.raises(RuntimeError, match=f"error word of {device} does not exist yet"):
            errors.device_word(device)
    else:
        assert errors.device_word(device) is errors.device_word(device)


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_check_after_call(device, captured, monkeypatch):
    checked = []
    monkeypatch.setattr(errors, "_words", {device: None})
    monkeypatch.setattr(errors, "check_errors", lambda: checked.append(device))
    monkeypatch.setenv("PAGEWIRE_CHECK", "1")
    errors.check_after_call(device)
    assert bool(checked) is (device != captured)


def test_counters_of_a_capture_are_its_own(captured, on_cpu, monkeypatch):
    """By q's stream alone: stream 7 is being captured, first as graph 5, then as graph 6."""
    graph = 0

    class Extension:
        @staticmethod
        def capture_id(stream: int) -> int:
            return graph if stream == 7 else 0

    monkeypatch.setattr(cuda, "_built", Extension)
    monkeypatch.setattr(cuda, "_counter_buffers", {})
    eager = cuda._counters(SECOND, 7, 10)
    graph = 5
    mine = cuda._counters(SECOND, 7, 10)
    assert mine is not eager and mine is cuda._counters(SECOND, 7, 10)
    assert cuda._counters(SECOND, 8, 10) is not mine
    graph = 6
    assert cuda._counters(SECOND, 7, 10) is not mine
    graph = 0
    assert cuda._counters(SECOND, 7, 10) is eager
    assert cuda._counters(SECOND, 7, 2000).of_items.shape == (2000,)
