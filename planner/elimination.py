"""Serial latency on graphs that are nearly a row, exactly: groups are eliminated one by one, each after a table of what is best for it.

Bucket elimination (Bertele and Brioschi, 1972; Dechter, 1999): memory and time are exponential in the width of the graph only, and graphs
of models are narrow: a residual block or an attention head joins a handful of tensors. Where the tables would grow too large there is no
answer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from aivmm.planner.compact import Array, Compact, Tensor

Spots = list[tuple[int, int]]
_MOST_CELLS = 2e7  # of all tables together
_Factor = tuple[tuple[int, ...], Array]  # groups, and what each combination of their choices costs


class Elimination:
    """The order for one graph, to be used with any prices. `possible` says whether its tables are small enough."""

    def __init__(self, merged: Compact) -> None:
        width = merged.cost.shape[1]
        self.tensors = [index for index, each in enumerate(merged.tensors) if each.export.any() or each.move.any()]
        near: list[set[int]] = [set() for _ in merged.members]
        cells = 0.0
        for index in self.tensors:
            scope = {merged.tensors[index].source, *merged.tensors[index].readers}
            cells += float(width) ** len(scope)
            if cells > _MOST_CELLS:
                break
            for group in scope:
                near[group] |= scope - {group}
        self.order: list[int] = []
        self.possible = cells <= _MOST_CELLS and self._narrowest_first(near, width)

    def _narrowest_first(self, near: list[set[int]], width: int) -> bool:
        """Find the order: always the group with the fewest neighbours left."""
        cells, gone = 0.0, [False] * len(near)
        waiting = [(len(each), group) for group, each in enumerate(near)]
        heapq.heapify(waiting)
        while waiting:
            degree, group = heapq.heappop(waiting)
            if gone[group] or degree != len(near[group]):
                continue  # an older entry
            gone[group] = True
            self.order.append(group)
            cells += float(width) ** (degree + 1)
            if cells > _MOST_CELLS:
                return False
            for other in near[group]:
                near[other] |= near[group] - {other}
                near[other].discard(group)
            for other in near[group]:
                heapq.heappush(waiting, (len(near[other]), other))
        return True

    def solve(self, merged: Compact) -> tuple[Spots | None, float]:
        """Return the plan with the least sum of loads, each device used once, and that sum; None and infinity where there is none."""
        buckets: list[list[_Factor]] = [[((group,), merged.cost[group])] for group in range(len(merged.members))]
        rank = np.argsort(self.order)
        for index in self.tensors:
            tensor = merged.tensors[index]
            scope = (tensor.source, *tensor.readers)
            buckets[min(scope, key=lambda each: rank[each])].append((scope, _prices(tensor, merged.cost.shape[1])))
        total = 0.0
        picked: list[tuple[int, tuple[int, ...], Array]] = []
        for group in self.order:
            scope, table = _joined(buckets[group], group)
            best = table.argmin(axis=0)
            picked.append((group, scope[1:], best))
            rest = table.min(axis=0)
            if scope[1:]:
                buckets[min(scope[1:], key=lambda each: rank[each])].append((scope[1:], rest))
            else:
                total += float(rest)
        if not math.isfinite(total):
            return None, math.inf
        choice = [0] * len(merged.members)
        for group, scope, best in reversed(picked):
            choice[group] = int(best[tuple(choice[each] for each in scope)])
        return [(each, 0) for each in choice], total


def _prices(tensor: Tensor, width: int) -> Array:
    """Return [source, each reader]: what moving the tensor costs in all."""
    size = len(tensor.readers) + 1
    ends = np.ix_(*[np.arange(width)] * size)
    total = np.zeros((width,) * size)
    away = np.zeros((width,) * size, dtype=bool)
    for place in range(width):
        read = np.zeros((width,) * size, dtype=bool)
        for end in ends[1:]:
            read |= end == place
        moved = read & (ends[0] != place)
        away |= moved
        total += np.where(moved, tensor.move[:, place].reshape(-1, *[1] * (size - 1)), 0.0)
    total += np.where(away, tensor.export.reshape(-1, *[1] * (size - 1)), 0.0)
    return total


def _joined(factors: Sequence[_Factor], first: int) -> _Factor:
    """Return the sum of the factors over all of their groups, `first` being the first of them."""
    scope = (first, *sorted({each for groups, _ in factors for each in groups} - {first}))
    axis = {group: index for index, group in enumerate(scope)}
    total: Array | float = 0.0
    for groups, table in factors:
        order = np.argsort([axis[each] for each in groups])
        shape = [1] * len(scope)
        for group, length in zip(groups, table.shape, strict=True):
            shape[axis[group]] = length
        total = total + table.transpose(order).reshape(shape)
    return scope, np.asarray(total)
