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
            self._study.enqueue_trial(self._params(candidate), skip_if_exists=True)

    def ask(self, count: int) -> list[Candidate]:
        """Return up to `count` candidates that are not known yet; fewer when the space is exhausted."""
        found: list[Candidate] = []
        repeats = 0
        while len(found) < count and not self.exhausted:
            trial = self._study.ask()
            candidate = self._suggest(trial)
            if candidate.key in self._known:
                self._tell_one(trial, self._known[candidate.key][1])
                repeats += 1
                self.exhausted = repeats >= _DUPLICATES_IN_A_ROW or len(self._known) >= self.space.size()
                continue
            repeats = 0
            if candidate.key not in self._open:
                found.append(candidate)
            self._open.setdefault(candidate.key, []).append(trial)
            self.exhausted = len(self._known) + len(self._open) >= self.space.size()
        return found

    def tell(self, candidate: Candidate, outcome: Score | Rejection) -> None:
        """Report how a candidate came out. One that was never asked for is added as known (a baseline, a row of the database)."""
        self._known[candidate.key] = (candidate, outcome)
        self._record(candidate, outcome)
        trials = self._open.pop(candidate.key, None)
        if trials is None and candidate.target in self.space.targets:
            params = self._params(candidate)
            self._study.enqueue_trial(params)
            trials = [self._study.ask()]
            if self._suggest(trials[0]).key != candidate.key:
                # A point outside the space (another batch, a knob that was removed): worth a record, but nothing to learn from.
                self._study.tell(trials[0], state=TrialState.PRUNED)
                return
        for trial in trials or ():
            self._tell_one(trial, outcome)

    def best(self, count: int) -> list[tuple[Candidate, Score]]:
        """Return the best candidates known, best first."""
        scored = [(candidate, outcome) for candidate, outcome in self._known.values() if isinstance(outcome, Score)]
        return sorted(scored, key=lambda each: each[1].ratio)[:count]

    def importance(self) -> dict[str, float]:
        """Return how much of the variance each knob explains (fANOVA); empty when too few trials are complete."""
        complete = [each for each in self._study.get_trials(deepcopy=False) if each.state == TrialState.COMPLETE]
        if len(complete) < 8 or len({each.value for each in complete}) < 3:
            return {}
        try:
            return dict(optuna.importance.get_param_importances(self._study))
        except (ValueError, RuntimeError, ZeroDivisionError):
            return {}  # no knob is shared by all complete trials

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

    def _params(self, candidate: Candidate) -> dict[str, Any]:
        name = str(candidate.target)
        params: dict[str, Any] = {}
        if len(self.space.targets) > 1:
            params["target"] = name
        if candidate.target in self.space.targets:
            for knob in self.space.knobs_of(candidate.target):
                value = candidate.config.get(knob.name)
                value = knob.default if value is None else value
                if value is not None:
                    params[f"{name} {knob.name}"] = value
            if len(self.space.precisions[name]) > 1:
                params[f"{name} precision"] = candidate.config.precision
        if len(self.space.batches) > 1 and candidate.batch in self.space.batches:
            params["batch index"] = list(self.space.batches).index(candidate.batch)
        if self.space.most_callers > 1:
            params["callers"] = candidate.callers
        return params


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
