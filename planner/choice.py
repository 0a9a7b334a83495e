"""Choosing among what was proven: who keeps the limits, who runs on the hardware that is wanted first, who serves the objective best.

Pure: an option is its numbers. Where speed decides, the races do (`tuner.prove`), among those that are left here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aivmm.planner.constraints import TARGETS, Constraint, Violation, check, human, parse, unjudged
from aivmm.planner.objectives import Objective
from aivmm.planner.pareto import front
from aivmm.runtime.target import matches

K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run the model: its metrics by the names that constraints use, in SI units, and its targets."""

    metrics: Mapping[str, float]
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Why nothing fits. `alone`: limits that nothing keeps; else `together` are kept by something each, and by nothing all at once."""

    alone: tuple[Constraint, ...]
    together: tuple[Constraint, ...]

    def __str__(self) -> str:
        if self.alone:
            return f"nothing that was proven keeps {' or '.join(map(_as_asked, self.alone))}"
        return f"nothing that was proven keeps {' and '.join(map(_as_asked, self.together))} at once, though each is kept by something"


def _as_asked(constraint: Constraint) -> str:
    return constraint.text or str(constraint)  # the canonical form is exact and may read badly: 0.1ms is 100000ns


def violated(option: Option, constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
    """Return the limits that an option breaks, or cannot be shown to keep."""
    broken = [each.constraint for each in check(constraints, option.metrics, targets=option.targets)]
    return (*broken, *unjudged(constraints, option.metrics, targets=option.targets))


def rank(targets: Sequence[str], prefer: Sequence[str]) -> int:
    """Return the place in the order of preference: that of the least wanted target. What no pattern names comes last."""
    places = [next((at for at, pattern in enumerate(prefer) if matches(pattern, target)), len(prefer)) for target in targets]
    return max(places, default=len(prefer))


def preferred(options: Mapping[K, Option], prefer: Sequence[str]) -> list[K]:
    """Return those that run on what is wanted most, of what there is."""
    ranks = {key: rank(option.targets, prefer) for key, option in options.items()}
    return [key for key, place in ranks.items() if place == min(ranks.values())]


def as_good(options: Mapping[K, Option], objective: Objective) -> list[K]:
    """Return those that no other one beats in the objective by more than its tolerance. Without numbers, all are."""
    losses = {key: objective.loss_of(option.metrics[objective.metric]) for key, option in options.items() if _known(option, objective)}
    if not losses:
        return list(options)
    least = min(losses.values())
    return [key for key, loss in losses.items() if loss <= least + math.log1p(objective.tolerance)]


def choose(
    options: Mapping[K, Option], constraints: Sequence[Constraint], objective: Objective, prefer: Sequence[str] = ()
) -> tuple[list[K], Misfit | None]:
    """Return the options that may be the plan: all limits kept, on what is wanted most, as good as any; or none, and what is in the way."""
    keeping = {key: option for key, option in options.items() if not violated(option, constraints)}
    if not keeping:
        return [], misfit(list(options.values()), constraints)
    wanted = preferred(keeping, prefer)
    return as_good({key: keeping[key] for key in wanted}, objective), None


def misfit(options: Sequence[Option], constraints: Sequence[Constraint]) -> Misfit | None:
    """Return why no option keeps all limits; None where one does, or there is no option."""
    broken = [set(violated(option, constraints)) for option in options]
    if not broken or any(not each for each in broken):
        return None
    alone = tuple(each for each in constraints if all(each in mine for mine in broken))
    together = tuple(each for each in constraints if any(each in mine for mine in broken))
    return Misfit(alone=alone, together=together)


def distance(violations: Sequence[Violation]) -> tuple[float, float]:
    """Return how far limits are broken, in percent: by the worst, then by all together. What comes nearest has the least.

    The worst counts to two digits: where all are far too large, a few bytes must not outweigh the time of a call.
    """
    found = [each.percent for each in violations]
    return float(f"{max(found, default=0.0):.1e}"), math.fsum(each for each in found if math.isfinite(each))


def relaxed(violations: Sequence[Violation]) -> str:
    """Return the limits that would let a misfit pass: `latency<=5.4ms, memory<=1.2GB`; "" where one of them has no number."""
    parts = []
    for each in violations:
        if each.value is None or math.isnan(each.value) or each.constraint.metric == TARGETS:
            return ""
        parts.append(_that_passes(each.value, each.constraint.metric, up=each.constraint.operator in ("<", "<=")))
    return ", ".join(parts)


def _that_passes(value: float, metric: str, *, up: bool) -> str:
    """Return a limit that `value` keeps, in as few digits as do: as text, it may round to the wrong side (200 s are 3.333 min)."""
    text = ""
    for digits in (4, 6, 9, 12, 17):
        text = f"{metric}{'<=' if up else '>='}{_just_past(value, metric, up=up, digits=digits)}"
        if not check(parse(text), {metric: value}):
            break
    return text


def _just_past(value: float, metric: str, *, up: bool, digits: int) -> str:
    """Return a number of three digits or so, on the side of the value that lets it pass, in `digits` digits."""
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value else 0.0
    if metric in ("cosine", "top1_agreement", "top5_agreement"):
        step = 1e-6  # near 1, three digits say nothing
    rounded = (math.ceil(value / step) if up else math.floor(value / step)) * step if step else value
    return human(rounded, metric, digits=digits).replace(" ", "")


def alternatives(options: Mapping[K, Option], plan: K, objectives: Sequence[Objective]) -> list[K]:
    """Return the Pareto front over the objectives, without the plan, and without what is nowhere better than the plan, or than another
    that is kept, by more than tolerance. What is best in an objective is kept before what is between."""
    losses = _losses(options, objectives)
    keys = list(losses)
    found = [key for at in front(list(losses.values())) if (key := keys[at]) != plan]
    margins = [math.log1p(each.tolerance) for each in objectives]

    def better(key: K, than: K) -> bool:
        return any(mine < theirs - margin for mine, theirs, margin in zip(losses[key], losses[than], margins, strict=True))

    first = [min(found, key=lambda key: (losses[key][at], math.fsum(losses[key]))) for at in range(len(objectives)) if found]
    kept: list[K] = []
    for key in dict.fromkeys((*first, *found)):
        if all(better(key, other) for other in (*kept, *([plan] if plan in losses else []))):
            kept.append(key)
    return [key for key in found if key in kept]


def best_in(options: Mapping[K, Option], plan: K, key: K, objectives: Sequence[Objective]) -> list[str]:
    """Return the objectives in which `key` is better than the plan by more than tolerance, and the best of all options; of equals the
    first one is."""
    found = []
    for each in objectives:
        losses = {name: loss for name, (loss,) in _losses(options, [each]).items()}
        beaten = plan not in losses or losses.get(key, math.inf) < losses[plan] - math.log1p(each.tolerance)
        if beaten and key == min(losses, key=losses.__getitem__, default=None):
            found.append(each.name)
    return found


def _losses(options: Mapping[K, Option], objectives: Sequence[Objective]) -> dict[K, list[float]]:
    """Return the losses of the options of which all objectives are known."""
    known = {key: option for key, option in options.items() if all(_known(option, each) for each in objectives)}
    return {key: [each.loss_of(option.metrics[each.metric]) for each in objectives] for key, option in known.items()}


def _known(option: Option, objective: Objective) -> bool:
    value = option.metrics.get(objective.metric, math.nan)
    return math.isfinite(value) and (value > 0 or objective.name == "accuracy")
