"""The FlashAttention drop-in against the dense formula: names, LSE layouts, appended keys, and what it refuses."""

import math

import pytest
import torch

import pagewire as pw
from pagewire.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 32, 4, 24
LENS = [9, 1, 17]  # keys in the cache
TABLE_WIDTH = 7


@pytest.fixture(params=["reference", "triton"])
def chosen(request, device, monkeypatch):
    """The drop-in has no backend argument: PAGEWIRE_BACKEND decides."""
    reason = pw.backends(device.type)[request.param]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("PAGEWIRE_BACKEND", request.param)
    return request.param


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setenv("PAGEWIRE_BACKEND", "reference")


class Cache:
    """A paged cache of random keys, NaN where nobody has written, and the same keys dense."""

    def __init__(self, device, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.g, self.device, self.dtype = g, device, dtype
        order = torch.randperm(PAGES, generator=g)[: len(LENS) * TABLE_WIDTH]
        self.table = order.reshape(len(LENS), TABLE_WIDTH).to(device, torch.int32)
        self.lens = torch.tensor(LENS, dtype=torch.int32, device=device)
        self.k = torch.full((PAGES, PAGE, KV_HEADS, DIM), torch.nan, device=device, dtype=dtype)
        self.v = self.k.clone()
        self.keys = [self.rand(n, KV_HEADS, DIM) for n in LENS]
        self.values = [self.rand(n, KV_HEADS, DIM) for n in LENS]
        for b, n in enumerate(LENS):
            slots = pw.page_slots(self.table[b], 0, n, PAGE)
            self.k.flatten(0, 1)[slots] = self.keys[b]
            self.v.flatten(0, 1)[slots] = self.values[b]

    def rand(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.g).to(self.device, self.dtype)


def dense(q, k, v, *, causal=False, window=(-1, -1), scale=None, softcap=0.0, slopes=None, sinks=None):
    """q [q_len, H, D], k and v [k_len, KV_HEADS, D] -> out [q_len, H, D], lse [H, q_len], in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    distance = (torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))).to(q.device)
    if slopes is not None:
        logits = logits - slopes.double()[:, None, None] * distance.abs()
    hidden = (distance < 0) & causal
    hidden |= (distance > window[0]) & (window[0] >= 0)
    hidden |= (-distance > window[1]) & (window[1] >= 0)
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse[..., None]).nan_to_num()[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def close(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=2e-5)


MODIFIERS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "window_none": {"window_size": (None, None)},
    "no_window": {"window_size": None},
    "scale": {"softmax_scale": 0.3},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    "s_aux": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.bfloat16)},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "causal": True},
    "one_split": {"num_splits": 1},
    "splits": {"num_splits": 7},
}


def formula(modifiers: dict) -> dict:
    window = modifiers.get("window_size") or (-1, -1)
    return {
        "causal": modifiers.get("causal", False),
        "window": tuple(-1 if w is None else w for w in window),
        "scale": modifiers.get("softmax_scale"),
        "softcap": modifiers.get("softcap", 0.0),
        "slopes": modifiers.get("alibi_slopes"),
        "sinks": modifiers.get("s_aux", modifiers.get("sinks")),
    }


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("name", MODIFIERS)
def test_with_kvcache(name, q_len, reference):
    cache = Cache("cpu")
    q = cache.rand(len(LENS), q_len, HEADS, DIM)
    out, lse = flash_attn_with_kvcache(
        q, cache.k, cache.v, cache_seqlens=cache.lens, page_table=cache.table, return_softmax_lse=True,
        **MODIFIERS[name],
    )  # fmt: skip
    assert out.shape == q.shape and lse.shape == (len(LENS), HEADS, q_len) and lse.is_contiguous()
    for b in range(len(LENS)):
        want, want_lse = dense(q[b], cache.keys[b], cache.values[b], **formula(MODIFIERS[name]))
        close(out[b], want)
        close(lse[b], want_lse)


@pytest.mark.parametrize("name", MODIFIERS)
def test_varlen(name, reference):
    cache = Cache("cpu")
    rows = [3, 1, 5]
    q = cache.rand(sum(rows), HEADS, DIM)
    cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(
        q, cache.k, cache.v, cu, max_seqlen_q=5, seqused_k=cache.lens, block_table=cache.table,
        return_softmax_lse=True, **MODIFIERS[name],
    )  # fmt: skip
    assert lse.shape == (HEADS, sum(rows)) and lse.is_contiguous()
    for b, (start, stop) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        want, want_lse = dense(q[start:stop], cache.keys[b], cache.values[b], **formula(MODIFIERS[name]))
        close(out[start:stop], want)
        close(lse[:, start:stop], want_lse)


def test_causal_is_off_by_default_and_aligned_to_the_last_key(chosen, device):
    cache = Cache(device)
    q = cache.rand(len(LENS), 2, HEADS, DIM)
    for causal in (False, True):
        keyword = {"causal": True} if causal else {}
        out = flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=cache.lens, block_table=cache.table, **keyword)
        for b in range(len(LENS)):
            close(out[b], dense(q[b], cache.keys[b], cache.values[b], causal=causal)[0])


@pytest.mark.parametrize("ragged", [False, True], ids=["square", "ragged"])
def test_new_keys_are_appended_first(ragged, chosen, device):
    """cache_seqlens counts the keys before the call; a mixture of chunk, decode and nothing when ragged."""
    cache = Cache(device)
    news = [4, 1, 0] if ragged else [2, 2, 2]
    total = sum(news)
    k, v, q = (cache.rand(total, h, DIM) for h in (KV_HEADS, KV_HEADS, HEADS))
    cu = torch.tensor([0, *torch.tensor(news).cumsum(0)], dtype=torch.int32, device=device)
    keywords = dict(cache_seqlens=cache.lens, page_table=cache.table, causal=True, return_softmax_lse=True)
    if ragged:
        padded_k, padded_v = (torch.cat([x, torch.full_like(x[:2], 77.0)]) for x in (k, v))
        out, lse = flash_attn_with_kvcache(
            q, cache.k, cache.v, padded_k, padded_v, cu_seqlens_q=cu, cu_seqlens_k_new=cu, max_seqlen_q=4, **keywords
        )
        assert lse.shape == (HEADS, total)
        assert not (cache.k == 77).any()  # rows behind cu_seqlens_k_new[-1] are padding
    else:
        square = [x.unflatten(0, (3, 2)) for x in (q, k, v)]
        out, lse = flash_attn_with_kvcache(square[0], cache.k, cache.v, *square[1:], **keywords)
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    for b in range(len(LENS)):
        mine = slice(cu[b], cu[b + 1])
        keys = torch.cat([cache.keys[b], k[mine]])
        slots = pw.page_slots(cache.table[b], 0, len(keys), PAGE)
        assert torch.equal(cache.k.flatten(0, 1)[slots], keys)
        want, want_lse = dense(q[mine], keys, torch.cat([cache.values[b], v[mine]]), causal=True)
        close(out[mine], want)
        close(lse[:, mine], want_lse)
    assert torch.equal(cache.lens.cpu(), torch.tensor(LENS, dtype=torch.int32))


@pytest.mark.parametrize("where", ["past the table", "negative page"])
def test_new_keys_that_have_no_slot_are_an_error(where, chosen, device):
    """Not skipped silently: raised at once, or recorded and reported by check_errors."""
    cache = Cache(device)
    lens = cache.lens.clone()
    if where == "negative page":
        cache.table[0, LENS[0] // PAGE] = -1
    else:
        lens[0] = TABLE_WIDTH * PAGE
    k = cache.rand(len(LENS), 1, KV_HEADS, DIM)
    with pytest.raises(pw.BadIndexError, match=r"append_kv: slot_mapping\[0\]"):
        flash_attn_with_kvcache(
            cache.rand(len(LENS), 1, HEADS, DIM), cache.k, cache.v, k, k, cache_seqlens=lens, page_table=cache.table
        )
        pw.check_errors()


def test_unpaged_cache(reference):
    """One page per row; cache_batch_idx picks the rows; cache_seqlens may be an int or left out."""
    cache = Cache("cpu")
    k, v = (cache.rand(5, 11, KV_HEADS, DIM) for _ in range(2))
    q = cache.rand(2, 3, HEADS, DIM)
    rows = torch.tensor([4, 1], dtype=torch.int32)
    for lens, n in ((None, 11), (7, 7), (torch.tensor([7, 7], dtype=torch.int32), 7)):
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, cache_batch_idx=rows, causal=True)
        for b, row in enumerate(rows):
            close(out[b], dense(q[b], k[row, :n], v[row, :n], causal=True)[0])
    with pytest.raises(ValueError, match=r"k_cache: expected \[2, max_len"):
        flash_attn_with_kvcache(q, k, v)
    with pytest.raises(NotImplementedError, match="cache_batch_idx"):
        flash_attn_with_kvcache(q, cache.k, cache.v, cache_batch_idx=rows, page_table=cache.table[:2])


@pytest.mark.parametrize("used", [False, True], ids=["cu_seqlens_k", "seqused_k"])
def test_varlen_over_contiguous_keys(used, chosen, device):
    cache = Cache(device)
    k, v = torch.cat(cache.keys), torch.cat(cache.values)
    cu_k = torch.tensor([0, *torch.tensor(LENS).cumsum(0)], dtype=torch.int32, device=device)
    cu_q = torch.tensor([0, 2, 2, 7], dtype=torch.int32, device=device)
    lens = torch.tensor([5, 1, 17], dtype=torch.int32, device=device) if used else cache.lens
    q = cache.rand(7, HEADS, DIM)
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, max(LENS), causal=True, seqused_k=lens if used else None)
    for b in range(len(LENS)):
        mine = slice(cu_q[b], cu_q[b + 1])
        close(out[mine], dense(q[mine], cache.keys[b][: lens[b]], cache.values[b][: lens[b]], causal=True)[0])


def test_rows_without_keys(chosen, device):
    """out 0 and lse -inf, in FlashAttention's layouts."""
    cache = Cache(device)
    lens = torch.tensor([0, 1, 17], dtype=torch.int32, device=device)
    q = cache.rand(len(LENS), 3, HEADS, DIM)
    out, lse = flash_attn_with_kvcache(
        q, cache.k, cache.v, cache_seqlens=lens, page_table=cache.table, causal=True, return_softmax_lse=True
    )
    empty = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool, device=device)
    assert not out[empty].any()
    assert torch.equal((lse == -torch.inf).all(1), empty) and torch.equal((lse == -torch.inf).any(1), empty)


