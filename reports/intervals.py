"""The few statistics a report derives itself from raw samples, where the run's summary does not give them, and axis ticks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from aivmm.probes.records import Samples

P99_NEEDS = 500  # samples below which a 99th percentile is a rumour


def median_interval(samples: Samples) -> tuple[float, float]:
    """Return a 95 % interval of the median in seconds, from order statistics (Conover, Practical Nonparametric Statistics, 3.2).

    It assumes no distribution. Samples of one round resemble each other, so with six rounds or more the rounds' medians are what counts;
    fewer than six values give their whole range.
    """
    values: Sequence[float] = samples.timed_s
    if samples.rounds:
        rounds: dict[int, list[float]] = defaultdict(list)
        for duration, number in zip(samples.timed_s, samples.rounds, strict=True):
            rounds[number].append(duration)
        if len(rounds) >= 6:
            values = [median(each) for each in rounds.values()]
    ordered = sorted(values)
    n = len(ordered)
    if n < 6:
        return ordered[0], ordered[-1]
    reach = 1.96 * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - reach) - 1)
    high = min(n - 1, math.ceil(n / 2 + reach))
    return ordered[low], ordered[high]


def apart(one: Samples, other: Samples) -> bool:
    """Say whether the two medians' intervals do not overlap: careful, it misses small true differences, and claims few false ones."""
    low, high = median_interval(one)
    other_low, other_high = median_interval(other)
    return high < other_low or other_high < low


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers within [low, high], `about` of them, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def thinned(ticks: list[float], most: int) -> list[float]:
    """Return at most `most` of the ticks, as evenly as it goes."""
    step = -(-len(ticks) // most)
    return ticks[::step] if step > 1 else ticks


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within [low, high]; powers alone when that would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 150 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
