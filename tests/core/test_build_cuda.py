"""How the CUDA extension is built: for which architectures, and from which objects; nvcc itself is stood in for."""

import importlib.util
import json
import os
import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;;
esac
echo "$@" >> "$CALLS"
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2;; -MF) deps=$2;; esac
  shift
done
echo object > "$out"
[ -z "$deps" ] || echo "$out:" > "$deps"
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """csrc/build_cuda.py with an nvcc that writes down how it was called."""
    pytest.importorskip("ninja")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("PAGEWIRE_CUDA", "PAGEWIRE_CUDA_ARCH", "PAGEWIRE_CUDA_OBJECTS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc" / "build_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calls(tmp_path) -> list[str]:
    path = tmp_path / "calls"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_every_architecture_by_default_and_those_that_are_named(recipe, tmp_path, monkeypatch):
    recipe.build(tmp_path / "all", (), tmp_path / "all.so")
    compiled = [call for call in calls(tmp_path) if " -c " in call]
    assert len(compiled) == len(recipe.SOURCES)
    for flag in ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"):
        assert all(flag in call for call in compiled)
    monkeypatch.setenv("PAGEWIRE_CUDA_ARCH", "90a")
    recipe.build(tmp_path / "one", (), tmp_path / "one.so")
    compiled = [call for call in calls(tmp_path) if " -c " in call]
    assert all(call.count("-gencode") == 1 and "sm_90a" in call for call in compiled)


@pytest.mark.parametrize("name", ["abc", "9", "sm_90", "90a+ptx"])
def test_a_bad_architecture_is_one_sentence(name, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_CUDA_ARCH", name)
    with pytest.raises(recipe.CannotBuild, match=r"PAGEWIRE_CUDA_ARCH: expected 80, 90a or 90\+PTX, got "):
        recipe.build(tmp_path / "b", (), tmp_path / "b.so")


@pytest.mark.parametrize(
    ("capabilities", "expected"), [("9.0", ("90a",)), ("8.6\n8.0\n8.6", ("80", "86")), ("12.0", ("120",))]
)
def test_native_is_what_nvidia_smi_names(capabilities, expected, recipe, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{capabilities}\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("PAGEWIRE_CUDA_ARCH", "native")
    assert recipe.architectures() == expected
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(recipe.CannotBuild, match="architecture native: nvidia-smi names no GPU"):
        recipe.architectures()


def test_objects_made_before_are_linked_and_not_compiled(recipe, tmp_path, monkeypatch):
    recipe.save_objects(tmp_path / "objects")
    assert len([c for c in calls(tmp_path) if " -c " in c]) == len(recipe.KERNELS)
    monkeypatch.setenv("PAGEWIRE_CUDA_OBJECTS", str(tmp_path / "objects"))
    recipe.build(tmp_path / "b", (), tmp_path / "b.so")
    compile_bindings, link = calls(tmp_path)
    assert str(recipe.BINDINGS) in compile_bindings and " -shared " in f" {link} "
    assert all(str(tmp_path / "objects" / f"{k.name}.o") in link for k in recipe.KERNELS)


def _another_source(recipe, objects, monkeypatch):
    found = json.loads((objects / recipe.MANIFEST).read_text())
    (objects / recipe.MANIFEST).write_text(json.dumps({**found, "sources": "another"}))


def _other_flags(recipe, objects, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_CUDA_ARCH", "80")


def _one_gone(recipe, objects, monkeypatch):
    (objects / "merge.cu.o").unlink()


def _no_manifest(recipe, objects, monkeypatch):
    (objects / recipe.MANIFEST).unlink()


CHANGED = {
    "sources differ": _another_source, "flags differ": _other_flags, "merge.cu.o differ": _one_gone,
    "No such file": _no_manifest,
}  # fmt: skip


@pytest.mark.parametrize("words", CHANGED)
def test_objects_of_another_build_are_not_linked(words, recipe, tmp_path, monkeypatch, capsys):
    objects = tmp_path / "objects"
    recipe.save_objects(objects)
    calls(tmp_path)
    CHANGED[words](recipe, objects, monkeypatch)
    monkeypatch.setenv("PAGEWIRE_CUDA_OBJECTS", str(objects))
    recipe.build(tmp_path / "b", (), tmp_path / "b.so")
    printed = capsys.readouterr().out
    assert f"{objects} is not used: " in printed and words in printed
    assert len([c for c in calls(tmp_path) if " -c " in c]) == len(recipe.SOURCES)


def test_sources_that_change_while_they_are_compiled(recipe, tmp_path, monkeypatch):
    manifests = iter([{"sources": "before"}, {"sources": "after"}])
    monkeypatch.setattr(recipe, "manifest", lambda nvcc: next(manifests))
    with pytest.raises(recipe.CannotBuild, match="the sources changed while they were compiled"):
        recipe.save_objects(tmp_path / "objects")
    assert not (tmp_path / "objects" / recipe.MANIFEST).exists()
