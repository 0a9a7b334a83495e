"""What the engine counts while it runs: durations, waits and bytes, a stage and a lane at a time. Cheap to write, summed up when asked."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from time import perf_counter_ns, process_time_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from aivmm.runtime import hot

# Durations remembered per stage and lane: 32 KiB, of numbers of Python's or of C's.
RING: int = 1024 if hot.native is None else hot.native.RING
QUANTILES = (50, 90, 99)
_UNUSED = 1 << 20  # numbers that the interpreter does not share, of the size of durations


class PythonClock:
    """What each call counts: the fields of a clock that it touches. `_hot.Clock` is the same in C.

    The last durations are whole from early on, so that a call takes the memory of one that is forgotten: new pages would cost a fault for
    each hundred calls.
    """

    __slots__ = (
        "_bounds",
        "_looked",
        "_own_ns",
        "_ring",
        "_until",
        "_until_ns",
        "count",
        "due",
        "due_ns",
        "ended_ns",
        "looking_ns",
        "note",
    )

    def __init__(self) -> None:
        self.count = 0
        self.due = self.due_ns = 0  # the count at which, and the time from which, what was timed may be passed on: see `WatchedClock`
        self._until = self._until_ns = 0  # by when it is passed on in any case
        self._looked = self._own_ns = 0  # the count, and the CPU time of this process, at the last look of `may_wait`
        self._bounds: tuple[int, int, float, float, int] = 0, 0, 0.0, 0.0, 0
        self.ended_ns = 0  # the last call
        self.looking_ns = 0  # what `may_wait` took, added up; who passes calls on takes from it
        self._ring: deque[int] = deque(maxlen=RING)
        self.note = self._ring.append  # a duration; whoever notes one counts it next

    def fill(self) -> None:
        """Take the memory of what is still to come of the last durations."""
        missing = RING - len(self._ring)
        if missing:
            self._ring.extendleft(range(_UNUSED, _UNUSED + missing))

    def newest(self, many: int) -> list[int]:
        """Return the durations of so many of the last calls, the very last first; of at most as many as are remembered."""
        return _newest(self._ring, max(0, min(many, self.count, RING)))

    def wait(self, now_ns: int, step: int, most: int, pause_ns: int, most_ns: int, call_ns: float, ratio: float, later: int) -> None:
        """Begin to wait with what is timed from now on, for `most` calls or `most_ns`.

        By each `step` of them is looked whether a call takes more than `call_ns` on average: then for no more than `later` calls; and
        whether all take more than `ratio` times the CPU time that this process took meanwhile: then for none. Where none comes for
        `pause_ns` the next one is not waited with.
        """
        self._until, self._until_ns = self.count + min(most, RING - 1), now_ns + most_ns
        self._bounds = step, pause_ns, call_ns, ratio, later
        self._look_again(now_ns, process_time_ns())

    def may_wait(self, now_ns: int) -> bool:
        """Look at the calls since the last look; return whether what was timed need not be passed on yet.

        Where it has to be, that is said again until `wait` is called. Reading the CPU time is where Linux takes the core from who has had
        his slice, so that others have it before this returns: that is no pause of the caller.
        """
        if self.count >= self._until or now_ns >= self.due_ns:
            return False
        began_ns = perf_counter_ns()
        calm = self._were_calm(now_ns)
        self.looking_ns += perf_counter_ns() - began_ns
        return calm

    def _were_calm(self, now_ns: int) -> bool:
        step, pause_ns, call_ns, ratio, later = self._bounds
        calls, own_ns = self.count - self._looked, process_time_ns()
        total_ns = self.newest_ns(calls)
        slow = total_ns > calls * call_ns
        if total_ns > (own_ns - self._own_ns) * ratio or (slow and not later):
            self._until = self.count
            return False
        if slow:
            self._until = min(self._until, self.count + later)
            self._bounds = step, pause_ns, math.inf, ratio, later
        self._look_again(now_ns, own_ns)
        return True

    def _look_again(self, now_ns: int, own_ns: int) -> None:
        step, pause_ns, *_ = self._bounds
        self._looked, self._own_ns = self.count, own_ns
        self.due, self.due_ns = min(self.count + step, self._until), min(now_ns + pause_ns, self._until_ns)

    def newest_ns(self, many: int) -> int:
        """Return their sum."""
        return sum(self.newest(many))

    def sums(self, many: int, without: int, step: int, most_ns: int) -> list[int]:
        """Return the sums of the durations by each `step` calls, of `many` of the last ones without the newest `without`, the oldest first.

        The last sum is of those that are left; no duration counts for more than `most_ns`.
        """
        durations = self.newest(many)[without:]
        durations.reverse()
        return [sum(min(each, most_ns) for each in durations[at : at + step]) for at in range(0, len(durations), step)]


if TYPE_CHECKING:
    from aivmm.runtime._hot import Clock
else:
    Clock = PythonClock if hot.native is None else hot.native.Clock


class StageClock(Clock):
    """Durations of one stage in one lane, in nanoseconds: the last ones, how many there were and their sum.

    Only its lane writes. The last ones are added up before they are forgotten, and not at each call, which would touch a sum besides. A
    look from another thread may miss the call that is being counted.
    """

    __slots__ = ("added_up", "late_bytes", "wait_count", "wait_ns", "waits")

    def __init__(self, *, full: bool = True) -> None:
        """With `full` take the memory of the last ones now, else when `fill` is called."""
        super().__init__()
        if full:
            self.fill()
        self.added_up = 0, 0  # so many runs, and what they took; one object, so that a look sees both or neither
        self.waits: deque[int] = deque(maxlen=RING)  # in front of the stage, where it has a queue
        self.wait_ns = 0
        self.wait_count = 0
        self.late_bytes = 0  # of outputs whose size is known only after the run

    def took(self, nanoseconds: int) -> None:
        """Count a run. The hot path in C does so without this call, and calls `add_up` as this does."""
        self.note(nanoseconds)
        self.count = count = self.count + 1
        if count >= self.due:
            self.add_up()

    def add_up(self) -> None:
        """Add to the sum what was counted since the last time. It is `due` again before what is remembered is forgotten."""
        self.added_up = self.count, self.total_ns
        self.due = self.count + RING

    @property
    def total_ns(self) -> int:
        """The sum of all durations."""
        while True:
            before = self.added_up
            total_ns = before[1] + self.newest_ns(self.count - before[0])
            if self.added_up is before:  # its lane has not added up meanwhile
                return total_ns

    def last(self, many: int) -> list[int]:
        """Return the durations of the last `many` runs, in their order; of at most as many as are remembered."""
        found = self.newest(many)
        found.reverse()
        return found

    def waited(self, nanoseconds: int) -> None:
        """Remember how long a request stood in the stage's queue."""
        self.waits.append(nanoseconds)
        self.wait_ns += nanoseconds
        self.wait_count += 1

    def recent_ns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the last durations."""
        return np.array(self.last(RING), dtype=np.int64)


def _newest(ring: deque[int], many: int) -> list[int]:
    """Return so many of the last, the very last first."""
    while True:
        try:
            return list(islice(reversed(ring), many))
        except RuntimeError:
            continue  # its lane added one meanwhile


def quantiles_s(rings: Iterable[deque[int]], prefix: str = "") -> dict[str, float | None]:
    """Return p50, p90 and p99 in seconds over all that `rings` remember; None while they are empty."""
    return _quantiles_s([np.array(_newest(each, RING), dtype=np.int64) for each in rings], prefix)


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
