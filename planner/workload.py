"""Divides a machine among models that are served at once, so that limits hold in the order of priority and the rest is shared.

Each model has *options*: a target with a number of threads and of replicas, and how long a call takes there when nothing else runs. An
option takes `threads * replicas` units of its device: a processor has its usable cores, any other device one. A division gives each model
one option, within what the devices have. It is the best in this order: the fewest broken limits of the first priority, then of the second,
and so on; then the least sum of the logarithms of how many times its fastest option's latency each model waits, which shares the rest in
proportion and starves no model for another's last percent. All of that adds up over models, so dynamic programming over what is left of
the devices finds the optimum.

Where models are more than cores, or when the proof finds it better, `level` units of work share one core: then calls take `level` times as
long at worst, which is what is assumed.

Requests that arrive at random (Poisson) with rate r find R replicas that take s seconds each busy with rho = r s / R. A queue before one
server of fixed service time makes them wait rho s / (2 (1 - rho)) on average (Pollaczek and Khinchine, M/D/1); R servers share one queue,
which divides the wait by R. A share rho of the requests waits at all, and the waits of those are taken for exponential, as they are in
M/M/1: P(wait > t) = rho exp(-t rho / mean). These are estimates to choose by; what is claimed is proven.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aivmm.errors import UsageError

_MOST_BUSY = 0.95  # beyond this share of its time a replica is taken for overloaded: the queue grows without end near 1
_BEYOND = 0.01  # the share of the requests beyond the 99th percentile
_KEPT = 16  # divisions kept for each state of the devices

Units = tuple[int, ...]  # by device, in one order
Key = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked for a model. Times in seconds; `rate_per_s` None: the next request comes when the last one is answered."""

    name: str
    priority: int = 1  # 1 is served first
    latency_s: float | None = None
    p99_s: float | None = None
    rate_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.priority < 1:
            raise UsageError(f"the priority of {self.name!r} is {self.priority}", advice="give 1 for the first, 2 for the next, ...")
        for what, value in (("latency", self.latency_s), ("p99", self.p99_s), ("rate", self.rate_per_s)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"the {what} of {self.name!r} is {value}", advice="give a number above 0, or leave it away")
        if self.latency_s is not None and self.p99_s is not None and self.p99_s < self.latency_s:
            raise UsageError(
                f"the limits of {self.name!r} contradict each other: p99 below the median's {self.latency_s:g} s",
                advice="a 99th percentile is never below the median: drop the limit on latency",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to run a model. `service_s` is one call with nothing beside it, `least_s` the shortest that was seen, 0 where nobody knows."""

    name: str  # for whoever made it, to find it again
    model: str
    device: str
    threads: int
    service_s: float
    replicas: int = 1
    least_s: float = 0.0

    @property
    def units(self) -> int:
        """What it takes of its device."""
        return self.threads * self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What is expected of an option in company."""

    latency_s: float  # on average, from arrival to answer; infinite when requests come faster than they are answered
    p99_s: float
    busy: float  # share of their time that the replicas compute

    def broken(self, demand: Demand) -> bool:
        """Say whether a limit of `demand` does not hold."""
        return (
            self.latency_s == math.inf
            or (demand.latency_s is not None and self.latency_s > demand.latency_s)
            or (demand.p99_s is not None and self.p99_s > demand.p99_s)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """An option for each model, by name, and what is expected of it. `broken` names the models whose limits do not hold."""

    options: Mapping[str, Option]
    expected: Mapping[str, Expectation]
    broken: tuple[str, ...]
    key: Key
    level: int


def expect(demand: Demand, option: Option, *, slowdown: float = 1.0) -> Expectation:
    """Return what is expected of `option` when calls take `slowdown` times as long as with nothing beside them."""
    service = option.service_s * slowdown
    if demand.rate_per_s is None:
        return Expectation(latency_s=service, p99_s=service, busy=1.0)
    busy = demand.rate_per_s * service / option.replicas
    if busy >= _MOST_BUSY:
        return Expectation(latency_s=math.inf, p99_s=math.inf, busy=busy)
    wait = busy * service / (2 * (1 - busy)) / option.replicas
    tail = wait / busy * max(0.0, math.log(busy / _BEYOND))
    return Expectation(latency_s=service + wait, p99_s=service + tail, busy=busy)


def divide(
    demands: Sequence[Demand],
    options: Sequence[Option],
    units: Mapping[str, int],
    *,
    level: int = 1,
    slowdown: Mapping[str, float] | None = None,
    count: int = 1,
) -> tuple[Division, ...]:
    """Return the best divisions, best first, at most `count`. None when not every model finds room: then try a higher `level`.

    `slowdown` is how many times as long a model's calls were seen to take beside the others (1 where it is not known).

    Raises:
        UsageError: a model has no option, or an option names no device of `units`.
    """
    for demand in demands:
        if not any(each.model == demand.name for each in options):
            raise UsageError(f"nothing here runs {demand.name!r}", advice="allow more targets, or drop it from the workload")
    odd = next((each for each in options if each.device not in units), None)
    if odd is not None:
        raise UsageError(f"option {odd.name!r} is on {odd.device!r}, which is no device here", advice=f"known: {', '.join(units)}")
    devices = list(units)
    priorities = sorted({each.priority for each in demands})
    states: dict[Units, list[tuple[Key, tuple[Option, ...]]]] = {tuple(units[each] * level for each in devices): [((), ())]}
    states = {left: [((0.0,) * (len(priorities) + 1), ())] for left in states}
    for demand in demands:
        factor = max((slowdown or {}).get(demand.name, 1.0), float(level))
        mine = [each for each in options if each.model == demand.name]
        fastest = min(each.service_s for each in mine)
        prices = [(each, _price(demand, each, factor, fastest, priorities)) for each in mine]
        following: dict[Units, list[tuple[Key, tuple[Option, ...]]]] = {}
        for left, found in states.items():
            for option, price in prices:
                index = devices.index(option.device)
                if option.units > left[index]:
                    continue
                rest = (*left[:index], left[index] - option.units, *left[index + 1 :])
                added = (((*map(sum, zip(key, price, strict=True)),), (*chosen, option)) for key, chosen in found)
                following.setdefault(rest, []).extend(added)
        states = {left: sorted(found, key=lambda each: each[0])[: max(count, _KEPT)] for left, found in following.items()}
    best = sorted((each for found in states.values() for each in found), key=lambda each: each[0])[:count]
    return tuple(_division(demands, key, chosen, slowdown or {}, level) for key, chosen in best)


def _price(demand: Demand, option: Option, factor: float, fastest_s: float, priorities: Sequence[int]) -> Key:
    """Return what an option adds to a division's key: a broken limit at its priority, and how far it is from the model's fastest."""
    expected = expect(demand, option, slowdown=factor)
    broken = [float(expected.broken(demand) and demand.priority == each) for each in priorities]
    latency = expected.latency_s if expected.latency_s < math.inf else option.service_s * factor * (1 + 100 * expected.busy)
    return (*broken, math.log(latency / fastest_s))


def _division(demands: Sequence[Demand], key: Key, chosen: Iterable[Option], slowdown: Mapping[str, float], level: int) -> Division:
    options = {each.model: each for each in chosen}
    expected = {each.name: expect(each, options[each.name], slowdown=max(slowdown.get(each.name, 1.0), float(level))) for each in demands}
    broken = tuple(each.name for each in demands if expected[each.name].broken(each))
    return Division(options=options, expected=expected, broken=broken, key=key, level=level)


def thread_ladder(cores: int) -> list[int]:
    """Return the numbers of threads worth trying on `cores`: all up to four, then doubles, halves of the machine, and the machine."""
    return sorted({each for each in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, cores // 2, cores) if 1 <= each <= cores})


def rank(demands: Sequence[Demand], broken: Iterable[str]) -> tuple[int, ...]:
    """Return how many limits of each priority are broken, the first priority first: smaller is better."""
    missed = set(broken)
    return tuple(sum(each.name in missed for each in demands if each.priority == level) for level in sorted({d.priority for d in demands}))
