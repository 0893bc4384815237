"""Which sender is to push which part of what a receiver holds."""

from collections.abc import Mapping, Sequence

from pagewire.transfer.coverage import cells
from pagewire.transfer.frames import Block, Held, Range


def common(a: Held | Block, b: Held | Block) -> tuple[Range, Range]:
    """Layers and heads of both; twice (0, 0) when there are none."""
    layers = max(a.layer_start, b.layer_start), min(a.layer_stop, b.layer_stop)
    heads = max(a.head_start, b.head_start), min(a.head_stop, b.head_stop)
    return (layers, heads) if layers[0] < layers[1] and heads[0] < heads[1] else ((0, 0), (0, 0))


def shares(ours: Sequence[Held], links: Mapping[int, Sequence[Held]]) -> dict[int, tuple[Block, ...]]:
    """What each link's sender is to push, of what it and we hold: `ours` in all, nothing twice. Where links hold the
    same of a group, each gets as many layers of it as the others, or one fewer.

    Raises ValueError naming what no link holds, or links of which one holds a part of what the other holds.
    """
    pushed: dict[int, tuple[Block, ...]] = {number: () for number in links}
    for group, held in enumerate(ours):
        holders: dict[tuple[Range, Range], list[int]] = {}
        for number, theirs in links.items():
            of_both = common(held, theirs[group])
            if of_both[0][1]:
                holders.setdefault(of_both, []).append(number)
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
