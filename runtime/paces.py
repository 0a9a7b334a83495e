"""Drift where calls come at a changing pace: each pace is held against its own beginning.

A call after a pause is slower by itself: caches are cold, threads parked, clocks low. On a virtual machine a model of 0.33 ms took
twice as long after 2 ms without a call and 2.7 times after 100 ms, one of 6 µs thirty times, and one of 6 ms a tenth more. Who gets few
requests has no drift for that. So calls in a row are held against the plan, which was proven so, and the rest against what calls took at
first that came as far apart.

How far apart is told by what a slowdown leaves alone. Where requests come at a fixed rate that is the period, from one call to the next;
where the next call is made some time after the last one it is the pause. So calls are of the pace before while either of the two is as it
was then, and of another when both have changed, as they do where the caller changes his rate. As it was is within a factor of 1.4: in
that range the calls of 0.33 ms differ by less than what is told as drift, within a factor of two they do not. Periods are told apart by
what the quickest calls leave of them, so that short pauses are told apart as well as long ones.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from aivmm.runtime.causes import Machine
from aivmm.runtime.drift import BLOCK, Calm, Drift, DriftMonitor, Sums
from aivmm.runtime.plan import Number

log = logging.getLogger("aivmm.engine")
_NO_PAUSE_NS = 50_000  # what callers do between two calls: nothing is parked, and little is cold
_NO_PAUSE_SHARE = 8  # nor where the pause is this part of a call
_SAME_PERIOD = 0.95  # of the period before, or more: calls in a row of such a caller fill their periods, and he does not ask faster
_RECENT_S = 60.0  # a pace whose calls are longer ago says nothing of now


class _Pace(DriftMonitor):
    """Watches the calls of one pace."""

    heard_s = -math.inf  # when the last of them came

    def outside(self, now_s: float) -> bool:
        """Return whether calls of this pace are too slow, as far as is known at `now_s`."""
        return self.is_outside and now_s - self.heard_s < _RECENT_S


class PacedMonitor:
    """Watches the latencies of one engine. Thread-safe."""

    def __init__(self, expected: Number | None, *, callers: int = 1, tell: Callable[[Drift], None], machine: Machine | None = None) -> None:
        """Watch as `DriftMonitor` does, with one of it for each pace."""
        self._expected, self._callers, self._tell = expected, callers, tell
        self._machine = machine or Machine()
        self._paces: dict[int, _Pace] = {}
        self._lock = threading.Lock()
        self._quickest_ns = math.inf  # a call, on the average of a block
        self._now = self._by_pause = 0  # the pace now, and its pause when it began
        self._period_ns = 0.0  # of the last calls of it that had pauses
        self._before = 0, 0  # the paces of the two blocks before, even if they were dropped
        self._last: _Pace | None = None  # that watched the last calls
        self._events: list[Drift] = []

    def add(self, durations_ns: Sequence[int], passed_ns: int, block: int = BLOCK) -> None:
        """Take the durations of calls by whole blocks, as `DriftMonitor.add` does, of one caller, and in what time they came."""
        pace = self._of(sum(durations_ns), len(durations_ns), passed_ns)
        if pace is not None:
            pace.add(durations_ns, block)

    def add_short(self, blocks: Sequence[Sequence[int]], passed_ns: int) -> None:
        """Take the durations of short calls of one caller, as `DriftMonitor.add_short` does, and in what time all came."""
        pace = self._of(sum(map(sum, blocks)), sum(map(len, blocks)), passed_ns)  # of all: a pause among them is in none of the blocks
        if pace is not None:
            pace.add_short(blocks)

    def add_sums(self, sums: Sums, passed_ns: int) -> None:
        """Take what calls of one caller took, as `DriftMonitor.add_sums` does, and in what time all came."""
        pace = self._of(sums.busy_ns, sums.calls, passed_ns)
        if pace is not None and not pace.is_warming:  # else some were of another pace, and no baseline begins with these
            pace.add_sums(sums)

    def calm(self) -> Calm | None:
        """Return what calls like the last ones may be for nothing to begin that is told; None while something may have begun."""
        with self._lock:
            pace = self._pace(self._now)
        return pace.calm()

    def state(self) -> dict[str, Any]:
        """Return the state for statistics: that of the last calls' pace, `outside` where another one was lately, and the events."""
        now_s = monotonic()
        with self._lock:
            found = self._pace(self._now).state() | {"events": [each.as_json() for each in self._events]}
            return found | {"state": "outside"} if any(each.outside(now_s) for each in self._paces.values()) else found

    def _of(self, total_ns: int, calls: int, passed_ns: int) -> _Pace | None:
        """Return who watches calls like these, or None where they are of several paces."""
        call_ns = total_ns / calls
        period_ns = passed_ns / calls / self._callers  # a lane has one turn of as many as there are callers for
        with self._lock:
            self._quickest_ns = min(self._quickest_ns, call_ns)
            if not self._follow(call_ns, period_ns):
                self._last = None
                return None
            found = self._pace(self._now)
            resumed, self._last = found is not self._last, found
        found.heard_s = monotonic()
        if resumed:
            found.resume()
        return found

    def _follow(self, call_ns: float, period_ns: float) -> bool:
        """Find the pace of calls; return whether they are of one."""
        pause_ns = period_ns - call_ns
        if pause_ns <= max(_NO_PAUSE_NS, call_ns / _NO_PAUSE_SHARE):
            if not self._now or period_ns < self._period_ns * _SAME_PERIOD or self._pace(self._now).is_warming:
                self._now, self._before = 0, (self._before[1], 0)
            return True
        by_pause, by_period = _steps(pause_ns), _steps(period_ns - self._quickest_ns)
        earlier, last = self._before
        self._before = last, by_period
        if not self._now or (by_pause != self._by_pause and by_period != self._now):
            alike = (self._now, last, earlier) if by_period < last else (self._now, last)  # the last may be what had a long pause
            if all(abs(by_period - each) > 2 for each in alike):
                return False  # a long pause, and calls in a row or nearly so: it is a pace where the next block is of it, too
            self._now, self._by_pause = by_period, by_pause
        self._period_ns = period_ns
        return True

    def _pace(self, number: int) -> _Pace:
        found = self._paces.get(number)
        if found is None:
            expected = None if number else self._expected
            self._paces[number] = found = _Pace(expected, callers=self._callers, tell=partial(self._found, number), machine=self._machine)
        return found

    def _found(self, number: int, event: Drift) -> bool:
        """Tell an event, but for one of a slowdown that was told at another pace, and lasts; return whether it was told."""
        now_s = monotonic()
        with self._lock:
            if any(each.outside(now_s) for other, each in self._paces.items() if other != number):
                return False
            self._events = [*self._events[-99:], event]
        self._tell(event)
        return True


def _steps(pause_ns: float) -> int:
    """Return a number above 0 that grows by two where a pause is twice as long."""
    return 1 + int(2 * math.log2(max(1.0, pause_ns / _NO_PAUSE_NS)))


def tell_apart(listener: Callable[[Drift], None] | None, found: Drift) -> None:
    """Tell a listener, if there is one, on a thread of its own: a call that showed drift has its turn still, and who asked the engine, or
    closed it, would wait for that turn for ever."""
    if listener is None:
        return
    try:
        threading.Thread(target=_listen, args=(listener, found), name="aivmm-drift", daemon=True).start()
    except RuntimeError:  # no threads any more: the interpreter ends
        log.exception("on_drift cannot be called")


def _listen(listener: Callable[[Drift], None], found: Drift) -> None:
    try:
        listener(found)
    except Exception:  # a listener's own fault is told, and costs nobody anything
        log.exception("on_drift failed")
