"""Drift: whether calls still take what the plan says, told from the noise that every machine has.

The statistic is a one-sided CUSUM (Page, "Continuous inspection schemes", Biometrika 41, 1954) on the logarithm of the mean of `BLOCK`
calls, or of as many as take 20 ms. Means, since another process that takes a share of the cores delays a few short calls by much or all
long ones by a little, and the share is what both have in common; and since they are nearer to independent than calls are (Runger and
Willemain, "Batch-means control charts for autocorrelated data", IIE Transactions 28, 1996). A call counts for at most twice the baseline
and a scheduler's slice, and a mean for at most `_CLIP`, so that a stall of a second is one stall.

    S = min(h, max(0, S + min(_CLIP, log(mean) - level)))               level = max(baseline + log(1.3) / 2, the plan's interval)

log(1.3) / 2 is the allowance k with which a shift of 30 % is found soonest (Page's k; Moustakides, Annals of Statistics 14, 1986). The
baseline is where steps are none on average, stalls that were there from the beginning included, plus two standard errors of it; a warm-up
that says little of it goes on. The limit h is `_LIMIT`, or what noise of the variance seen reaches once in exp(`_PATIENCE`) steps by
Brownian motion (variance * _PATIENCE / 2k; Siegmund, "Sequential Analysis", 1985); both are taken again when twice as much was seen
without an event. The event is raised when S has come to h and the excursion has lasted `_LEAST_CALLS` calls and `_LEAST_S` seconds: where
it is quiet, a shift of 30 % is told after some 180 calls or, where calls are short, after half a second; other machines on the same host
take away more than that for shorter times (seen on virtual machines: twice the time for up to 0.2 s, several times a minute). So the
baseline knows this machine, this process and its load; the plan's interval keeps what the proof has already seen from being called a
drift. Where it comes and goes, there is at most one event in `_PAUSE_S`.

The event says what took the time (`causes`). Where nothing on this machine is seen to have, it is raised only when S has not come back to 0
for `_UNSEEN_S` and most calls were slow: hosts are slow for seconds, again and again (docs/decisions/0065). Where no calls come, nothing
is known: a pause that is much longer than those before counts for little of that time, and what was counted in it is held against nobody.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from aivmm.runtime.causes import Cause, CauseName, Machine, Witness
from aivmm.runtime.plan import Number

log = logging.getLogger("aivmm.engine")

BLOCK = 16  # calls whose mean is one observation: what feeds a monitor gathers as many
_SKIPPED_BLOCKS = 2  # the first calls after loading are slower
_WARMUP_BLOCKS, _WARMUP_S = 8, 0.5  # the baseline is taken over at least so many blocks, and so long
_WARMUP_LONGEST_S = 8.0  # where what it says is not sure to 5 %
_SURE = 0.05
_WARMUP_MOST = 8192  # blocks: where calls take microseconds
_ALLOWANCE = math.log(1.3) / 2
_LIMIT = 1.0  # some eight blocks of a 30 % shift
_CLIP = 0.5
LEAST_BLOCK_NS = 20_000_000  # of calls: a slice of somebody else is but a part of it
_PATIENCE = 15.0  # the logarithm of how many observations noise alone is to take for an event: 3 million, or a day
_SLICE_NS = 5_000_000  # for which Linux lets somebody else run, and a little more
_LEARNT = 512  # observations, from which level and limit are taken: at first those of the warm-up, again when there are twice as many
_NEIGHBOURS = 4  # observations
_REMEMBERED = 100  # events
_SKEWED = 1.1  # a mean so much above the median is told, too
_LEAST_CALLS, _LEAST_S = 10 * BLOCK, 0.5
_UNSEEN_S = 60.0  # for so long, and in most calls, slowness lasts before it is told where no cause is seen
_UNSEEN_CALLS, _UNSEEN_LONG_S = 1000, 600.0  # so many of them, or as many as an event needs that took `_UNSEEN_S`, or came in so long
_SUSPECTED = 0.25  # of the limit: from there on the machine's accounts are compared
_AGAIN = 1.08  # they are looked at again when calls have been slow for so much longer
_PAUSE_S = 60.0  # of calls, between two events
_IDLE_S, _IDLE_TIMES, _IDLE_KEPT = 3.0, 4.0, 0.9  # calls have stopped when none comes for so long, and for so many times the longest lately
_TOLERANCE = 1.15  # loads of one model differ by up to 10 % (docs/decisions/0009); beyond this a warm-up is outside of the plan's interval


_Block = tuple[int, int, Sequence[int]]  # what some calls took, how many they are, and what each took: of short ones the last few


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Live latency has left the plan's interval. Times in seconds; those of the plan are None where it has no number."""

    live_s: float  # median of the last calls
    baseline_s: float  # median of the calls of the warm-up
    plan_s: float | None
    low_s: float | None
    high_s: float | None
    calls: int  # since the excursion began
    # What is compared: means, in which a long call counts for a few others at most. Where few calls are slow medians say nothing of them.
    live_mean_s: float
    baseline_mean_s: float
    cause: CauseName  # what was seen to take the time
    seen: str  # the same in words, with figures

    def as_json(self) -> dict[str, Any]:
        """Return the fields, for statistics."""
        return asdict(self)

    def __str__(self) -> str:
        said = "the plan names no latency" if self.plan_s is None else f"the plan says {_ms(self.plan_s)}"
        if self.low_s is not None and self.high_s is not None:
            said += f" ({_ms(self.low_s)} to {_ms(self.high_s)})"
        means = self.live_mean_s > self.live_s * _SKEWED or self.baseline_mean_s > self.baseline_s * _SKEWED
        live = _ms(self.live_s) + (f" ({_ms(self.live_mean_s)} on average)" if means else "")
        first = _ms(self.baseline_s) + (f" ({_ms(self.baseline_mean_s)} on average)" if means else "")
        against = "" if self.live_s == self.baseline_s else f", and the first calls of this engine took {first}"
        return f"drift: a call takes {live} over the last {self.calls} calls; {said}{against}; {self.seen}"


