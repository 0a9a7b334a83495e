"""Measuring only the segments that could be in the best plan of a chain.

A segment that was not measured is given its optimistic cost: what it may take at best, by what is believed of it. The plan that is best by
these costs is measured, beliefs take in what came out, and so again, until the best plan that is measured throughout is no worse than the
best optimistic one (Dellin, Srinivasa 2016, "A unifying formalism for shortest path problems with expensive edge evaluations", LazySP; here
with segments for edges, and bounds that hold with a stated confidence instead of for sure).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
_DRAWS, _MOST_DRAWS = 6, 200  # of costs, of which the regret to be expected is the mean; and in all
_WELL_KNOWN = 0.01  # relative deviation beyond which a segment of a plan that may be the best is measured again


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
    solves: int = 0  # placements so far
    forbidden: npt.NDArray[np.bool_] | None = None  # [first, last, choice]: segments that have no room there

    @property
    def choices(self) -> list[str]:
        """The choices, in the order of `prices`."""
        return list(self.beliefs)

    def tables(self) -> tuple[Array, Array]:
        """Return the believed seconds [first, last, choice] and their relative deviations, as who chooses should take them."""
        both = [each.judged() for each in self.beliefs.values()]
        mean = np.stack([mean for mean, _ in both], axis=-1)
        if self.forbidden is not None:
            mean[self.forbidden] = math.inf
        return mean, np.stack([sigma for _, sigma in both], axis=-1)

    def place(self, costs: Array) -> ChainPlan[str]:
        """Return the best plan by the costs of segments [first, last, choice].

        Raises:
            Infeasible: there is none.
        """
        self.solves += 1
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
    apart: bool = False,
    most_probes: int | None = None,
) -> Look:
    """Return the best plan, having measured as few segments as could be, at most `most` plans (and about `most_probes` segments).

    First plans are looked at that would be best were all that is unknown as good as it may be. Then, since that says nothing of what is
    gained by knowing, and the noise of measurements flatters whatever looks best: costs are drawn from what is believed, the best plan by
    them is measured, again where it was measured before, and how far the best plan that is known falls behind it is an observation of the
    regret to be expected. When that is half of `tolerance` or less in the mean of the last draws, it is enough.

    `apart`: segments are measured one by one, so those of a plan that are known well are left out; otherwise all of a plan are measured.

    Raises:
        Infeasible: there is no plan.
    """
    search = _Search(chain, measure, apart)
    limit = math.inf if most_probes is None else most_probes
    done = False
    while True:
        with search.planning():
            mean, sigma = search.tables()
            hopeful = chain.place(mean * np.exp(-deviations * np.where(search.known(), 0.0, sigma)))
            best = _measured_only(chain, mean)
            unknown = [span for span in hopeful.segments if span[:2] not in chain.beliefs[span[2]].measured]
            done = not unknown or (best is not None and best.cost_s <= hopeful.cost_s * (1 + tolerance))
        if done or search.asked >= most or search.probes >= limit or stop():
            break
        search.ask(hopeful.segments, unknown)
    regrets: list[float] = []
    random = np.random.default_rng(0)
    while done and best is not None and search.asked < most and search.probes < limit and not stop():
        with search.planning():
            mean, sigma = search.tables()
            best = _measured_only(chain, mean)
            assert best is not None
            drawn = mean * np.exp(sigma * random.standard_normal(mean.shape))
            rival = chain.place(drawn)
            shift = math.fsum(float(drawn[search.cell(span)] - mean[search.cell(span)]) for span in best.segments)
            regrets.append(max(0.0, (best.cost_s + shift) / rival.cost_s - 1))
        if (len(regrets) >= _DRAWS and math.fsum(regrets[-_DRAWS:]) / _DRAWS <= tolerance / 2) or len(regrets) >= _MOST_DRAWS:
            break
        if unsure := search.unsure(rival.segments, sigma):
            search.ask(rival.segments, unsure)
    with search.planning():
        mean, _ = search.tables()
        if search.learned or best is None:
            best = _measured_only(chain, mean)
        if best is None or not (done or search.learned):
            # Nothing could be measured: what is believed is all there is, and for a proof to judge.
            best = chain.place(mean)
        best = _as_measured(chain, best)
    return Look(
        plan=best,
        bound_s=min(hopeful.cost_s, best.cost_s),
        proven=done,
        probes=sum(len(each.measured) for each in chain.beliefs.values()),
        possible=int(np.isfinite(mean).sum()),
        solves=chain.solves,
        seconds=search.seconds,
    )


class _Search:
    """What `look` has asked for and learnt so far."""

    def __init__(self, chain: Chain, measure: Measure, apart: bool) -> None:
        self._chain, self._measure, self._apart = chain, measure, apart
        self._position = {name: index for index, name in enumerate(chain.choices)}
        self._refused: set[Span] = set()
        self.asked = self.probes = 0  # plans, and segments
        self.learned = False
        self.seconds = 0.0  # spent on planning
        chain.solves = 0

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Count the seconds inside as planning."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def cell(self, span: Span) -> tuple[int, int, int]:
        """Return where a segment is in the tables."""
        return span[0], span[1], self._position[span[2]]

    def tables(self) -> tuple[Array, Array]:
        """Return the chain's tables; what could not be measured is out."""
        mean, sigma = self._chain.tables()
        for span in self._refused:
            mean[self.cell(span)] = math.inf
        return mean, sigma

    def known(self) -> npt.NDArray[np.bool_]:
        """Return which segments [first, last, choice] were measured."""
        blocks = len(self._chain.prices) + 1
        found = np.zeros((blocks, blocks, len(self._position)), dtype=bool)
        for name, belief in self._chain.beliefs.items():
            for first, last in belief.measured:
                found[first, last, self._position[name]] = True
        return found

    def unsure(self, spans: Sequence[Span], sigma: Array) -> list[Span]:
        """Return those that were not measured, or may be worth another measurement."""
        return [span for span in spans if span[:2] not in self._chain.beliefs[span[2]].measured or sigma[self.cell(span)] > _WELL_KNOWN]

    def ask(self, spans: Sequence[Span], unsure: Sequence[Span]) -> None:
        """Measure a plan's segments; one by one, only those of which one is unsure."""
        wanted = unsure if self._apart else spans
        found = self._measure(wanted)
        self.asked += 1
        self.probes += len(wanted)
        self.learned = self.learned or bool(found)
        for span, estimate in found.items():
            self._chain.beliefs[span[2]].observe(span[0], span[1], estimate)
        self._refused |= {span for span in wanted if span not in found and span[:2] not in self._chain.beliefs[span[2]].measured}


def _as_measured(chain: Chain, plan: ChainPlan[str]) -> ChainPlan[str]:
    """Return a plan with the cost that its segments were measured at: beliefs choose it, measurements are what is told of it."""
    mean, _ = (np.stack(each, axis=-1) for each in zip(*(belief.table() for belief in chain.beliefs.values()), strict=True))
    position = {name: index for index, name in enumerate(chain.choices)}
    judged, _ = chain.tables()
    cells = [(first, last, position[name]) for first, last, name in plan.segments]
    return replace(plan, cost_s=plan.cost_s + math.fsum(float(mean[cell] - judged[cell]) for cell in cells))


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
