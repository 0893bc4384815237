"""V kept within K (MLA): one storage has one amax and one scale."""

import pytest
import torch

import pagewire as pw
from cases import SHORT, e4m3, e5m2, fp32, int8

D, DV, SLOTS = 24, 16, [1, 2, 6]


def rows(device):
    """The part behind the latent is much larger: V's own amax would be another one."""
    k = torch.randn(3, 1, D, generator=torch.Generator().manual_seed(0))
    k[..., DV:] *= 20
    return k.to(device)


def mla(dtype, kind, device, own=True):
    """own: V has scale tensors of its own beside K's."""
    t = torch.zeros(2, 4, 1, D, device=device).to(dtype)
    shape = {"tensor": (), "head": (1,), "token_head": (2, 4, 1), "none": None}[kind]
    if shape is None:
        return pw.PagedKVCache([t], [t[..., :DV]])
    scales = [torch.full(shape, 2.0, device=device) for _ in range(2)]
    return pw.PagedKVCache([t], [t[..., :DV]], k_scales=[scales[0]], v_scales=[scales[own]])


def append(cache, k, v, slots, backend):
    pw.append_kv(
        k, v, cache.k[0], cache.v[0], slots, k_scale=cache.k_scale[0], v_scale=cache.v_scale[0], backend=backend
    )


@pytest.mark.parametrize("dtype", [int8, e4m3, e5m2, fp32], ids=SHORT.get)
@pytest.mark.parametrize("kind", ["head", "token_head"])
@pytest.mark.parametrize("view", [True, False], ids=["view", "copy"])
def test_what_is_appended_is_read_back(dtype, kind, view, backend, device):
    if dtype == fp32:
        kind = "none"
    cache, k = mla(dtype, kind, device), rows(device)
    slots = torch.tensor(SLOTS, device=device)
    v = k[..., :DV] if view else k[..., :DV].clone()
    append(cache, k, v, slots, backend)
    assert cache.geometry.shares_kv
    scale = 1.0
    if kind != "none":
        scale = cache.k_scale[0].expand(2, 4, 1).reshape(8, 1)[slots][..., None]
        expected = torch.full_like(scale, 2.0)
        if kind == "token_head":
            expected = k.abs().amax(-1, keepdim=True) / {int8: 127, e4m3: 448, e5m2: 57344}[dtype]
        torch.testing.assert_close(scale, expected)
        assert torch.equal(cache.k_scale[0], cache.v_scale[0])
    stored = cache.k[0].view(8, 1, D)[SLOTS].float() * scale
    limit = {int8: 0.51, e4m3: 0.07, e5m2: 0.13, fp32: 0.0}[dtype]
    unit = scale if dtype == int8 else k.abs().clamp(min=0.05)
    assert ((stored - k).abs() <= limit * unit).all()


@pytest.mark.parametrize("kind", ["tensor", "head", "token_head"])
@pytest.mark.parametrize("wire", [None, fp32, e4m3], ids=["bytes", "fp32", "e4m3"])
@pytest.mark.parametrize("own", [True, False])
def test_both_scales_arrive(kind, wire, own, backend, device):
    """The wire carries K and its scale; the receiver has both."""
    a, b, c = (mla(int8, kind, device, own) for _ in range(3))
    slots, to = torch.tensor(SLOTS, device=device), torch.tensor([0, 7, 3], device=device)
    append(a, rows(device), rows(device)[..., :DV], slots, backend)
    pw.unpack_kv(pw.pack_kv(a, slots, dtype=wire, backend=backend), b, to, backend=backend)
    assert torch.equal(b.k_scale[0], b.v_scale[0])
    if wire is None:
        assert torch.equal(b.k[0].view(8, D)[to.cpu()], a.k[0].view(8, D)[SLOTS])
    if kind == "token_head":
        expected = a.k_scale[0].view(8)[slots]
        torch.testing.assert_close(b.k_scale[0].view(8)[to], expected, rtol=0.1, atol=0)
        untouched = [i for i in range(8) if i not in (0, 7, 3)]
        assert (b.v_scale[0].view(8)[untouched] == 2.0).all()
    pw.unpack_kv(pw.pack_kv(b, to, backend=backend), c, to, backend=backend)  # and on they go


