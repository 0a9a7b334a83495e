"""Which of two is faster: the median of per-pair log ratios, with an interval that knows both kinds of noise.

What "faster" and "slower" claim: another config on this machine differs by more than running the same thing again does, in this process
and in a new one. Two kinds of noise stand behind that. Within a process the rounds scatter: a bootstrap over rounds. And what is loaded
a second time, in a process of its own, is a little faster or slower for as long as that process lives, however often it is measured:
where its memory and threads came to lie (Curtsinger and Berger, "Stabilizer", ASPLOS 2013). No number of rounds shows that. It takes
copies in further processes (`copies`), or a prior of how much processes differ (`Apart`).

A round stands for each side by the median of its block. On a machine that other processes keep busy that tells how the scheduler shared
the cores: a block holds calls that ran through and calls that stood still for a time slice, as it happens. There a round stands by its
least duration (`by="least"`): what disturbs only ever adds (Chen and Revels, "Robust benchmarking in noisy environments", 2016).

Where it counts what is answered in a second, durations are those of windows, and a round stands for each side by the mean of its block,
which is elapsed time over calls, stalls of the machine included (`by="mean"`; `rate_s` is the figure of all rounds), on a busy machine by
its best window (`by="window"`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

import numpy as np

from aivmm.probes.records import Caution, Samples

INDIFFERENCE = 0.01  # differences below ±1 % are of no use to anyone
_RESAMPLES = 2000
_APART_RESAMPLES = 500
_INTERVAL_RESAMPLES = 500  # each sorts all samples
_ONE_PAIR = math.log(2)  # a single pair says nothing of its noise: within a factor of two, let us say
_COLD_LEAST = 3  # samples to a quarter, below which nothing is said of them
_COLD = 1.15
_MOST_HALF = 20.0  # e^20 is no ratio of durations
Word = Literal["faster", "slower", "same", "ambiguous"]
By = Literal["median", "least", "mean", "window"]  # what a round stands for a contestant by
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """How much the logarithm of a duration differs between processes that run the same thing: its standard deviation.

    `weight` says how much that is worth, in degrees of freedom: a prior of a few, or infinite when it is known. What the copies of a race
    show is pooled with it, as variances are in Smyth's moderated t (Stat. Appl. Genet. Mol. Biol. 3, 2004).
    """

    sd: float
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.sd < math.inf or not self.weight > 0:
            raise ValueError(f"no spread between processes: {self}")

    def pooled(self, squares: float, freedom: float) -> Apart:
        """Return this with an observed sum of squares over `freedom` degrees of freedom taken in."""
        if math.isinf(self.weight) or freedom <= 0:
            return self
        weight = self.weight + freedom
        return Apart(sd=math.sqrt((self.weight * self.sd**2 + squares) / weight), weight=weight)

    def half_width(self, copies: tuple[int, int], confidence: float) -> float:
        """Return the half width of the interval of a difference of two means over so many copies, from this source alone."""
        return _quantile(confidence, self.weight) * self.sd * math.sqrt(1 / copies[0] + 1 / copies[1])


# A prior for any machine: single processes that differ by 3 % (seen on a shared two-core machine) are called different in less than 2 %
# at 99 %, and six copies that hardly differ still tell 5 %.
APART = Apart(sd=0.015, weight=4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The ratio a / b of two durations, its interval, and the verdict on a: below 1, a is the faster one."""

    ratio: float
    low: float
    high: float
    pairs: int
    verdict: Word
    by: By = "median"


def round_medians(samples: Samples) -> dict[int, float]:
    """Return the median duration of each round in seconds."""
    return round_figures([samples])[0]


def round_figures(runs: Sequence[Samples], by: By = "median") -> list[dict[int, float]]:
    """Return for each run what each round stands for in seconds. Without rounds each sample is a round of its own.

    The least of many is smaller than that of few, and a fast contestant's block holds more calls: so many of each count, the first ones, as
    the shortest block of that round has. Where that is one window it is a whole block, and so is what stands beside it: its mean.
    """
    blocks = [_by_round(each) for each in runs]
    if by == "median":
        return [{number: float(np.median(block)) for number, block in each.items()} for each in blocks]
    if by == "mean":
        return [{number: fmean(block) for number, block in each.items()} for each in blocks]
    fewest: dict[int, int] = {}
    for each in blocks:
        for number, block in each.items():
            fewest[number] = min(len(block), fewest.get(number, len(block)))

    def best(number: int, block: Sequence[float]) -> float:
        return fmean(block) if by == "window" and fewest[number] == 1 else min(block[: fewest[number]])

    return [{number: best(number, block) for number, block in each.items()} for each in blocks]


def rate_s(samples: Samples) -> float:
    """Return seconds from one answer to the next, by what each round's windows answered in a second, on average over rounds.

    Blocks last as long as each other, so that is all calls over all of the time. A median of rounds would have no stall of the machine in
    it that comes in fewer than half of them.
    """
    return 1 / fmean(1 / each for each in round_figures([samples], "mean")[0].values())


