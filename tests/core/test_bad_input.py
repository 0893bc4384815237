"""Bad input: refused before anything is written, in a sentence that names what was expected, what came, from where."""

import re

import pytest
import torch

import cases
import pagewire as pw

CASE = cases.Attention((20, 9), (6, 9), head_dim=32)
DECODE = cases.Attention((20, 9), head_dim=32)


def call_with(case=CASE, position=None, value=None, **kwargs):
    call = cases.build(case)
    args = list(call.args)
    if position is not None:
        args[position] = value(args[position]) if callable(value) else value
    keywords = {**call.kwargs, **kwargs, "backend": "reference"}
    return getattr(pw, call.op)(*args, **keywords)


Q, K, V, TABLE, LENS, CU = range(6)

REFUSED = [
    # what, position, replacement, error, what the sentence must say
    ("q has two dims", Q, lambda q: q[0], ValueError, "q: expected [num_tokens, num_qo_heads, head_dim], got shape"),
    ("q is int", Q, lambda q: q.int(), TypeError, "q: expected float16 or bfloat16 or float32, got int32"),
    ("q is another float", Q, lambda q: q.half(), TypeError, "k_cache: expected float16 (from q), float8_e4m3fn"),
    ("heads do not divide", Q, lambda q: q[:, :3], ValueError, "multiple of num_kv_heads=2 (from k_cache), got 3"),
    ("q not dense", Q, lambda q: q.mT.contiguous().mT, ValueError, "q: expected a contiguous"),
    ("q is sparse", Q, lambda q: q.to_sparse(), TypeError, "q: expected a dense tensor (layout torch.strided), got"),
    ("lens are sparse", LENS, lambda s: s.to_sparse(), TypeError, "seq_lens: expected a dense tensor"),
    ("head_dim differs", Q, lambda q: q[..., :16], ValueError, "head_dim=16 from q"),
    ("k is 3-d", K, lambda k: k[0], ValueError, "k_cache: expected [num_pages, page_size, num_kv_heads, head_dim]"),
    ("v has fewer pages", V, lambda v: v[1:], ValueError, "num_pages=5 from k_cache"),
    ("v has another dtype", V, lambda v: v.bfloat16(), TypeError, "v_cache: expected float32 (from k_cache)"),
    ("table is int64", TABLE, lambda t: t.long(), TypeError, "page_table: expected int32, got int64"),
    ("table is 1-d", TABLE, lambda t: t[0], ValueError, "page_table: expected [batch_size, max_pages_per_seq]"),
    ("lens too long", LENS, lambda s: s.repeat(2), ValueError, "batch_size=2 from page_table"),
    ("lens is float", LENS, lambda s: s.float(), TypeError, "seq_lens: expected int32, got float32"),
    ("cu of batch_size", CU, lambda c: c[:-1], ValueError, "cu_seqlens_q: expected [batch_size + 1] = [3]"),
    ("cu is int64", CU, lambda c: c.long(), TypeError, "cu_seqlens_q: expected int32, got int64"),
    ("on another device", LENS, lambda s: s.to("meta"), ValueError, "seq_lens: expected device cpu (from q), got meta"),
]