def test_two_scales_are_refused(backend, device):
    k, slots = rows(device), torch.tensor(SLOTS, device=device)
    t = torch.zeros(2, 4, 1, D, dtype=int8, device=device)
    keep = t.clone()
    for k_scale, v_scale in [
        (0.5, 0.02),
        (torch.tensor([0.5], device=device), torch.tensor([0.25], device=device)),
        (torch.ones(2, 4, 1, device=device), 1.0),
    ]:
        with pytest.raises(ValueError, match="v_scale: expected one scale for both"):
            pw.append_kv(k, k[..., :DV], t, t[..., :DV], slots, k_scale=k_scale, v_scale=v_scale, backend=backend)
    for k_scale, v_scale in [(1.0, 2.0), ([1.0], [2.0])]:
        scales = [torch.tensor(s, device=device) for s in (k_scale, v_scale)]
        with pytest.raises(ValueError, match=r"v_scales\[0\]: expected one scale for both"):
            pw.PagedKVCache([t], [t[..., :DV]], k_scales=scales[:1], v_scales=scales[1:])
    assert torch.equal(t, keep)


def test_equal_scales_are_one(backend, device):
    k, slots = rows(device), torch.tensor(SLOTS, device=device)
    t = torch.zeros(2, 4, 1, D, dtype=int8, device=device)
    one = torch.tensor([0.5], device=device)
    pairs = [(0.5, 0.5), (one, one)]
    if one.device.type == "cpu":  # elsewhere values are not fetched to be compared
        pairs += [(one, one.clone()), (one, 0.5), (torch.tensor(0.5), 0.5)]
    for k_scale, v_scale in pairs:
        pw.append_kv(k, k[..., :DV], t, t[..., :DV], slots, k_scale=k_scale, v_scale=v_scale, backend=backend)


def test_scales_that_differ_do_not_travel(backend):
    cache = mla(int8, "token_head", "cpu")
    cache.v_scale[0][1, 2] = 3.0  # slot 6
    pw.pack_kv(cache, torch.tensor([1, 2]), backend=backend)
    with pytest.raises(ValueError, match=r"v_scales\[0\]: .* slots\[2\] = 6"):
        pw.pack_kv(cache, torch.tensor(SLOTS), backend=backend)


def test_other_values_than_the_keys_are_refused(backend):
    cache, k = mla(fp32, "none", "cpu"), rows("cpu")
    v = k[..., :DV] + 1
    with pytest.raises(ValueError, match=r"v: expected k\[..., :16\] .* token 0"):
        append(cache, k, v, torch.tensor(SLOTS), backend)
    assert (cache.k[0] == 0).all()
    append(cache, k, v, torch.tensor([-1, -1, -1]), backend)  # nothing of them is written


def test_one_scale_for_two_storages_is_refused(backend, device):
    k = rows(device)
    a, b = (torch.zeros(2, 4, 1, D, dtype=int8, device=device) for _ in range(2))
    scale = torch.ones(2, 4, 1, device=device)
    with pytest.raises(ValueError, match="v_scale: expected memory of its own, .* overlaps k_scale"):
        pw.append_kv(k, k, a, b, torch.tensor(SLOTS, device=device), k_scale=scale, v_scale=scale, backend=backend)


def test_a_cache_that_does_not_share_cannot_be_said_to():
    k, v = torch.zeros(2, 4, 1, D), torch.zeros(2, 4, 1, DV)
    with pytest.raises(ValueError, match="shares_kv=True: expected"):
        pw.PagedKVCache([k], [v], shares_kv=True)
    hidden = pw.PagedKVCache([k], [k[..., :DV]], shares_kv=False)
    slots = torch.tensor(SLOTS)
    with pytest.raises(ValueError, match=r"v_caches\[0\] overlaps k_caches\[0\]"):
        pw.unpack_kv(pw.pack_kv(hidden, slots), hidden, slots)
