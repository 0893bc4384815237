"""Adapters that no GPU is needed for: reasons, tables, addresses, and loading two files of a peer without the peer."""

import ctypes
import subprocess
import sys

import pytest
import torch

from pagewire.bench import peers
from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention, Pack
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.movement import PackWork
from pagewire.bench.peers import flash_attn3, flashinfer, memcpy, vllm_triton


def _arena() -> ColdMemory:
    return ColdMemory("cpu", 1 << 17, 1 << 28)


def test_every_peer_runs_here_or_says_why_not():
    found = peers.all_peers()
    assert len({p.name for p in found}) == len(found) > 10
    for peer in found:
        reason = peer.missing("cpu")
        assert reason is None or len(reason) > 5, peer.name
    assert {p.name for p in found if p.missing("cpu") is None} >= {"sdpa", "sdpa-dense", "index-select"}


HIDDEN = """
import importlib.machinery as machinery, runpy, sys
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == "triton" else find(name, *rest))
sys.argv = ["pagewire", "bench", *sys.argv[1:]]
runpy.run_module("pagewire", run_name="__main__")
"""


def test_without_triton_the_rest_is_measured(tmp_path):
    csv = tmp_path / "x.csv"
    flags = ("--suite", "smoke", "--device", "cpu", "--minutes", "0.1", "--threads", "1", "--csv", str(csv))
    done = subprocess.run([sys.executable, "-c", HIDDEN, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ",ok," in csv.read_text()


def test_peers_are_chosen_by_name():
    assert [p.name for p in peers.chosen("sdpa,torch", "cpu")] == ["sdpa", "torch"]
    assert peers.chosen("none", "cpu") == ()
    assert {p.name for p in peers.chosen(None, "cuda")} > {p.name for p in peers.chosen("sdpa", "cuda")}
    with pytest.raises(ValueError, match="nobody"):
        peers.chosen("nobody", "cpu")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("op", ["pack", "unpack"])
def test_fragments_copied_one_by_one_are_the_pack(op, layout, monkeypatch):
    """On a CPU the same addresses go through memmove."""
    case = Pack(op, 37, 2, 4, 3, 64, layout=layout, dtype=torch.float32)
    work = PackWork(case, _arena())

    class Runtime:
        @staticmethod
        def cudaMemcpyAsync(target, source, size, kind, stream):
            ctypes.memmove(target, source, size)
            return 0

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(memcpy, "_runtime", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream)
    contender = memcpy._prepare(work)
    assert contender.before is not None
    contender.before(0)
    verdict = work.check(contender)
    assert verdict.ok, verdict.reason
    fragments = memcpy._fragments(work, 0)
    assert len(fragments) == 2 * 2 * 3 * (37 if layout == "NHD" else 3)


def test_flashinfers_tables_are_the_page_table_in_csr():
    case = Attention("x", "1q1s33_1q1s5_1q1s64", (4, 2), 64, 16)
    work = AttentionWork(case, _arena())
    tables = flashinfer._Tables(work)
    assert tables.indptr.tolist() == [0, 3, 4, 8]
    assert tables.last_page_len.tolist() == [1, 5, 16]
    for csr, table in zip(tables.indices, work.page_tables, strict=True):
        expected = [*table[0, :3].tolist(), table[1, 0].item(), *table[2, :4].tolist()]
        assert csr.tolist() == expected


def test_flash_attention_3_is_called_by_argument_name(monkeypatch):
    """Versions of the op differ in their arguments; what is unknown is None."""
    work = AttentionWork(Attention("x", "2q1s20", (4, 2), 64, 16), _arena())
    given = {}
    names = ("q", "k", "v", "new_in_this_version", "out", "seqused_k", "page_table", "softmax_scale", "is_causal")

    def op(*arguments):
        given.update(zip(names, arguments, strict=True))

    monkeypatch.setattr(flash_attn3, "_vllm_op", lambda: (op, names))
    flash_attn3._from_vllm(work, 0)(1)
    assert given["page_table"] is work.page_tables[1] and given["seqused_k"] is work.seq_lens
    assert given["new_in_this_version"] is None and given["is_causal"] is True


def test_two_files_of_vllm_load_without_it(tmp_path, monkeypatch):
    (tmp_path / "triton_attention_helpers.py").write_text(
        "from vllm.triton_utils import tl, triton\nfrom vllm.logger import init_logger\n"
        "init_logger(__name__).info_once('x')\nHELPS = 7\n"
    )
    (tmp_path / "triton_unified_attention.py").write_text(
        "from vllm.platforms import current_platform\n"
        "from vllm.v1.attention.ops.triton_attention_helpers import HELPS\n"
        "assert current_platform.is_cuda()\n"
        "def unified_attention(q, out, block_table):\n    out.copy_(q * HELPS)\n"
    )
    monkeypatch.setenv("PAGEWIRE_PEER_VLLM_TRITON", str(tmp_path))
    vllm_triton._unified_attention.cache_clear()
    before = {name for name in sys.modules if name.split(".")[0] == "vllm"}
    try:
        work = AttentionWork(Attention("x", "2q1s20", (4, 2), 64, 16), _arena())
        out = vllm_triton._prepare(work).call(0)
    finally:
        vllm_triton._unified_attention.cache_clear()
        loaded = [f"vllm.v1.attention.ops.{name}" for name in vllm_triton._FILES]
        for name in loaded:
            sys.modules.pop(name, None)
    assert torch.equal(out, work.q * 7)
    assert {name for name in sys.modules if name.split(".")[0] == "vllm"} == before

    monkeypatch.setenv("PAGEWIRE_PEER_VLLM_TRITON", str(tmp_path / "nowhere"))
    assert "has no triton_attention_helpers.py" in (vllm_triton._missing("cuda") or "")