class DriftMonitor:
    """Watches the latencies of one engine. Thread-safe; fed by blocks, a call costs a part of a microsecond."""

    def __init__(
        self, expected: Number | None, *, callers: int = 1, tell: Callable[[Drift], bool | None], machine: Machine | None = None
    ) -> None:
        """Watch against the plan's `expected` latency of a call; `tell` is called once each time when it was left.

        Where it returns False that was nothing to tell yet: it is asked again while it lasts. The `machine` is asked for causes.
        With several `callers` the plan's latency is that of an engine kept busy: less load is faster, and more of it no drift.
        """
        self._expected = expected
        self._callers = callers
        self._tell = tell
        self._lock = threading.Lock()
        self._machine = machine or Machine()
        self._witness = Witness(self._machine, callers=callers)
        self._warm: list[_Block] = []  # the calls of the warm-up; empty afterwards
        self._warm_ns = self._warm_calls = 0
        self._warm_until_ns = _WARMUP_S * 1e9
        self._warming = True
        self._skip = _SKIPPED_BLOCKS
        self._recent: deque[int] = deque(maxlen=_LEAST_CALLS)
        self._level = math.inf
        self._floor = -math.inf  # of the level, which the plan's interval sets
        self._limit = _LIMIT
        self._logs: list[float] = []  # logarithms of the means that were seen without an event, at first
        self._pending: list[float] = []  # those of the excursion that goes on
        self._learned = 0  # from so many
        self._baseline = 0.0  # the logarithm of a mean, in nanoseconds
        self._most_ns = 0  # what a call counts for at most
        self._least_ns = LEAST_BLOCK_NS * callers  # what makes an observation, with `BLOCK` calls at least
        self._part_ns = self._part_calls = 0  # of one that is not whole
        self._sum = 0.0
        self._calls = 0  # in this excursion
        self._busy_ns = 0
        self._slow_calls = self._slow_ns = 0  # of them, those that were slow
        self._held_calls = self._held_ns = 0  # of them, those whose loss is held against what is counted
        self._lasted_s = 0.0  # on the clock, but for times without calls
        self._came_s = -math.inf  # when the last calls came
        self._idle_s = 0.0  # the longest time between two blocks, lately
        self._suspected = False
        self._cause: Cause | None = None  # of this excursion
        self._looked_ns = 0.0  # of slow calls, when the machine was asked for it last; 0 where it was not yet
        self._lasted = False  # it was so long by then that it is told without a cause
        self._outside = False
        self._paused_ns = math.inf  # of calls, since the last event
        self.baseline_s: float | None = None
        self.events: deque[Drift] = deque(maxlen=_REMEMBERED)

    def add(self, durations_ns: Sequence[int]) -> None:
        """Take the durations of calls, in nanoseconds: `BLOCK` of them, or some times as many."""
        found: list[Drift] = []
        with self._lock:
            for at in range(0, len(durations_ns), BLOCK):
                block = durations_ns[at : at + BLOCK]
                event = self._warm_up((sum(block), len(block), block)) if self._warming else self._gather(block)
                if event is not None:
                    found.append(event)
        for each in found:
            self._tell_or_wait(each)

    def add_short(self, total_ns: int, calls: int, last: Sequence[int]) -> None:
        """Take the sum of the durations of calls that are much shorter than a slice, and the last of them: `BLOCK` or less."""
        with self._lock:
            if self._warming:
                event = self._warm_up((total_ns, calls, last))
            else:
                self._recent.extend(last)
                self._witness.calls += calls
                self._witness.busy_ns += total_ns
                event = self._put_together(total_ns, calls)
        if event is not None:
            self._tell_or_wait(event)

    @property
    def is_warming(self) -> bool:
        """Whether the baseline is not known yet."""
        return self._warming

    @property
    def is_outside(self) -> bool:
        """Whether latency has left the interval, was told to have, and is not back."""
        return self._outside

    def state(self) -> dict[str, Any]:
        """Return the state for statistics: `warming up`, `inside` or `outside`, the baseline, and the events."""
        with self._lock:
            state = "warming up" if self._warming else "outside" if self._outside else "inside"
            return {"state": state, "baseline_s": self.baseline_s, "events": [each.as_json() for each in self.events]}

    def _tell_or_wait(self, event: Drift) -> None:
        if self._tell(event) is False:
            with self._lock:
                self._outside, self._paused_ns = False, math.inf
                self._cause, self._looked_ns = None, min(self._looked_ns, 1.0)  # looked for anew with the next calls: it may be another one
                with suppress(ValueError):
                    self.events.remove(event)

    def _warm_up(self, block: _Block) -> Drift | None:
        if self._skip:
            self._skip -= 1
            return None
        self._witness.calls += block[1]
        self._witness.busy_ns += block[0]
        if self._passed(block[0])[1]:
            self._witness.begin()  # before the first calls, or anew
            self._held_calls = self._held_ns = 0
        else:
            self._held_calls += block[1]
            self._held_ns += block[0]
        self._warm.append(block)
        self._warm_ns += block[0]
        self._warm_calls += block[1]
        blocks = self._warm_calls // BLOCK
        if blocks < _WARMUP_BLOCKS or (self._warm_ns < self._warm_until_ns and blocks < _WARMUP_MOST):
            return None
        call_ns = max(1.0, median(each for _, _, durations in self._warm for each in durations))  # a coarse clock may have seen none of it
        self._most_ns = int(2 * call_ns) + _SLICE_NS
        self._logs = [math.log(mean) for mean in _means(self._warm, self._most_ns, self._least_ns)]
        baseline, unsure = self._learn()
        if unsure > _SURE and self._warm_until_ns < _WARMUP_LONGEST_S * 1e9 and blocks < _WARMUP_MOST:
            self._warm_until_ns *= 2  # where it is this noisy, half a second says little
            return None
        calls = self._warm_calls
        self._warm, self._warming, self.baseline_s = [], False, call_ns / 1e9
        if self._expected is None:
            self._witness.usual()
            self._held_calls = self._held_ns = 0
            return None
        # The plan's numbers are those of a call, and the level is one of means: what lies between the two is in the baseline.
        high_ns = (self._expected.high or self._expected.value) * 1e9
        limit = baseline + math.log(high_ns / call_ns)
        if self._callers == 1 and call_ns > high_ns * _TOLERANCE:
            self._level, self._sum = limit + _ALLOWANCE, self._limit  # it is back when it is where the plan says
            self._calls = self._slow_calls = calls
            self._busy_ns = self._slow_ns = self._warm_ns
            self._suspected = True
            return self._left(self.baseline_s) if self._explained() else None
        self._witness.usual()
        self._held_calls = self._held_ns = 0
        self._floor = limit + (_ALLOWANCE if self._callers > 1 else 0.0)
        self._level = max(self._level, self._floor)
        return None

    def _learn(self) -> tuple[float, float]:
        """Take level and limit from what was seen without an event; return the logarithm of the baseline and two standard errors of it.

        Stalls that came from the beginning are in few observations or in many: the baseline is where steps are none on average.
        """
        middle = median(self._logs)
        baseline = middle + max(0.0, fmean(min(_CLIP, each - middle) for each in self._logs))
        noise = _long_run_variance([min(_CLIP, each - baseline) for each in self._logs])
        unsure = 2 * math.sqrt(noise / len(self._logs))
        self._level = max(baseline + unsure + _ALLOWANCE, self._floor)
        self._limit = max(_LIMIT, _PATIENCE * noise / (2 * _ALLOWANCE))
        self._learned = len(self._logs)
        self._baseline = baseline
        return baseline, unsure

    def _gather(self, durations_ns: Sequence[int]) -> Drift | None:
        self._recent.extend(durations_ns)
        most, total_ns, witness = self._most_ns, sum(durations_ns), self._witness
        witness.calls += len(durations_ns)
        witness.busy_ns += total_ns
        if max(durations_ns) > most:
            total_ns = sum(min(each, most) for each in durations_ns)
        return self._put_together(total_ns, len(durations_ns))

    def _put_together(self, total_ns: int, calls: int) -> Drift | None:
        """Put short calls together until one slice of somebody else is but a part of them."""
        self._part_ns += total_ns
        self._part_calls += calls
        if self._part_ns < self._least_ns:
            return None
        total_ns, calls, self._part_ns, self._part_calls = self._part_ns, self._part_calls, 0, 0
        return self._watch(total_ns, calls)

    def _watch(self, total_ns: int, calls: int) -> Drift | None:
        self._paused_ns += total_ns
        passed_s, stopped = self._passed(total_ns)
        mean = math.log(max(total_ns, 1) / calls)
        step = mean - self._level
        if self._learned < _LEARNT and len(self._pending) < _LEARNT and not self._outside:
            self._pending.append(mean)
        self._sum = min(self._limit, max(0.0, self._sum + min(_CLIP, step)))
        if self._sum <= 0.0:
            self._over()
            return None
        if stopped and self._suspected:
            self._suspected, self._held_calls, self._held_ns = False, 0, 0  # begins anew, after these calls
        else:
            self._held_calls += calls
            self._held_ns += total_ns
        self._lasted_s += passed_s
        self._calls += calls
        self._busy_ns += total_ns
        if step > 0:
            self._slow_calls += calls
            self._slow_ns += total_ns
        if not self._suspected and self._sum >= _SUSPECTED * self._limit:
            self._suspected = True
            self._witness.suspect()
        lasted = self._calls >= _LEAST_CALLS and self._busy_ns >= _LEAST_S * 1e9 * self._callers
        if self._outside or self._sum < self._limit or not lasted or self._paused_ns < _PAUSE_S * 1e9 * self._callers:
            return None
        return self._left(median(self._recent) / 1e9) if self._explained() else None

    def _over(self) -> None:
        """Do what is to be done where calls are not slow: forget an excursion, and learn of it where it was noise."""
        if self._pending:  # what comes in half a second is not all that there is
            self._logs += self._pending if not (self._outside or self._looked_ns) else []
            self._pending.clear()
            if len(self._logs) >= 2 * self._learned:
                self._learn()
        if self._outside:
            self._outside = False
            log.info("latency is back inside of the plan's interval")
        if self._calls:
            self._calls = self._busy_ns = self._slow_calls = self._slow_ns = self._held_calls = self._held_ns = 0
            self._suspected, self._cause, self._looked_ns, self._lasted, self._lasted_s = False, None, 0.0, False, 0.0
        self._witness.quiet()

    def _passed(self, busy_ns: int) -> tuple[float, bool]:
        """Return what passed on the clock with calls that count for `busy_ns`, and whether they had stopped before, or one has stalled:
        then little of that counts."""
        now_s, busy_s = self._machine.now_s(), busy_ns / 1e9 / self._callers
        passed_s, self._came_s = now_s - self._came_s, now_s
        idle_s, most_s = max(0.0, passed_s - busy_s), max(_IDLE_S, _IDLE_TIMES * self._idle_s)
        self._idle_s = max(min(idle_s, most_s), _IDLE_KEPT * self._idle_s)
        if idle_s <= most_s:
            return passed_s, False
        self._witness.stopped()
        return most_s + busy_s, True

    def _explained(self) -> bool:
        """Return whether the excursion is to be told now: since its cause is seen, or since it has lasted without one."""
        lasts = self._lasts()
        if self._slow_ns < self._looked_ns * _AGAIN and (self._lasted or not lasts):
            return False
        self._looked_ns, self._lasted = float(self._slow_ns), lasts
        if self._held_ns >= _LEAST_S * 1e9 * self._callers:
            self._cause = self._witness.cause(self._held_calls, self._held_ns, usual_ns=math.exp(self._level - _ALLOWANCE))
        if self._cause is None and lasts:
            self._cause = self._witness.unseen()
        return self._cause is not None

    def _lasts(self) -> bool:
        """Return whether it has lasted so long that it is told without a cause: by enough calls for a host's slow seconds not to be met by
        chance, which are fewer where they are long or come seldom."""
        if self._lasted_s < _UNSEEN_S or self._slow_calls < max(_LEAST_CALLS, self._calls / 2):
            return False
        slow_s = self._slow_ns / 1e9 / self._callers
        return self._slow_calls >= _UNSEEN_CALLS or slow_s >= _UNSEEN_S or self._lasted_s >= _UNSEEN_LONG_S

    def _left(self, live_s: float) -> Drift:
        assert self.baseline_s is not None and self._cause is not None
        self._outside, self._paused_ns = True, 0
        said = self._expected
        found = Drift(
            live_s=live_s,
            baseline_s=self.baseline_s,
            plan_s=None if said is None else said.value,
            low_s=None if said is None else said.low,
            high_s=None if said is None else said.high,
            calls=self._calls,
            live_mean_s=self._busy_ns / self._calls / 1e9,
            baseline_mean_s=math.exp(self._baseline) / 1e9,
            cause=self._cause.name,
            seen=self._cause.words,
        )
        self.events.append(found)
        return found


