"""Which sender is to push which part of what a receiver holds."""

from collections.abc import Mapping, Sequence

from pagewire.transfer.coverage import cells
from pagewire.transfer.frames import Block, Held, Range


def intersection(a: Range, b: Range) -> Range:
    """(0, 0) when there is none."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else (0, 0)


def shares(ours: Sequence[Held], links: Mapping[int, Sequence[Held]]) -> dict[int, tuple[Block, ...]]:
    """What each link's sender is to push, of what it and we hold: `ours` in all, nothing twice. Where links hold the
    same of a group, each gets as many layers of it as the others, or one fewer.

    Raises ValueError naming what no link holds, or links of which one holds a part of what the other holds.
    """
    pushed: dict[int, tuple[Block, ...]] = {number: () for number in links}
    for group, held in enumerate(ours):
        holders: dict[tuple[Range, Range], list[int]] = {}
        for number, theirs in links.items():
            common = intersection(held.layers, theirs[group].layers), intersection(held.heads, theirs[group].heads)
            if (0, 0) not in common:
                holders.setdefault(common, []).append(number)
        missing = set(cells(Block(group, *held.layers, *held.heads))) if held.layer_start < held.layer_stop else set()
        for ((start, stop), heads), numbers in holders.items():
            if not missing.issuperset(cells(Block(group, start, stop, *heads))):
                raise ValueError(f"group {group}: layers [{start}, {stop}) x heads {heads} overlap another link's")
            missing.difference_update(cells(Block(group, start, stop, *heads)))
            bounds = [start + (stop - start) * i // len(numbers) for i in range(len(numbers) + 1)]
            for number, of in zip(numbers, zip(bounds, bounds[1:], strict=False), strict=True):
                if of[0] < of[1]:
                    pushed[number] += (Block(group, *of, *heads),)
        if missing:
            raise ValueError("no link holds group {}, layer {}, head {}".format(*min(missing)))
    return pushed
