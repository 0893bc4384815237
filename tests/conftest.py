"""One suite for every machine: on a GPU the backends run there; without one, Triton runs under its interpreter and
the CUDA sources under their emulation (built by g++ on first use, about a minute).

TRITON_INTERPRET is read when Triton is imported, so it is set here, before anything imports it. Tests that compile
kernels for real do so in a subprocess without it.
"""

import os

import torch

DEVICE = os.environ.get("PAGEWIRE_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("PAGEWIRE_EMULATE_CUDA", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

import pagewire as pw  # noqa: E402
from cuda_fault import CudaFault  # noqa: E402
from pagewire import emulation, registry  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE == "cuda":
        config.pluginmanager.register(CudaFault(config, torch.cuda.synchronize))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(params=[b.name for b in registry.BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    """Every registered backend; one that cannot run here is skipped with its reason."""
    reason = pw.backends(DEVICE)[request.param]
    if reason is not None:
        pytest.skip(f"{request.param} on {DEVICE}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def no_error_left_behind():
    """A device guard that fired in a test which did not expect it fails that test."""
    yield
    pw.check_errors()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the CUDA emulation before the first test's clock runs."""
    needed = any("cuda" in item.nodeid for item in session.items)
    if needed and not session.config.option.collectonly and pw.backends(DEVICE)["cuda"] is None:
        if DEVICE == "cpu":
            emulation.load(emulation.mode())


def pytest_report_header(config: pytest.Config) -> str:
    lines = [f"{name}: {reason or 'runs'}" for name, reason in pw.backends(DEVICE).items()]
    return f"pagewire on {DEVICE}, torch {torch.__version__}; backends " + "; ".join(lines)
