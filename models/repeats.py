"""Repeated structure: stretches of a sequence that are one piece several times in a row (the layers of a transformer, a stage's blocks)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """`count` pieces of `period` items each, all alike, one after another from `first` on; the likeness goes on until `reach`."""

    first: int
    period: int
    count: int
    reach: int

    @property
    def end(self) -> int:
        """The item behind the last piece."""
        return self.first + self.period * self.count


def stretches(kinds: Sequence[Hashable], weights: Sequence[float]) -> list[Repeat]:
    """Return stretches of repeated kinds that do not overlap, in order: the heaviest first, then the heaviest of what is left, and so on.

    Of stretches that weigh the same the one of the shortest period is taken. Another phase may suit better: `first` can be moved on as long
    as all pieces end at `reach` or before. O(n²) comparisons, done by NumPy.
    """
    numbers: dict[Hashable, int] = {}
    sequence = np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds], dtype=np.int32)
    before = [0.0, *accumulate(weights)]
    found: list[tuple[int, int, int]] = []  # first, end, period
    for period in range(1, len(sequence) // 2 + 1):
        same = sequence[:-period] == sequence[period:]
        if np.count_nonzero(same) < period:
            continue
        changes = np.flatnonzero(np.diff(same, prepend=False, append=False))
        starts, ends = changes[::2], changes[1::2]
        long = ends - starts >= period
        found += [(int(first), int(end) + period, period) for first, end in zip(starts[long], ends[long], strict=True)]
    found.sort(key=lambda each: (-_weight(each, before), each[2], each[0]))
    taken: list[Repeat] = []
    for first, end, period in found:
        if all(end <= other.first or other.end <= first for other in taken):
            taken.append(Repeat(first=first, period=period, count=(end - first) // period, reach=end))
    return sorted(taken, key=lambda each: each.first)


def _weight(stretch: tuple[int, int, int], before: Sequence[float]) -> float:
    first, end, period = stretch
    return before[first + (end - first) // period * period] - before[first]
