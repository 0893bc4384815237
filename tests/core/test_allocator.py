"""PageAllocator against a model that is only sets and counts."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

import pagewire as pw
from pagewire.allocator import STATES

# page ids as callers have them
FORMS = {
    "list": list,
    "tuple": tuple,
    "int32 tensor": lambda pages: torch.tensor(pages, dtype=torch.int32),
    "int64 tensor": lambda pages: torch.tensor(pages, dtype=torch.int64),
    "array": lambda pages: np.array(pages, dtype=np.int64),
    "numpy integers": lambda pages: [np.int32(p) for p in pages],
    "0-d tensors": lambda pages: [torch.tensor(p) for p in pages],
    "row of a page table": lambda pages: torch.tensor([pages, pages], dtype=torch.int32)[1],
    "generator": lambda pages: (p for p in pages),
}
forms = st.sampled_from(list(FORMS.values()))


class Allocator(RuleBasedStateMachine):
    """Requests hold references to pages; every page is in one state; nothing is lost and nothing is given twice."""

    references = Bundle("references")  # one entry per reference that some request holds

    @initialize(num_pages=st.integers(0, 12))
    def start(self, num_pages: int) -> None:
        self.pages = pw.PageAllocator(num_pages)
        self.refs = [0] * num_pages
        self.where = {"cached": set(), "leased": set()}

    @property
    def free(self) -> set[int]:
        idle = {page for page, n in enumerate(self.refs) if n == 0}
        return idle - self.where["cached"] - self.where["leased"]

    @rule(target=references, n=st.integers(0, 5))
    def alloc(self, n: int):
        free = self.free
        if n > len(free):
            with pytest.raises(pw.OutOfPages, match=f"{n} pages asked for, {len(free)} of"):
                self.pages.alloc(n)
            return multiple()
        taken = self.pages.alloc(n)
        assert len(set(taken)) == n and set(taken) <= free
        for page in taken:
            self.refs[page] = 1
        return multiple(*taken)

    @rule(target=references, page=references, form=forms)
    def share(self, page: int, form) -> int:
        self.pages.share(form([page]))
        self.refs[page] += 1
        return page

    @rule(page=consumes(references), to=st.sampled_from(["free", "cached", "leased"]), form=forms)
    def let_go(self, page: int, to: str, form) -> None:
        self.pages.free(form([page]), to=to)
        self.refs[page] -= 1
        if self.refs[page] == 0 and to != "free":
            self.where[to].add(page)

    @rule(target=references, data=st.data(), form=forms)
    def revive(self, data, form):
        chosen = self.some("cached", data)
        self.pages.revive(form(chosen))
        for page in chosen:
            self.where["cached"].discard(page)
            self.refs[page] = 1
        return multiple(*chosen)

    @rule(data=st.data(), form=forms)
    def evict(self, data, form) -> None:
        chosen = self.some("cached", data)
        self.pages.evict(form(chosen))
        self.where["cached"].difference_update(chosen)

    @rule(data=st.data(), form=forms)
    def end_lease(self, data, form) -> None:
        chosen = self.some("leased", data)
        self.pages.end_lease(form(chosen))
        self.where["leased"].difference_update(chosen)

    @rule(data=st.data(), verb=st.sampled_from(["share", "free", "revive", "evict", "end_lease"]), form=forms)
    def one_wrong_page_changes_nothing(self, data, verb: str, form) -> None:
        """All or nothing: a call that names one page it may not touch leaves the others alone too."""
        needed = {"revive": "cached", "evict": "cached", "end_lease": "leased"}.get(verb, "active")
        states = {page: self.pages.state(page) for page in range(self.pages.num_pages)}
        wrong = [page for page, state in states.items() if state != needed] + [-1, self.pages.num_pages]
        right = [page for page, state in states.items() if state == needed]
        with pytest.raises(ValueError, match=f"{verb}: "):
            getattr(self.pages, verb)(form([*right, data.draw(st.sampled_from(wrong))]))
        if right:
            with pytest.raises(ValueError, match=f"{verb}: page {right[0]} is named twice"):
                getattr(self.pages, verb)(form(right + right[:1]))

    def some(self, state: str, data) -> list[int]:
        pages = sorted(self.where[state])
        return data.draw(st.lists(st.sampled_from(pages), unique=True)) if pages else []

    @invariant()
    def hands_out_plain_integers(self) -> None:
        assert all(type(page) is int for page in self.pages._free)

    @invariant()
    def agrees_with_the_model(self) -> None:
        counts = self.pages.counts()
        assert tuple(counts) == STATES and sum(counts.values()) == self.pages.num_pages
        assert counts["free"] == self.pages.num_free == len(self.free)
        for page, refs in enumerate(self.refs):
            assert self.pages.ref_count(page) == refs
            state = "active" if refs else next((s for s, held in self.where.items() if page in held), "free")
            assert self.pages.state(page) == state


TestAllocator = Allocator.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_pages_come_back_in_the_order_they_were_freed():
    """Least recently freed first: a late write to a freed page has the longest time to be noticed."""
    pages = pw.PageAllocator(3)
    pages.alloc(3)
    pages.free([2])
    pages.free([0, 1])
    assert pages.alloc(3) == [2, 0, 1]


@pytest.mark.parametrize("to", ["active", "gone"])
def test_free_to_an_unknown_state(to):
    pages = pw.PageAllocator(1)
    pages.alloc(1)
    with pytest.raises(ValueError, match="expected to='free', 'cached' or 'leased'"):
        pages.free([0], to=to)


@pytest.mark.parametrize("call", [lambda: pw.PageAllocator(-1), lambda: pw.PageAllocator(1).alloc(-1)])
def test_negative_counts(call):
    with pytest.raises(ValueError, match=">= 0"):
        call()


@pytest.mark.parametrize("pages", [3, 1.0, [1.5], "0", ["0"], None, torch.tensor([0.0]), torch.tensor([[0]])])
@pytest.mark.parametrize("verb", ["share", "free", "revive", "evict", "end_lease"])
def test_what_is_no_page_id_is_refused_in_a_sentence(verb, pages):
    allocator = pw.PageAllocator(4)
    allocator.alloc(4)
    with pytest.raises(TypeError, match=f"^{verb}: (a page id: expected an integer|expected page ids), got"):
        getattr(allocator, verb)(pages)
    assert allocator.counts()["active"] == 4


@pytest.mark.parametrize("count", [2.0, "2", None, torch.tensor(2.0)])
def test_counts_are_integers(count):
    with pytest.raises(TypeError, match="num_pages: expected an integer"):
        pw.PageAllocator(count)
    with pytest.raises(TypeError, match="alloc: num_pages: expected an integer"):
        pw.PageAllocator(4).alloc(count)
    assert pw.PageAllocator(np.int64(4)).alloc(torch.tensor(2)) == [0, 1]
