"""The clock of a whole request, which tells who watches latency what calls took: by hundreds, and not at each call."""

from __future__ import annotations

import logging
from time import perf_counter_ns

from aivmm.runtime.clocks import RING, StageClock
from aivmm.runtime.drift import BLOCK, LEAST_BLOCK_NS, Calm, Sums
from aivmm.runtime.paces import PacedMonitor

log = logging.getLogger("aivmm.engine")

# What was timed is passed on to who watches it: 200 to 500 µs where caches are cold, as much as a short call takes. Were it one call in a
# hundred, that would be the 99th percentile, and one in five hundred still moves it by several microseconds. So short calls wait for two
# seconds, or for as many as are remembered, while a look at each observation of them (`may_wait`: microseconds in C) says that nothing
# began that would be told. What is kept from cores is passed on at once, with all before it; what is slow otherwise, which is told after
# half a second at the soonest, by some observations. Where nothing is told anyway, in a warm-up or once it was, and where there are
# several callers, they are passed on as often as a baseline needs.
_WAIT_NS, _PAUSED_NS = 2_000_000_000, 500_000_000
_SLOW_OBSERVATIONS, _SLOW_NS = 4, 250_000_000
_PASSED_CALLS, _PASSED_LEAST_NS, _PASSED_MOST_NS = 512, 50_000_000, 250_000_000
# Who waits for longer than this and than twice what an observation takes lately is not waited with: his calls came in a burst, which is
# held against bursts. Several with the pauses between them would seem to be of a slower pace, and calls in a row would have no baseline.
# Whether a slow pace is one of bursts is seen by each eighth time, in which calls are expected without pauses.
_BURST_NS, _BURST_OBSERVATIONS, _BURSTS_TIMES = 50_000_000, 2, 8
# Calls so long are passed on by a twentieth of a second: it is a small part of one, and drift is to be told within two hundred of them.
_LONG_NS, _LONG_PASSED_NS, _NEVER_NS = 2_000_000, 50_000_000, 1 << 62
_PAUSE_NS, _PAUSE_PERIODS = 20_000_000, 4  # what is longer than both, the periods of the calls before it, is a pause after a burst
_SHORT_NS = 500_000  # where all are shorter their sums are watched, otherwise each


class WatchedClock(StageClock):
    """Durations of whole requests of one lane. Who counts a call asks `due` and `due_ns` behind it, and sets `ended_ns`."""

    __slots__ = ("_most_ns", "_passed_at_ns", "_period_ns", "_rest", "_times", "watch")

    def __init__(self, *, full: bool = True) -> None:
        super().__init__(full=full)
        self.watch: PacedMonitor | None = None  # takes the durations
        self.due, self.due_ns = 1, 0  # the count at which, and the time from which, what was timed is passed on
        self.ended_ns = perf_counter_ns()  # the last call
        self._passed_at_ns = self.ended_ns  # up to when they were passed on
        self._period_ns = self._times = 0  # of the last calls that were passed on, and how often some were
        self._rest = 0  # calls before that: of the block that is not whole yet
        self._most_ns = 0  # what a call counts for, where calls wait for long; else each is told what it took

    def took(self, nanoseconds: int) -> None:
        """Count a run, which `pass_on` adds up. `Lane.call` and `shortest` do so without this call."""
        self.note(nanoseconds)
        self.count += 1

    def pass_on(self, started_ns: int, now_ns: int) -> None:
        """Tell who watches what calls took, unless that can wait: of short ones the sum, by as many as are one observation, of others each.

        The last call went from `started_ns` to `now_ns`. Where it came after a pause, those before it came in a row.
        """
        if self.may_wait(now_ns):
            return
        began_ns = perf_counter_ns()  # a look is no pause: who has the core meanwhile would make another pace of it
        before, before_ns = self.added_up
        if before:  # not with the first answer, for which somebody may wait
            self.fill()
        self.add_up()
        calm: Calm | None = Calm()
        calls = self.count - before
        try:
            if self.watch is not None:
                self._watched(self.watch, self._rest + calls, started_ns, now_ns)
                calm = self.watch.calm()
        except Exception:  # its fault, whatever it is, costs nobody an answer that was computed
            log.exception("latency is not watched any more")
            self.watch = None
        self._begin((self.added_up[1] - before_ns) // max(calls, 1) + 1, now_ns, calm)
        self.looking_ns += perf_counter_ns() - began_ns

    def _begin(self, call_ns: int, now_ns: int, calm: Calm | None) -> None:
        """Begin to wait, while calls take `call_ns`, and are `calm`; None where they have nothing to wait for."""
        step, self._most_ns = max(BLOCK, LEAST_BLOCK_NS // call_ns + 1), 0
        if calm is None or call_ns >= _LONG_NS:
            # Not before they are a block: who calls once a second, too, is watched by blocks, and so is a pipeline's lane, whose turn
            # comes seldom. Short ones are not waited for longer than a block of them would have taken.
            long = call_ns >= _LONG_NS
            most_ns = _NEVER_NS if long else _LONG_PASSED_NS
            self.wait(now_ns, step, max(1, BLOCK - self._rest) if long else min(step, RING - BLOCK), most_ns, most_ns, 0.0, 0.0, 0)
            return
        most = max(step, min(max(_PASSED_CALLS, _PASSED_LEAST_NS // call_ns), _PASSED_MOST_NS // call_ns))
        most_ns, later = _PAUSED_NS, _SLOW_OBSERVATIONS * step
        if calm.may_wait:
            most, most_ns, self._most_ns = (later, _SLOW_NS, calm.most_ns) if calm.begun else (RING, _WAIT_NS, calm.most_ns)
        self._times = (self._times + 1) % _BURSTS_TIMES
        pause_ns = min(_PAUSED_NS, _BURST_NS + _BURST_OBSERVATIONS * step * (self._period_ns if self._times else call_ns))
        self.wait(now_ns, step, min(most, RING - BLOCK), pause_ns, most_ns, calm.call_ns, calm.ratio, later)

    def _watched(self, watch: PacedMonitor, many: int, started_ns: int, now_ns: int) -> None:
        """Tell who watches what the last calls took, so many, but for those of a block that is not whole."""
        if many < BLOCK:
            self._rest = many
            return
        pause_ns, came_ns, end = started_ns - self.ended_ns, self.ended_ns - self._passed_at_ns, many
        if end > BLOCK and pause_ns > max(_PAUSE_NS, _PAUSE_PERIODS * came_ns // (end - 1)):
            # The pause is nobody's: who calls in bursts has calls in a row and, seldom, one behind a pause.
            passed_ns, end, self._passed_at_ns = came_ns, end - 1, started_ns
        else:
            passed_ns, self._passed_at_ns = now_ns - self._passed_at_ns, now_ns
        self._rest = rest = many - end
        total_ns = self.newest_ns(many) - self.newest_ns(rest)
        passed_ns, self.looking_ns = max(total_ns, passed_ns - self.looking_ns), 0
        self._period_ns = passed_ns // end
        step = max(BLOCK, LEAST_BLOCK_NS * end // max(1, total_ns) + 1)
        if self._most_ns:
            sums = Sums(self.sums(many, rest, step, self._most_ns), step, end, total_ns, self.last(BLOCK + rest)[:BLOCK])
            watch.add_sums(sums, passed_ns)
            return
        whole = self.last(many)[:end]
        if max(whole) >= _SHORT_NS:
            watch.add(whole, passed_ns, step)
            return
        watch.add_short([whole[at : at + step] for at in range(0, end, step)], passed_ns)
