"""What is planted in prefill's Hopper kernel, to be found: file, text, what stands there instead."""

_WAIT_ACC = "    acc = warpgroup_mma_wait(0, [acc])\n"
_RELEASE_K, _RELEASE_V = "    release(tiles.k, at)\n", "    release(tiles.v, at - 1)\n"
FAULTS = {
    "nobody says that K was read": ("consumer", _RELEASE_K, ""),
    "nobody says that V was read": ("consumer", _RELEASE_V, ""),
    "V is given back while it is read": ("consumer", _WAIT_ACC + _RELEASE_V, _RELEASE_V + _WAIT_ACC),
    "V is read before it is there": ("consumer", "    wait_full(tiles.v, at - 1, True)\n", ""),
    "the next K is read before it is there": ("consumer", "wait_full(tiles.k, at + 1, i + 1 < walk.num)", "pass"),
    "a sum is used before it is waited for": ("consumer", _WAIT_ACC + _RELEASE_V, _RELEASE_V),
    "the sums are not rescaled": ("consumer", "gl.convert_layout(rescale,", "gl.convert_layout(rescale * 0 + 1,"),
    "a phase is the other one": ("ring", "_phase(ring, i) ^ 1", "_phase(ring, i)"),
    "a phase does not turn": ("ring", "_phase(ring, i), pred=needed", "0, pred=needed"),
    "one consumer is waited for": ("ring", "count=CONSUMERS", "count=1"),
    "fewer bytes are expected": ("boxes", "N * D * BYTES)", "N * D)"),
    "more bytes are expected": ("boxes", "N * D * BYTES)", "N * D * 4)"),
    "all boxes go to one place": ("boxes", ".slice(j * ROWS, ROWS)", ".slice(0, ROWS)"),
    "the mask is off by one": ("softmax", "key[None, :] < t.stop_key", "key[None, :] <= t.stop_key"),
    "the left mask is off by one": ("softmax", "key[None, :] >= t.first_key", "key[None, :] > t.first_key"),
    "too many tiles are whole": ("row_tiles", "stop_inner_tile - inner_tile, 0", "stop_inner_tile - inner_tile + 1, 0"),
    "a tile is missing": ("row_tiles", "gl.maximum((stop + N - 1) // N,", "gl.maximum(stop // N,"),
    "Q is not fenced": ("consumer", "    fence_async_shared()\n", ""),
    "Q is not waited for": ("consumer", "    barrier()\n", ""),
    "the next tile's pages come at once": ("boxes", "        pages = next_pages\n", ""),
    "pages are read past their end": (
        "pages",
        "        needed = (entry >= keys.first // spec.PAGE_SIZE) & (entry < stop_entry)",
        "        needed = entry >= 0",
    ),
}
OF_ITEMS = {
    "an item is written over the one before": ("items", "    wait_empty(items, i)\n", ""),
    "an item is not given back": ("items", "    release(items, i)\n", ""),
    "an item is read before it is there": ("items", "    wait_full(items, i, True)\n", ""),
    "every item has the ring's first tiles": ("consumer", "            done += item.walk.num\n", ""),
    "an item's last V is kept": ("consumer", "    release(tiles.v, last)\n", ""),
    "nobody hears of the end": ("prefill", "if ours | (item.rows.seq_len < 0):", "if ours & more:"),
    "a program goes the same way twice": ("prefill", "gl.where(step % 2 == 0, program,", "gl.where(step % 2 != 2, 0,"),
}
OF_TURNS = {
    "a turn has no end": ("consumer", "        _end_turn(tiles.turns, CONSUMER)\n", "        pass\n"),
    "both begin": ("consumer", "(i & 1) ^ (1 - CONSUMER)", "(i & 1) ^ 1"),
    "nobody begins": ("consumer", "(i & 1) ^ (1 - CONSUMER)", "i & 1"),
    "who is last does not clear": ("prefill", "before == num_items - 1", "before == num_items"),
    "one is left out": ("prefill", "index = programs + before", "index = programs + before + 1"),
}
_ASK_V = "        _ask_for(v, tiles.v, done + i, keys, kv_head, walk.last - i, spec)\n"
_NEXT_V = "        if i + 2 < walk.num:\n            wait_empty(tiles.v, done + i + 1)\n"
OF_ROWS = {
    "rows are handed over while on their way": (
        "rows",
        "async_copy.wait_group(later)",
        "async_copy.wait_group(later + 1)",
    ),
    "rows are not fenced": ("rows", "    fence_async_shared()\n", ""),
    "K is handed over when the next V has room": ("rows", _ASK_V, f"{_NEXT_V}{_ASK_V}"),
    "rows are not handed over": ("rows", "    _hand_over(tiles.v, done + walk.num - 1, 0)\n", ""),
    "rows are copied over what is read": ("rows", "    wait_empty(ring, i)\n", ""),
    "rows past the end are read": ("rows", "& (key < keys.stop)", ""),
    "rows of another page": ("rows", "key % spec.PAGE_SIZE", "key % 16"),
}


