"""Backends: an explicit name is obeyed or refused with its reason; explain() tells why."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cases
import pagewire as pw
from pagewire import registry
from pagewire.types import Modifiers, Problem


def test_unknown_name():
    with pytest.raises(pw.BackendError, match="backend='cudnn': expected one of .*reference"):
        cases.build(cases.Attention((3,))).run("cudnn")


def test_environment_chooses(monkeypatch):
    call = cases.build(cases.Attention((3,)))
    monkeypatch.setenv("PAGEWIRE_BACKEND", "nonsense")
    with pytest.raises(pw.BackendError, match="PAGEWIRE_BACKEND='nonsense': expected one of"):
        call.run(None)
    call.run("reference")  # the argument wins
    monkeypatch.setenv("PAGEWIRE_BACKEND", "reference")
    call.run(None)


def test_explicit_name_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(pw.BackendError, match="backend='triton' refuses this decode: .*TRITON_INTERPRET=1"):
        cases.build(cases.Attention((3,))).run("triton")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_device_before_sm_80_is_refused(name, monkeypatch):
    """Its processors lack the kernels' shared memory and asynchronous copies."""
    (backend,) = (b for b in registry.BACKENDS if b.name == name)
    problem = Problem("decode", "cuda", torch.float16, torch.float16, 128, 128, 16)
    monkeypatch.setattr(registry, "cuda_versions", lambda: (13000, 13000))
    for capability, words in (((7, 5), "needs sm_80 or newer, this device is sm_75"), ((8, 0), None), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        assert backend.special(problem) == words


def test_head_dim_limit():
    problem = pw.explain("decode", device="cpu", head_dim=2048)
    assert "head_dim = 2048 is above 256" in problem and "-> reference" in problem


def test_explain_marks_the_choice(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    text = pw.explain("pack_kv", device="cpu", dtype=torch.int8)
    lines = {line.split()[0 if not line.startswith("->") else 1]: line for line in text.splitlines()[1:]}
    assert set(lines) == {b.name for b in registry.BACKENDS}
    assert "runs on CPU tensors only under TRITON_INTERPRET=1" in lines["triton"]
    assert sum(line.startswith("->") for line in lines.values()) == 1
    with pytest.raises(ValueError, match="op: expected one of append_kv"):
        pw.explain("attend")


def run(code: str, **env: str) -> str:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout


def test_import_loads_no_kernel_and_touches_no_device():
    code = (
        "import sys, torch; before = set(sys.modules); import pagewire\n"
        "new = set(sys.modules) - before\n"
        "print([m for m in new if m.startswith(('triton', 'pagewire._', 'pagewire.kernels.')) "
        "and m not in ('pagewire._api', 'pagewire._host', 'pagewire.kernels.error_codes')])\n"
        "print(torch.cuda.is_initialized())"
    )
    assert run(code).split("\n")[:2] == ["[]", "False"]


def test_import_is_quick():
    """< 50 ms of CPU time beyond torch, byte-compiled as an installed package is; the fastest of three."""
    code = "import torch, time; t = time.process_time(); import pagewire; print(time.process_time() - t)"
    assert min(float(run(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(3)) < 0.05


def test_server_package_needs_no_torch():
    pytest.importorskip("msgspec", reason="pagewire[serve] is not installed")
    assert run("import sys, pagewire.serve.messages; print('torch' in sys.modules)").strip() == "False"


def test_slow_path_warns_once(monkeypatch):
    code = (
        "import warnings, torch, pagewire as pw; warnings.simplefilter('always')\n"
        "o, s = torch.ones(1, 1, 2048), torch.ones(1, 1)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): pw.merge_state(o, s, o, s)\n"
        "print(len([w for w in caught if 'reference backend' in str(w.message)]))"
    )
    expected = "1" if "-> reference" in pw.explain("merge_state", device="cpu", head_dim=2048) else "0"
    assert run(code).strip() == expected


@pytest.mark.parametrize(
    ("driver", "runtime", "words"),
    [
        (12080, 13000, ("CUDA 13.0", "CUDA 12.8", "driver of CUDA 13.0 or newer")),
        (11080, 12040, ("CUDA 12.4", "CUDA 11.8", "driver of CUDA 12.1 or newer")),
        (12000, 12090, ("CUDA 12.9", "CUDA 12.0", "driver of CUDA 12.1 or newer")),
        (13000, 13020, None),  # one major version: compatible
        (13010, 12040, None),
        (0, 13000, None),  # no driver: another sentence
    ],
)
def test_an_older_driver_is_refused_with_both_versions(driver, runtime, words, monkeypatch):
    extension = SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: runtime)
    monkeypatch.setitem(sys.modules, "pagewire._cuda", extension)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: object())
    registry.cuda_versions.cache_clear()
    try:
        reason = registry._cuda_unavailable("cuda")
    finally:
        registry.cuda_versions.cache_clear()
    if words is None:
        assert torch.cuda.is_available() or reason == "torch sees no CUDA device"
    else:
        assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("source", "without"),
    [
        ("python/pagewire/backends/reference.py", {"split_size"}),
        ("csrc/bindings/params.h", set()),
        ("kernels/launch.py", set()),
    ],
    ids=["reference", "cpu and cuda", "triton"],
)
def test_every_backend_reads_every_modifier(source, without):
    """By name: one that does not know a new field would leave it out of its result and say nothing."""
    text = (Path(__file__).parents[2] / source).read_text()
    reads = {name for name in Modifiers._fields if re.search(rf'(\bm\.|modifiers\.|"){name}\b', text)}
    assert reads == set(Modifiers._fields) - without


@pytest.mark.parametrize(
    "switch, asked, said",
    [
        ("0", {"op": "decode"}, "takes it, by the tl kernels: PAGEWIRE_HOPPER is 0"),
        ("1", {"op": "decode"}, "takes it, by kernels/hopper/"),
        ("1", {"op": "decode", "page_size": 3}, "takes it, by the tl kernels: k_cache with pages of 3"),
        ("1", {"op": "decode", "group_size": 33}, "by the tl kernels: 33 query heads to a kv head: at most 32"),
        ("1", {"op": "prefill"}, "takes it, by kernels/hopper/"),
        ("1", {"op": "prefill", "head_dim": 80}, "takes it, by the tl kernels: head_dim 80, 80 of V"),
        ("1", {"op": "prefill", "max_q_len": 4}, "takes it, by the tl kernels: rows in cu_seqlens_q"),
        ("1", {"op": "merge_state"}, "takes it\n"),
    ],
)
def test_explain_says_which_kernels_of_tritons_take_it_on_hopper(switch, asked, said, monkeypatch):
    pytest.importorskip("triton")
    from pagewire.kernels import launch

    monkeypatch.setenv("PAGEWIRE_HOPPER", switch)
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device(90, 132))
    triton = dataclasses.replace(registry.BACKENDS[0], special=lambda problem: None)
    monkeypatch.setattr(registry, "BACKENDS", (triton, *registry.BACKENDS[1:]))
    assert said in pw.explain(device="cuda", **asked)