def test_descales(reference):
    """[batch, num_kv_heads]; q_descale multiplies the logits too."""
    cache = Cache("cpu")
    q = cache.rand(len(LENS), 1, HEADS, DIM)
    k8, v8 = (x.nan_to_num(9.0).to(torch.float8_e4m3fn) for x in (cache.k, cache.v))
    q_descale, k_descale, v_descale = (torch.rand(len(LENS), KV_HEADS) + 0.5 for _ in range(3))
    keywords = dict(cache_seqlens=cache.lens, page_table=cache.table)
    out = flash_attn_with_kvcache(q, k8, v8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, **keywords)
    for b, n in enumerate(LENS):
        slots = pw.page_slots(cache.table[b], 0, n, PAGE)
        k, v = (x.float().flatten(0, 1)[slots] for x in (k8, v8))
        k = k * (q_descale * k_descale)[b, :, None]
        close(out[b], dense(q[b], k, v * v_descale[b, :, None])[0])
    with pytest.raises(ValueError, match="v_descale: a float8_e4m3fn cache needs one"):
        flash_attn_with_kvcache(q, k8, v8, k_descale=k_descale, **keywords)
    new = cache.rand(len(LENS), 1, KV_HEADS, DIM)
    with pytest.raises(NotImplementedError, match="k and v are not supported with a float8_e4m3fn cache"):
        flash_attn_with_kvcache(q, k8, v8, new, new, k_descale=k_descale, v_descale=v_descale, **keywords)


