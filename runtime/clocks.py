"""What the engine counts while it runs: durations, waits and bytes, a stage and a lane at a time. Cheap to write, summed up when asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_RING = 4096  # durations remembered per stage and lane
QUANTILES = (50, 90, 99)


class StageClock:
    """Durations of one stage in one lane, in nanoseconds: the last ones, how many there were and their sum. Only its lane writes."""

    __slots__ = ("count", "durations", "late_bytes", "total_ns", "wait_count", "wait_ns", "waits")

    def __init__(self) -> None:
        self.durations: deque[int] = deque(maxlen=_RING)
        self.count = 0
        self.total_ns = 0
        self.waits: deque[int] = deque(maxlen=_RING)  # in front of the stage, where it has a queue
        self.wait_ns = 0
        self.wait_count = 0
        self.late_bytes = 0  # of outputs whose size is known only after the run

    def add(self, nanoseconds: int) -> None:
        """Remember one duration."""
        self.durations.append(nanoseconds)
        self.count += 1
        self.total_ns += nanoseconds

    def waited(self, nanoseconds: int) -> None:
        """Remember how long a request stood in the stage's queue."""
        self.waits.append(nanoseconds)
        self.wait_ns += nanoseconds
        self.wait_count += 1

    def recent_ns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the last durations."""
        return _recent(self.durations)


def _recent(ring: deque[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    while True:
        try:
            return np.array(ring, dtype=np.int64)
        except RuntimeError:
            continue  # its lane added one meanwhile


def quantiles_s(rings: Iterable[deque[int]], prefix: str = "") -> dict[str, float | None]:
    """Return p50, p90 and p99 in seconds over all that `rings` remember; None while they are empty."""
    recent = np.concatenate([np.empty(0, dtype=np.int64), *(_recent(each) for each in rings)]) / 1e9
    return {f"{prefix}p{q}_s": float(np.quantile(recent, q / 100)) if recent.size else None for q in QUANTILES}


def summed(clocks: Sequence[StageClock]) -> dict[str, Any]:
    """Return what the clocks of one stage in all lanes say together."""
    return {
        "count": sum(each.count for each in clocks),
        "total_s": sum(each.total_ns for each in clocks) / 1e9,
        **quantiles_s(each.durations for each in clocks),
        "wait_count": sum(each.wait_count for each in clocks),
        "wait_total_s": sum(each.wait_ns for each in clocks) / 1e9,
        **quantiles_s((each.waits for each in clocks), "wait_"),
    }
