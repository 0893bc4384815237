"""CUDA IPC between two processes: on one GPU, and with a fake of the driver where there is none."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch

from pagewire.net.channel import ChannelClosed
from pagewire.transfer import cuda_ipc
from pagewire.transfer.frames import Ack, Held, Hello
from pagewire.transfer.transport import connect, listen
from transfer import fake_cuda
from transfer.ipc_ends import D_PAGES, P_PAGES, SLOT_BYTES, SLOTS, START_S, D, P, kept, make_cache, next_frame

HELLO = Hello("decode", 0, 0, b"i" * 16, b"f" * 32, (Held(0, 1, 0, 1, 8, 8, "float32", "none"),))
ENDS = Path(__file__).with_name("ipc_ends.py")


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory) -> str:
    return fake_cuda.build(tmp_path_factory.mktemp("libcuda"))


class Gpu(NamedTuple):
    device: str
    library: str  # the fake one, or ""

    def allocated(self) -> int:
        """Bytes of staging that this process has allocated, or with a real driver, that anyone has of anything."""
        if self.library:
            return fake_cuda.num_bytes(self.library)[0]
        free, total = torch.cuda.mem_get_info()
        return total - free


@pytest.fixture(params=["fake", "real"])
def gpu(request, libcuda, monkeypatch):
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("no GPU: its driver is a fake in the tests beside this one")
        yield Gpu("cuda", "")
        return
    fake_cuda.install(libcuda, monkeypatch.setattr)
    yield Gpu("cpu", libcuda)
    assert fake_cuda.num_bytes(libcuda) == (0, 0)


@pytest.fixture()
def start(gpu):
    """Starts a process of ipc_ends.py; it is gone in the end."""
    children: list[subprocess.Popen] = []

    def run(*args: str) -> subprocess.Popen:
        role, address, dtype, *how = args
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        child = subprocess.Popen(
            [sys.executable, str(ENDS), role, address, dtype, gpu.library, *how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        children.append(child)
        return child

    yield run
    for child in children:
        with child:
            child.kill()


def said(child: subprocess.Popen) -> str:
    return child.stdout.readline().strip()


def eventually(holds: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lost(transport) -> None:
    with pytest.raises(ChannelClosed):
        while True:
            next_frame(transport, 10)


@pytest.mark.parametrize("address", ["cuda-ipc:", "unix:"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_what_p_packs_is_what_d_keeps(gpu, start, dtype, address):
    """To the bit; with `unix:` the same caches go through host memory."""
    if (address, gpu.device) == ("unix:", "cpu"):
        pytest.skip("nothing of it is on a GPU")
    d = D(address, make_cache(dtype, gpu.device, seed=2))
    child = start("p", d.listener.address, dtype, "push")
    d.join()
    assert d.packing.wire.checksum_kind == ("fletcher64" if address == "cuda-ipc:" else "crc32c")
    for _ in range(SLOTS):
        assert d.unpack(next_frame(d.link)) is None
    assert torch.equal(kept(d.cache, D_PAGES), kept(make_cache(dtype, gpu.device, seed=1), P_PAGES))
    d.link.close()
    assert child.wait(START_S) == 0
    d.listener.close()


def test_what_changes_behind_its_chunk_is_refused(gpu, start):
    d = D("cuda-ipc:", make_cache("bfloat16", gpu.device, seed=2))
    before = kept(d.cache, D_PAGES)
    child = start("p", d.listener.address, "bfloat16", "tamper")
    d.join()
    for slot in range(SLOTS):
        chunk = next_frame(d.link)
        assert next_frame(d.link) == Ack("tampered", slot)
        assert "CHUNK: payload FLETCHER64: expected 0x" in d.unpack(chunk)
    assert torch.equal(kept(d.cache, D_PAGES), before)
    d.link.close()
    assert child.wait(START_S) == 0
    d.listener.close()


def push_again(gpu, start, d: D) -> None:
    child = start("p", d.listener.address, "bfloat16", "push")
    d.join()
    for _ in range(SLOTS):
        assert d.unpack(next_frame(d.link)) is None
    assert torch.equal(kept(d.cache, D_PAGES), kept(make_cache("bfloat16", gpu.device, seed=1), P_PAGES))
    d.link.close()
    assert child.wait(START_S) == 0
    d.listener.close()


def test_d_survives_a_p_that_is_killed(gpu, start):
    d = D("cuda-ipc:", make_cache("bfloat16", gpu.device, seed=2))
    child = start("p", d.listener.address, "bfloat16", "hold")
    d.join()
    assert said(child) == "ready"
    child.kill()
    child.wait()
    lost(d.link)
    d.link.close()
    if gpu.library:
        assert gpu.allocated() == 0
    push_again(gpu, start, d)


def test_p_survives_a_d_that_is_killed(gpu, start):
    cache = make_cache("bfloat16", gpu.device, seed=1)
    for killed in (True, False):
        child = start("d", "cuda-ipc:", "bfloat16")
        p = P(said(child), cache)
        assert said(child) == "ready"
        p.push(0)
        if killed:
            child.kill()
        else:
            child.stdin.close()
        child.wait()
        lost(p.link)
        p.link.close()
        if gpu.device == "cuda":
            torch.cuda.synchronize()  # nothing of it has failed


def test_memory_is_kept_until_p_has_unmapped_it(gpu, start):
    """Though D's end is closed long before. The fake driver aborts who frees it."""
    d = D("cuda-ipc:", make_cache("bfloat16", gpu.device, seed=2))
    child = start("p", d.listener.address, "bfloat16", "hold")
    d.join()
    assert said(child) == "ready"
    d.link.close()
    assert d.link.staging is None and d.link.fileno() == -1
    assert d.listener.accept() is None
    assert len(d.listener.kept) == 1 and gpu.allocated() > 0
    child.stdin.close()
    assert child.wait(START_S) == 0
    assert d.listener.accept() is None
    assert not d.listener.kept
    d.listener.close()


