"""The search: Optuna over targets, their knobs, precision, batch and callers; each point is measured by somebody else.

Ordered knobs are integer or float distributions. What cannot be is not representable (one batch, one precision: no parameter). Every trial
that is asked is told: with its ratio, or PRUNED when it was refused, failed, or broke a limit (TPE forgets FAIL and would ask again).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.records import TrialRecord
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.target import Target

_STARTUP_TRIALS = 6
_DUPLICATES_IN_A_ROW = 25  # so many repeats of known points mean that the space is as good as exhausted


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What may be searched: per target its knobs, and the precisions, batches and numbers of callers allowed."""

    targets: Sequence[Target]
    knobs: Mapping[str, Sequence[Knob]]  # by str(target)
    objective: str
    precisions: Mapping[str, Sequence[str | None]]  # by str(target); None leaves it to the runtime
    batches: Sequence[int] = (1,)
    most_callers: int = 1

    def size(self) -> float:
        """Return how many points there are; infinite when a knob is continuous."""
        total = 0.0
        for target in self.targets:
            points = float(len(self.precisions[str(target)]))
            for knob in self.knobs_of(target):
                points *= math.inf if knob.kind == "float" else len(knob.choices) or int(knob.high - knob.low + 1)
            total += points
        return total * len(self.batches) * self.most_callers

    def knobs_of(self, target: Target) -> list[Knob]:
        """Return the knobs of a target that serve the objective and have more than one value."""
        found = (knob for knob in self.knobs[str(target)] if self.objective in knob.objectives)
        return [knob for knob in found if (len(knob.choices) > 1 if knob.kind == "choice" else knob.high > knob.low)]


