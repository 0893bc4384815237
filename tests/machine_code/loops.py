"""Loops of machine code, and the way through one that whole, aligned, unmasked data takes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

from machine_code.sass import Instruction

END = -1  # of a way
ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")  # where nothing follows, unless under a predicate
Score = tuple[int, ...]  # what a way has of each kind of instruction that counts, then minus its length


class Flow:
    """Instructions, by their positions, and which may be next to which."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        self.after = successors(code)
        self.before: list[list[int]] = [[] for _ in code]
        for n, nexts in enumerate(self.after):
            for m in nexts:
                self.before[m].append(n)

    def around(self, head: int, latches: Iterable[int]) -> frozenset[int]:
        """The natural loop: what lies on some way from its head to the instructions that lead back there."""
        body, todo = {head}, list(latches)
        while todo:
            n = todo.pop()
            if n not in body:
                body.add(n)
                todo += self.before[n]
        return frozenset(body)

    def whole(self) -> Region:
        ends = frozenset(n for n, instruction in enumerate(self.code) if instruction.unit == "EXIT")
        return Region(self, 0, frozenset(range(len(self.code))), ends)

    def loops(self) -> list[Region]:
        """One for every head, shortest first."""
        latches: dict[int, list[int]] = {}
        for n, nexts in enumerate(self.after):
            for head in nexts:
                if head <= n:
                    latches.setdefault(head, []).append(n)
        found = [Region(self, head, self.around(head, ends), frozenset(ends)) for head, ends in latches.items()]
        # what reaches back to the beginning of the code can be entered elsewhere than at its head
        return sorted((loop for loop in found if 0 not in loop.body or loop.head == 0), key=lambda loop: len(loop.body))


@dataclasses.dataclass(frozen=True)
class Region:
    """A loop, or a whole kernel."""

    flow: Flow
    head: int  # where it is entered
    body: frozenset[int]
    ends: frozenset[int]  # where it is left, or begins again

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, self.flow.code[n].text) for n in self.body)


def successors(code: Sequence[Instruction]) -> list[list[int]]:
    """Calls return, or else jump where they say (sm_80 leaves loops so). Branches on divergence are not taken: warps
    stay together. A jump through a table may lead wherever nothing else does.
    """
    at = {instruction.address: n for n, instruction in enumerate(code)}
    found: list[list[int]] = []
    for n, instruction in enumerate(code):
        diverges = instruction.op.startswith("BRA.DIV")
        ends = instruction.unit in ENDS and not instruction.text.startswith("@") and not diverges
        nexts = [] if ends or n + 1 == len(code) else [n + 1]
        if instruction.unit in ("BRA", "CALL") and not diverges:
            named = re.search(r"(\S+)\s+0x([0-9a-f]+)$", instruction.text)
            target = at.get(int(named[2], 16)) if named else None
            if named and named[1] != instruction.op and n + 1 < len(code):  # a second predicate: `BRA P1, 0x...`
                nexts = [n + 1]
            if target is not None and target not in nexts:
                nexts.append(target)
        found.append(nexts)
    reached = {0}.union(*found)
    tables = [n for n in range(len(code)) if n not in reached]
    return [tables if instruction.unit == "BRX" else nexts for instruction, nexts in zip(code, found, strict=True)]


def innermost(found: Iterable[Region], *patterns: str) -> Region:
    """The smallest loop that has an instruction of each pattern.

    Raises:
        LookupError: no loop has.
    """
    for loop in found:
        if all(loop.has(pattern) for pattern in patterns):
            return loop
    raise LookupError(f"no loop with {' and '.join(patterns)}")


def plain_way(
    region: Region,
    most: Sequence[str],
    with_a: str | None = None,
    not_over: Callable[[Sequence[Instruction]], bool] | None = None,
) -> list[Instruction]:
    """Once through a region: of the ways from its head to an end, those with the most instructions of the first
    pattern of `most`, of these those with the most of the second, ..., of these, if there are any, those with an
    instruction of `with_a`, and of these the shortest. No way jumps over code for which `not_over` holds, and loops
    inside are passed once.

    With tensor core steps and whole copies as `most`, that is the way of data which asks for nothing else: whatever is
    left out by a row that is short or absent has fewer steps or copies, and whatever a mask, a scale per token, a bias,
    an error or a rare value brings is longer. It is a bound from below: branches are taken as if they had nothing to
    do with each other.
    """
    kinds = [re.compile(pattern) for pattern in most]
    needed = re.compile(with_a) if with_a else None
    nexts, order = _acyclic(region, not_over)
    # position -> whether with_a is met -> the best from there: its score, the next position, whether it is met there
    best: dict[int, dict[bool, tuple[Score, int, bool]]] = {}
    for n in order:
        text = region.flow.code[n].text
        own = (*(int(bool(kind.search(text))) for kind in kinds), -1)
        rests = [((0,) * len(own), END, False)] if n in region.ends else []
        rests += [(score, m, met) for m in nexts[n] for met, (score, *_) in best[m].items()]
        here: dict[bool, tuple[Score, int, bool]] = {}
        for rest, m, met in rests:
            meets = met or bool(needed and needed.search(text))
            score = tuple(a + b for a, b in zip(own, rest, strict=True))
            if meets not in here or score > here[meets][0]:
                here[meets] = score, m, met
        best[n] = here
    # to meet with_a comes after what is to be most, and before the length
    n, met = region.head, max(best[region.head], key=lambda met: (best[region.head][met][0][:-1], met))
    way = []
    while n != END:
        way.append(region.flow.code[n])
        _, n, met = best[n][met]
    return way


def _acyclic(
    region: Region, not_over: Callable[[Sequence[Instruction]], bool] | None
) -> tuple[dict[int, list[int]], list[int]]:
    """The region without what leads back, and its positions, each after those it leads to. Where nothing else follows,
    at the end of a loop that is left at its beginning, that is next which comes after the loop.
    """
    flow = region.flow
    kept: dict[int, list[int]] = {}
    order: list[int] = []
    path, open_ = [region.head], {region.head}
    while path:
        n = path[-1]
        if n not in kept:
            nexts = [m for m in flow.after[n] if m in region.body]
            kept[n] = [m for m in nexts if m not in open_]
            if not_over and len(kept[n]) == 2 and not_over(flow.code[n + 1 : kept[n][1]]):
                kept[n] = kept[n][:1]
            if nexts and not kept[n] and n not in region.ends:
                inside = flow.around(nexts[0], [n])
                left = {m for k in inside for m in flow.after[k] if m not in inside}
                kept[n] = [m for m in left if m in region.body and m not in open_]
        todo = next((m for m in kept[n] if m not in kept), None)
        if todo is None:
            order.append(path.pop())
            open_.discard(n)
        else:
            path.append(todo)
            open_.add(todo)
    return kept, order
