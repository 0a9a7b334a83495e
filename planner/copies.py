"""Copies: on which targets, and in how many replicas each, a model runs whole, so that all together answer the most requests.

Each copy takes requests of its own, so the rates add up, less what copies that run at once cost each other:

    rate = sum over copies a of 1 / (seconds_a * (1 + sum over the other copies b of (factor[a, b] - 1)))

which is the contention of `problem`, with the sum of rates for the largest load. As for pipelines, factors are measured in place for the
copies that a plan uses together; a pair that was not measured yet is hoped to cost nothing, and so looked at whenever hoping for it could
make a plan the best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from aivmm.runtime.plan import MOST_EXECUTABLES

Pair = tuple[str, str]  # (way slowed, way beside it); of one name, two replicas of it
Counts = Mapping[str, int]  # way -> replicas; those that are not used are left out
MeasureFactors = Callable[[Counts], Mapping[Pair, float]]

_SAME = 1e-12  # relative; differences below are rounding
_MOST_PLANS = 50_000  # looked at one by one; beyond, copies are added one at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A target with some settings: seconds from one answered request to the next, kept busy, and what a copy takes of its device."""

    name: str
    device: str
    seconds: float
    memory_bytes: float = 0.0
    cores: float = 0.0  # of a processor, that a copy keeps busy
    most: int = 1  # replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Copies of one model. `rate_per_s` is what they answer together by the factors, `bound_per_s` what no such plan is above."""

    counts: Counts
    rate_per_s: float
    bound_per_s: float
    shares: Mapping[str, float]  # of the requests, by way, all its replicas together
    factors: Mapping[Pair, float]


def rates(ways: Sequence[Way], counts: Counts, factors: Mapping[Pair, float]) -> dict[str, float]:
    """Return what each way of a plan answers a second, all its replicas together. A factor that is missing is 1."""
    found = {}
    for way in ways:
        if not counts.get(way.name):
            continue
        beside = ((other, number - (other == way.name)) for other, number in counts.items())
        slowed = 1.0 + math.fsum(number * (factors.get((way.name, other), 1.0) - 1.0) for other, number in beside)
        found[way.name] = counts[way.name] / (way.seconds * slowed)
    return found


def _rate(ways: Sequence[Way], counts: Counts, factors: Mapping[Pair, float]) -> float:
    return math.fsum(rates(ways, counts, factors).values())


def best_copies(
    ways: Sequence[Way],
    capacity: Mapping[str, float],
    factors: Mapping[Pair, float],
    *,
    cores: Mapping[str, float] | None = None,
    tolerance: float = 0.0,
    refused: Sequence[Counts] = (),
    least: int = 1,
) -> Counts:
    """Return the plan of the greatest rate that no device's memory and cores forbid; {} where there is none of `least` copies.

    Plans that hold all copies of a `refused` one are left out: what does not run does not run beside more.

    Of plans that are slower than that by no more than `tolerance` (relative) the one of the fewest copies, and of those the fastest:
    factors are measured, and a copy that noise recommends costs memory. Exact where there are few plans; otherwise the copy that adds most
    is added again and again, as long as it adds more than `tolerance`.
    """

    def fits(counts: Counts) -> bool:
        if any(all(counts.get(name, 0) >= number for name, number in each.items()) for each in refused):
            return False
        few = sum(counts.values()) <= MOST_EXECUTABLES
        return (
            few
            and _keeps(ways, counts, capacity, lambda way: way.memory_bytes)
            and _keeps(ways, counts, cores or {}, lambda way: way.cores)
        )

    def worth(counts: Counts) -> tuple[float, int]:
        return _rate(ways, counts, factors), -sum(counts.values())

    if math.prod(way.most + 1 for way in ways) <= _MOST_PLANS:
        plans = [each for each in _every(ways) if sum(each.values()) >= least and fits(each)]
        enough = max((worth(each)[0] for each in plans), default=0.0) / (1.0 + tolerance)
        good = [each for each in plans if worth(each)[0] >= enough * (1 - _SAME)]
        return min(good, key=lambda each: (sum(each.values()), -worth(each)[0]), default={})
    counts: Counts = {}
    while True:
        more = [{**counts, way.name: counts.get(way.name, 0) + 1} for way in ways if counts.get(way.name, 0) < way.most]
        best = max(filter(fits, more), key=worth, default=counts)
        if worth(best)[0] <= worth(counts)[0] * (1.0 + tolerance):
            return counts if sum(counts.values()) >= least else {}
        counts = best