def _means(blocks: Sequence[_Block], most_ns: int, least_ns: int) -> Iterator[float]:
    """Yield the means of calls by so many blocks as take `least_ns`, a call counting for `most_ns` at most; one at least."""
    total_ns = calls = 0
    whole = False
    for number, (block_ns, count, durations_ns) in enumerate(blocks, start=1):
        total_ns += sum(min(each, most_ns) for each in durations_ns) if len(durations_ns) == count else block_ns
        calls += count
        if total_ns >= least_ns or (number == len(blocks) and not whole):
            yield max(total_ns, 1) / calls
            total_ns = calls = 0
            whole = True


def _long_run_variance(steps: Sequence[float]) -> float:
    """Return what the variance of a sum of steps grows by a step, neighbours being alike: from sums over four, where there are enough.

    By the differences of sums next to each other (von Neumann 1941), so that a lasting change of level is not taken for noise.
    """
    if len(steps) < 3 * _NEIGHBOURS:
        return 0.0  # too few to tell: the limit is that of a quiet machine
    sums = [sum(steps[at : at + _NEIGHBOURS]) for at in range(0, len(steps) - _NEIGHBOURS + 1, _NEIGHBOURS)]
    return fmean((later - sooner) ** 2 for sooner, later in pairwise(sums)) / 2 / _NEIGHBOURS


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
