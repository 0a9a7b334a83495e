"""Measuring only the segments that could be in the best plan of a chain.

A segment that was not measured is given its optimistic cost: what it may take at best, by what is believed of it. The plan that is best by
these costs is measured, beliefs take in what came out, and so again, until the best plan that is measured throughout is no worse than the
best optimistic one (Dellin, Srinivasa 2016, "A unifying formalism for shortest path problems with expensive edge evaluations", LazySP; here
with segments for edges, and bounds that hold with a stated confidence instead of for sure).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivmm.errors import Infeasible
from aivmm.planner.chain import ChainPlan, place
from aivmm.planner.evidence import Estimate
from aivmm.planner.segments import Segments

Array = npt.NDArray[np.float64]
Span = tuple[int, int, str]  # first block, last block, choice
Measure = Callable[[Sequence[Span]], Mapping[Span, Estimate]]  # of a plan's segments, in order; what is missing could not be measured

DEVIATIONS = 2.0  # how far below what is believed the optimistic cost is: 39 segments in 40 take more
TOLERANCE = 0.005  # relative: a plan that is not shown to be better by more is not looked for


@dataclass(slots=True, kw_only=True)
class Chain:
    """A chain of blocks to be placed: what is believed of its segments on each choice, and what the boundaries cost.

    `prices` is [boundary, from, to] in seconds, its diagonal the price of a cut between two segments on one choice. `cut_within` allows
    those.
    """

    beliefs: Mapping[str, Segments]
    prices: Array
    min_segments: int = 1
    max_segments: int | None = None
    cut_within: bool = True
    forbidden: npt.NDArray[np.bool_] | None = None  # [first, last, choice]: segments that have no room there

    @property
    def choices(self) -> list[str]:
        """The choices, in the order of `prices`."""
        return list(self.beliefs)

    def tables(self) -> tuple[Array, Array]:
        """Return the believed seconds [first, last, choice] and their relative deviations."""
        both = [each.table() for each in self.beliefs.values()]
        mean = np.stack([mean for mean, _ in both], axis=-1)
        if self.forbidden is not None:
            mean[self.forbidden] = math.inf
        return mean, np.stack([sigma for _, sigma in both], axis=-1)

    def place(self, costs: Array) -> ChainPlan[str]:
        """Return the best plan by the costs of segments [first, last, choice].

        Raises:
            Infeasible: there is none.
        """
        diagonal = np.arange(len(self.beliefs))
        boundary = self.prices.copy()
        boundary[:, diagonal, diagonal] = 0.0
        blocks = len(costs)
        alone: list[dict[str, float]] = [{} for _ in range(blocks)]
        return place(
            alone,
            boundary,
            choices=self.choices,
            cut=self.prices[:, diagonal, diagonal] if self.cut_within else None,
            segment_cost=costs,
            min_segments=self.min_segments,
            max_segments=self.max_segments,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a search ended. `plan` rests on measured segments alone where `proven`; else some could not be measured, or time ran out.

    No plan is believed to cost less than `bound_s`, at the confidence of the optimistic costs. `probes` of all `possible` segments (runs of
    blocks times choices that can run them) are measured, those known before included. `seconds` went into planning, none into measuring.
    """

    plan: ChainPlan[str]
    bound_s: float
    proven: bool
    probes: int
    possible: int
    solves: int
    seconds: float

    @property
    def gap(self) -> float:
        """How much of the plan's cost is not shown to be necessary; 0 is the best there is."""
        return max(0.0, 1 - self.bound_s / self.plan.cost_s) if self.plan.cost_s else 0.0


def look(
    chain: Chain,
    measure: Measure,
    *,
    most: int = 1000,
    stop: Callable[[], bool] = lambda: False,
    deviations: float = DEVIATIONS,
    tolerance: float = TOLERANCE,
) -> Look:
    """Return the best plan, having measured as few segments as could be, at most `most` plans.

    Raises:
        Infeasible: there is no plan.
    """
    solves, planning = 0, 0.0
    refused: set[Span] = set()
    position = {name: index for index, name in enumerate(chain.choices)}
    asked, learned = 0, False
    while True:
        started = time.perf_counter()
        mean, sigma = chain.tables()
        for first, last, name in refused:
            mean[first, last, position[name]] = math.inf
        hopeful = chain.place(mean * np.exp(-deviations * sigma))
        best = _measured_only(chain, mean)
        solves += 2
        unknown = [span for span in hopeful.segments if span[:2] not in chain.beliefs[span[2]].measured]
        done = not unknown or (best is not None and best.cost_s <= hopeful.cost_s * (1 + tolerance))
        planning += time.perf_counter() - started
        if done or asked >= most or stop():
            break
        asked += 1
        found = measure(hopeful.segments)
        learned = learned or bool(found)
        for span, estimate in found.items():
            chain.beliefs[span[2]].observe(span[0], span[1], estimate)
        refused |= {span for span in unknown if span not in found}
    if best is None or not (done or learned):
        # Nothing could be measured: what is believed is all there is, and for a proof to judge.
        started = time.perf_counter()
        best = chain.place(mean)
        solves += 1
        planning += time.perf_counter() - started
    return Look(
        plan=best,
        bound_s=min(hopeful.cost_s, best.cost_s),
        proven=done,
        probes=sum(len(each.measured) for each in chain.beliefs.values()),
        possible=int(np.isfinite(mean).sum()),
        solves=solves,
        seconds=planning,
    )


def _measured_only(chain: Chain, mean: Array) -> ChainPlan[str] | None:
    """Return the best plan of segments that were measured; None where they make none."""
    known = np.full_like(mean, math.inf)
    for pick, belief in enumerate(chain.beliefs.values()):
        for first, last in belief.measured:
            known[first, last, pick] = mean[first, last, pick]
    try:
        return chain.place(known)
    except Infeasible:
        return None
