"""Drift where calls come at a changing pace: each pace is held against its own beginning.

A call after a pause is slower by itself: caches are cold, threads parked, clocks low. On a virtual machine a model of 0.33 ms took
twice as long after 2 ms without a call and 2.7 times after 100 ms, one of 6 µs thirty times, and one of 6 ms a tenth more. Who gets few
requests has no drift for that. So calls are told apart by the mean pause between them: those that come without one are held against the
plan, which was proven so, and the rest against what calls took at first that came as far apart, within a factor of two.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from aivmm.runtime.drift import Drift, DriftMonitor
from aivmm.runtime.plan import Number

log = logging.getLogger("aivmm.engine")
_NO_PAUSE_NS = 50_000  # what callers do between two calls: nothing is parked, and little is cold
_NO_PAUSE_SHARE = 8  # nor where the pause is this part of a call
_APART_S = 60.0  # between events of two paces: one slowdown is told once


class PacedMonitor:
    """Watches the latencies of one engine. Thread-safe."""

    def __init__(self, expected: Number | None, *, callers: int = 1, tell: Callable[[Drift], None]) -> None:
        """Watch as `DriftMonitor` does, with one of it for each pace."""
        self._expected, self._callers, self._tell = expected, callers, tell
        self._monitors: dict[int, DriftMonitor] = {}
        self._lock = threading.Lock()
        self._before = 0  # the pace of the calls before
        self._last = self._monitor(0)  # whose pace it is now
        self._told: tuple[int, float] | None = None  # the pace of the last event, and when that was
        self._events: list[Drift] = []

    def add(self, durations_ns: Sequence[int], passed_ns: int) -> None:
        """Take the durations of calls by whole blocks, as `DriftMonitor.add` does, of one caller, and in what time they came."""
        monitor = self._of_pace(sum(durations_ns), len(durations_ns), passed_ns)
        if monitor is not None:
            monitor.add(durations_ns)

    def add_short(self, total_ns: int, calls: int, last: Sequence[int], passed_ns: int) -> None:
        """Take what short calls of one caller took together, as `DriftMonitor.add_short` does, and in what time they came."""
        monitor = self._of_pace(total_ns, calls, passed_ns)
        if monitor is not None:
            monitor.add_short(total_ns, calls, last)

    def _of_pace(self, total_ns: int, calls: int, passed_ns: int) -> DriftMonitor | None:
        pace = self._pace(total_ns, calls, passed_ns)
        before, self._before = self._before, pace
        if abs(pace - before) > 1:
            return None  # some calls of each: one long pause, and many calls in a row
        self._last = self._monitor(pace)
        return self._last

    def state(self) -> dict[str, Any]:
        """Return the state for statistics: that of the pace that calls came at last, and the events."""
        with self._lock:
            events = list(self._events)
        return self._last.state() | {"events": [each.as_json() for each in events]}

    def _pace(self, total_ns: int, calls: int, passed_ns: int) -> int:
        """Return 0 for calls without a pause, and else a number that grows by one where pauses are twice as long."""
        call_ns = total_ns / calls
        # A lane has one turn of as many as there are callers for.
        pause_ns = passed_ns / calls / self._callers - call_ns
        if pause_ns <= max(_NO_PAUSE_NS, call_ns / _NO_PAUSE_SHARE):
            return 0
        return int(pause_ns / _NO_PAUSE_NS).bit_length()

    def _monitor(self, pace: int) -> DriftMonitor:
        with self._lock:
            found = self._monitors.get(pace)
            if found is None:
                expected = self._expected if pace == 0 else None
                self._monitors[pace] = found = DriftMonitor(expected, callers=self._callers, tell=partial(self._found, pace))
            return found

    def _found(self, pace: int, event: Drift) -> None:
        now = monotonic()
        with self._lock:
            if self._told is not None and self._told[0] != pace and now - self._told[1] < _APART_S:
                return
            self._told = pace, now
            self._events = [*self._events[-99:], event]
        self._tell(event)


def tell_apart(listener: Callable[[Drift], None], found: Drift) -> None:
    """Tell a listener on a thread of its own: a call that showed drift has its turn still, and who asked the engine, or closed it, would
    wait for that turn for ever."""
    try:
        threading.Thread(target=_listen, args=(listener, found), name="aivmm-drift", daemon=True).start()
    except RuntimeError:  # no threads any more: the interpreter ends
        log.exception("on_drift cannot be called")


def _listen(listener: Callable[[Drift], None], found: Drift) -> None:
    try:
        listener(found)
    except Exception:  # a listener's own fault is told, and costs nobody anything
        log.exception("on_drift failed")
