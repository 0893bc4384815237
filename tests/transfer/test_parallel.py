"""Any ranks of P to any ranks of D: every number in every cache of D against plain loops."""

import random
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.ranks import FIRST_TOKEN, Group, Prompt, Ranks, Storage, copies, through

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 2, 4, 8)


@st.composite
def storages(draw: st.DrawFn, num_ranks: int, num_layers: int, dtypes: tuple[torch.dtype, ...]) -> Storage:
    stages = [n for n in RANKS if n <= min(num_ranks, num_layers)]
    page_size, layout = draw(st.sampled_from([1, 3, 4, 7])), draw(st.sampled_from(["NHD", "HND"]))
    return Storage(page_size, layout, draw(st.sampled_from(dtypes)), num_ranks, draw(st.sampled_from(stages)))


def prompt_of(draw: st.DrawFn, groups: list[Group], dice: random.Random) -> Prompt:
    length = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(dice.randrange(1 << 30))
    kv = {}
    for g, of in enumerate(groups):
        for layer in range(of.num_layers):
            for head in range(of.num_heads):
                k = torch.randn(length, of.head_dim, generator=generator)
                v = torch.randn(length, of.head_dim_v, generator=generator) if of.head_dim_v else k[:, :-1]
                kv[g, layer, head] = k, v
    num_cached = draw(st.integers(0, length - 1))
    return Prompt(length, length + draw(st.integers(1, 5)), num_cached, kv)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("m", RANKS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_every_number_arrives_where_it_belongs(m: int, n: int, data: st.DataObject) -> None:
    dice = random.Random(data.draw(st.integers(0, 1 << 30), "dice"))
    groups = [Group(data.draw(st.integers(1, 8)), data.draw(st.sampled_from(RANKS)), 4, 4)]
    if data.draw(st.booleans(), "MLA"):
        groups.append(Group(data.draw(st.integers(1, 4)), 1, 6, 0))
    if data.draw(st.booleans(), "a third group"):
        groups.append(Group(data.draw(st.integers(1, 3)), data.draw(st.sampled_from(RANKS)), 8, 3))
    dtypes = data.draw(st.sampled_from([FLOATS, FLOATS, (torch.int8,)]), "dtypes")  # test_triples has the others
    p = data.draw(storages(m, groups[0].num_layers, dtypes), "P")
    d = data.draw(storages(n, groups[0].num_layers, dtypes), "D")
    prompts = {f"r{i}": prompt_of(data.draw, groups, dice) for i in range(data.draw(st.integers(1, 2)))}
    ranks = Ranks(
        groups, p, d, prompts, dice, thin=data.draw(st.booleans(), "thin"),
        num_staging_slots=data.draw(st.integers(1, 3)), slot_tokens=data.draw(st.sampled_from([1, 2, 5, 200])),
        forward_tokens=data.draw(st.sampled_from([1, 5, 20])),
    )  # fmt: skip
    before = [copies(rank) for rank in ranks.d]
    ranks.play()
    for rank, (found, expected) in enumerate(zip(ranks.d, before, strict=True)):
        for request_id, prompt in prompts.items():
            start = ranks.started[rank, request_id]
            assert start.first_token == FIRST_TOKEN
            for share in start.shares:
                tokens = share.reserve.num_cached, share.reserve.num_tokens
                ours = ranks.links[share.link].at_d.digests(start.pages, share.reserve.blocks, tokens)
                assert share.commit.digests == ours
            expected.write(prompt, start.pages, prompt.num_cached, prompt.length, through(p.dtype, d.dtype))
            ranks.receivers[rank].release(request_id)
        for (_, *of), (_, *naive) in zip(found.cells(), expected.cells(), strict=True):
            for rows, expected_rows in zip(chain(*of), chain(*naive), strict=True):
                assert torch.equal(rows, expected_rows)
        assert found.pages.num_free == found.pages.num_pages
    ranks.check_clean()
