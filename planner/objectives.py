"""Objectives: what may be made better, which way better is, and what a trial is told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from aivmm.errors import UsageError
from aivmm.planner.candidates import Candidate, Score
from aivmm.planner.constraints import Constraint

_LEAST_ERROR = 1e-7  # of a cosine: below it there is rounding only
_LEAST = 1e-9  # s, J, bytes: below it no clock and no counter tells anything apart, and some read 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One goal. `metric` is the name that constraints and proofs know it by; `what` completes "its ... is"."""

    name: str
    metric: str
    what: str
    better: Literal["less", "more"] = "less"
    drive: Literal["latency", "throughput"] = "latency"  # one call after the other, or as many at once as pays
    in_search: bool = True  # False: it takes a fresh process to see it, so only the proof compares it
    tolerance: float = 0.03  # relative, of accuracy's error; what differs by less is the same

    def loss(self, candidate: Candidate, score: Score) -> float:
        """Return what a sampler minimises: smaller is better, and equal steps are equal ratios.

        Latency and throughput come from the ratio to the race's own reference, which the machine's mood does not move.

        Raises:
            KeyError: the score does not hold the metric.
        """
        if self.name == "latency":
            return math.log(score.ratio * candidate.batch * candidate.callers)
        if self.name == "throughput":
            return math.log(score.ratio)
        return self.loss_of(score.metrics[self.metric])

    def loss_of(self, value: float) -> float:
        """Return the loss of a value of the metric, in SI units."""
        if self.name == "accuracy":
            return math.log(max(1.0 - value, _LEAST_ERROR))
        loss = math.log(max(value, _LEAST))
        return loss if self.better == "less" else -loss


OBJECTIVES: Mapping[str, Objective] = {
    each.name: each
    for each in (
        Objective(name="latency", metric="latency", what="latency"),
        Objective(name="throughput", metric="throughput", what="throughput", better="more", drive="throughput"),
        Objective(name="p99", metric="p99", what="99th percentile of latency", tolerance=0.05),
        Objective(name="memory", metric="memory", what="peak memory", in_search=False, tolerance=0.05),
        Objective(name="energy", metric="energy", what="energy for a sample", tolerance=0.05),
        Objective(name="accuracy", metric="cosine", what="cosine to the reference", better="more", tolerance=0.10),
        Objective(name="compile", metric="compile", what="time to compile", tolerance=0.10),
        Objective(name="size", metric="size", what="size on disk", tolerance=0.01),
    )
}


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """Return the objectives of `latency` or `latency,throughput`, the first of which decides what the plan is.

    Raises:
        UsageError: one is unknown, named twice, or none is named; or two of them cannot be seen of the same calls.
    """
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in OBJECTIVES:
            raise UsageError(f"unknown objective {name!r}", advice=f"choose from {', '.join(OBJECTIVES)}; several are joined by commas")
    if len(set(names)) < len(names):
        raise UsageError(f"--objective {text!r} names one objective twice", advice="name each once, the one that matters most first")
    if {"throughput", "p99"} <= set(names):
        problem = f"--objective {text!r}: p99 is measured of one call at a time, and throughput is tried with several at once"
        raise UsageError(problem, advice="tune for each alone; the second tuning knows what the first measured")
    return tuple(OBJECTIVES[name] for name in names)


def drive_of(objectives: Sequence[Objective]) -> Literal["latency", "throughput"]:
    """Return how the model has to be driven for all of them to be seen."""
    return "throughput" if any(each.drive == "throughput" for each in objectives) else "latency"


def counts_rate(objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()) -> bool:
    """Say whether what is answered in a second is all that counts of times: then means of windows do, and else the median of calls.

    A limit on latency counts calls, too. One on p99 does not: its calls are timed one by one in any case.
    """
    limited = any(each.metric == "latency" for each in constraints)
    return not limited and drive_of(objectives) == "throughput" and all(each.metric not in ("latency", "p99") for each in objectives)


def searched(objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """Return those that the search can steer by; latency where there is none."""
    return tuple(each for each in objectives if each.in_search) or (OBJECTIVES["latency"],)