def test_results_in_given_tensors(reference):
    cache = Cache("cpu")
    keywords = dict(cache_seqlens=cache.lens, page_table=cache.table)
    for q_len in (1, 2):
        q = cache.rand(len(LENS), q_len, HEADS, DIM)
        out = torch.full_like(q, torch.nan)
        assert flash_attn_with_kvcache(q, cache.k, cache.v, out=out, **keywords) is out
        assert torch.equal(out, flash_attn_with_kvcache(q, cache.k, cache.v, **keywords))
    gappy = torch.empty(len(LENS), 5, HEADS, DIM)[:, :2]
    with pytest.raises(ValueError, match="q: expected batch and len dims that merge"):
        flash_attn_with_kvcache(gappy, cache.k, cache.v, **keywords)
    cu = torch.tensor([0, 2, 2, 2], dtype=torch.int32)
    q, out = cache.rand(2, HEADS, DIM), torch.full((2, HEADS, DIM), torch.nan)
    args = (q, cache.k, cache.v, cu, None, 2)
    kw = dict(seqused_k=cache.lens, block_table=cache.table)
    assert flash_attn_varlen_func(*args, out=out, **kw) is out
    assert torch.equal(out, flash_attn_varlen_func(*args, **kw))


def test_one_split_is_independent_of_the_batch(chosen, device):
    cache = Cache(device)
    q = cache.rand(len(LENS), 1, HEADS, DIM)
    kw = dict(num_splits=1, return_softmax_lse=True)
    together = flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=cache.lens, page_table=cache.table, **kw)
    for b in range(len(LENS)):
        alone = flash_attn_with_kvcache(
            q[b : b + 1], cache.k, cache.v, cache_seqlens=cache.lens[b : b + 1], page_table=cache.table[b : b + 1], **kw
        )
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x[0], y[b])


