"""Drift: whether calls still take what the plan says, told from the noise that every machine has.

The statistic is a CUSUM (`cusum`) on the logarithm of the mean of `BLOCK` calls, or of as many as take 20 ms. Means, since another process
that takes a share of the cores delays a few short calls by much or all long ones by a little, and the share is what both have in common;
and since they are nearer to independent than calls are (Runger and Willemain, "Batch-means control charts for autocorrelated data", IIE
Transactions 28, 1996). A call counts for at most twice the baseline and a scheduler's slice, and a mean for at most `CLIP`, so that a stall
of a second is one stall. The baseline is of this machine, this process and its load, and a warm-up that says little of it goes on; the
level is never within the plan's interval, which keeps what the proof has already seen from being called a drift.

The event is raised when S has come to its limit and the excursion has lasted `_LEAST_CALLS` calls and `_LEAST_S` seconds: where it is
quiet, a shift of 30 % is told after some 180 calls or, where calls are short, after half a second; other machines on the same host take
away more than that for shorter times (seen on virtual machines: twice the time for up to 0.2 s, several times a minute). Where it comes
and goes, there is at most one event in `_PAUSE_S`. A second CUSUM tells who keeps calls from cores however fast the host is just then
(`contention`).

The event says what took the time (`causes`). Where nothing on this machine is seen to have, it is raised only when S has not come back to 0
for `_UNSEEN_S` and most calls were slow, and for `_HOST_S` where they need more CPU time: hosts are slow for seconds, again and again, and
once for 95 in a row (docs/decisions/0065). Where no calls come, nothing is known: a pause that is much longer than those before counts for
little of that time, and what was counted in it is held against nobody.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from aivmm.runtime.causes import Cause, CauseName, Machine, Witness
from aivmm.runtime.contention import Contention
from aivmm.runtime.cusum import ALLOWANCE, Cusum
from aivmm.runtime.plan import Number

log = logging.getLogger("aivmm.engine")

BLOCK = 16  # calls whose mean is one observation: what feeds a monitor gathers as many
_SKIPPED_BLOCKS = 2  # the first calls after loading are slower
_WARMUP_BLOCKS, _WARMUP_S = 8, 0.5  # the baseline is taken over at least so many blocks, and so long
_WARMUP_LONGEST_S = 8.0  # where what it says is not sure to 5 %
_SURE = 0.05
_WARMUP_MOST = 8192  # blocks: where calls take microseconds
LEAST_BLOCK_NS = 20_000_000  # of calls: a slice of somebody else is but a part of it
_SLICE_NS = 5_000_000  # for which Linux lets somebody else run, and a little more
_REMEMBERED = 100  # events
_SKEWED = 1.1  # a mean so much above the median is told, too
_LEAST_CALLS, _LEAST_S = 10 * BLOCK, 0.5
_LEAST_CONTENDED = 8 * BLOCK  # the first block or two may show too little of it, and 200 calls are 12 and a half
_UNSEEN_S = 60.0  # for so long, and in most calls, slowness lasts before it is told where no cause is seen
_HOST_S = 300.0  # and for so long where calls need more CPU time: the longest of a host's moods that was seen took 95 s
_UNSEEN_CALLS, _UNSEEN_LONG_S = 1000, 600.0  # so many of them, or as many as an event needs that took `_UNSEEN_S`, or came in so long
_SUSPECTED = 0.25  # of the limit: from there on the machine's accounts are compared
_AGAIN = 1.08  # they are looked at again when calls have been slow for so much longer
_PAUSE_S = 60.0  # of calls, between two events
_IDLE_S, _IDLE_TIMES, _IDLE_KEPT = 3.0, 4.0, 0.9  # calls have stopped when none comes for so long, and for so many times the longest lately
_BACK = "latency is back inside of the plan's interval"
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


class Calm(NamedTuple):
    """What calls are at most, on average over an observation, while none is slow: those may wait to be watched."""

    call_ns: float = math.inf
    ratio: float = math.inf  # of what they take to this process's CPU time meanwhile, which says nothing of one among several callers
    most_ns: int = 0  # what one of them counts for
    begun: bool = False  # some were slow, and kept from no core: what comes of that takes half a second at least

    @property
    def may_wait(self) -> bool:
        """Whether those that are not slow may wait for long, or those that are for a moment: not where nothing is told by them."""
        return math.isfinite(self.ratio) and (self.begun or math.isfinite(self.call_ns))


class Sums(NamedTuple):
    """What calls took that could wait, in nanoseconds."""

    each_ns: Sequence[int]  # by each `step` of them, where a call counts for at most what `Calm` says
    step: int
    calls: int
    busy_ns: int  # all of it
    last_ns: Sequence[int]  # what each of the last ones took


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
        self._least_ns = LEAST_BLOCK_NS * callers  # what makes an observation, with `BLOCK` calls at least
        self._contention = Contention(
            self._machine, self._witness, callers=callers, least_ns=self._least_ns, least_calls=_LEAST_CONTENDED, least_s=_LEAST_S
        )
        self._warm: list[_Block] = []  # the calls of the warm-up; empty afterwards
        self._warm_ns = self._warm_calls = 0
        self._warm_until_ns = _WARMUP_S * 1e9
        self._warming = True
        self._skip = _SKIPPED_BLOCKS
        self._recent: deque[int] = deque(maxlen=_LEAST_CALLS)
        self._cusum = Cusum(forgets=callers == 1)  # of the logarithms of means, in nanoseconds; fewer callers at once are faster
        self._most_ns = 0  # what a call counts for at most
        self._part_ns = self._part_calls = 0  # of one that is not whole
        self._calls = 0  # in this excursion
        self._busy_ns = 0
        self._slow_calls = self._slow_ns = 0  # of them, those that were slow
        self._held_calls = self._held_ns = 0  # of them, those whose loss is held against what is counted
        self._lasted_s = 0.0  # on the clock, but for times without calls
        self._came_s = -math.inf  # when the last calls came
        self._idle_s = 0.0  # the longest time between two blocks, lately
        self._suspected = False
        self._stale = False  # whether the machine's accounts were not looked at then
        self._cause: Cause | None = None  # of this excursion
        self._looked_ns = 0.0  # of slow calls, when the machine was asked for it last; 0 where it was not yet
        self._lasted = False  # it was so long by then that it is told without a cause
        self._outside = False
        self._paused_ns = math.inf  # of calls, since the last event
        self.baseline_s: float | None = None
        self.events: deque[Drift] = deque(maxlen=_REMEMBERED)

    def add(self, durations_ns: Sequence[int], block: int = BLOCK) -> None:
        """Take the durations of calls, in nanoseconds, all that came since the last time: some blocks of so many, `BLOCK` at least."""
        blocks = [durations_ns[at : at + block] for at in range(0, len(durations_ns), block)]
        with self._lock:
            found = [self._warm_up((sum(each), len(each), each)) if self._warming else self._gather(each) for each in blocks]
            found.append(self._compare(sum(durations_ns), len(durations_ns)))
        if any(found):
            self._tell_or_wait(found)

    def add_short(self, blocks: Sequence[Sequence[int]]) -> None:
        """Take those of calls that are much shorter than a slice, all that came since the last time, by observations or nearly so."""
        found = []
        with self._lock:
            for each in blocks:
                total_ns, calls, last = sum(each), len(each), each[-BLOCK:]
                if self._warming:
                    found.append(self._warm_up((total_ns, calls, last)))
                    continue
                self._recent.extend(last)
                self._witness.calls += calls
                self._witness.busy_ns += total_ns
                found.append(self._put_together(total_ns, calls))
            found.append(self._compare(sum(map(sum, blocks)), sum(map(len, blocks))))
        if any(found):
            self._tell_or_wait(found)

    def add_sums(self, sums: Sums) -> None:
        """Take what calls took that could wait (`calm`)."""
        with self._lock:
            self._recent.extend(sums.last_ns)
            self._witness.calls += sums.calls
            self._witness.busy_ns += sums.busy_ns
            found = [self._put_together(each, sums.step) for each in sums.each_ns[:-1]]
            found.append(self._put_together(sums.each_ns[-1], sums.calls - sums.step * len(found)))
            found.append(self._compare(sums.busy_ns, sums.calls))
        if any(found):
            self._tell_or_wait(found)

    def calm(self) -> Calm | None:
        """Return what calls may be for nothing to begin that is told; None while something may have begun."""
        with self._lock:
            if self._warming or self.is_outside:
                return Calm()
            begun = self._cusum.sum > 0.0
            if self._contention.is_above or (begun and self._callers > 1):
                return None
            ratio = math.exp(self._contention.level) if self._callers == 1 else math.inf
            return Calm(call_ns=math.inf if begun else math.exp(self._cusum.level), ratio=ratio, most_ns=self._most_ns, begun=begun)

    def resume(self) -> None:
        """Take note that other calls than those watched here came meanwhile."""
        with self._lock:
            self._contention.stopped()

    @property
    def is_warming(self) -> bool:
        """Whether the baseline is not known yet."""
        return self._warming

    @property
    def is_outside(self) -> bool:
        """Whether latency has left the interval, was told to have, and is not back."""
        return self._outside or self._contention.told

    def state(self) -> dict[str, Any]:
        """Return the state for statistics: `warming up`, `inside` or `outside`, the baseline, and the events."""
        with self._lock:
            state = "warming up" if self._warming else "outside" if self.is_outside else "inside"
            return {"state": state, "baseline_s": self.baseline_s, "events": [each.as_json() for each in self.events]}

    def _tell_or_wait(self, found: Sequence[Drift | None]) -> None:
        for event in found:
            if event is not None and self._tell(event) is False:
                with self._lock:
                    self._outside = self._contention.told = False
                    self._paused_ns = math.inf
                    # Looked for anew with the next calls: it may be another one.
                    self._cause, self._looked_ns = None, min(self._looked_ns, 1.0)
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
        unsure = self._cusum.learn([math.log(mean) for mean in _means(self._warm, self._most_ns, self._least_ns)])
        if unsure > _SURE and self._warm_until_ns < _WARMUP_LONGEST_S * 1e9 and blocks < _WARMUP_MOST:
            self._warm_until_ns *= 2  # where it is this noisy, half a second says little
            return None
        calls = self._warm_calls
        self._warm, self._warming, self.baseline_s = [], False, call_ns / 1e9
        self._contention.watch()
        if self._expected is None:
            self._witness.usual()
            self._held_calls = self._held_ns = 0
            return None
        # The plan's numbers are those of a call, and the level is one of means: what lies between the two is in the baseline.
        high_ns = (self._expected.high or self._expected.value) * 1e9
        cusum = self._cusum
        cusum.floor = limit = cusum.baseline + math.log(high_ns / call_ns)
        if self._callers == 1 and call_ns > high_ns * _TOLERANCE:
            cusum.level, cusum.sum = limit + ALLOWANCE, cusum.limit  # it is back when it is where the plan says
            self._calls = self._slow_calls = calls
            self._busy_ns = self._slow_ns = self._warm_ns
            self._suspected = True
            return self._left(self.baseline_s) if self._explained() else None
        self._witness.usual()
        self._held_calls = self._held_ns = 0
        if self._callers > 1:
            cusum.floor += ALLOWANCE
        cusum.level = max(cusum.level, cusum.floor)
        return None

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
        cusum = self._cusum
        learns = not (self.is_outside or self._contention.is_doubted)
        step = cusum.take(math.log(max(total_ns, 1) / calls), seconds=total_ns / 1e9 / self._callers, learns=learns)
        if cusum.sum <= 0.0:
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
        if not self._suspected and cusum.sum >= _SUSPECTED * cusum.limit:
            self._suspected = True
            self._stale = not self._witness.suspect()
        lasted = self._calls >= _LEAST_CALLS and self._busy_ns >= _LEAST_S * 1e9 * self._callers
        if self._outside or cusum.sum < cusum.limit or not lasted:
            return None
        if self._contention.told:
            self._outside = True  # with that: it is one slowdown
            return None
        if self._paused_ns < _PAUSE_S * 1e9 * self._callers:
            return None
        return self._left(median(self._recent) / 1e9) if self._explained() else None

    def _compare(self, busy_ns: int, calls: int) -> Drift | None:
        """Hold what calls took against the CPU time that they got."""
        contention = self._contention
        told = contention.told
        contention.take(busy_ns, calls, learns=not self._outside)
        if told and not self.is_outside:
            log.info(_BACK)
        if self._warming or contention.told or not contention.is_suspected:
            return None
        cause = contention.cause(above=self._cusum.floor)
        if cause is None or self._outside:
            contention.told = cause is not None
            return None
        if self._paused_ns < _PAUSE_S * 1e9 * self._callers:
            return None
        contention.told = True
        calls, mean_s = contention.live()
        return self._event(cause, median(self._recent) / 1e9, calls, mean_s)

    def _over(self) -> None:
        """Do what is to be done where calls are not slow: forget an excursion, and learn of it where it was noise."""
        self._cusum.over(usual=not (self.is_outside or self._looked_ns or self._contention.is_doubted))
        if self._outside:
            self._outside = False
            if not self.is_outside:
                log.info(_BACK)
        if self._calls:
            self._calls = self._busy_ns = self._slow_calls = self._slow_ns = self._held_calls = self._held_ns = 0
            self._suspected, self._cause, self._looked_ns, self._lasted, self._lasted_s = False, None, 0.0, False, 0.0
        if not self._contention.is_doubted:
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
        self._contention.stopped()
        return most_s + busy_s, True

    def _explained(self) -> bool:
        """Return whether the excursion is to be told now: since its cause is seen, or since it has lasted without one."""
        lasts = self._lasts()
        if self._slow_ns < self._looked_ns * _AGAIN and (self._lasted or not lasts):
            return False
        self._looked_ns, self._lasted = float(self._slow_ns), lasts
        if self._stale:  # what was counted since some earlier suspicion says nothing of this one
            self._stale = not self._witness.suspect(surely=True)
            self._held_calls = self._held_ns = 0
        elif self._held_ns >= _LEAST_S * 1e9 * self._callers:
            self._cause = self._witness.cause(self._held_calls, self._held_ns, usual_ns=math.exp(self._cusum.level - ALLOWANCE))
        if self._cause is None and lasts:
            unseen = self._witness.unseen()
            self._cause = None if unseen.may_pass and self._lasted_s < _HOST_S else unseen.cause
        return self._cause is not None

    def _lasts(self) -> bool:
        """Return whether it has lasted so long that it is told without a cause: by enough calls for a host's slow seconds not to be met by
        chance, which are fewer where they are long or come seldom."""
        if self._lasted_s < _UNSEEN_S or self._slow_calls < max(_LEAST_CALLS, self._calls / 2):
            return False
        slow_s = self._slow_ns / 1e9 / self._callers
        return self._slow_calls >= _UNSEEN_CALLS or slow_s >= _UNSEEN_S or self._lasted_s >= _UNSEEN_LONG_S

    def _left(self, live_s: float) -> Drift:
        assert self._cause is not None
        self._outside = True
        return self._event(self._cause, live_s, self._calls, self._busy_ns / self._calls / 1e9)

    def _event(self, cause: Cause, live_s: float, calls: int, live_mean_s: float) -> Drift:
        assert self.baseline_s is not None
        self._paused_ns = 0
        said = self._expected
        found = Drift(
            live_s=live_s,
            baseline_s=self.baseline_s,
            plan_s=None if said is None else said.value,
            low_s=None if said is None else said.low,
            high_s=None if said is None else said.high,
            calls=calls,
            live_mean_s=live_mean_s,
            baseline_mean_s=math.exp(self._cusum.baseline) / 1e9,
            cause=cause.name,
            seen=cause.words,
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


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