@pytest.mark.parametrize("position, value, error, words", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_tensor_refused(position, value, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call_with(CASE, position, value)


KEYWORDS = [
    ("layout", dict(layout="DHN"), ValueError, "layout: expected one of ('NHD', 'HND'), got 'DHN'"),
    ("window", dict(window_size=(1, 2, 3)), ValueError, "window_size: expected (left, right), got (1, 2, 3)"),
    ("softcap", dict(softcap=-1.0), ValueError, "softcap: expected >= 0"),
    ("softmax_scale", dict(softmax_scale=float("nan")), ValueError, "softmax_scale: expected a finite number, got nan"),
    ("split_size", dict(split_size=0), ValueError, "split_size: expected >= 1"),
    ("max_q_len", dict(max_q_len=0), ValueError, "max_q_len: expected >= 1"),
    ("alibi", dict(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes: expected [num_qo_heads], got shape (3,)"),
    ("sinks dtype", dict(sinks=torch.ones(4).half()), TypeError, "sinks: expected float32, got float16"),
    ("scale shape", dict(k_scale=torch.ones(7)), ValueError, "k_scale: expected one of [] = [], [num_kv_heads] = [2]"),
    ("scale value", dict(v_scale=-1.0), ValueError, "v_scale: expected a finite float > 0"),
    ("out shape", dict(out=torch.empty(15, 4, 8)), ValueError, "head_dim_v=32 from v_cache"),
    ("out dtype", dict(out=torch.empty(15, 4, 32, dtype=torch.bfloat16)), TypeError, "out: expected float32"),
    ("lse shape", dict(lse=torch.empty(15, 3)), ValueError, "lse: expected [num_tokens, num_qo_heads]"),
]


@pytest.mark.parametrize("kwargs, error, words", [k[1:] for k in KEYWORDS], ids=[k[0] for k in KEYWORDS])
def test_keyword_refused(kwargs, error, words):
    if error is None:  # with as many heads as slots the two layouts cannot be told apart: here they can
        error, words = IndexError, "prefill: "
    with pytest.raises(error, match=re.escape(words)):
        call_with(CASE, **kwargs)


def test_quantised_cache_needs_scales():
    case = cases.Attention((20,), kv_dtype=torch.int8, scale="float")
    with pytest.raises(ValueError, match="k_scale: a int8 cache needs a scale \\(pass 1.0 for none\\), got None"):
        call_with(case, k_scale=None)
    with pytest.raises(ValueError, match="k_scale: a float32 cache stores real values, expected None"):
        cache = torch.zeros(1, 4, 1, 8)
        pw.append_kv(torch.ones(1, 1, 8), torch.ones(1, 1, 8), cache, cache, torch.tensor([0]), k_scale=2.0)


def entry(row, column, page):
    def put(table):
        table = table.clone()
        table[row, column] = page
        return table

    return put


INDICES = [
    ("page", TABLE, entry(1, 0, 99), "page_table[1, 0]: expected a page in [0, 5) (num_pages, from k_cache), got 99"),
    ("negative page", TABLE, entry(0, 1, -1), "page_table[0, 1]"),
    ("long", LENS, lambda s: s + 100, "seq_lens[0]: expected a value in [0, 64]"),
    ("negative length", LENS, lambda s: -s, "seq_lens[0]"),
]


@pytest.mark.parametrize("case", [DECODE, CASE], ids=["decode", "prefill"])
@pytest.mark.parametrize("position, value, words", [i[1:] for i in INDICES], ids=[i[0] for i in INDICES])
def test_index_refused_before_anything_is_written(case, position, value, words):
    call = cases.build(case)
    args = list(call.args)
    args[position] = value(args[position])
    out = torch.full_like(args[0], 5.0)
    with pytest.raises(pw.BadIndexError, match=re.escape(words)):
        getattr(pw, call.op)(*args, **call.kwargs, out=out, backend="reference")
    assert bool((out == 5.0).all())


@pytest.mark.parametrize(
    "cu, words",
    [
        ([0, 9, 6], "cu_seqlens_q[2]: expected a value in [9, 15]"),
        ([0, -1, 15], "cu_seqlens_q[1]"),
        ([0, 6, 16], "cu_seqlens_q[2]: expected a value in [6, 15]"),
        ([1, 6, 15], "cu_seqlens_q[0]: expected 0, got 1"),
    ],
)
def test_offsets_refused(cu, words):
    with pytest.raises(pw.BadIndexError, match=re.escape(words)):
        call_with(CASE, CU, torch.tensor(cu, dtype=torch.int32))


def test_max_q_len_is_a_promise():
    with pytest.raises(pw.BadIndexError, match="request 1 has 9 query rows, more than max_q_len=8"):
        call_with(CASE, max_q_len=8)


def test_pages_nobody_can_see_are_not_read():
    """Entries past the length and pages wholly before the window may hold anything."""
    call = cases.build(cases.Attention((60,), (4,), page_size=4, window=(7, -1)))
    args = list(call.args)
    expected = pw.prefill(*args, **call.kwargs, backend="reference")
    args[TABLE] = args[TABLE].clone()
    args[TABLE][0, : (60 - 4 - 7) // 4] = -5
    assert torch.equal(pw.prefill(*args, **call.kwargs, backend="reference"), expected)


def cache_of(**kwargs):
    keywords = dict(
        num_layers=2, num_pages=3, page_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu"
    )
    return pw.PagedKVCache.allocate(**{**keywords, **kwargs})


def test_append_slots():
    cache = cache_of()
    k = torch.ones(2, 2, 8)
    with pytest.raises(pw.BadIndexError, match=re.escape("slot_mapping[1]: expected a slot in [0, 12)")):
        pw.append_kv(k, k, cache.k[0], cache.v[0], torch.tensor([0, 12]), backend="reference")
    assert not cache.k[0].any()
    with pytest.raises(ValueError, match="slot_mapping: expected \\[<=num_tokens\\]"):
        pw.append_kv(k, k, cache.k[0], cache.v[0], torch.tensor([0, 1, 2]), backend="reference")
    with pytest.raises(TypeError, match="slot_mapping: expected int32 or int64, got int16"):
        pw.append_kv(k, k, cache.k[0], cache.v[0], torch.tensor([0, 1], dtype=torch.int16), backend="reference")


@pytest.mark.parametrize("slot", [-1, 12])
def test_pack_slots(slot):
    cache = cache_of()
    slots = torch.tensor([3, slot])
    with pytest.raises(
        pw.BadIndexError, match=re.escape(f"slots[1]: expected a slot in [0, 12) (num_pages * page_size), got {slot}")
    ):
        pw.pack_kv(cache, slots, backend="reference")
    packed = pw.pack_kv(cache, torch.tensor([0, 1]), backend="reference")
    packed.k.fill_(3)
    with pytest.raises(pw.BadIndexError, match=re.escape("unpack_kv: slots[1]")):
        pw.unpack_kv(packed, cache, slots, backend="reference")
    assert not cache.k[0].any()


def test_pack_arguments():
    cache = cache_of()
    slots = torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match="heads: expected \\(start, stop\\) with 0 <= start < stop <= 2, got \\(1, 3\\)"
    ):
        pw.pack_kv(cache, slots, heads=(1, 3))
    with pytest.raises(ValueError, match="slots: expected \\[num_tokens\\] int64"):
        pw.pack_kv(cache, slots.int())
    with pytest.raises(ValueError, match="packed buffer: expected at least 512 bytes, got 511"):
        pw.pack_kv(cache, slots, out=torch.empty(511, dtype=torch.uint8))
    with pytest.raises(ValueError, match="16-byte aligned start, got byte 4"):
        pw.pack_kv(cache, slots, out=torch.empty(600, dtype=torch.uint8)[4:])
    packed = pw.pack_kv(cache, slots, backend="reference")
    with pytest.raises(ValueError, match="packed: expected num_heads=1 \\(from heads=\\(0, 1\\)\\), got 2"):
        pw.unpack_kv(packed, cache, slots, heads=(0, 1))
    with pytest.raises(ValueError, match="packed: expected head_dim=16 \\(from the cache\\), got 8"):
        pw.unpack_kv(packed, cache_of(head_dim=16, head_dim_v=8), slots)


def test_cache_arguments():
    with pytest.raises(ValueError, match="num_pages: expected >= 1, got 0"):
        cache_of(num_pages=0)
    with pytest.raises(ValueError, match="a int8 cache needs k_scales and v_scales"):
        cache_of(dtype=torch.int8)
    with pytest.raises(ValueError, match="a float32 cache needs no scales"):
        cache_of(scale="head")
    a, b = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape("k_caches[1]: expected (3, 4, 2, 8) float32")):
        pw.PagedKVCache([a, b], [a, a])
    with pytest.raises(ValueError, match="v_caches: expected 1 layers \\(from k_caches\\), got 2"):
        pw.PagedKVCache([a], [a, a])


def test_merge_arguments():
    out, lse = torch.ones(3, 2, 8), torch.ones(3, 2)
    with pytest.raises(ValueError, match="lse_b: expected \\[num_tokens, num_qo_heads\\]"):
        pw.merge_state(out, lse, out, lse[:2])
    with pytest.raises(TypeError, match="lse_a: expected float32, got float64"):
        pw.merge_state(out, lse.double(), out, lse)
    with pytest.raises(TypeError, match="out_b: expected float32, got float16"):
        pw.merge_state(out, lse, out.half(), lse)


def test_page_helpers():
    row = torch.tensor([3, 1], dtype=torch.int32)
    for start, stop in ((-1, 2), (3, 2), (0, 9)):
        with pytest.raises(ValueError, match=f"got start={start}, stop={stop}"):
            pw.page_slots(row, start, stop, 4)
    with pytest.raises(ValueError, match="kv_indptr: expected non-decreasing"):
        pw.page_table_from_csr(torch.tensor([0, 3, 2]), torch.arange(3))
    with pytest.raises(ValueError, match="kv_indptr\\[-1\\]: expected at most 3"):
        pw.page_table_from_csr(torch.tensor([0, 3, 5]), torch.arange(3))
    with pytest.raises(ValueError, match="request 0 has 3 pages"):
        pw.page_table_from_csr(torch.tensor([0, 3]), torch.arange(3), 2)


def test_sparse_tensors_are_refused_in_words():
    """Wherever a tensor may come in that no other check takes apart."""
    cache = pw.PagedKVCache.allocate(
        num_layers=1, num_pages=2, page_size=4, num_kv_heads=2, head_dim=8, dtype=torch.int8, device="cpu", scale="head"
    )
    ones, rows = torch.ones(2).to_sparse(), torch.zeros(2, 2, 8)
    slots = torch.arange(2)
    for name, call in (
        ("k_scales[0]", lambda: pw.PagedKVCache(cache.k, cache.v, k_scales=[ones], v_scales=[ones])),
        ("slots", lambda: pw.pack_kv(cache, slots.to_sparse())),
        ("k_scale", lambda: pw.append_kv(rows, rows, cache.k[0], cache.v[0], slots, k_scale=ones, v_scale=ones)),
        ("lses", lambda: pw.merge_states(torch.zeros(2, 1, 2, 8), torch.zeros(2, 1, 2).to_sparse())),
        ("page_table_row", lambda: pw.page_slots(slots.to_sparse(), 0, 3, 4)),
    ):
        with pytest.raises(TypeError, match=re.escape(f"{name}: expected a dense tensor")):
            call()


def test_a_shape_that_fitted_is_still_compared_with_the_slots():
    cache = pw.PagedKVCache.allocate(
        num_layers=1, num_pages=2, page_size=4, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16, device="cpu"
    )
    packed = pw.pack_kv(cache, torch.arange(4))
    pw.unpack_kv(packed, cache, torch.arange(4))
    with pytest.raises(ValueError, match="3"):
        pw.unpack_kv(packed, cache, torch.arange(3))
    with pytest.raises(ValueError, match="num_heads"):
        pw.unpack_kv(packed, cache, torch.arange(4), heads=(0, 1))
