"""A one-sided CUSUM that learns what is usual from what it is given, and forgets it where that was slow.

    S = min(h, max(0, S + min(CLIP, x - level)))                                              level = max(baseline + log(1.3) / 2, floor)

(Page, "Continuous inspection schemes", Biometrika 41, 1954.) log(1.3) / 2 is the allowance k with which a shift of 30 % is found soonest
(Page's k; Moustakides, Annals of Statistics 14, 1986). The baseline is where steps are none on average, stalls that were there from the
beginning included, plus two standard errors of it. The limit h is a given one, or what noise of the variance seen reaches once in
exp(`_PATIENCE`) steps by Brownian motion (variance * _PATIENCE / 2k; Siegmund, "Sequential Analysis", 1985); both are taken again when
twice as much was seen without an excursion that mattered. And they are taken anew from the last observations where these have lain below
the baseline for `_FASTER_S` and for as many as it was learnt from: what was learnt while a host was slow says nothing of what it does when
it is not, and a few fast seconds say little of what it does for minutes. Up the baseline goes with what came back by itself only: what
stays slow is not learnt, unless who asks knows that it is usual (`anew`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median

ALLOWANCE = math.log(1.3) / 2
CLIP = 0.5  # what an observation counts for at most
_PATIENCE = 15.0  # the logarithm of how many observations noise alone is to take for an event: 3 million, or a day
_LEARNT = 512  # observations, from which level and limit are taken: at first those of the warm-up, again when there are twice as many
_NEIGHBOURS = 4  # observations
_FASTER = 0.05  # below the baseline: where that is where the middle lay, half of all is below it
_FASTER_S = 5.0  # longer than a host is fast by chance, and soon enough for who has been waiting for it
_FASTER_LEAST = 3 * _NEIGHBOURS  # observations


class Cusum:
    """Watches the logarithms of a quantity for a lasting growth by 30 %. Used by one thread at a time."""

    def __init__(self, *, forgets: bool = True, allowance: float = ALLOWANCE, least_limit: float = 1.0) -> None:
        """Watch; where it `forgets`, low observations take the place of all before: not where these depend on what is asked for.

        A limit of 1 is some eight observations of a 30 % shift.
        """
        self._forgets = forgets
        self._allowance, self._least_limit = allowance, least_limit
        self.sum = 0.0
        self.limit = least_limit
        self.level = math.inf
        self.floor = -math.inf  # of the level
        self.baseline = 0.0
        self._usual: list[float] = []  # what was seen without an excursion that mattered, at first
        self._pending: list[float] = []  # what the excursion that goes on consists of
        self._learned = 0  # from so many
        self._faster: deque[float] = deque(maxlen=_LEARNT)  # since observations lie below the baseline
        self._faster_s = self._drop = 0.0

    def learn(self, usual: Sequence[float]) -> float:
        """Take baseline, level and limit from what was seen without an event; return two standard errors of the baseline.

        Stalls that came from the beginning are in few observations or in many: the baseline is where steps are none on average.
        """
        self._usual = list(usual)
        middle = median(self._usual)
        self.baseline = middle + max(0.0, fmean(min(CLIP, each - middle) for each in self._usual))
        noise = _long_run_variance([min(CLIP, each - self.baseline) for each in self._usual])
        unsure = 2 * math.sqrt(noise / len(self._usual))
        self.level = max(self.baseline + unsure + self._allowance, self.floor)
        self.limit = max(self._least_limit, _PATIENCE * noise / (2 * self._allowance))
        self._learned = len(self._usual)
        self._drop = self._faster_s = 0.0
        self._faster.clear()
        return unsure

    def take(self, observed: float, *, seconds: float, learns: bool) -> float:
        """Take an observation that `seconds` of calls have gone into, and return how far it lies above the level.

        Where it `learns` it may become usual: when the excursion that it belongs to is over (`over`), or where many are lower than that.
        """
        if learns and self._learned < _LEARNT and len(self._pending) < _LEARNT:
            self._pending.append(observed)
        if self._forgets and (self._drop or observed < self.baseline - _FASTER):
            self._fall(observed, seconds if learns else 0.0)
        step = observed - self.level
        total = self.sum + (step if step < CLIP else CLIP)
        if total <= 0.0:
            self.sum = 0.0
        else:
            self.sum = total if total < self.limit else self.limit
        return step

    def _fall(self, observed: float, seconds: float) -> None:
        """Learn anew where enough observations have lain below the baseline."""
        self._drop = max(0.0, self._drop + self.baseline - observed - _FASTER) if seconds else 0.0
        if not self._drop:
            self._faster.clear()
            self._faster_s = 0.0
            return
        self._faster.append(observed)
        self._faster_s += seconds
        least = max(_FASTER_LEAST, min(_LEARNT, self._learned))
        if self._faster_s >= _FASTER_S and len(self._faster) >= least and self._drop >= self.limit:
            self._pending.clear()
            self.learn(self._faster)

    def anew(self, usual: Sequence[float]) -> None:
        """Begin anew with this for usual, whatever was before."""
        self._pending.clear()
        self.learn(usual)
        self.sum = 0.0

    def over(self, *, usual: bool) -> None:
        """Take note that no excursion goes on any more, and learn of the last one where that was as `usual` as any."""
        if not self._pending:
            return
        if usual:  # what comes in half a second is not all that there is
            self._usual += self._pending
        self._pending.clear()
        if len(self._usual) >= 2 * self._learned:
            self.learn(self._usual)


def _long_run_variance(steps: Sequence[float]) -> float:
    """Return what the variance of a sum of steps grows by a step, neighbours being alike: from sums over four, where there are enough.

    By the differences of sums next to each other (von Neumann 1941), so that a lasting change of level is not taken for noise.
    """
    if len(steps) < 3 * _NEIGHBOURS:
        return 0.0  # too few to tell: the limit is that of a quiet machine
    sums = [sum(steps[at : at + _NEIGHBOURS]) for at in range(0, len(steps) - _NEIGHBOURS + 1, _NEIGHBOURS)]
    return fmean((later - sooner) ** 2 for sooner, later in pairwise(sums)) / 2 / _NEIGHBOURS