def _keeps(ways: Sequence[Way], counts: Counts, limits: Mapping[str, float], taken: Callable[[Way], float]) -> bool:
    """Say whether no device is asked for more than it has; one that `limits` lacks has no limit."""
    used: dict[str, float] = {}
    for way in ways:
        used[way.device] = used.get(way.device, 0.0) + counts.get(way.name, 0) * taken(way)
    return all(each <= limits.get(device, math.inf) for device, each in used.items())


def _every(ways: Sequence[Way]) -> Iterator[Counts]:
    for numbers in itertools.product(*(range(way.most + 1) for way in ways)):
        if any(numbers):
            yield {way.name: number for way, number in zip(ways, numbers, strict=True) if number}


def place_copies(
    ways: Sequence[Way],
    measure: MeasureFactors,
    *,
    capacity: Mapping[str, float] | None = None,
    cores: Mapping[str, float] | None = None,
    most: int = 4,
    tolerance: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> Copies | None:
    """Return the best plan of several copies whose effect on each other was measured; None where one copy is best, or nothing was measured.

    `measure` returns the factors of the copies of a plan, and nothing where they cannot be measured; it is asked at most `most` times, and
    no more once `stop` says so. A plan that cannot be measured is no plan, nor is one with more copies; fewer may be.
    `capacity` is the memory of devices, and `cores` what processors have, by name; a device that they lack has no limit. Copies of more
    threads than cores are no plan: they would wait for each other's slices. For `tolerance` see `best_copies`.
    """
    factors: dict[Pair, float] = {}
    seen: list[tuple[tuple[str, int], ...]] = []
    refused: list[Counts] = []
    limits, bound, asked = capacity or {}, math.inf, 0
    while True:
        counts = best_copies(ways, limits, factors, cores=cores, tolerance=tolerance, refused=refused)
        bound = _rate(ways, best_copies(ways, limits, factors, cores=cores, refused=refused), factors)
        if sum(counts.values()) < 2:
            break
        pairs = pairs_of(counts)
        if any(pair not in factors for pair in pairs):
            if asked == most or stop():
                break
            known, asked = measure(counts), asked + 1
            if any(pair not in known for pair in pairs):
                refused.append(counts)
                continue
            factors |= {pair: max(1.0, known[pair]) for pair in pairs}
        key = tuple(sorted(counts.items()))
        if key in seen:
            break
        seen.append(key)
    # Later looks may have changed what is known of earlier plans.
    plans = [(_rate(ways, dict(key), factors), key) for key in seen]
    least = max((rate for rate, _ in plans), default=0.0) / (1.0 + tolerance)
    good = [each for each in plans if each[0] >= least * (1 - _SAME)]
    rate, key = min(good, key=lambda each: (sum(number for _, number in each[1]), -each[0]), default=(0.0, ()))
    alone = max((1.0 / way.seconds for way in ways if way.memory_bytes <= limits.get(way.device, math.inf)), default=0.0)
    if rate <= alone:
        return None
    parts = rates(ways, dict(key), factors)
    used = {pair: factors[pair] for pair in pairs_of(dict(key))}
    shares = {name: part / rate for name, part in parts.items()}
    return Copies(counts=dict(key), rate_per_s=rate, bound_per_s=max(bound, rate), shares=shares, factors=used)


def pairs_of(counts: Counts) -> list[Pair]:
    """Return the pairs that run at once in a plan; a way of several replicas is beside itself."""
    return [(a, b) for a in counts for b in counts if a != b or counts[a] > 1]