@dataclass(slots=True)
class Search:
    """An Optuna study over a space. Ask for candidates, tell how they came out; the records are what the database keeps."""

    space: Space
    seed: int = 0
    records: list[TrialRecord] = field(default_factory=list)
    exhausted: bool = False
    _study: optuna.Study = field(init=False)
    _known: dict[str, tuple[Candidate, Score | Rejection]] = field(default_factory=dict)
    _open: dict[str, list[optuna.trial.Trial]] = field(default_factory=dict)
    _inside: set[str] = field(default_factory=set)  # keys of the points of the space that were asked for or told

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            # `group` is marked experimental, and is the way to search knobs that exist under one target only.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=_STARTUP_TRIALS, multivariate=True, group=True)
        # In memory: a trial costs 0.3 ms there and 59 ms in SQLite; the database keeps our own record of each.
        self._study = optuna.create_study(direction="minimize", sampler=sampler)

    def enqueue(self, candidates: Iterable[Candidate]) -> None:
        """Have these asked for first: defaults, and the best that is known of similar models."""
        for candidate in candidates:
            params = self._params(candidate)
            if params is not None and self._canonical(candidate, params).key not in self._known:
                self._study.enqueue_trial(params, skip_if_exists=True)

    def ask(self, count: int) -> list[Candidate]:
        """Return up to `count` candidates that are not known yet; fewer when the space is exhausted."""
        found: list[Candidate] = []
        repeats = 0
        while len(found) < count and not self.exhausted:
            trial = self._study.ask()
            candidate = self._suggest(trial)
            known = self._known.get(candidate.key)
            if known is not None or candidate.key in self._open:
                repeats += 1
                self.exhausted = repeats >= _DUPLICATES_IN_A_ROW
                if known is None:
                    self._open[candidate.key].append(trial)
                else:
                    self._tell_one(trial, known[1])
                continue
            repeats = 0
            self._inside.add(candidate.key)
            found.append(candidate)
            self._open[candidate.key] = [trial]
            self.exhausted = len(self._inside) >= self.space.size()
        return found

    def tell(self, candidate: Candidate, outcome: Score | Rejection) -> None:
        """Report how a candidate came out. One that was never asked for is added as known (a baseline, a row of the database)."""
        params = self._params(candidate)
        for key in {candidate.key, *([self._canonical(candidate, params).key] if params is not None else [])}:
            # A default and the same thing spelled out are one point: neither is measured again.
            self._known.setdefault(key, (candidate, outcome))
            if params is not None and key not in self._open:
                self._inside.add(key)
        self._known[candidate.key] = (candidate, outcome)
        self._record(candidate, outcome)
        trials = self._open.pop(candidate.key, None)
        if trials is not None:
            for trial in trials:
                self._tell_one(trial, outcome)
        elif params is not None:
            self._add(params, candidate.target, outcome)

    def _add(self, params: dict[str, Any], target: Target, outcome: Score | Rejection) -> None:
        """Add a point that was never asked for to the study."""
        known = self._distributions(target)
        if set(params) != set(known):
            return  # a knob whose default is the library's secret: worth a record, but there is no point to learn from
        complete = isinstance(outcome, Score)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if complete else TrialState.PRUNED,
                value=math.log(outcome.ratio) if isinstance(outcome, Score) else None,
                params=params,
                distributions=known,
            )
        )

    def _distributions(self, target: Target) -> dict[str, BaseDistribution]:
        """Return the distributions of the parameters that a point on `target` has."""
        space, name = self.space, str(target)
        known: dict[str, BaseDistribution] = {}
        if len(space.targets) > 1:
            known["target"] = CategoricalDistribution([str(each) for each in space.targets])
        known |= {f"{name} {knob.name}": distribution(knob) for knob in space.knobs_of(target)}
        if len(space.precisions[name]) > 1:
            known[f"{name} precision"] = CategoricalDistribution(list(space.precisions[name]))
        if len(space.batches) > 1:
            known["batch index"] = IntDistribution(0, len(space.batches) - 1)
        if space.most_callers > 1:
            known["callers"] = IntDistribution(1, space.most_callers)
        return known

    def best(self, count: int) -> list[tuple[Candidate, Score]]:
        """Return the best candidates known, best first."""
        scored = [(candidate, outcome) for candidate, outcome in self._known.values() if isinstance(outcome, Score)]
        return sorted(scored, key=lambda each: each[1].ratio)[:count]

    def _tell_one(self, trial: optuna.trial.Trial, outcome: Score | Rejection) -> None:
        if isinstance(outcome, Score):
            self._study.tell(trial, math.log(outcome.ratio))
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _record(self, candidate: Candidate, outcome: Score | Rejection) -> None:
        known: dict[str, Any] = {
            "number": len(self.records),
            "target": str(candidate.target),
            "config": candidate.config,
            "batch": candidate.batch,
            "callers": candidate.callers,
            "seconds": outcome.seconds,
            "reused": outcome.reused,
            "median_s": outcome.median_s,
        }
        if isinstance(outcome, Score):
            self.records.append(TrialRecord(**known, state="complete", value=outcome.ratio, low=outcome.low, high=outcome.high))
        else:
            state = outcome.state if outcome.state in ("refused", "failed") else "pruned"
            self.records.append(TrialRecord(**known, state=state, value=outcome.ratio, reason=outcome.reason))  # type: ignore[arg-type]

    def _suggest(self, trial: optuna.trial.Trial) -> Candidate:
        """Turn a trial into a candidate. Knobs of a target are parameters of their own, asked for only under that target."""
        names = [str(target) for target in self.space.targets]
        name = names[0] if len(names) == 1 else trial.suggest_categorical("target", names)
        target = self.space.targets[names.index(name)]
        settings: dict[str, Setting] = {}
        for knob in self.space.knobs_of(target):
            value = _ask_knob(trial, f"{name} {knob.name}", knob)
            if value != knob.default:
                settings[knob.name] = value
        precisions = list(self.space.precisions[name])
        precision = precisions[0] if len(precisions) == 1 else trial.suggest_categorical(f"{name} precision", precisions)
        batch = _ask_batch(trial, self.space.batches)
        callers = 1 if self.space.most_callers == 1 else trial.suggest_int("callers", 1, self.space.most_callers)
        return Candidate(target=target, config=Config.of(settings, precision=precision), batch=batch, callers=callers)

    def _params(self, candidate: Candidate) -> dict[str, Any] | None:
        """Return a candidate as parameters, without those that only the library knows; None when it lies outside the space."""
        space, name = self.space, str(candidate.target)
        if (
            candidate.target not in space.targets
            or candidate.batch not in space.batches
            or not 1 <= candidate.callers <= space.most_callers
        ):
            return None
        precisions = list(space.precisions[name])
        # Where a target runs one precision only, leaving the choice to the runtime and asking for that one are the same.
        native = candidate.target.precisions
        precision = native[0] if candidate.config.precision is None and len(native) == 1 else candidate.config.precision
        knobs = {knob.name: knob for knob in space.knobs_of(candidate.target)}
        if precision not in precisions or any(setting not in knobs for setting, _ in candidate.config.settings):
            return None
        params: dict[str, Any] = {"target": name} if len(space.targets) > 1 else {}
        for knob in knobs.values():
            value = candidate.config.get(knob.name)
            value = knob.default if value is None else value
            if value is None:
                continue
            if not _fits(knob, value):
                return None
            params[f"{name} {knob.name}"] = value
        if len(precisions) > 1:
            params[f"{name} precision"] = precision
        if len(space.batches) > 1:
            params["batch index"] = list(space.batches).index(candidate.batch)
        if space.most_callers > 1:
            params["callers"] = candidate.callers
        return params

    def _canonical(self, candidate: Candidate, params: dict[str, Any]) -> Candidate:
        """Return the candidate as `_suggest` would spell it."""
        name = str(candidate.target)
        settings = {}
        for knob in self.space.knobs_of(candidate.target):
            value = params.get(f"{name} {knob.name}")
            if value is not None and value != knob.default:
                settings[knob.name] = value
        precisions = list(self.space.precisions[name])
        precision = precisions[0] if len(precisions) == 1 else params[f"{name} precision"]
        config = Config.of(settings, precision=precision)
        return Candidate(target=candidate.target, config=config, batch=candidate.batch, callers=candidate.callers)


def _fits(knob: Knob, value: Setting) -> bool:
    if knob.kind == "choice":
        return value in knob.choices
    return isinstance(value, int | float) and knob.low <= value <= knob.high


def distribution(knob: Knob) -> BaseDistribution:
    """Return the Optuna distribution of a knob."""
    if knob.kind == "int":
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log)
    if knob.kind == "float":
        return FloatDistribution(knob.low, knob.high, log=knob.log)
    return CategoricalDistribution(knob.choices)


def _ask_knob(trial: optuna.trial.Trial, name: str, knob: Knob) -> Setting:
    if knob.kind == "int":
        return int(trial.suggest_int(name, int(knob.low), int(knob.high), log=knob.log))
    if knob.kind == "float":
        return float(trial.suggest_float(name, knob.low, knob.high, log=knob.log))
    value: Setting = trial.suggest_categorical(name, list(knob.choices))
    return value


def _ask_batch(trial: optuna.trial.Trial, batches: Sequence[int]) -> int:
    # The position in the ascending list: 1, 2, 4, 8 ... are evenly apart there, and so ordered and smooth for the sampler.
    return batches[0] if len(batches) == 1 else batches[trial.suggest_int("batch index", 0, len(batches) - 1)]
