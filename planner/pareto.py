"""Pareto fronts: what nothing else beats in every respect."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Say whether `one` is nowhere above `other`, and somewhere below it; both are losses, in one order."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(losses: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions of those that none dominates, in order. Of several that are alike the first one stays."""
    kept: list[int] = []
    for index, mine in enumerate(losses):
        beaten = any(dominates(other, mine) for other in losses)
        if not beaten and all(list(losses[each]) != list(mine) for each in kept):
            kept.append(index)
    return kept


def ends(losses: Sequence[Sequence[float]]) -> list[int]:
    """Return, for each loss, the position on the front of the one that is best in it; ties go to what is better in the others."""
    positions = front(losses)
    if not positions:
        return []
    width = len(losses[positions[0]])
    return [min(positions, key=lambda at: (losses[at][which], sum(losses[at]))) for which in range(width)]
