"""The search: Optuna over the points of a space, for one objective or several; each point is measured by somebody else.

Every trial that is asked is told: with its losses, or PRUNED when it was refused, failed, or was inaccurate (TPE forgets FAIL and would ask
again). A limit that is broken is told as a constraint beside the losses, so that the sampler learns on which side of it to look. What the
n-th ask draws hangs on the seed, n and what was told before, and on nothing else: a search that was killed is resumed by telling it the
same outcomes again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.constraints import Constraint, beyond
from aivmm.planner.drawing import Drawing
from aivmm.planner.objectives import OBJECTIVES, Objective
from aivmm.planner.pareto import front
from aivmm.planner.proposing import Proposer
from aivmm.planner.records import TrialRecord
from aivmm.planner.space import Params, Space

_STARTUP_TRIALS = 6
_SAMPLER_EVERY = 6  # asks: the others go to what is believed of points
_AT_ONCE = 3  # points proposed before anything is told: they share a race
_DRAWS = 200  # without a new point: there is hardly one left
_RANDOM_FROM = 4  # repeats of known points in a row: the sampler is sure of itself, so chance looks where it would not
_DUPLICATES_IN_A_ROW = 25  # so many mean that the space is as good as exhausted


@dataclass(slots=True)
class Search:
    """An Optuna study over a space. Ask for candidates, tell how they came out; the records are what the database keeps."""

    space: Space
    seed: int = 0
    objectives: Sequence[Objective] = ()  # by default that of the space
    runs_as: Callable[[Candidate], str] = lambda candidate: candidate.key  # equal for points that come to the same, once placed exactly
    limits: Sequence[Constraint] = ()  # judged by a score's metrics, as far as it has them
    records: list[TrialRecord] = field(default_factory=list)
    exhausted: bool = False
    _study: optuna.Study = field(init=False)
    _known: dict[str, tuple[Candidate, Score | Rejection]] = field(default_factory=dict)
    _open: dict[str, list[optuna.trial.Trial]] = field(default_factory=dict)
    _inside: set[str] = field(default_factory=set)  # keys of the points of the space that were asked for or told
    _asks: int = 0
    _proposer: Proposer = field(init=False)
    _proposed: list[Params] = field(default_factory=list)
    _every: dict[str, BaseDistribution] = field(init=False)

    def __post_init__(self) -> None:
        self.objectives = tuple(self.objectives) or (OBJECTIVES[self.space.objective],)
        self._every = self.space.every()
        self._proposer = Proposer(self.space, self.objectives, self.limits)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # In memory: a trial costs 0.3 ms there and 59 ms in SQLite; the database keeps our own record of each.
        self._study = optuna.create_study(directions=["minimize"] * len(self.objectives), sampler=self._sampler())

    def enqueue(self, candidates: Iterable[Candidate]) -> None:
        """Have these asked for first: defaults, and the best that is known of similar models. What lies outside the space is left out."""
        for candidate in candidates:
            params = self.space.params(candidate)
            if params is not None and self._is_new(self.space.canonical(params)):
                self._study.enqueue_trial(params, skip_if_exists=True)

    def ask(self, count: int) -> list[Candidate]:
        """Return up to `count` candidates that are not known yet; fewer when the space is exhausted."""
        found: list[Candidate] = []
        repeats = 0
        while len(found) < count and not self.exhausted:
            trial = self._next(by_chance=repeats >= _RANDOM_FROM)
            asking = _Asking(trial)
            candidate = self.space.point(asking)
            asking.fill(self._every)
            key = self.runs_as(candidate)
            known = self._known.get(key)
            if known is not None or key in self._open:
                repeats += 1
                self.exhausted = repeats >= _DUPLICATES_IN_A_ROW
                if known is None:
                    self._open[key].append(trial)
                else:
                    self._tell_one(trial, *known)
                continue
            repeats = 0
            self._inside.add(key)
            found.append(candidate)
            self._open[key] = [trial]
            self.exhausted = len(self._inside) >= self.space.size()
        return found

    def _next(self, *, by_chance: bool) -> optuna.trial.Trial:
        self._asks += 1
        params = self._by_chance() if by_chance else self._most_promising() if self._asks % _SAMPLER_EVERY else None
        if params is not None:
            self._study.enqueue_trial(params)
        # What stands in line is asked for as it is: the sampler has nothing to think about.
        self._study.sampler = self._sampler(by_chance=params is not None)
        return self._study.ask()

    def _is_new(self, candidate: Candidate) -> bool:
        key = self.runs_as(candidate)
        return key not in self._known and key not in self._open

    def _by_chance(self) -> Params | None:
        """Return the parameters of a point that nobody knows yet, drawn by chance; None when many draws gave none."""
        chance = np.random.default_rng((self.seed, self._asks, 2))
        for _ in range(_DRAWS):
            drawn = Drawing(chance)
            if self._is_new(self.space.point(drawn)):
                return drawn.params
        return None

    def _most_promising(self) -> Params | None:
        """Return the parameters of a new point from which most is expected; None where too little is known."""
        if not self._proposed:
            chance = np.random.default_rng((self.seed, self._asks, 1))
            known = [each for each in self._known.values() if self.space.params(each[0]) is not None]
            self._proposed = self._proposer.propose(known, self._is_new, chance, count=_AT_ONCE)
        while self._proposed:
            params = self._proposed.pop(0)
            if self._is_new(self.space.canonical(params)):
                return params
        return None

    def _sampler(self, *, by_chance: bool = False) -> optuna.samplers.BaseSampler:
        """Return a sampler for one ask. One that went on drawing from its own stream could not be resumed."""
        seed = int(np.random.SeedSequence((self.seed, self._asks)).generate_state(1)[0])
        if by_chance:
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `multivariate` is, and `group` would part what belongs
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS, multivariate=True)

    def tell(self, candidate: Candidate, outcome: Score | Rejection) -> None:
        """Report how a candidate came out. One that was never asked for is added as known (a baseline, a row of the database)."""
        params = self.space.params(candidate)
        mine = self.runs_as(candidate)
        self._proposed.clear()  # they were chosen before this was known
        spelled = self.runs_as(self.space.canonical(params)) if params is not None else None
        for key in {mine, mine if spelled is None else spelled}:
            # A default and the same thing spelled out are one point: neither is measured again.
            self._known.setdefault(key, (candidate, outcome))
        if spelled is not None and spelled not in self._open:
            self._inside.add(spelled)  # once, however it is written
        self._known[mine] = (candidate, outcome)
        trials = self._open.pop(mine, None)
        self._record(candidate, outcome, asked=trials is not None)
        if trials is not None:
            for trial in trials:
                self._tell_one(trial, candidate, outcome)
        elif params is not None:
            self._add(params, candidate, outcome)

    def _add(self, params: dict[str, Any], candidate: Candidate, outcome: Score | Rejection) -> None:
        """Add a point that was never asked for to the study."""
        if self.space.distributions(params) is None:
            return  # a knob whose default is the library's secret: worth a record, but there is no point to learn from
        filling = Drawing(np.random.default_rng((self.seed, len(self.records), 3)), params)
        for name, known in self._every.items():
            filling.suggest(name, known)
        losses = self._losses(candidate, outcome)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if losses is None else TrialState.COMPLETE,
                values=losses,
                params=filling.params,
                distributions=self._every,
                constraints=self._beyond(outcome) if losses is not None else None,
            )
        )

    def best(self, count: int, objective: Objective | None = None) -> list[tuple[Candidate, Score]]:
        """Return the best candidates known, best first: of the first objective, or of another. Limits are not looked at."""
        wanted = objective or self.objectives[0]
        return sorted(self._scored(), key=lambda each: wanted.loss(*each))[:count]

    def keeping(self) -> list[tuple[Candidate, Score]]:
        """Return the candidates whose scores break no limit."""
        return [each for each in self._scored() if not any(value > 0 for value in self._beyond(each[1]).values())]

    def front(self) -> list[tuple[Candidate, Score]]:
        """Return what no other candidate beats in all objectives, among those that break no limit."""
        found = self.keeping()
        return [found[at] for at in front([[each.loss(*one) for each in self.objectives] for one in found])]

    def studied(self) -> Sequence[optuna.trial.FrozenTrial]:
        """Return the study's own trials, for those who look at what mattered."""
        found: Sequence[optuna.trial.FrozenTrial] = self._study.get_trials(deepcopy=False)
        return found

    def _scored(self) -> list[tuple[Candidate, Score]]:
        return [(candidate, outcome) for candidate, outcome in self._known.values() if isinstance(outcome, Score)]

    def _tell_one(self, trial: optuna.trial.Trial, candidate: Candidate, outcome: Score | Rejection) -> None:
        losses = self._losses(candidate, outcome)
        if losses is None:
            self._study.tell(trial, state=TrialState.PRUNED)
            return
        for name, value in self._beyond(outcome).items():
            trial.set_constraint(name, value)
        self._study.tell(trial, losses)

    def _losses(self, candidate: Candidate, outcome: Score | Rejection) -> list[float] | None:
        return [each.loss(candidate, outcome) for each in self.objectives] if isinstance(outcome, Score) else None

    def _beyond(self, outcome: Score | Rejection) -> Mapping[str, float]:
        """Return for each limit that can be judged how far it is broken: 0 and below, it is kept."""
        if not isinstance(outcome, Score):
            return {}
        judged = ((str(limit), beyond(limit, outcome.metrics.get(limit.metric, math.nan))) for limit in self.limits)
        return {name: value for name, value in judged if not math.isnan(value)}

    def _record(self, candidate: Candidate, outcome: Score | Rejection, *, asked: bool) -> None:
        self.records.append(record_of(len(self.records), candidate, outcome, asked=asked))


