"""Whether calls take longer for the CPU time that they get: the part of a slowdown that has nothing to do with how fast the machine is.

Who takes turns on a core with a call makes it wait, and the CPU time that it needs stays what it was; a host that is slow, a clock or a
cache make calls need more of it. So the ratio of the two moves with neighbours only: recorded on a virtual machine (Xeon, calls of 4 ms),
its standard deviation was 0.1 to 2.5 % where that of what calls take was 9 to 19 %, and a process at nice 5 on their core made it 1.32. It
is held against its own beginning, as what calls take is (`cusum`), but it needs no second in which the machine was as fast as it is now: a
baseline that was taken while the host was slow hides nothing of a neighbour who comes when it is not.

A ratio is no proof: calls wait for disks and devices, too. So nothing is told but what the machine's accounts say as well (`causes`): that
threads waited for cores while other processes had them, or that a quota stopped them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

from aivmm.runtime.causes import Cause, Contended, Counted, Machine, Witness
from aivmm.runtime.cusum import Cusum

_ALLOWANCE = math.log(1.2) / 2  # half of the part of a 30 % slowdown that may be waits: the neighbour's traces in the caches are the rest
_LEAST_LIMIT = 0.3  # of the statistic, whose noise is that much smaller than that of what calls take
_TOLD = math.log(1.13)  # how much longer calls have to take for their CPU time, on average: less is no slowdown of 30 %
_NEAR = 0.15  # to the limit: who has slices of a core is not met by each observation
_SUSPECTED = 2  # observations in a row that are above the level: from there on the accounts are compared
_AGAIN = 1.08  # they are looked at again when there are so many times as many calls ...
_ANEW_S, _ANEW_LEAST = 10.0, 12  # seconds of calls, and observations, in which they named nobody: what is seen then is usual
_NAMED_TIMES = 3  # where they named somebody they are asked for that so much later
_UNKNOWN_TIMES = 3  # and where they cannot be asked, as calls stop again and again, that is not waited for longer than this
_KEPT_MOST = 0.5  # of calls: what of them is taken for waits, as others of our threads wait, too
_SEEN_MOST = 512  # observations
_LONGEST_S = 0.25  # of calls, that are one observation


@dataclass(slots=True)
class _Held:
    """What is held against whoever keeps calls from cores: those that came since the accounts were looked at."""

    since: Counted | None = None
    calls: int = 0
    busy_ns: int = 0
    own_ns: float = 0.0
    asked_calls: int = 0  # how many they were when the accounts were asked last


class Contention:
    """Watches the wall time of calls by the CPU time that this process took meanwhile. Used by one thread at a time."""

    def __init__(self, machine: Machine, witness: Witness, *, callers: int, least_ns: int, least_calls: int, least_s: float) -> None:
        """Watch by observations of `least_ns`; what is told has lasted for `least_calls` and for `least_s` of calls."""
        self._machine = machine
        self._witness = witness
        self._cusum = Cusum(forgets=callers == 1, allowance=_ALLOWANCE, least_limit=_LEAST_LIMIT)
        self._callers = callers
        self._least_ns, self._least_calls, self._least_s = least_ns, least_calls, least_s
        self._warm: list[float] | None = []  # observations of the warm-up; None afterwards
        self._own_s: float | None = None  # CPU time of this process, when an observation began
        self._part_ns = self._part_calls = 0  # of one that is not whole
        self._observed = self._calls = self._busy_ns = 0  # since calls take longer for their CPU time
        self._reached = False  # whether the statistic has come to its limit, and is near it still
        self._unnamed_ns = 0  # of calls, since the accounts named somebody: calls that are not suspected make up for those that are
        self._seen: deque[float] = deque(maxlen=_SEEN_MOST)  # meanwhile, as far as they are suspected
        self._held = _Held()
        self.told = False  # whether what goes on was told

    @property
    def is_suspected(self) -> bool:
        """Whether calls may be kept from cores just now."""
        return self._observed >= _SUSPECTED

    @property
    def is_above(self) -> bool:
        """Whether an excursion goes on, be it noise."""
        return self._cusum.sum > 0.0

    @property
    def level(self) -> float:
        """The logarithm of the ratio above which one begins."""
        return self._cusum.level

    @property
    def is_doubted(self) -> bool:
        """Whether what is seen just now may be somebody's doing, and so is nothing to learn of: not where accounts could not say whose."""
        return self.told or (self.is_suspected and self._machine.sees_waits)

    def stopped(self) -> None:
        """Take note that no calls came for a while, or that they are of another pace: what this process took meanwhile is not theirs."""
        self._own_s = None
        self._part_ns = self._part_calls = 0
        self._held = _Held()

    def watch(self) -> None:
        """Take what was seen so far for usual."""
        warm, self._warm = self._warm, None
        if warm:
            self._cusum.learn(warm)

    def take(self, busy_ns: int, calls: int, *, learns: bool) -> None:
        """Take what calls took that have come since the last time, all of them; see `Cusum.take` for what `learns`."""
        if self._own_s is None:  # it began somewhen
            self._own_s = self._machine.own_s()
            return
        self._part_ns += busy_ns
        self._part_calls += calls
        if self._part_ns < self._least_ns:
            return
        own_s = self._machine.own_s()
        own_ns, self._own_s = (own_s - self._own_s) * 1e9, own_s
        busy_ns, calls, self._part_ns, self._part_calls = self._part_ns, self._part_calls, 0, 0
        observed = math.log(busy_ns / max(own_ns, 1.0))
        if self._warm is not None:
            self._warm.append(observed)
        else:
            self._observe(observed, busy_ns, calls, own_ns, learns=learns and not self.told)

    def _observe(self, observed: float, busy_ns: int, calls: int, own_ns: float, *, learns: bool) -> None:
        seconds = busy_ns / 1e9 / self._callers
        # Calls that were not slow come by seconds, and count for what they would if they came by observations: for what is learnt of them.
        times = max(1, int(seconds / _LONGEST_S)) if observed <= self._cusum.level else 1
        for _ in range(times):
            self._cusum.take(observed, seconds=seconds / times, learns=learns)
        self._reached = self._cusum.sum >= self._cusum.limit - (_NEAR if self._reached else 0.0)
        if self._cusum.sum <= 0.0:
            self._cusum.over(usual=learns and not self._held.asked_calls)
            if self._unnamed_ns:
                self._unnamed_ns = max(0, self._unnamed_ns - busy_ns)
                if not self._unnamed_ns:
                    self._seen.clear()
            if self._observed:
                self._over()
            return
        self._observed += 1
        self._calls += calls
        self._busy_ns += busy_ns
        if self._held.since is not None:
            self._held.calls += calls
            self._held.busy_ns += busy_ns
            self._held.own_ns += own_ns
        elif self.is_suspected:
            self._held.since = self._witness.mark()
        if self.is_suspected:
            self._seen.append(observed)
            self._unnamed_ns += busy_ns
            if self._unnamed_ns >= self._of_calls(_ANEW_S) and len(self._seen) >= _ANEW_LEAST:
                self._ask_anew()

    def _over(self) -> None:
        self._observed = self._calls = self._busy_ns = 0
        self.told = False
        self._held = _Held()

    def _of_calls(self, seconds: float) -> float:
        """Return what calls take in so many seconds of the clock, in nanoseconds."""
        return seconds * 1e9 * self._callers

    def _ask_anew(self) -> None:
        """Ask whether somebody keeps calls from cores still; where nobody is named, take what was seen for usual, but for their waits."""
        kept, is_early = 0.0, self._unnamed_ns < self._of_calls(_ANEW_S * _UNKNOWN_TIMES)
        if self._may_ask():
            found = self._ask()
            if found is None and is_early:  # that will be known later
                return
            if found is not None and found.cause is not None:
                self._unnamed_ns = int(self._of_calls(_ANEW_S) * (1 - _NAMED_TIMES))
                self._seen.clear()
                self._held = _Held(asked_calls=1)
                return
            if found is not None:
                kept = min(found.kept_s * 1e9 / self._held.busy_ns, _KEPT_MOST)  # who came meanwhile is not usual
        elif is_early:
            return
        self._cusum.anew([each + math.log(1 - kept) for each in self._seen])
        self._unnamed_ns = 0
        self._seen.clear()
        self._over()

    def _may_ask(self) -> bool:
        """Whether there are calls enough for the accounts to say something of them."""
        return self._held.since is not None and self._held.busy_ns >= self._of_calls(self._least_s / 2)

    def _ask(self) -> Contended | None:
        held = self._held
        assert held.since is not None
        held.asked_calls = held.calls
        return self._witness.contended(held.calls, held.busy_ns, self._usual_ns(), since=held.since)

    def _usual_ns(self) -> float:
        """Return what a call would take if nobody kept it from cores."""
        return max(self._held.own_ns, 1.0) / self._held.calls * math.exp(self._cusum.baseline)

    def cause(self, *, above: float) -> Cause | None:
        """Return who keeps calls from cores where they have been for long enough, and take longer than `above`: the logarithm of a mean."""
        if not self._reached or self._calls < self._least_calls or self._busy_ns < self._of_calls(self._least_s):
            return None
        held = self._held
        if not self._may_ask() or held.calls < held.asked_calls * _AGAIN or math.log(held.busy_ns / held.calls) <= above:
            return None
        if math.log(held.busy_ns / max(held.own_ns, 1.0)) < self._cusum.baseline + _TOLD:
            return None
        found = self._ask()
        if found is None or found.cause is None:
            return None
        return replace(found.cause, words=f"{found.cause.words}; without that a call would take {self._usual_ns() / 1e6:.3g} ms")

    def live(self) -> tuple[int, float]:
        """Return how many calls there were since they take longer for their CPU time, and what they took on average, in seconds."""
        return self._calls, self._busy_ns / max(self._calls, 1) / 1e9
