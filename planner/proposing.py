"""Proposing points: the one from which most is expected, by what is believed of a pool of points near the best and by chance.

Expected improvement (Jones et al. 1998) times the chance that limits are kept, over points that differ from the best of each set of targets
in one parameter or two, and points drawn by chance; then uphill through neighbours (as in Hutter et al. 2011). With several objectives each
ask weighs them anew (Knowles 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.constraints import Constraint
from aivmm.planner.drawing import Drawing, another
from aivmm.planner.objectives import Objective
from aivmm.planner.space import Params, Space
from aivmm.planner.surrogate import Surrogate, log_chance_below, log_expected_improvement, one_thread
from aivmm.runtime.config import Knob, Setting
from aivmm.runtime.target import Target

Array = npt.NDArray[np.float64]

LEAST = 8  # known points, before anything is believed
_BY_CHANCE = 60  # points of the pool
_NEAR = 120  # points of the pool beside the best
_TWO_AT_ONCE = 0.4
_ARMS = 4  # sets of targets whose best point has neighbours in the pool
_CLIMBS, _CLIMB_WIDTH = 2, 20
_ANEW = 1.1
_MOST_LOOKED_AT = 60  # in order of promise, for one that is new
_MOST = 300  # points that are learnt from, the best and the latest: with more it takes longer than a measurement
_SIGMA = 0.03  # of a loss, where intervals tell nothing
_WORST_SHARE = 0.05  # of the sum, beside the largest weighed loss (Knowles 2006)


@dataclass(frozen=True, slots=True)
class Encoding:
    """A candidate as numbers: for each target whether it takes part and how it is set, and what all share."""

    space: Space
    ordered: tuple[bool, ...] = field(init=False)
    _own: tuple[tuple[Target, Sequence[Knob], Sequence[str | None]], ...] = field(init=False)

    def __post_init__(self) -> None:
        space = self.space
        own = tuple((target, space.knobs_of(target), list(space.precisions[str(target)])) for target in space.targets)
        flags: list[bool] = []
        for _, knobs, _ in own:
            flags += [True, *(knob.kind != "choice" for knob in knobs), False]
        object.__setattr__(self, "_own", own)
        object.__setattr__(self, "ordered", (*flags, *[True] * 7))

    def encode(self, candidate: Candidate) -> list[float]:
        """Return the numbers of a candidate; what it has no use for stands at its default."""
        space, policy = self.space, candidate.policy
        taking = policy.targets if policy else ((candidate.target, candidate.config),)
        found: list[float] = []
        for target, knobs, precisions in self._own:
            config = next((config for each, config in taking if each is target or each == target), None)
            found.append(float(config is not None))
            for knob in knobs:
                value = config.get(knob.name) if config is not None else None
                found.append(_scaled(knob, knob.default if value is None else value))
            found.append(float(precisions.index(config.precision)) if config is not None and config.precision in precisions else 0.0)
        found += [
            _share(policy.most_pieces if policy else 1, space.most_pieces),
            _place(policy.cut_price if policy else 1.0, space.cut_prices),
            float(bool(policy and policy.contiguous)),
            _place(candidate.batch, space.batches),
            _share(candidate.callers, space.most_callers),
            _share(candidate.replicas, space.most_replicas),
            _share(candidate.depth, space.most_depth),
        ]
        return found


def _share(count: int, most: int) -> float:
    return math.log(count) / math.log(most) if most > 1 else 0.0


def _place(value: float, values: Sequence[float]) -> float:
    at = values.index(value) if value in values else 0
    return at / (len(values) - 1) if len(values) > 1 else 0.0


def _scaled(knob: Knob, value: Setting | None) -> float:
    if knob.kind == "choice":
        return float(knob.choices.index(value)) if value in knob.choices else -1.0
    if not isinstance(value, int | float):
        return 0.5
    low, high = float(knob.low), float(knob.high)
    if low > 0:  # counts: from one to two is as far as from two to four
        return math.log(max(value, low) / low) / math.log(high / low)
    return (value - low) / (high - low)


@dataclass(slots=True)
class Proposer:
    """Proposes points of a space. What it is told of each is what a search knows."""

    space: Space
    objectives: Sequence[Objective]
    limits: Sequence[Constraint]
    encoding: Encoding = field(init=False)
    _fitted: dict[str, tuple[int, Surrogate]] = field(default_factory=dict)  # by limit, and "" for the one objective

    def __post_init__(self) -> None:
        self.encoding = Encoding(self.space)

    def _believe(self, name: str, x: Array, losses: Array, sigma: float, *, known: int) -> Surrogate:
        """Return what is believed; what matters is learnt anew each time that a tenth more is `known`, and kept meanwhile.

        `known` counts all points, of which `x` may be some.
        """
        count, held = self._fitted.get(name, (0, None))
        if held is not None and count <= known < count * _ANEW:
            return held.with_data(x, losses)
        found = Surrogate.fit(x, losses, self.encoding.ordered, sigma=sigma)
        self._fitted[name] = (known, found)
        return found

    def propose(
        self,
        known: Sequence[tuple[Candidate, Score | Rejection]],
        is_new: Callable[[Candidate], bool],
        chance: np.random.Generator,
        *,
        count: int,
    ) -> list[Params]:
        """Return the parameters of up to `count` new points from which most is expected, each believing that the one before came out as
        believed; none where too little is known, or nothing new turned up."""
        scored = [(candidate, score) for candidate, score in known if isinstance(score, Score)]
        if len(scored) < LEAST:
            return []
        every = len(scored)
        if every > _MOST:
            first = self.objectives[0]
            best = sorted(range(len(scored)), key=lambda at: first.loss(*scored[at]))[: _MOST // 2]
            scored = [scored[at] for at in sorted({*best, *range(every - _MOST // 2, every)})]
        with one_thread():
            return self._propose(scored, is_new, chance, count, known=every)

    def _propose(
        self,
        scored: Sequence[tuple[Candidate, Score]],
        is_new: Callable[[Candidate], bool],
        chance: np.random.Generator,
        count: int,
        *,
        known: int,
    ) -> list[Params]:
        x = np.array([self.encoding.encode(candidate) for candidate, _ in scored])
        losses = self._weighed(scored, chance)
        sigma = sigma_of([score for _, score in scored])
        if len(self.objectives) == 1:
            believed = self._believe("", x, losses, sigma, known=known)
        else:  # weighed anew, they are other losses: nothing that was learnt of them holds
            believed = Surrogate.fit(x, losses, self.encoding.ordered, sigma=sigma)
        limits = self._limits(scored, x, known)
        means, _ = believed.believe(x)
        keeps = np.array([self._keeps(score) for _, score in scored])
        best = float(means[keeps].min()) if keeps.any() else math.inf
        pool = _Pool(self.space, self.encoding, partial(_promise, believed=believed, limits=limits, best=best))
        starts = [scored[at][0] for at in self._starts(scored, means, keeps)]
        for at, start in enumerate(starts):
            pool.add_beside(start, _NEAR // 2 if at == 0 else _NEAR // 8, chance)
        pool.add_by_chance(_BY_CHANCE, chance)
        for _ in range(_CLIMBS):
            pool.climb(chance)
        found: list[Params] = []
        while len(found) < count and (taken := pool.take(is_new)) is not None:
            found.append(taken[0])
            if len(found) < count:
                believed = believed.given(taken[1], believed.believe(taken[1])[0])
                pool.judge(partial(_promise, believed=believed, limits=limits, best=best))
        return found

    def _weighed(self, scored: Sequence[tuple[Candidate, Score]], chance: np.random.Generator) -> Array:
        table = np.array([[each.loss(*one) for each in self.objectives] for one in scored])
        if table.shape[1] == 1:
            return table[:, 0]
        table = (table - table.min(axis=0)) / np.maximum(np.ptp(table, axis=0), 1e-9)
        weighed = table * chance.dirichlet(np.ones(table.shape[1]))
        found: Array = weighed.max(axis=1) + _WORST_SHARE * weighed.sum(axis=1)
        return found

    def _limits(self, scored: Sequence[tuple[Candidate, Score]], x: Array, known: int) -> list[Surrogate]:
        """Return for each limit that something breaks what is believed of how far points lie beyond it."""
        found = []
        for limit in self.limits:
            beyond = np.array([_log_beyond(limit, score) for _, score in scored])
            kept = np.isfinite(beyond)
            if kept.sum() >= LEAST and (beyond[kept] > 0).any():
                found.append(self._believe(str(limit), x[kept], beyond[kept], _SIGMA, known=known))
        return found

    def _keeps(self, score: Score) -> bool:
        beyond = (_log_beyond(limit, score) for limit in self.limits)
        return not any(value > 0 for value in beyond if not math.isnan(value))

    def _starts(self, scored: Sequence[tuple[Candidate, Score]], means: Array, keeps: npt.NDArray[np.bool_]) -> list[int]:
        """Return the best points by what is believed, of the leading sets of targets one each; the leading one comes twice."""
        arms: dict[frozenset[Target], list[int]] = {}
        for at in np.argsort(np.where(keeps, means, means + 1e6)):
            arms.setdefault(_targets(scored[at][0]), []).append(int(at))
        starts = [found[0] for found in arms.values()][:_ARMS]
        return starts + next(iter(arms.values()))[1:3]


@dataclass(slots=True)
class _Pool:
    """Points that may be proposed, and what each promises."""

    space: Space
    encoding: Encoding
    promise: Callable[[Array], Array]
    points: list[tuple[Candidate, Params]] = field(default_factory=list)
    at: list[list[float]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _taken: set[int] = field(default_factory=set)

    def add_beside(self, start: Candidate | Params, count: int, chance: np.random.Generator) -> None:
        """Add points that differ from one in a parameter or two."""
        params = self.space.params(start) if isinstance(start, Candidate) else start
        distributions = self.space.distributions(params) if params is not None else None
        if not params or not distributions:
            return
        names = sorted(params)
        drawn = []
        for _ in range(count):
            changed = chance.choice(len(names), size=min(len(names), 1 + int(chance.random() < _TWO_AT_ONCE)), replace=False)
            values = {names[at]: another(distributions[names[at]], params[names[at]], chance) for at in changed}
            drawn.append(Drawing(chance, params | values))
        self._add(drawn)

    def add_by_chance(self, count: int, chance: np.random.Generator) -> None:
        """Add points drawn by chance."""
        self._add([Drawing(chance) for _ in range(count)])

    def climb(self, chance: np.random.Generator) -> None:
        """Add what lies beside the point that promises most."""
        if self.values:
            self.add_beside(self.points[int(np.argmax(self.values))][1], _CLIMB_WIDTH, chance)

    def judge(self, promise: Callable[[Array], Array]) -> None:
        """Say anew what each promises."""
        self.promise = promise
        self.values = list(promise(np.array(self.at)))

    def take(self, is_new: Callable[[Candidate], bool]) -> tuple[Params, Array] | None:
        """Take out the new point that promises most: its parameters, and where it lies."""
        order = [index for index in np.argsort(-np.array(self.values)) if int(index) not in self._taken]
        for index in order[:_MOST_LOOKED_AT]:
            self._taken.add(int(index))
            if is_new(self.points[index][0]):
                return self.points[index][1], np.array([self.at[index]])
        return None

    def _add(self, drawn: Sequence[Drawing]) -> None:
        start = len(self.at)
        for each in drawn:
            point = self.space.point(each)
            spelled = repr(sorted(each.params.items()))
            if spelled not in self._seen:
                self._seen.add(spelled)
                self.points.append((point, each.params))
                self.at.append(self.encoding.encode(point))
        if len(self.at) > start:
            self.values += list(self.promise(np.array(self.at[start:])))


def _promise(at: Array, believed: Surrogate, limits: Sequence[Surrogate], best: float) -> Array:
    """Return the logarithm of the improvement expected of points, times the chance that they keep the limits."""
    mean, sd = believed.believe(at)
    value = log_expected_improvement(mean, sd, best) if math.isfinite(best) else np.zeros(len(at))
    for surrogate in limits:
        value = value + log_chance_below(*surrogate.believe(at), 0.0)
    return value


def _targets(candidate: Candidate) -> frozenset[Target]:
    return frozenset(target for target, _ in (candidate.policy.targets if candidate.policy else ((candidate.target, candidate.config),)))


def sigma_of(scores: Sequence[Score]) -> float:
    """Return how far one score is off, by the intervals that they have."""
    found = [math.log(each.high / each.low) / (2 * 1.96) for each in scores if 0 < each.low < each.high]
    return float(np.median(found)) if found else _SIGMA


def _log_beyond(limit: Constraint, score: Score) -> float:
    """Return how far a score lies beyond a limit, as a logarithm where it has one: above 0 is broken; NaN where it does not say."""
    value = score.metrics.get(limit.metric, math.nan)
    if limit.operator == "in" or math.isnan(value):
        return math.nan
    sign = 1.0 if limit.operator in ("<", "<=") else -1.0
    apart = math.log(value / limit.limit) if value > 0 and limit.limit > 0 and limit.metric != "cosine" else value - limit.limit
    return sign * apart
