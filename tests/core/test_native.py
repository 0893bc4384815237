"""pagewire._host by itself: what it says of tensors, and what it refuses to start."""

import ctypes
import os

import pytest
import torch

from pagewire import native

_host = pytest.importorskip("pagewire._host")


def launch(**more):
    given = {"name": "k", "function": 1, "grid": (1, 1, 1), "num_threads": 32, "shared_bytes": 0}
    return _host.Launch(**given | {"values": [0, 0], "places": [(0, 0, 0)], "matrices": []} | more)


def capsule(name: bytes, major: int):
    """Of an API of that version, without functions."""
    api = (ctypes.c_uint32 * 32)(major, 0)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return api, new(ctypes.addressof(api), name, None)


@pytest.mark.skipif(native.looker is None, reason=f"torch {torch.__version__} does not show tensors to C++")
def test_addresses_are_those_of_torch():
    x = torch.zeros(4, 6)
    tensors = (x, x[1:], x[:, 3:], torch.zeros(()), x.to(torch.float8_e4m3fn), torch.nn.Parameter(x))
    for some in (tensors, tensors[:1], ()):
        expected = b"".join(t.data_ptr().to_bytes(8, "little") for t in some)
        assert native.addresses(some) == expected
        assert native._addresses(some) == tuple(t.data_ptr() for t in some)
    with pytest.raises(Exception, match="str|Tensor"):
        native.addresses(("no tensor",))


@pytest.mark.parametrize(
    "name, major", [(b"dlpack_exchange_api", 2), (b"dlpack_exchange_api", 1), (b"dlpack_exchange_api", 0)]
)
def test_another_exchange_api_is_refused(name, major):
    """Of version 1, but without a function for views, too."""
    api, given = capsule(name, major)
    with pytest.raises(ValueError, match="expected version 1 of DLPack's exchange API"):
        _host.Looker(torch.Tensor, given)
    assert api[0] == major


def test_another_capsule_is_refused():
    api, given = capsule(b"dltensor", 1)
    with pytest.raises(ValueError, match="PyCapsule"):
        _host.Looker(torch.Tensor, given)
    assert api[0] == 1


@pytest.mark.parametrize("place", [(2, 0, 0), (0, 15, 0), (0, 99, 0)])
def test_places_are_within_parameters_and_tensors(place):
    with pytest.raises(IndexError, match="a place beyond the parameters or tensors of k"):
        launch(places=[place])
    with pytest.raises(IndexError):
        _host.Launches([launch()], [99])


@pytest.mark.parametrize("where", [{"parameter": 2, "place": 0}, {"parameter": 0, "place": 15}])
def test_matrices_are_within_parameters_and_tensors(where):
    matrix = _host.Matrix(**where, type=9, shape=(16, 64), row_bytes=128, box=(16, 64), swizzle_bytes=128)
    with pytest.raises(IndexError, match="a matrix beyond the parameters or tensors of k"):
        launch(matrices=[matrix])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is there")
def test_nothing_is_started_without_a_driver():
    if any(os.path.exists(f"{folder}/libcuda.so.1") for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        pytest.skip("a stand-in is there")
    assert _host.Launches([launch()], [0]).start((torch.zeros(1),), None, 0) is False
