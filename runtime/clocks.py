"""What the engine counts while it runs: durations, waits and bytes, a stage and a lane at a time. Cheap to write, summed up when asked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_RING = 4096  # durations remembered per stage and lane
QUANTILES = (50, 90, 99)


class StageClock:
    """Durations of one stage in one lane, in nanoseconds: the last ones, how many there were and their sum.

    Only its lane writes. A call appends to `fresh`, which is all that it pays; the lane counts them now and then (`fold`), and who reads
    looks at both.
    """

    __slots__ = ("_count", "_durations", "_lock", "_total_ns", "fresh", "late_bytes", "wait_count", "wait_ns", "waits")

    def __init__(self) -> None:
        self.fresh: deque[int] = deque()  # not counted yet; no list, which asks for more memory every ten calls
        self._durations: deque[int] = deque(maxlen=_RING)
        self._count = 0
        self._total_ns = 0
        self._lock = threading.Lock()
        self.waits: deque[int] = deque(maxlen=_RING)  # in front of the stage, where it has a queue
        self.wait_ns = 0
        self.wait_count = 0
        self.late_bytes = 0  # of outputs whose size is known only after the run

    def fold(self) -> list[int]:
        """Count what is fresh, and return it."""
        with self._lock:
            new = list(self.fresh)
            self.fresh.clear()
            self._durations.extend(new)
            self._count += len(new)
            self._total_ns += sum(new)
        return new

    def waited(self, nanoseconds: int) -> None:
        """Remember how long a request stood in the stage's queue."""
        self.waits.append(nanoseconds)
        self.wait_ns += nanoseconds
        self.wait_count += 1

    @property
    def count(self) -> int:
        """How many runs there were."""
        with self._lock:
            return self._count + len(self.fresh)

    @property
    def total_ns(self) -> int:
        """How long they took together."""
        with self._lock:
            return self._total_ns + sum(self.fresh)

    def recent_ns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the last durations."""
        with self._lock:
            return np.array([*self._durations, *self.fresh][-_RING:], dtype=np.int64)


def _recent(ring: deque[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    while True:
        try:
            return np.array(ring, dtype=np.int64)
        except RuntimeError:
            continue  # its lane added one meanwhile


def quantiles_s(rings: Iterable[deque[int]], prefix: str = "") -> dict[str, float | None]:
    """Return p50, p90 and p99 in seconds over all that `rings` remember; None while they are empty."""
    return _quantiles_s([_recent(each) for each in rings], prefix)


def _quantiles_s(parts: Sequence[np.ndarray[Any, np.dtype[np.int64]]], prefix: str) -> dict[str, float | None]:
    recent = np.concatenate([np.empty(0, dtype=np.int64), *parts]) / 1e9
    return {f"{prefix}p{q}_s": float(np.quantile(recent, q / 100)) if recent.size else None for q in QUANTILES}


def summed(clocks: Sequence[StageClock]) -> dict[str, Any]:
    """Return what the clocks of one stage in all lanes say together."""
    return {
        "count": sum(each.count for each in clocks),
        "total_s": sum(each.total_ns for each in clocks) / 1e9,
        **_quantiles_s([each.recent_ns() for each in clocks], ""),
        "wait_count": sum(each.wait_count for each in clocks),
        "wait_total_s": sum(each.wait_ns for each in clocks) / 1e9,
        **quantiles_s((each.waits for each in clocks), "wait_"),
    }