SOME = torch.zeros(3)
REFUSED_WITH_KVCACHE = {
    "qv": SOME, "rotary_cos": SOME, "rotary_sin": SOME, "cache_leftpad": SOME, "rotary_seqlens": SOME,
    "attention_chunk": 8, "scheduler_metadata": SOME, "pack_gqa": True, "sm_margin": 2,
}  # fmt: skip
REFUSED_VARLEN = {
    "seqused_q": SOME, "dropout_p": 0.1, "qv": SOME, "q_v": SOME, "attention_chunk": 8, "return_attn_probs": True,
    "scheduler_metadata": SOME, "pack_gqa": False, "sm_margin": 2, "cp_world_size": 2, "cp_rank": 1,
    "cp_tot_seqused_k": SOME,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_WITH_KVCACHE)
def test_with_kvcache_refuses(name):
    cache = Cache("cpu")
    before = cache.k.clone()
    new = cache.rand(len(LENS), 1, KV_HEADS, DIM)
    with pytest.raises(NotImplementedError, match=f"flash_attn_with_kvcache: {name} is not supported"):
        flash_attn_with_kvcache(
            cache.rand(len(LENS), 1, HEADS, DIM), cache.k, cache.v, new, new, cache_seqlens=cache.lens,
            page_table=cache.table, **{name: REFUSED_WITH_KVCACHE[name]},
        )  # fmt: skip
    assert torch.equal(cache.k.nan_to_num(), before.nan_to_num())  # nothing was appended


@pytest.mark.parametrize("name", REFUSED_VARLEN)
def test_varlen_refuses(name):
    cache = Cache("cpu")
    with pytest.raises(NotImplementedError, match=f"flash_attn_varlen_func: {name} is not supported"):
        flash_attn_varlen_func(
            cache.rand(1, HEADS, DIM), cache.k, cache.v, torch.tensor([0, 1, 1, 1]), None, 1,
            seqused_k=cache.lens, block_table=cache.table, **{name: REFUSED_VARLEN[name]},
        )  # fmt: skip


def test_harmless_arguments_change_nothing(reference):
    cache = Cache("cpu")
    q = cache.rand(len(LENS), 1, HEADS, DIM)
    kw = dict(cache_seqlens=cache.lens, page_table=cache.table)
    plain = flash_attn_with_kvcache(q, cache.k, cache.v, **kw)
    same = flash_attn_with_kvcache(
        q, cache.k, cache.v, rotary_interleaved=False, fa_version=3, attention_chunk=0, pack_gqa=None, **kw
    )
    assert torch.equal(plain, same)


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"block_table": True}, "page_table and block_table: two names"),
        ({"sinks": SOME, "s_aux": SOME}, "s_aux and sinks: two names"),
        ({"num_splits": -1}, "num_splits: expected >= 0"),
        ({"k": True}, "k, v: expected both or neither"),
        ({"cu_seqlens_k_new": SOME}, "cu_seqlens_k_new: expected None"),
        ({"cache_seqlens": torch.tensor([1, 1, 1])}, "cache_seqlens: expected int32, got int64"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 2, 3])}, "max_seqlen_q: expected an int"),
        ({"softcap": -1.0}, "softcap: expected >= 0"),
    ],
)
def test_with_kvcache_bad_values(keywords, words):
    cache = Cache("cpu")
    new = cache.rand(len(LENS), 1, KV_HEADS, DIM)
    keywords = {n: {"block_table": cache.table, "k": new}[n] if x is True else x for n, x in keywords.items()}
    base = {"cache_seqlens": cache.lens, "page_table": cache.table}
    with pytest.raises((ValueError, TypeError), match=words):
        flash_attn_with_kvcache(cache.rand(len(LENS), 1, HEADS, DIM), cache.k, cache.v, **{**base, **keywords})


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"seqused_k": None}, "expected exactly one of the two"),
        ({"cu_seqlens_k": SOME}, "expected exactly one of the two"),
        ({"block_table": None, "seqused_k": None}, "expected exactly one of the two"),
        ({"block_table": None, "seqused_k": None, "cu_seqlens_k": SOME}, "max_seqlen_k: expected an int"),
        ({"max_seqlen_q": None}, "max_seqlen_q: expected an int"),
        ({"cu_seqlens_q": 5}, "cu_seqlens_q: expected an int32 tensor"),
    ],
)
def test_varlen_bad_values(keywords, words):
    cache = Cache("cpu")
    base = {
        "cu_seqlens_q": torch.tensor([0, 1, 1, 1], dtype=torch.int32), "max_seqlen_q": 1,
        "seqused_k": cache.lens, "block_table": cache.table,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=words):
        flash_attn_varlen_func(cache.rand(1, HEADS, DIM), cache.k, cache.v, **{**base, **keywords})
