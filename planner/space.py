"""The space of a search: which points there are, and how Optuna's parameters spell them.

What cannot be is not representable (one batch, one precision: no parameter). Ordered knobs are integer or float distributions. A target's
knobs are parameters of its own, which whole and cut models share; they count only where the target takes part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from aivmm.planner.candidates import Candidate, Policy
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.target import Target

Params = dict[str, Any]


class _Asked(Protocol):
    """What answers with values: an Optuna trial, or a point that is known."""

    def suggest(self, name: str, known: BaseDistribution) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What may be searched: per target its knobs, the precisions, batches and numbers of callers allowed, and how the model may be cut.

    `cut_prices` and `batches` ascend. Cuts, depths and replicas are searched where their limit is above 1.
    """

    targets: Sequence[Target]
    knobs: Mapping[str, Sequence[Knob]]  # by str(target)
    objective: str
    precisions: Mapping[str, Sequence[str | None]]  # by str(target); None leaves it to the runtime
    batches: Sequence[int] = (1,)
    most_callers: int = 1
    most_pieces: int = 1
    cut_prices: Sequence[float] = (1.0,)
    contiguous: Sequence[bool] = (True, False)
    most_depth: int = 1
    most_replicas: int = 1
    replicated: Collection[str] | None = None  # by str(target): those that may run in several replicas; by default all
    placed: Policy | None = None  # what all points run, where the placement is given: how deep is then all there is to search
    defaults: Mapping[str, str] = field(default_factory=dict)  # by str(target): the precision that a runtime left alone computes in

    def size(self) -> float:
        """Return how many points there are; infinite when a knob is continuous, or the model may be cut."""
        if self.placed is not None:
            return self.most_depth
        if self.cuts:
            return math.inf
        total = 0.0
        for target in self.targets:
            points = float(len(self.precisions[str(target)]))
            for knob in self.knobs_of(target):
                points *= math.inf if knob.kind == "float" else len(knob.choices) or int(knob.high - knob.low + 1)
            total += points * self._loads([str(target)])
        return total * len(self.batches)

    @property
    def cuts(self) -> bool:
        """True when there are cut models among the points."""
        return self.most_pieces > 1 and len(self.targets) > 1

    def replicas_of(self, target: Target) -> int:
        """Return the most replicas of the whole model that a point has on a target."""
        return self._most_replicas([str(target)])

    def _most_replicas(self, taking: Iterable[str]) -> int:
        return self.most_replicas if self.replicated is None or set(taking) <= set(self.replicated) else 1

    def _loads(self, taking: Iterable[str]) -> int:
        """Return how many pairs of callers and replicas there are. Where callers are searched, a replica without one would idle."""
        most = self._most_replicas(taking)
        return sum(min(callers, most) for callers in range(1, self.most_callers + 1)) if self.most_callers > 1 else most

    def knobs_of(self, target: Target) -> list[Knob]:
        """Return the knobs of a target that serve the objective and a precision that is searched, and have more than one value."""
        families = {(precision or "").partition(":")[0] for precision in self.precisions[str(target)]}
        mine = (knob for knob in self.knobs[str(target)] if not knob.families or not families.isdisjoint(knob.families))
        found = (knob for knob in mine if self.objective in knob.objectives)
        return [knob for knob in found if (len(knob.choices) > 1 if knob.kind == "choice" else knob.high > knob.low)]

    def point(self, asked: _Asked) -> Candidate:
        """Return the candidate that an answerer's values spell."""
        if self.placed is not None:
            (first, config), *_ = self.placed.targets
            depth = asked.suggest("depth", IntDistribution(1, self.most_depth))
            return Candidate(target=first, config=config, batch=self.batches[0], policy=self.placed, depth=depth)
        pieces = asked.suggest("pieces", IntDistribution(1, self.most_pieces)) if self.cuts else 1
        names = [str(target) for target in self.targets]
        name = names[0] if len(names) == 1 else asked.suggest("target", CategoricalDistribution(names))
        taking = [name]
        if pieces > 1:
            others = [other for other in names if other != name]
            # Of two targets both take part; a cut model on one target only is the whole model there.
            taking += [each for each in others if len(names) == 2 or asked.suggest(f"with {each}", IntDistribution(0, 1))]
        chosen = {each: self._config(asked, self.targets[names.index(each)]) for each in taking}
        batch = self.batches[asked.suggest("batch index", IntDistribution(0, len(self.batches) - 1))] if len(self.batches) > 1 else 1
        counts = {"callers": self.most_callers, "replicas": self._most_replicas(taking)}
        found = {each: asked.suggest(each, IntDistribution(1, most)) if most > 1 else 1 for each, most in counts.items()}
        if self.most_callers > 1:
            found["callers"] = max(found.values())
        policy, depth = None, 1
        if pieces > 1:
            policy = self._policy(asked, pieces, chosen)
            depth = asked.suggest("depth", IntDistribution(1, self.most_depth)) if self.most_depth > 1 else 1
        if policy is None:
            first, config, depth = self.targets[names.index(name)], chosen[name], 1
        else:
            first, config = policy.targets[0]
        batch = batch if len(self.batches) > 1 else self.batches[0]
        return Candidate(target=first, config=config, batch=batch, policy=policy, depth=depth, **found)

    def _config(self, asked: _Asked, target: Target) -> Config:
        name = str(target)
        settings: dict[str, Setting] = {}
        for knob in self.knobs_of(target):
            value = asked.suggest(f"{name} {knob.name}", distribution(knob))
            if value != knob.default:
                settings[knob.name] = value
        precisions = list(self.precisions[name])
        single = len(precisions) == 1
        return Config.of(
            settings, precision=precisions[0] if single else asked.suggest(f"{name} precision", CategoricalDistribution(precisions))
        )

    def _policy(self, asked: _Asked, pieces: int, chosen: Mapping[str, Config]) -> Policy | None:
        """Return the policy, or None where one target is left, which has nothing to be cut between."""
        price = self.cut_prices[0]
        if len(self.cut_prices) > 1:
            price = self.cut_prices[asked.suggest("cut price index", IntDistribution(0, len(self.cut_prices) - 1))]
        one_each = self.contiguous[0]
        if len(self.contiguous) > 1:
            one_each = asked.suggest("contiguous", CategoricalDistribution(list(self.contiguous)))
        if len(chosen) == 1:
            return None
        ordered = tuple((target, chosen[str(target)]) for target in self.targets if str(target) in chosen)
        most = min(pieces, len(ordered)) if one_each else pieces
        return Policy(targets=ordered, most_pieces=most, cut_price=price, contiguous=one_each)

    def params(self, candidate: Candidate) -> Params | None:
        """Return a candidate as parameters, without those that only the library knows; None when it lies outside the space."""
        if self.placed is not None:
            inside = candidate.policy == self.placed and candidate.batch in self.batches and 1 <= candidate.depth <= self.most_depth
            return {"depth": candidate.depth} if inside else None
        names = [str(target) for target in self.targets]
        taking = ((candidate.target, candidate.config),) if candidate.policy is None else candidate.policy.targets
        most_replicas = self._most_replicas(str(target) for target, _ in taking)
        counted = (
            (candidate.callers, self.most_callers),
            (candidate.replicas, most_replicas),
            (candidate.depth, self.most_depth if candidate.policy else 1),
        )
        if candidate.batch not in self.batches or any(not 1 <= count <= most for count, most in counted):
            return None
        params: Params = {"target": str(taking[0][0])} if len(names) > 1 else {}
        for target, config in taking:
            mine = self._known(target, config) if target in self.targets else None
            if mine is None:
                return None
            params |= mine
        if self.cuts:
            params["pieces"] = candidate.policy.most_pieces if candidate.policy else 1
        if candidate.policy is not None and not self._spell_policy(candidate, params):
            return None
        if len(self.batches) > 1:
            params["batch index"] = list(self.batches).index(candidate.batch)
        if self.most_callers > 1:
            params["callers"] = candidate.callers
        if most_replicas > 1:
            params["replicas"] = candidate.replicas
        return params

    def _known(self, target: Target, config: Config) -> Params | None:
        name, knobs = str(target), {knob.name: knob for knob in self.knobs_of(target)}
        precisions = list(self.precisions[name])
        # Leaving the choice to the runtime and asking for what it then computes in are the same, and are measured once.
        native = target.precisions
        default = native[0] if len(native) == 1 else self.defaults.get(name)
        precision = default if config.precision is None and None not in precisions else config.precision
        if precision not in precisions or any(setting not in knobs for setting, _ in config.settings):
            return None
        params: Params = {}
        for knob in knobs.values():
            value = config.get(knob.name)
            value = knob.default if value is None else value
            if value is None:
                continue
            if not _fits(knob, value):
                return None
            params[f"{name} {knob.name}"] = value
        if len(precisions) > 1:
            params[f"{name} precision"] = precision
        return params

    def _spell_policy(self, candidate: Candidate, params: Params) -> bool:
        policy = candidate.policy
        assert policy is not None
        outside = policy.cut_price not in self.cut_prices or policy.contiguous not in self.contiguous
        if not self.cuts or outside or not 1 < policy.most_pieces <= self.most_pieces:
            return False
        names = [str(target) for target, _ in policy.targets]
        if len(self.targets) > 2:
            params |= {f"with {target}": int(str(target) in names) for target in self.targets if str(target) != names[0]}
        if len(self.cut_prices) > 1:
            params["cut price index"] = list(self.cut_prices).index(policy.cut_price)
        if len(self.contiguous) > 1:
            params["contiguous"] = policy.contiguous
        if self.most_depth > 1:
            params["depth"] = candidate.depth
        return True

    def every(self) -> dict[str, BaseDistribution]:
        """Return the distributions of all parameters that any point has."""
        if self.placed is not None:
            return {"depth": IntDistribution(1, self.most_depth)}
        names = [str(target) for target in self.targets]
        found: dict[str, BaseDistribution] = {}
        if len(names) > 1:
            found["target"] = CategoricalDistribution(names)
        for target in self.targets:
            found |= {f"{target} {knob.name}": distribution(knob) for knob in self.knobs_of(target)}
            if len(self.precisions[str(target)]) > 1:
                found[f"{target} precision"] = CategoricalDistribution(list(self.precisions[str(target)]))
        counts = {"callers": self.most_callers, "replicas": self.most_replicas}
        if self.cuts:
            counts |= {"pieces": self.most_pieces, "depth": self.most_depth}
            found |= {f"with {name}": IntDistribution(0, 1) for name in names if len(names) > 2}
            if len(self.contiguous) > 1:
                found["contiguous"] = CategoricalDistribution(list(self.contiguous))
            if len(self.cut_prices) > 1:
                found["cut price index"] = IntDistribution(0, len(self.cut_prices) - 1)
        found |= {name: IntDistribution(1, most) for name, most in counts.items() if most > 1}
        if len(self.batches) > 1:
            found["batch index"] = IntDistribution(0, len(self.batches) - 1)
        return found

    def canonical(self, params: Params) -> Candidate:
        """Return the candidate of parameters as `point` spells it; what only the library knows stays unsaid."""
        return self.point(_Spelled(params))

    def distributions(self, params: Params) -> dict[str, BaseDistribution] | None:
        """Return the distributions of the parameters that the point of `params` has; None where `params` does not hold them all."""
        spelled = _Spelled(params)
        self.point(spelled)
        return spelled.asked if set(spelled.asked) == set(params) else None


class _Spelled:
    """Answers from parameters; notes what it was asked for. What is not known has no value, and no knob has that for a default but one
    whose default only the library knows."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self.asked: dict[str, BaseDistribution] = {}

    def suggest(self, name: str, known: BaseDistribution) -> Any:
        self.asked[name] = known
        return self._params.get(name)


def _fits(knob: Knob, value: Setting) -> bool:
    if knob.kind == "choice":
        return value in knob.choices
    return isinstance(value, int | float) and knob.low <= value <= knob.high


@cache
def distribution(knob: Knob) -> BaseDistribution:
    """Return the Optuna distribution of a knob."""
    if knob.kind == "int":
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log)
    if knob.kind == "float":
        return FloatDistribution(knob.low, knob.high, log=knob.log)
    return CategoricalDistribution(knob.choices)