OF_BYTES = {
    "what was converted is not fenced": ("converted", "    fence_async_shared()\n", ""),
    "it is handed over too early": (
        "converted",
        "            if n == 0 and strip == 0:\n                wait_empty(ring, i)\n",
        "",
    ),
    "it is not handed over": ("converted", "    mbarrier.arrive(full_of(ring, i), count=1)\n", ""),
    "a piece is missing": ("converted", "static_range(_SLICES)", "static_range(_SLICES - 1)"),
    "bytes past the end are read": ("converted", "& (key < keys.stop)", ""),
    "V's scale is forgotten": ("consumer", "acc * scales.value", "acc"),
}


OF_PARTS = {
    "a part of no tiles": ("row_tiles", "gl.minimum(size, walk.num - first)", "size"),
    "a part begins one tile late": ("row_tiles", "last = walk.last - first\n", "last = walk.last - first - 1\n"),
    "more tiles are whole": ("row_tiles", "Walk(last, num_right, inner - num_right,", "Walk(last, 1, inner - 1,"),
    "parts lie in one place": ("consumer", "first + part * step", "first"),
    "warpgroups share a place": ("consumer", "+ CONSUMER * ROWS\n    step", "\n    step"),
    "warpgroups share a counter": ("consumer", "+ tile * CONSUMERS + CONSUMER", "+ tile * CONSUMERS"),
    "heads share a counter": ("consumer", "+ tile * CONSUMERS + CONSUMER", "+ item.rows.tile * CONSUMERS + CONSUMER"),
    "counters are not made zero": ("merging", "            gl.store(count, 0)\n", ""),
}  # fmt: skip
OF_STRIPS = {
    "strips are one": ("consumer", "tiles.q.index(strip)", "tiles.q.index(0)"),
    "strips start anew": ("consumer", "use_acc=strip > 0", "use_acc=False"),
    "boxes of a strip are the first's": ("boxes", "+ strip * D]", "]"),
    "Q's strips are the first": ("consumer", "(strip * D + dim)", "dim"),
}
OF_TOKENS = {
    "K's scales are V's": ("consumer", "_scales(tiles.k_scales, i)", "_scales(tiles.v_scales, i)"),
    "V's scales are the next tile's": ("consumer", "_scales(tiles.v_scales, i)", "_scales(tiles.v_scales, i + 1)"),
    "scales have one stage": ("prefill", "PLACES: gl.constexpr = 2 * STAGES", "PLACES: gl.constexpr = STAGES // 2"),
    "scales are of another page": ("scales", "page.to(gl.int64) * cache.stride_scale_page", "page.to(gl.int64) * 0"),
    "scales are another head's": ("scales", "kv_head.to(gl.int64) * cache.stride_scale_head + at", "at"),
}  # fmt: skip
