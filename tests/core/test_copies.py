"""Copies of caches and packed buffers share what the originals share, and nothing with the originals."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as mp

import pagewire as pw
from cases import fp16, int8


def through_torch_save(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch_save,
}


def mla(scale="token_head"):
    t = torch.randint(-99, 99, (2, 4, 1, 24), dtype=int8)
    scales = torch.rand(2, 4, 1) + 1
    return pw.PagedKVCache([t], [t[..., :16]], k_scales=[scales], v_scales=[scales])


def fused():
    """K and V of two layers in one tensor, HND."""
    whole = torch.randn(2, 3, 2, 2, 4, 8).to(fp16)
    return pw.PagedKVCache(list(whole[:, :, 0]), list(whole[:, :, 1]), layout="HND")


def apart():
    return pw.PagedKVCache([torch.randn(2, 4, 1, 8)], [torch.randn(2, 4, 1, 16)])


CACHES = {"mla": mla, "fused": fused, "apart": apart}


def same_sharing(a, b) -> None:
    """Every pair of tensors is one storage here if it is there, at the same distance."""
    for (name, x), y in zip(a.tensors.items(), b.tensors.values(), strict=True):
        assert x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
        assert torch.equal(x, y), name
        for other, u in a.tensors.items():
            v = b.tensors[other]
            one = x.untyped_storage().data_ptr() == u.untyped_storage().data_ptr()
            assert one == (y.untyped_storage().data_ptr() == v.untyped_storage().data_ptr())
            if one:
                assert x.data_ptr() - u.data_ptr() == y.data_ptr() - v.data_ptr()
    assert a.geometry == b.geometry and a.layout == b.layout


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("how", COPIES)
def test_cache(kind, how):
    cache = CACHES[kind]()
    copied = COPIES[how](cache)
    same_sharing(cache, copied)
    before = cache.k[0].clone()
    copied.k[0].zero_()
    assert torch.equal(cache.k[0], before)
    if kind == "mla":
        assert (copied.v[0] == 0).all()
    slots = torch.tensor([1, 6])
    pw.unpack_kv(pw.pack_kv(cache, slots), copied, slots)
    assert torch.equal(pw.pack_kv(copied, slots).buffer, pw.pack_kv(cache, slots).buffer)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", CACHES)
def test_packed(kind, how):
    staging = torch.zeros(4096, dtype=torch.uint8)
    packed = pw.pack_kv(CACHES[kind](), torch.tensor([1, 6]), out=staging[64:])
    copied = COPIES[how](packed)
    assert torch.equal(copied.buffer, packed.buffer) and copied.shape == packed.shape
    copied.buffer.zero_()
    assert (copied.k == 0).all() and not (packed.k == 0).all()
    if packed.k_scale is not None:
        assert (copied.k_scale == 0).all()


@pytest.mark.parametrize("kind", CACHES)
def test_to(kind):
    cache = CACHES[kind]()
    assert cache.to("cpu") is cache
    packed = pw.pack_kv(cache, torch.tensor([1, 6]))
    assert packed.to("cpu") is packed and packed.to("meta").buffer.is_meta
    there = cache.to("meta")
    assert there.geometry == cache.geometry and there.device.type == "meta"
    storages = {t.untyped_storage()._cdata for t in cache.tensors.values()}
    assert len({t.untyped_storage()._cdata for t in there.tensors.values()}) == len(storages)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", CACHES)
def test_to_a_gpu_and_back(kind):
    cache = CACHES[kind]()
    same_sharing(cache, cache.to("cuda").to("cpu"))


def _write(cache, packed, done):
    cache.k[0][1, 2] = 7
    packed.buffer.fill_(1)
    done.put((bool((cache.v[0][1, 2] == 7).all()), bool((packed.k.view(torch.uint8) == 1).all())))


def test_shared_memory():
    """A process that is handed a cache writes into this one's, and its V is within its K as here."""
    cache = mla().share_memory_()
    packed = pw.pack_kv(cache, torch.tensor([1, 6])).share_memory_()
    assert cache.k[0].is_shared() and cache.geometry.shares_kv
    assert cache.k[0].data_ptr() == cache.v[0].data_ptr()
    context = mp.get_context("spawn")
    done = context.SimpleQueue()
    process = context.Process(target=_write, args=(cache, packed, done))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and done.get() == (True, True)
    assert (cache.k[0][1, 2] == 7).all() and (packed.buffer == 1).all()
    slots = torch.tensor([1, 6])
    with pytest.raises(ValueError, match="overlaps k_caches"):  # where it lies now is known
        whole = cache.k[0].view(torch.uint8).view(-1)
        pw.pack_kv(cache, slots, out=whole[:64])