def test_connections_leave_no_memory_behind(gpu, start):
    d = D("cuda-ipc:", make_cache("bfloat16", gpu.device, seed=2))
    before = 0
    child = start("p", d.listener.address, "bfloat16", "again")
    for i in range(20):
        d.join()
        lost(d.link)
        d.link.close()
        if i == 4:
            before = gpu.allocated()
    if gpu.library:
        assert before == gpu.allocated() == 0
    else:  # the child's context is there at both times
        assert gpu.allocated() - before < 8 * cuda_ipc.GRANULE
    assert child.wait(START_S) == 0
    d.listener.close()


# ---------------------------------------------------------------- with the fake driver only


@pytest.fixture()
def fake(libcuda, monkeypatch):
    fake_cuda.install(libcuda, monkeypatch.setattr)
    yield monkeypatch
    assert fake_cuda.num_bytes(libcuda) == (0, 0)


@pytest.fixture()
def greeted(fake):
    """P's end, D's HELLO."""
    listener = listen("cuda-ipc:", HELLO, (SLOTS, SLOT_BYTES))
    p = connect(listener.address)
    d = listener.accept()
    yield p, next_frame(p)
    for end in (p, d, listener):
        end.close()


def test_p_refuses_another_gpu(greeted, fake):
    p, hello = greeted
    fake.setenv("FAKE_CUDA_UUID", "0123456789abcdef")
    here, there = "GPU-30313233-3435-3637-3839-616263646566 here", "GPU-61206661-6b65-206f-6620-61204750552e there"
    with pytest.raises(ValueError, match=f"cuda-ipc: expected P and D on one GPU, got {here} and {there}"):
        p.open_staging(hello)


def test_a_process_cannot_open_its_own(greeted):
    p, hello = greeted
    with pytest.raises(OSError, match="expected memory of D, another process that lives: .*INVALID_CONTEXT"):
        p.open_staging(hello)


def test_memory_of_a_process_that_is_gone(greeted):
    p, hello = greeted
    gone = subprocess.Popen(["true"])
    gone.wait()
    reach = f"{gone.pid} 5".encode().ljust(64, b"\0") + hello.staging[64:]
    with pytest.raises(OSError, match="expected memory of D, another process that lives: .*CUDA_ERROR_INVALID_VALUE"):
        p.open_staging(msgspec.structs.replace(HELLO, num_slots=SLOTS, slot_bytes=SLOT_BYTES, staging=reach))


@pytest.mark.parametrize("reach", [b"", b"x" * 79, b"x" * 81])
def test_a_hello_without_a_handle(greeted, reach):
    p, hello = greeted
    with pytest.raises(ValueError, match=f"HELLO: staging: expected 80 bytes, got {len(reach)}"):
        p.open_staging(msgspec.structs.replace(hello, staging=reach))


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("FAKE_CUDA_MEMORY", str(3 << 20), "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY"),
        ("FAKE_CUDA_NO_IPC", "1", "cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_a_device_that_has_no_memory_or_no_ipc(fake, variable, value, sentence):
    """P is sent away and D says why; it serves the next one when it can."""
    listener = listen("cuda-ipc:", HELLO, (SLOTS, 1 << 20))
    fake.setenv(variable, value)
    p = connect(listener.address)
    assert listener.accept() is None and listener.problem == f"cuda-ipc: the driver refused: {sentence}"
    lost(p)
    p.close()
    fake.delenv(variable)
    p = connect(listener.address)
    d = listener.accept()
    for end in (p, d, listener):
        end.close()


def test_no_driver(fake):
    fake.setattr(cuda_ipc, "LIBRARY", "libcuda-none.so.1")
    with pytest.raises(OSError, match="^cuda-ipc: expected NVIDIA's driver: libcuda-none.so.1: cannot open") as e:
        listen("cuda-ipc:", HELLO, (SLOTS, SLOT_BYTES))
    assert "\n" not in str(e.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_no_gpu():
    with pytest.raises(OSError, match="cuda-ipc: expected a GPU, torch sees none"):
        listen("cuda-ipc:", HELLO, (SLOTS, SLOT_BYTES))
