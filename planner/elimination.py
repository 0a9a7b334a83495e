"""Serial latency on graphs that are nearly a row, exactly: groups are eliminated one by one, each after a table of what is best for it.

Bucket elimination (Bertele and Brioschi, 1972; Dechter, 1999): memory and time are exponential in the width of the graph only, and graphs
of models are narrow: a residual block or an attention head joins a handful of tensors. Where the tables would grow too large there is no
answer.

A tensor that many groups read (a mask that each layer takes) would join them all in one table. What it costs hangs only on where it is made
and on which other choices read it, so its source gets that for a state (its choice, the choices that may read it elsewhere), and each
reader then has a table with the source alone: infinite where the reader's choice is not among them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from aivmm.planner.compact import Array, Compact, Tensor

Spots = list[tuple[int, int]]
_MOST_CELLS = 2e7  # of all tables together
_HUB_CELLS, _HUB_STATES = 4096, 512  # a tensor is a hub when its table would have more cells, and its source then not more states
_Factor = tuple[tuple[int, ...], Array]  # groups, and what each combination of their choices costs


class Elimination:
    """The order for one graph, to be used with any prices. `possible` says whether its tables are small enough."""

    def __init__(self, merged: Compact) -> None:
        width = merged.cost.shape[1]
        self.tensors = [index for index, each in enumerate(merged.tensors) if each.export.any() or each.move.any()]
        self._hubs = _hubs(merged, self.tensors)
        self._sizes = [width] * len(merged.members)
        for source in self._hubs:
            self._sizes[source] = len(_hub_states(width)[0])
        near: list[set[int]] = [set() for _ in merged.members]
        cells = 0.0
        for scope in (scope for index in self.tensors for scope in self._scopes(merged, index)):
            cells += self._cells(scope)
            if cells > _MOST_CELLS:
                break
            for group in scope:
                near[group] |= {*scope} - {group}
        self.order: list[int] = []
        self.possible = cells <= _MOST_CELLS and self._narrowest_first(near)

    def _scopes(self, merged: Compact, index: int) -> list[tuple[int, ...]]:
        """Return the groups of each table that a tensor makes."""
        tensor = merged.tensors[index]
        if self._hubs.get(tensor.source) == index:
            return [(tensor.source, reader) for reader in tensor.readers]
        return [(tensor.source, *tensor.readers)]

    def _cells(self, scope: Iterable[int]) -> float:
        return math.prod(float(self._sizes[group]) for group in scope)

    def _narrowest_first(self, near: list[set[int]]) -> bool:
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
            cells += self._cells((group, *near[group]))
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
        width = merged.cost.shape[1]
        choices, away = _hub_states(width)
        buckets: list[list[_Factor]] = [[] for _ in merged.members]
        rank = np.argsort(self.order).tolist()

        def add(scope: tuple[int, ...], table: Array, *, from_axis: int = 0) -> None:
            """File a table by choices under its group that goes first; a hub's axes are by its states, but those before `from_axis` are."""
            for axis, group in enumerate(scope):
                if axis >= from_axis and group in self._hubs:
                    table = table.take(choices, axis=axis)
            buckets[min(scope, key=rank.__getitem__)].append((scope, table))

        for group, cost in enumerate(merged.cost):
            add((group,), cost)
        for index in self.tensors:
            tensor = merged.tensors[index]
            if self._hubs.get(tensor.source) == index:
                moved = np.where(away, tensor.move[choices], 0.0).sum(axis=1) + np.where(away.any(axis=1), tensor.export[choices], 0.0)
                add((tensor.source,), moved, from_axis=1)
                allowed = away | (np.arange(width) == choices[:, None])
                for scope in self._scopes(merged, index):
                    add(scope, np.where(allowed, 0.0, np.inf), from_axis=1)
            else:
                add((tensor.source, *tensor.readers), _prices(tensor, width))
        total = 0.0
        picked: list[tuple[int, tuple[int, ...], Array]] = []
        for group in self.order:
            scope, table = _joined(buckets[group], group)
            best = table.argmin(axis=0)
            picked.append((group, scope[1:], best))
            rest = table.min(axis=0)
            if scope[1:]:
                buckets[min(scope[1:], key=rank.__getitem__)].append((scope[1:], rest))
            else:
                total += float(rest)
        if not math.isfinite(total):
            return None, math.inf
        state = [0] * len(merged.members)
        for group, scope, best in reversed(picked):
            state[group] = int(best[tuple(state[each] for each in scope)])
        return [(int(choices[each]) if group in self._hubs else each, 0) for group, each in enumerate(state)], total


def _hubs(merged: Compact, tensors: Iterable[int]) -> dict[int, int]:
    """Return the tensors that are hubs by their source, one each: that of the most readers."""
    width = merged.cost.shape[1]
    found: dict[int, int] = {}
    if len(_hub_states(width)[0]) > _HUB_STATES:
        return found
    for index in tensors:
        tensor = merged.tensors[index]
        held = found.get(tensor.source)
        if float(width) ** (len(tensor.readers) + 1) > _HUB_CELLS and (
            held is None or len(merged.tensors[held].readers) < len(tensor.readers)
        ):
            found[tensor.source] = index
    return found


@cache
def _hub_states(width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the states of a hub's source: its choice [s], and which other choices may read there [s, choices]. None where too many."""
    if width * 2 ** (width - 1) > _HUB_STATES:
        return np.zeros(_HUB_STATES + 1, dtype=np.int64), np.zeros((0, width), dtype=bool)
    both = [(choice, used) for choice in range(width) for used in itertools.product((False, True), repeat=width) if not used[choice]]
    return np.array([choice for choice, _ in both]), np.array([used for _, used in both])


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
