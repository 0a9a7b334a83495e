"""Contiguous placement, exactly: dynamic programming over the downsets of the graph.

A downset (an ideal) holds with each group all that it reads from. The segments of a contiguous placement in their order are the differences
of a growing row of downsets, so the best placement of a downset is a best placement of a smaller one and one segment more (Tarnawski et
al., "Efficient Algorithms for Device Placement of DNN Graph Operators", NeurIPS 2020; this is an implementation of our own). Of identical
devices only the number used counts. Graphs of models have few downsets; where there are too many, some of them give a plan, and no bound.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from aivmm.planner.compact import Array, Compact, Ints, Tensor, chains_of, sweeps
from aivmm.planner.problem import Goal

Spots = list[tuple[int, int]]  # (choice, device number) of each group
Doubt = Literal["exact", "least", "most"]  # how a transfer whose price depends on a sender that the search forgets is priced

# What a state costs; from which row, by which choice and from which sender it came.
_Tables = tuple[Array, npt.NDArray[np.int32], npt.NDArray[np.int16], npt.NDArray[np.int16]]

_CHECK_EVERY = 64  # downsets between two looks at the clock
_MOST_HEIGHTS = 25_000_000  # of one topological order: groups by chains; four orders take four times as much, at 4 bytes each
_SWEPT = 400  # downsets, about, of a family that is not complete


@dataclass(frozen=True, slots=True)
class Family:
    """Downsets, smaller ones first. `heights` [downsets, chains] counts the groups of each chain that a downset holds: always a prefix."""

    chains: list[list[int]]
    chain: Ints  # [groups]
    position: Ints  # [groups], in its chain
    heights: npt.NDArray[np.int32]
    complete: bool

    def holds(self, group: int, rows: slice | Ints | int = slice(None)) -> npt.NDArray[np.bool_]:
        """Say which of the downsets in `rows` hold a group."""
        found: npt.NDArray[np.bool_] = self.heights[rows, self.chain[group]] > self.position[group]
        return found

    def summed(self, values: Array) -> Array:
        """Return [downsets]: the sum of `values` [groups] over each. Adding in one order keeps it monotone in spite of rounding."""
        total = np.zeros(len(self.heights))
        for column, groups in enumerate(self.chains):
            total += np.concatenate([[0.0], np.cumsum(values[groups])])[self.heights[:, column]]
        return total


def every_downset(merged: Compact, most: int, deadline: float) -> Family | None:
    """Return all downsets, or None when there are more than `most` or time runs out. Groups are in topological order."""
    needs = [sum(1 << each for each in before) for before in merged.before]
    level: dict[int, int] = {0: sum(1 << group for group, need in enumerate(needs) if not need)}  # downset -> what can be added to it
    rows: dict[int, int] = {0: 0}
    origins: list[tuple[int, int]] = []  # (row of a smaller downset, group added to it)
    while level:
        larger: dict[int, int] = {}
        for held, ready in level.items():
            rest = ready
            while rest:
                bit = rest & -rest
                rest ^= bit
                more = held | bit
                if more not in larger:
                    group = bit.bit_length() - 1
                    if len(rows) > most:
                        return None  # of a wide graph, one level alone may have more than memory holds
                    larger[more] = (ready ^ bit) | sum(1 << each for each in merged.after[group] if not needs[each] & ~more)
                    origins.append((rows[held], group))
                    rows[more] = len(origins)
        if len(rows) > most or time.perf_counter() > deadline:
            return None
        level = larger
    return _family(merged, origins)


def swept_downsets(merged: Compact) -> Family | None:
    """Return some of the downsets that a few topological orders of the groups run through, enough for a plan to start from.

    None where the graph is so wide that they would fill the memory.
    """
    if len(merged.members) * len(chains_of(merged)) > _MOST_HEIGHTS:
        return None
    origins, kept = [], [0]
    orders = sweeps(merged)
    step = math.ceil(len(orders) * len(merged.members) / _SWEPT)
    for order in orders:
        last = 0
        for position, group in enumerate(order, start=1):
            origins.append((last, group))
            last = len(origins)
            if position % step == 0 or position == len(order):
                kept.append(last)
    return _family(merged, origins, kept)


def _family(merged: Compact, origins: list[tuple[int, int]], kept: list[int] | None = None) -> Family:
    """Return the family of the downsets that `origins` makes one from another, or of those `kept`."""
    chains = chains_of(merged)
    chain, position = np.zeros(len(merged.members), dtype=np.int64), np.zeros(len(merged.members), dtype=np.int64)
    for column, groups in enumerate(chains):
        chain[groups], position[groups] = column, np.arange(len(groups))
    heights = np.zeros((len(origins) + 1, len(chains)), dtype=np.int32)
    for row, (smaller, group) in enumerate(origins, start=1):
        heights[row] = heights[smaller]
        heights[row, chain[group]] += 1
    complete = kept is None
    heights = heights if kept is None else np.unique(heights[kept], axis=0)
    family = Family(chains, chain, position, heights, complete)
    # In the order of the work that they hold, so that the downsets at most so much smaller are neighbours; subsets still come first.
    order = np.lexsort((heights.sum(axis=1), family.summed(merged.cheapest)))
    return Family(chains, chain, position, heights[order], complete)


class Search:
    """The search over one family. States count the devices used of each kind; on chains with prices by pair, also the choice used last."""

    def __init__(self, merged: Compact, family: Family, goal: Goal, doubt: Doubt) -> None:
        self.merged, self.family, self.goal = merged, family, goal
        self.join = np.maximum if goal == "throughput" else np.add
        receive = _receive(merged, doubt)  # [tensors, senders, choices]
        self.senders = receive.shape[1] if len(merged.tensors) else 1
        self.receive = receive
        self.least = family.summed(merged.cheapest)
        supported = np.isfinite(merged.cost)
        choices = range(merged.cost.shape[1])
        self.work = np.array([family.summed(np.where(supported[:, c], merged.cost[:, c], 0.0)) for c in choices])
        self.lacking = np.array([family.summed((~supported[:, c]).astype(np.float64)) for c in choices])
        self.memory = np.array([family.summed(np.where(supported[:, c], merged.memory[:, c], 0.0)) for c in choices])
        self.live = self._live()
        self.strides = np.concatenate([[1], np.cumprod(merged.count[:-1] + 1)]).astype(np.int64)
        self.states = int(np.prod(merged.count + 1))

    def cells(self) -> int:
        """Return the size of the tables."""
        return self.states * self.senders * len(self.family.heights)

    def run(self, deadline: float, limit: float = math.inf) -> tuple[Spots, float] | None:
        """Return the best placement that costs at most `limit`, and its value; None when there is none.

        Raises:
            TimeoutError: the deadline has passed.
        """
        size = len(self.family.heights)
        value = np.full((self.states, self.senders, size), np.inf)
        value[:, :, 0] = 0.0
        came = np.zeros((self.states, self.senders, size), dtype=np.int32)
        via = np.zeros((self.states, self.senders, size), dtype=np.int16)
        sender_before = np.zeros((self.states, self.senders, size), dtype=np.int16)
        tables = (value, came, via, sender_before)
        for row in range(1, size):
            if row % _CHECK_EVERY == 0 and time.perf_counter() > deadline:
                raise TimeoutError
            first = int(np.searchsorted(self.least, self.least[row] - limit * (1 + 1e-9))) if self.goal == "throughput" else 0
            smaller = self._subsets(row, first)
            if not len(smaller):
                continue
            loads = self._loads(row, smaller)  # [senders, choices, smaller]
            for choice, device in enumerate(self.merged.device):
                self._extend(row, smaller, loads[:, choice], choice, int(device), limit, tables)
        return self._trace(tables)

    def _extend(self, row: int, smaller: Ints, load: Array, choice: int, device: int, limit: float, tables: _Tables) -> None:
        """Let the last segment of the downset `row` be in `choice`."""
        value, came, via, sender_before = tables
        useful = np.flatnonzero((load <= limit).any(axis=0))
        if not len(useful):
            return
        free, to = self._transitions(device)
        total = self.join(value[free][:, :, smaller[useful]], load[None, :, useful]).reshape(len(free), -1)
        best = total.argmin(axis=1)
        least = total[np.arange(len(free)), best]
        mine = choice if self.senders > 1 else 0
        better = least < value[to, mine, row]
        states, best = to[better], best[better]
        value[states, mine, row] = least[better]
        came[states, mine, row] = smaller[useful[best % len(useful)]]
        sender_before[states, mine, row] = best // len(useful)
        via[states, mine, row] = choice

    def _transitions(self, device: int) -> tuple[Ints, Ints]:
        """Return the states in which a device of this kind is free, and those in which one more is used."""
        states = np.arange(self.states)
        free = states[states // self.strides[device] % (self.merged.count[device] + 1) < self.merged.count[device]]
        return free, free + self.strides[device]

    def _subsets(self, row: int, first: int) -> Ints:
        """Return the downsets from `first` on that are strict subsets of that in `row`."""
        found: Ints = first + np.flatnonzero((self.family.heights[first:row] <= self.family.heights[row]).all(axis=1))
        return found

    def _live(self) -> list[list[tuple[int, int]]]:
        """Return for each downset the tensors that it makes and that are read outside, with how many of their readers are inside."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.family.heights]
        for index, tensor in enumerate(self.merged.tensors):
            inside = self._readers_inside(tensor, slice(None))
            rows = np.flatnonzero(self.family.holds(tensor.source) & (inside < len(tensor.readers)))
            for row, count in zip(rows.tolist(), inside[rows].tolist(), strict=True):
                found[row].append((index, count))
        self.export = np.zeros((self.merged.cost.shape[1], len(found)))
        self.entering = np.zeros((self.senders, self.merged.cost.shape[1], len(found)))
        self.barred = np.zeros(self.entering.shape, dtype=np.int64)  # how many of the tensors cannot be received
        for row, tensors in enumerate(found):
            for index, _ in tensors:
                self.export[:, row] += self.merged.tensors[index].export
                self.entering[:, :, row] += _finite(self.receive[index])
                self.barred[:, :, row] += np.isinf(self.receive[index])
        return found

    def _readers_inside(self, tensor: Tensor, rows: slice | Ints) -> Ints:
        counts = np.zeros(len(self.family.heights[rows]), dtype=np.int64)
        for reader in tensor.readers:
            counts += self.family.holds(reader, rows)
        return counts

    def _loads(self, row: int, smaller: Ints) -> Array:
        """Return [senders, choices, smaller]: what a segment costs that holds what the downset `row` has more than each smaller one."""
        base = self.work[:, [row]] - self.work[:, smaller]
        over = (self.memory[:, [row]] - self.memory[:, smaller]) > self.merged.capacity[self.merged.device][:, None]
        base[over | (self.lacking[:, [row]] != self.lacking[:, smaller])] = np.inf
        leaving = np.repeat(self.export[:, [row]], len(smaller), axis=1)
        entering, barred = self.entering[:, :, smaller], self.barred[:, :, smaller]  # copies
        for index, count in self.live[row]:
            tensor = self.merged.tensors[index]
            older = self.family.holds(tensor.source, smaller)
            leaving -= np.where(older, tensor.export[:, None], 0.0)
            unread = older & (self._readers_inside(tensor, smaller) == count)
            if unread.any():
                entering -= np.where(unread, _finite(self.receive[index])[:, :, None], 0.0)
                barred -= unread & np.isinf(self.receive[index])[:, :, None]
        # Rounding can leave a little less than nothing.
        loads: Array = base[None] + np.maximum(leaving, 0.0)[None] + np.maximum(entering, 0.0)
        loads[barred > 0] = np.inf
        return loads

    def _trace(self, tables: _Tables) -> tuple[Spots, float] | None:
        """Walk back from the whole graph with all devices, and give the segments their devices."""
        value, came, via, sender_before = tables
        row, state = len(self.family.heights) - 1, self.states - 1
        sender = int(value[state, :, row].argmin())
        best = float(value[state, sender, row])
        if not math.isfinite(best):
            return None
        spots: Spots = [(0, 0)] * len(self.merged.members)
        used = [0] * len(self.merged.count)
        while row:
            choice, smaller = int(via[state, sender, row]), int(came[state, sender, row])
            device = int(self.merged.device[choice])
            for group in self._between(smaller, row):
                spots[group] = (choice, used[device])
            used[device] += 1
            sender_next = int(sender_before[state, sender, row])
            state, row, sender = state - int(self.strides[device]), smaller, sender_next
        return spots, best

    def _between(self, smaller: int, row: int) -> list[int]:
        low, high = self.family.heights[smaller], self.family.heights[row]
        return [group for chain, groups in enumerate(self.family.chains) for group in groups[low[chain] : high[chain]]]


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def _receive(merged: Compact, doubt: Doubt) -> Array:
    """Return [tensors, senders, choices]: what the reader pays. There is one sender for all where their prices agree or are simplified."""
    moves = np.array([each.move for each in merged.tensors]).reshape(-1, *2 * merged.cost.shape[1:])
    if doubt == "exact" and not depends_on_sender(merged):
        doubt = "least"
    if doubt == "exact":
        return moves
    apart = _can_meet(merged)
    extreme = np.where(apart, moves, np.inf).min(axis=1) if doubt == "least" else np.where(apart, moves, -np.inf).max(axis=1)
    lone = ~apart.any(axis=0)
    extreme[:, lone] = 0.0  # nothing is anywhere else
    reduced: Array = extreme[:, None, :]
    return reduced


def _can_meet(merged: Compact) -> npt.NDArray[np.bool_]:
    """Say of which pairs of choices two segments of one contiguous placement can be: on different devices."""
    same = merged.device[:, None] == merged.device[None, :]
    found: npt.NDArray[np.bool_] = ~same | (merged.count[merged.device] > 1)[:, None]
    return found


def depends_on_sender(merged: Compact) -> bool:
    """Whether what a reader pays for a tensor depends on where it comes from."""
    apart = _can_meet(merged)
    for each in merged.tensors:
        low, high = np.where(apart, each.move, np.inf).min(axis=0), np.where(apart, each.move, -np.inf).max(axis=0)
        if (low < high).any():
            return True
    return False
