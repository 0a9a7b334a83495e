"""The clock of a whole request, which tells who watches latency what calls took: by hundreds, and not at each call."""

from __future__ import annotations

import logging
import math
from time import perf_counter_ns

from aivmm.runtime.clocks import RING, StageClock
from aivmm.runtime.drift import BLOCK, LEAST_BLOCK_NS
from aivmm.runtime.paces import PacedMonitor

log = logging.getLogger("aivmm.engine")

# What was timed is passed on to who watches it: 50 to 100 µs where caches are cold. Were it one call in a hundred, that would be the 99th
# percentile, and one in a thousand still moves it, by half of a microsecond for calls of ten: so short calls are passed on by hundreds, the
# shortest by thousands, or after half a second, as long as they take what they took before. Calls of `_LONG_NS`, and all that seem slower,
# are passed on by a twentieth of a second: there it is a small part of a call, and drift is to be told within two hundred of them.
_PASSED_CALLS, _PASSED_NS, _PASSED_LEAST_NS, _PASSED_MOST_NS = 512, 500_000_000, 50_000_000, 250_000_000
_LONG_NS, _LONG_PASSED_NS = 2_000_000, 50_000_000
_SLOWER = 1.1  # than the quickest that were passed on ...
_FORGOTTEN = 1e-11  # ... which counts for so much more a nanosecond: a percent a second
_PAUSE_NS, _PAUSE_PERIODS = 20_000_000, 4  # what is longer than both, the periods of the calls before it, is a pause after a burst
_SHORT_NS = 500_000  # where all are shorter their sums are watched, otherwise each


class WatchedClock(StageClock):
    """Durations of whole requests of one lane. Who counts a call asks `due` and `due_ns` behind it, and sets `ended_ns`."""

    __slots__ = ("_passed_at_ns", "_passed_on_ns", "_quickest_ns", "_rest", "watch")

    def __init__(self, *, full: bool = True) -> None:
        super().__init__(full=full)
        self.watch: PacedMonitor | None = None  # takes the durations
        self.due, self.due_ns = 1, 0  # the count at which, and the time from which, what was timed is passed on
        self.ended_ns = perf_counter_ns()  # the last call
        self._passed_at_ns = self._passed_on_ns = self.ended_ns  # up to when they were passed on, and when that was
        self._rest: list[int] = []  # of the block that is not whole yet
        self._quickest_ns = math.inf  # a call, on the average of those passed on at once

    def pass_on(self, started_ns: int, now_ns: int) -> None:
        """Tell who watches what calls took: of short ones the sum, by as many as are one observation, of others each; not at each call.

        The last call went from `started_ns` to `now_ns`. Where it came after a pause, those before it came in a row.
        """
        before, before_ns = self.added_up
        if before:  # not with the first answer, for which somebody may wait
            self.fill()
        self.add_up()
        calls, total_ns = self.count - before, self.added_up[1] - before_ns
        call_ns = total_ns // max(calls, 1) + 1
        calm = call_ns < _LONG_NS and call_ns <= self._quickest_ns * _SLOWER
        self._quickest_ns = min(call_ns, self._quickest_ns * (1 + _FORGOTTEN * (now_ns - self._passed_on_ns)))
        self._passed_on_ns = now_ns
        least = min(max(_PASSED_CALLS, _PASSED_LEAST_NS // call_ns), _PASSED_MOST_NS // call_ns) if calm else BLOCK
        most = min(max(least, LEAST_BLOCK_NS // call_ns + 1), RING - 1)
        # Not before they are a block: who calls once a second, too, is watched by blocks.
        self.due = self.count + most
        self.due_ns = now_ns + (_PASSED_NS if calm else max(_LONG_PASSED_NS, BLOCK * call_ns))
        if self.watch is None or not calls:
            return
        try:
            self._watched(self._rest + self.last(calls), started_ns, now_ns)
        except Exception:  # its fault, whatever it is, costs nobody an answer that was computed
            log.exception("latency is not watched any more")
            self.watch = None

    def _watched(self, whole: list[int], started_ns: int, now_ns: int) -> None:
        watch = self.watch
        if watch is None or len(whole) < BLOCK:
            self._rest = whole
            return
        pause_ns, came_ns, end = started_ns - self.ended_ns, self.ended_ns - self._passed_at_ns, len(whole)
        if end > BLOCK and pause_ns > max(_PAUSE_NS, _PAUSE_PERIODS * came_ns // (end - 1)):
            # The pause is nobody's: who calls in bursts has calls in a row and, seldom, one behind a pause.
            passed_ns, end, self._passed_at_ns = came_ns, end - 1, started_ns
        else:
            passed_ns, self._passed_at_ns = now_ns - self._passed_at_ns, now_ns
        self._rest = whole[end:]
        if max(whole) >= _SHORT_NS:
            watch.add(whole[:end], passed_ns)
            return
        step = max(BLOCK, LEAST_BLOCK_NS * end // max(1, sum(whole[:end])) + 1)
        watch.add_short([whole[at : min(at + step, end)] for at in range(0, end, step)], passed_ns)
