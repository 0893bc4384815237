"""The table of addresses that pack and unpack read: its contents, and who may read it when."""

import pytest
import torch

import pagewire as pw

pytest.importorskip("triton")
from pagewire.kernels import tables  # noqa: E402

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and captures need a GPU")
VALUES = tuple(range(2**47, 2**47 + 70)) + (0, 1, -1, 2**63 - 1)


@pytest.mark.parametrize("count", [1, 31, 32, 33, len(VALUES)])
def test_values_arrive(count, device):
    """Through kernel arguments, whatever their size: addresses, small strides, zero."""
    written = tables._write(VALUES[:count], device)
    assert written.dtype == torch.int64 and written[:count].tolist() == list(VALUES[:count])
    assert tables.device_table(VALUES[:count], device)[:count].tolist() == list(VALUES[:count])


def cache(seed: int) -> pw.PagedKVCache:
    made = pw.PagedKVCache.allocate(
        num_layers=3, num_pages=4, page_size=4, num_kv_heads=2, head_dim=64, dtype=torch.float16, device="cuda"
    )
    g = torch.Generator().manual_seed(seed)
    for t in made.k + made.v:
        t.copy_(torch.randn(t.shape, generator=g))
    return made


@on_gpu
def test_the_same_cache_finds_its_table_and_another_does_not():
    first, second = cache(0), cache(1)
    slots = torch.tensor([5, 0, 11], device="cuda")
    for _ in range(2):
        for each in (first, second):
            want = pw.pack_kv(each, slots, backend="reference").buffer
            assert torch.equal(pw.pack_kv(each, slots, backend="triton").buffer, want)


@on_gpu
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_captured_in_a_graph(warm):
    """The graph has its own table, or one that stays; the eager calls around it do not see the graph's."""
    source, slots = cache(2), torch.tensor([5, 0, 11], device="cuda")
    pw.pack_kv(cache(3), slots, backend="triton")  # compiled, and the error word exists
    packed = pw.pack_kv(source, slots, backend="reference")
    if warm:
        pw.pack_kv(source, slots, backend="triton")
        torch.cuda.synchronize()
        pw.pack_kv(source, slots, backend="triton")
    graph = torch.cuda.CUDAGraph()
    buffer = torch.empty_like(packed.buffer)
    with torch.cuda.graph(graph):
        pw.pack_kv(source, slots, out=buffer, backend="triton")
    assert torch.equal(pw.pack_kv(source, slots, backend="triton").buffer, packed.buffer)
    for _ in range(2):
        for t in source.k + source.v:
            t.neg_()
        graph.replay()
        assert torch.equal(buffer, pw.pack_kv(source, slots, backend="reference").buffer)


@on_gpu
def test_another_stream_waits_for_the_table():
    source, slots = cache(4), torch.tensor([5, 0, 11], device="cuda")
    want = pw.pack_kv(source, slots, backend="reference").buffer
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(20_000_000)  # the table is written behind this
        pw.pack_kv(source, slots, backend="triton")
    results = []
    for stream in streams[1:]:
        with torch.cuda.stream(stream):
            results.append(pw.pack_kv(source, slots, backend="triton").buffer)
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, want)
