"""Serving a division of the machine: what was seen of each model with all of them running, and which limits held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aivmm.planner.constraints import human
from aivmm.planner.workload import Demand, Division
from aivmm.probes.accuracy import over_limit
from aivmm.probes.records import Samples
from aivmm.runtime.family import Promise
from aivmm.runtime.plan import Number
from aivmm.tuner.prove import TAIL_SAMPLES
from aivmm.tuner.verdict import time_text

LATE = 0.03  # the share of the requests that may be unanswered at the end, besides two that are under way


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What serving one model showed."""

    latency_s: float  # median from arrival to answer
    p99_s: float | None  # None below 500 requests
    rate_per_s: float
    slowdown: float  # median call beside the others over that alone
    count: int
    broken: tuple[str, ...]  # limits that do not hold, each in words

    def as_json(self) -> dict[str, Any]:
        """Return it as `tune --json` gives it."""
        return {
            "latency_s": self.latency_s if self.latency_s < math.inf else None,
            "p99_s": self.p99_s,
            "rate_per_s": self.rate_per_s,
            "slowdown": self.slowdown,
            "samples": self.count,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A division that was served, and what was seen."""

    division: Division
    seen: Mapping[str, Seen]
    error: str = ""
    load_cores: float = 0.0  # cores that other processes kept busy meanwhile

    @property
    def broken(self) -> tuple[str, ...]:
        """The models whose limits did not hold."""
        return tuple(name for name, each in self.seen.items() if each.broken)

    @property
    def failed(self) -> bool:
        """True when it is no answer to what was asked."""
        return bool(self.error or self.broken)


def rate_text(rate_per_s: float) -> str:
    """Return a rate as people read it."""
    return human(rate_per_s, "throughput")


def seen_of(demand: Demand, answer: Mapping[str, Any], cosine: float) -> Seen:
    """Judge what a worker's `serve` answered of one model against what is asked for it. `cosine` limits how far its outputs may be off."""
    together, alone, accuracy = answer["together"], answer["alone"], answer["accuracy"]
    wrong = answer["problem"] or together["error"]
    wrong = wrong or over_limit(accuracy.get("cosine", -1.0), accuracy.get("relative_l2", math.inf), cosine)
    if wrong or not together["latencies_s"]:
        reason = str(wrong or f"no request was answered in {together['seconds']:g} s")
        return Seen(latency_s=math.inf, p99_s=None, rate_per_s=0.0, slowdown=1.0, count=0, broken=(reason,))
    latencies = Samples(timed_s=tuple(together["latencies_s"]))
    # Who was not answered at all waited longer than everybody who was.
    unanswered = max(0, together["offered"] - together["served"])
    median_s, tail_s = (_quantile_s(together["latencies_s"], unanswered, q) for q in (0.5, 0.99))
    broken = []
    late = unanswered > max(2, LATE * together["offered"])
    if demand.latency_s is not None and median_s > demand.latency_s:
        broken.append(f"median {_waited(median_s)}, limit {time_text(demand.latency_s)}")
    # Of few requests the tail is near their worst: enough to break a limit, too little to be published.
    if demand.p99_s is not None and tail_s > demand.p99_s and not (late and tail_s == math.inf):
        broken.append(f"p99 {_waited(tail_s)}, limit {time_text(demand.p99_s)}")
    if late:
        broken.append(f"{together['served']} of {together['offered']} requests answered in time at {rate_text(demand.rate_per_s or 0.0)}")
    slowdown = 1.0
    if alone["durations_s"]:
        slowdown = Samples(timed_s=tuple(together["durations_s"])).median_s / Samples(timed_s=tuple(alone["durations_s"])).median_s
    return Seen(
        latency_s=latencies.median_s,
        p99_s=tail_s if len(latencies.timed_s) >= TAIL_SAMPLES and tail_s < math.inf else None,
        rate_per_s=together["served"] / together["seconds"],
        slowdown=slowdown,
        count=len(latencies.timed_s),
        broken=tuple(broken),
    )


def _quantile_s(latencies_s: Sequence[float], unanswered: int, q: float) -> float:
    """Return a quantile of what all requests waited, of whom the `unanswered` waited for ever."""
    if not unanswered:
        return Samples(timed_s=tuple(latencies_s)).quantile_s(q)
    ordered = sorted(latencies_s)
    place = int(q * (len(ordered) + unanswered))
    return ordered[place] if place < len(ordered) else math.inf


def _waited(seconds: float) -> str:
    return time_text(seconds) if seconds < math.inf else "never answered"


def promise_of(demand: Demand, seen: Seen | None) -> Promise:
    """Return what a bundle says of a model: what was asked, and what was seen."""
    numbers = {} if seen is None else {"latency_s": seen.latency_s, "p99_s": seen.p99_s, "rate_per_s": seen.rate_per_s}
    known = {name: value for name, value in numbers.items() if value is not None and value < math.inf}
    return Promise(
        priority=demand.priority,
        latency_s=demand.latency_s,
        p99_s=demand.p99_s,
        rate_per_s=demand.rate_per_s,
        seen={name: Number(value=value, source="measured", samples=seen.count if seen else 0) for name, value in known.items()},
    )
