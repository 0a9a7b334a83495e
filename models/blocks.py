"""The rule that cuts a model into blocks: pure arithmetic on positions, so that it can be read, tested and repeated.

Given the work of each node and the places where the graph can be cut:

1. A place is useful when there is work on both sides of it and the node behind it would not be fused into one before it.
2. Boundaries are the useful places of the lowest level (one live tensor of known shape). A gap between neighbouring boundaries that holds
   more than an eighth of the whole is opened with the places of the next level, again and again.
3. Of boundaries with no work between them the best one stays: lowest level, then fewest bytes, then first.
4. While there are more than `max_blocks` blocks, the neighbours with the least work together are merged; a boundary of level k counts
   as k times as light, so that wide cuts go first. Merges of equal weight are done together even where that leaves fewer blocks, so that
   layers that are alike stay alike.
5. A block lighter than an eighth of a fair share (total / max_blocks) joins its lighter neighbour: a cut there would cost more than it
   moves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

_HEAVY_SHARE = 1 / 8  # of the whole: a block above it is opened with wider cuts
_LIGHT_SHARE = 1 / 8  # of a fair share: a block below it joins a neighbour
_EQUAL = 1 + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place where the graph can be cut: how unwelcome it is (1 is best) and how many bytes cross it."""

    level: int
    bytes: int


def useful(position: int, work_before: Sequence[float]) -> bool:
    """Say whether there is work on both sides of `position`; `work_before[i]` is the work of the nodes before i."""
    return 0 < work_before[position] < work_before[-1]


def partition(work: Sequence[float], places: Mapping[int, Place], max_blocks: int) -> list[tuple[int, int]]:
    """Return the blocks as (first, last) positions, in order; together they are all nodes. The rule is that of the module's docstring."""
    if not work:
        return []
    before = [0.0, *accumulate(work)]
    usable = {position: place for position, place in sorted(places.items()) if useful(position, before)}
    boundaries = _without_empty_blocks(_boundaries(usable, before), usable, before)
    kept = _drop_light(_coarsen(boundaries, usable, before, max_blocks), usable, before, max_blocks)
    return [(first, end - 1) for first, end in pairwise([0, *kept, len(work)])]


def _boundaries(usable: Mapping[int, Place], before: Sequence[float]) -> list[int]:
    levels = sorted({place.level for place in usable.values()})
    found = [position for position, place in usable.items() if place.level <= 1]
    for level in levels:
        gaps = [(a, b) for a, b in pairwise([0, *found, len(before) - 1]) if before[b] - before[a] > before[-1] * _HEAVY_SHARE]
        heavy = iter(gaps)
        gap = next(heavy, None)
        added = []
        for position, place in usable.items():  # both ascend
            while gap is not None and position >= gap[1]:
                gap = next(heavy, None)
            if gap is not None and gap[0] < position and place.level == level:
                added.append(position)
        found = sorted({*found, *added})
    return found


def _without_empty_blocks(boundaries: Sequence[int], usable: Mapping[int, Place], before: Sequence[float]) -> list[int]:
    kept: list[int] = []
    for position in boundaries:
        if kept and before[position] == before[kept[-1]]:
            kept[-1] = min(kept[-1], position, key=lambda at: (usable[at].level, usable[at].bytes, at))
        else:
            kept.append(position)
    return kept


class _Chain:
    """Blocks as a doubly linked list over their boundaries; position 0 and the end are never removed."""

    def __init__(self, boundaries: Sequence[int], usable: Mapping[int, Place], before: Sequence[float]) -> None:
        ends = [0, *boundaries, len(before) - 1]
        self.left = dict(zip(boundaries, ends, strict=False))
        self.right = dict(zip(boundaries, ends[2:], strict=True))
        self._usable, self._before = usable, before

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.left))

    def cost(self, position: int) -> float:
        """The work of the two blocks that `position` separates, less for wide cuts."""
        return (self._before[self.right[position]] - self._before[self.left[position]]) / max(1, self._usable[position].level)

    def lightest_side(self, position: int) -> float:
        here = self._before[position]
        return min(here - self._before[self.left[position]], self._before[self.right[position]] - here)

    def remove(self, position: int) -> list[int]:
        """Merge the two blocks at `position`; return the boundaries whose cost that changes."""
        left, right = self.left.pop(position), self.right.pop(position)
        if left in self.right:
            self.right[left] = right
        if right in self.left:
            self.left[right] = left
        return [each for each in (left, right) if each in self.left]


def _coarsen(boundaries: Sequence[int], usable: Mapping[int, Place], before: Sequence[float], max_blocks: int) -> list[int]:
    chain = _Chain(boundaries, usable, before)
    queue = [(chain.cost(position), position) for position in boundaries]
    heapq.heapify(queue)
    last = -1.0
    while queue and (len(chain.left) + 1 > max_blocks or queue[0][0] <= last * _EQUAL):
        cost, position = heapq.heappop(queue)
        if position not in chain.left or chain.cost(position) != cost:
            continue  # removed, or its neighbours changed and it is queued again
        last = cost
        for changed in chain.remove(position):
            heapq.heappush(queue, (chain.cost(changed), changed))
    return list(chain)


def _drop_light(boundaries: Sequence[int], usable: Mapping[int, Place], before: Sequence[float], max_blocks: int) -> list[int]:
    chain = _Chain(boundaries, usable, before)
    light = before[-1] / max(1, max_blocks) * _LIGHT_SHARE
    while candidates := [position for position in chain if chain.lightest_side(position) < light]:
        chain.remove(min(candidates, key=lambda position: (chain.cost(position), position)))
    return list(chain)