def rate_interval_s(samples: Samples, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the interval of `rate_s`: a bootstrap over rounds."""
    rates = [1 / each for each in round_figures([samples], "mean")[0].values()]
    if len(rates) < 5:
        return 1 / max(rates), 1 / min(rates)
    picks = np.random.default_rng(seed).integers(len(rates), size=(_INTERVAL_RESAMPLES, len(rates)))
    tail, middle = (1 - confidence) / 2, fmean(rates)
    low, high = np.quantile(np.array(rates)[picks].mean(axis=1), [tail, 1 - tail])
    return 1 / max(float(high), middle), 1 / min(float(low), middle)


def _by_round(samples: Samples) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for number, duration in zip(samples.rounds or range(len(samples.timed_s)), samples.timed_s, strict=True):
        found.setdefault(number, []).append(duration)
    return found


def paired_logs(a: Samples, b: Samples, *, scale: float = 1.0, by: By = "median") -> Floats:
    """Return the logarithm of a / b for each round that both ran, in order; see `paired_rounds`."""
    mine, theirs = round_figures([a, b], by)
    ratios: Floats = np.array([scale * mine[each] / theirs[each] for each in paired_rounds(a, b)])
    logs: Floats = np.log(ratios)
    return logs


def paired_rounds(a: Samples, b: Samples) -> list[int]:
    """Return the rounds that both ran, in order.

    Raises:
        ValueError: they share no round.
    """
    shared = sorted(_by_round(a).keys() & _by_round(b).keys())
    if not shared:
        raise ValueError("nothing to pair: the two were not measured in one race")
    return shared


def compare(
    a: Samples,
    b: Samples,
    *,
    scale: float = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
    copies: tuple[int, int] = (1, 1),
    apart: Apart | None = None,
    by: By = "median",
) -> Comparison:
    """Compare two runs of one race, round by round. `scale` multiplies a's durations (batch sizes that differ).

    A round holds both sides within a fraction of a second, so what slows the machine slows both and cancels in their ratio: on a noisy
    machine that cut false differences from 24-46 % (medians of sequential runs) to 5-7 %.

    Without `apart` the interval knows the noise of rounds alone, which is right where one process held both sides. With it the interval is
    widened by what `copies` processes of each side still leave open: independent errors, so the half widths add as squares.
    """
    logs = paired_logs(a, b, scale=scale, by=by)
    # The median of all rounds, also where copies took turns: a median of each copy's few rounds errs twice as much (decision 0029).
    middle = float(np.median(logs))
    low, high = bootstrap_median(logs, confidence=confidence, seed=seed)
    low, high = min(low, middle), max(high, middle)
    if apart is not None:
        between = apart.half_width(copies, confidence)
        low, high = middle - math.hypot(middle - low, between), middle + math.hypot(high - middle, between)
    return Comparison(
        ratio=math.exp(middle),
        low=math.exp(low),
        high=math.exp(high),
        pairs=logs.size,
        verdict=verdict(math.exp(low), math.exp(high)),
        by=by,
    )


def observed_apart(runs: Sequence[Samples], copies: int, *, prior: Apart = APART, by: By = "median") -> Apart:
    """Return how much processes differ, from contestants of one race that each ran in `copies` processes in turn (round % copies).

    Did processes not matter, the median of a pair's log ratios would vary as much when whole copies are drawn as when single rounds are
    (the cluster bootstrap and the plain one; Davison and Hinkley 1997, section 3.8). What it varies more by is the processes' doing:
    (contestants - 1) x (copies - 1) degrees of freedom in all pairs together.
    """
    if copies < 2 or len(runs) < 2:
        return prior
    figures = round_figures(runs, by)
    shared = sorted(set.intersection(*(set(each) for each in figures)))
    table = np.log([[each[number] for number in shared] for each in figures])
    of_copy = np.array(shared) % copies
    turns = int(np.bincount(of_copy, minlength=copies).min())
    if turns < 2:
        return prior
    in_turn = np.stack([np.flatnonzero(of_copy == copy)[:turns] for copy in range(copies)])
    generator = np.random.default_rng(0)
    whole = in_turn[generator.integers(copies, size=(_APART_RESAMPLES, copies))].reshape(_APART_RESAMPLES, -1)
    single = in_turn.ravel()[generator.integers(in_turn.size, size=whole.shape)]
    more = [
        np.median(logs[whole], axis=1).var() * copies / (copies - 1) - np.median(logs[single], axis=1).var()
        for logs in (mine - theirs for mine, theirs in combinations(table, 2))
    ]
    freedom = (len(runs) - 1) * (copies - 1)
    # The variance of a difference of two means over so many copies is 2 / copies times that of one process.
    return prior.pooled(freedom * max(0.0, float(np.mean(more)) * copies / 2), freedom)


def verdict(low: float, high: float, *, zone: float = INDIFFERENCE) -> Word:
    """Return the verdict on an interval of the ratio a / b: `same` only when all of it lies within the indifference zone.

    The zone is symmetric in the logarithm, so that swapping a and b swaps the verdict.
    """
    least, most = 1 / (1 + zone), 1 + zone
    if high < least:
        return "faster"
    if low > most:
        return "slower"
    if low >= least and high <= most:
        return "same"
    return "ambiguous"


def bootstrap_median(values: Sequence[float] | Floats, *, confidence: float, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of the median (percentiles; Efron 1979) of values in the order in which they were taken.

    Whole stretches are drawn (circular blocks; Politis and Romano 1992): what disturbs one round often disturbs the next too, and such
    values know less than as many independent ones. Of few values the percentiles promise too much (8 rounds at 99 %: 7 to 11 % false
    differences where 1 % was asked for, simulated), so the interval is at least the exact one between two order statistics, or Student's
    where there are too few values even for that.
    """
    array = np.asarray(values, dtype=np.float64)
    count = array.size
    middle = float(np.median(array))
    if count == 1:
        return middle - _ONE_PAIR, middle + _ONE_PAIR
    length = round(count ** (1 / 3)) if count >= 8 else 1
    generator = np.random.default_rng(seed)
    starts = generator.integers(count, size=(_RESAMPLES, -(-count // length)))
    picks = (starts[:, :, None] + np.arange(length)).reshape(_RESAMPLES, -1)[:, :count] % count
    tail = (1 - confidence) / 2
    low, high = (float(each) for each in np.quantile(np.median(array[picks], axis=1), [tail, 1 - tail]))
    least, most = _order_statistics(array, confidence) or _student(array, confidence)
    return min(low, least), max(high, most)


def _order_statistics(values: Floats, confidence: float) -> tuple[float, float] | None:
    """Return the narrowest pair of order statistics that holds the median at least as often as `confidence`; None when not even all do.

    The number of values below the median is binomial whatever the distribution (Thompson 1936).
    """
    from scipy import special  # here: half a second to import, and most commands compare nothing

    # How many may be cut off at each end: P(at most cut - 1 of n below the median) is within the tail.
    ends = special.bdtr(np.arange(values.size // 2), values.size, 0.5)
    cut = int(np.count_nonzero(ends <= (1 - confidence) / 2))
    if cut == 0:
        return None
    ordered = np.sort(values)
    return float(ordered[cut - 1]), float(ordered[-cut])


def _student(values: Floats, confidence: float) -> tuple[float, float]:
    """Return Student's interval around the median, for two values or more."""
    middle = float(np.median(values))
    half = _quantile(confidence, values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return middle - min(half, _MOST_HALF), middle + min(half, _MOST_HALF)


def _quantile(confidence: float, freedom: float) -> float:
    """Return Student's two-sided quantile; the normal one for infinite degrees of freedom."""
    from scipy import special

    upper = (1 + confidence) / 2
    return float(special.stdtrit(freedom, upper) if math.isfinite(freedom) else special.ndtri(upper))


def median_interval(samples: Samples, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the interval of the median duration in seconds: a bootstrap over rounds, whose calls share what the machine was doing."""
    parts = [np.array(each) for each in _by_round(samples).values()]
    if len(parts) < 5:
        return min(samples.timed_s), max(samples.timed_s)
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(parts), size=(_INTERVAL_RESAMPLES, len(parts)))
    medians = [float(np.median(np.concatenate([parts[pick] for pick in row]))) for row in picks]
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return min(float(low), samples.median_s), max(float(high), samples.median_s)


def cautions(samples: Samples) -> tuple[Caution, ...]:
    """Return the reasons to doubt `samples`; empty when none is found."""
    found = []
    spread = (samples.quantile_s(0.75) - samples.quantile_s(0.25)) / samples.median_s
    if spread > 0.15:
        found.append(
            Caution(
                code="spread",
                message=f"the middle half of the samples spans {spread:.0%} of the median",
                advice="close other programs, or raise --budget",
            )
        )
    quarter = len(samples.timed_s) // 4
    if quarter >= _COLD_LEAST:
        first, rest = np.median(samples.timed_s[:quarter]), np.asarray(samples.timed_s[quarter:])
        times = float(first / np.median(rest))
        if times > _COLD and first > np.quantile(rest, 0.9):
            found.append(
                Caution(
                    code="cold-cache",
                    message=f"the first quarter of the samples took {times:.1f} times as long as the rest: caches were cold",
                    advice="raise --budget, so that warm samples outweigh them",
                )
            )
    if len(samples.timed_s) < 20:
        found.append(Caution(code="few-samples", message=f"only {len(samples.timed_s)} samples", advice="raise --budget"))
    return tuple(found)