def record_of(number: int, candidate: Candidate, outcome: Score | Rejection, *, asked: bool = False) -> TrialRecord:
    """Return what the database keeps of a candidate that came out so."""
    known: dict[str, Any] = {
        "number": number,
        "target": " + ".join(str(target) for target, _ in candidate.policy.targets) if candidate.policy else str(candidate.target),
        "config": candidate.config,
        "batch": candidate.batch,
        "callers": candidate.callers,
        "seconds": outcome.seconds,
        "reused": outcome.reused,
        "median_s": outcome.median_s,
        "asked": asked,
        "policy": candidate.how(),
    }
    if isinstance(outcome, Score):
        metrics = {name: value for name, value in outcome.metrics.items() if math.isfinite(value)}
        known |= {"metrics": metrics, "low": outcome.low, "high": outcome.high}
        return TrialRecord(**known, state="complete", value=outcome.ratio)
    state = outcome.state if outcome.state in ("refused", "failed") else "pruned"
    return TrialRecord(**known, state=state, value=outcome.ratio, reason=outcome.reason)  # type: ignore[arg-type]


class _Asking:
    """Answers from a trial."""

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._trial = trial
        self._asked: set[str] = set()

    def fill(self, every: Mapping[str, BaseDistribution]) -> None:
        """Ask for what the point has no use for, so that all trials have the same parameters: only then are they looked at together."""
        for name in sorted(every.keys() - self._asked):
            self.suggest(name, every[name])

    def suggest(self, name: str, known: BaseDistribution) -> Any:
        self._asked.add(name)
        if isinstance(known, IntDistribution):
            return self._trial.suggest_int(name, known.low, known.high, log=known.log)
        if isinstance(known, FloatDistribution):
            return self._trial.suggest_float(name, known.low, known.high, log=known.log)
        assert isinstance(known, CategoricalDistribution)
        return self._trial.suggest_categorical(name, known.choices)
