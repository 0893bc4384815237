"""What is planted in decode's Hopper kernel, to be found: file, text, what stands there instead."""

_MMA_V = "    acc = warpgroup_mma(v, tiles.p.permute([1, 0]), sums.acc * rescale[None, :])\n"
_FENCE, _BARRIER = "    fence_async_shared()\n", "    barrier()\n"
FAULTS = {
    "nobody says that K was read": ("columns", "    release(tiles.k, i)\n", ""),
    "nobody says that V was read": ("columns", "    release(tiles.v, i)\n", ""),
    "K is read before it is there": ("columns", "    wait_full(tiles.k, i, True)\n", ""),
    "V is read before it is there": ("columns", "    wait_full(tiles.v, i, True)\n", ""),
    "V is given back while it is read": ("columns", _MMA_V, f"    release(tiles.v, i)\n{_MMA_V}    i += 1\n"),
    "P is not fenced": ("columns", _FENCE, ""),
    "P is not waited for": ("columns", _BARRIER, ""),
    "Q is not fenced": ("queries", _FENCE, ""),
    "Q is not waited for": ("queries", _FENCE + _BARRIER, _FENCE),
    "the sums are not rescaled": ("columns", "sums.acc * rescale[None, :]", "sums.acc"),
    "nor is the total": ("columns", "sums.total * rescale[None, :]", "sums.total"),
    "what nobody owns is multiplied": ("columns", "_clear_unseen(tile_of(tiles.v, i), first, keys, spec)", "pass"),
    "the mask is off by one": ("columns", "(key < keys.stop)", "(key < keys.stop - 1)"),
    "the left mask is off by one": ("columns", "(key >= keys.first)", "(key > keys.first)"),
    "the last tile is not masked": ("columns", "(first + N > keys.stop)", "(first > keys.stop)"),
    "the first tile is not masked": ("columns", "(first < keys.first)", "(first < 0)"),
    "a tile is missing": ("pieces", "gl.maximum((seq_len + spec.BLOCK_N - 1)", "gl.maximum((seq_len + 1)"),
    "a request without keys has no tile": ("pieces", "// spec.BLOCK_N - first, 1)", "// spec.BLOCK_N - first, 0)"),
    "a share begins a request late": ("pieces", "_plus) <= first)", "_plus) < first)"),
    "a share has no end": ("pieces", "gl.minimum(first + size, total)", "first + size"),
    "every program begins at the first unit": ("pieces", "gl.program_id(1) * size", "gl.program_id(1) * 0"),
    "pieces lie in one place": ("pieces", "(at.unit != program * share.size)", "(at.unit != at.unit)"),
    "pieces are looked for elsewhere": ("merging", "gl.where(n == 0, parts.first,", "gl.where(n < 0, parts.first,"),
    "each program counts for itself": ("pieces", "(1) + first_program\n", "(1) + program\n"),
    "the last but one merges": ("merging", "before == parts.num - 1", "before == parts.num - 2"),
    "a count is not set back": ("merging", "            gl.store(count, 0)\n", ""),
    "a piece too few is merged": ("merging", "(n < parts.num)", "(n < parts.num - 1)"),
    "the first sums are not rescaled": ("merging", "        acc = acc * rescale[:, None]\n", ""),
    "the next tile's pages come at once": ("decode", "            pages = next_pages\n", ""),
    "the ring begins anew with each request": ("decode", "        at = behind", "        i = 0\n        at = behind"),
    "all boxes go to one place": ("boxes", ".slice(j * ROWS, ROWS)", ".slice(0, ROWS)"),
    "pages are read past their end": ("pages", "& (entry < stop_entry)", ""),
}  # fmt: skip
OF_BYTES = {
    "Q's columns keep their order": ("queries", "reordered(values * power[:, None])", "values * power[:, None]"),
    "V's columns keep theirs": ("columns", "        acc = in_order(acc)\n", "        pass\n"),
    "Q's power stays": ("queries", "            scale_log2 *= unscale\n", "            pass\n"),
    "V's scale is forgotten": ("columns", "value = scales.value", "value = 1.0"),
    "the scales are another head's": ("scales", "kv_head.to(gl.int64)", "0"),
    "bytes are expected as halves": ("boxes", "N * D * BYTES)", "N * D * 2)"),
}


OF_TOKENS = {
    "K's scales are V's": ("columns", "tiles.k_scales.index", "tiles.v_scales.index"),
    "scales are the next stage's": ("columns", "stage_of(tiles.k, i)", "stage_of(tiles.k, i + 1)"),
    "scales are overwritten too early": ("decode", "                wait_empty(tiles.k, i)\n", ""),
    "scales are not waited for": ("decode", "                barrier()  # they", "                # they"),
    "the next scales come at once": ("decode", "            v_scale = next_v_scale\n", ""),
    "scales are of another page": ("scales", "page.to(gl.int64) * cache.stride_scale_page", "page.to(gl.int64) * 0"),
    "the lift stays": ("columns", "            value *= inverse(sums.lift)\n", "            pass\n"),
    "sums keep the lift before": ("columns", "        rescale *= lift * inverse(sums.lift)\n", ""),
    "Q's power stays": ("columns", "qk * terms.unscale[None, :]", "qk"),
    "a row of zeros counts": ("columns", "(some == 0)", "(some < 0)"),
}
