"""Several objectives in the summary: the front, its ends, what mattered, and what comes nearest where nothing fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aivmm.planner.choice import relaxed
from aivmm.planner.constraints import TARGETS, human
from aivmm.planner.objectives import Objective
from aivmm.planner.records import StudyRecord
from aivmm.tuner.proof import Entrant, Proof, constraint_metrics

_SHOWN_KNOBS = 3
_NAMED = {"p99": "p99 {}", "memory": "{} of memory", "energy": "{} a sample", "compile": "{} to compile", "size": "{} on disk"}


def figure(entrant: Entrant, objective: Objective) -> str:
    """Return what was proven of an entrant in an objective, in words."""
    value = constraint_metrics(entrant).get(objective.metric, math.nan)
    text = human(value, objective.metric)
    return {"throughput": f"{text.removesuffix('/s')} samples/s", "accuracy": f"cosine {text}"}.get(objective.name, text)


def alternatives_text(proof: Proof, objectives: Sequence[Objective], describe: Mapping[str, str]) -> str:
    """Say what the plan can be traded for; "" for a single objective. `describe` is by draft name."""
    if len(objectives) < 2:
        return ""
    if not proof.alternatives:
        return f"Nothing proven beats it in {' or '.join(each.what for each in objectives[1:])}."
    parts = [f"{describe[each.draft.name]} ({_figures(each, objectives)})" for each in proof.alternatives]
    mine = f" ({_figures(proof.plan, objectives)})" if proof.plan else ""
    return f"The plan{mine} keeps {len(parts)} {'alternative' if len(parts) == 1 else 'alternatives'}: {'; '.join(parts)}."


def _figures(entrant: Entrant, objectives: Sequence[Objective]) -> str:
    """Return what was proven of an entrant in each objective; where two are times, or two are sizes, each says of what."""
    return ", ".join(_NAMED.get(each.name, "{}").format(figure(entrant, each)) for each in objectives)


def tradeoffs_json(
    proof: Proof,
    objectives: Sequence[Objective],
    study: StudyRecord,
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    best: Mapping[str, str],
) -> dict[str, Any]:
    """Return the keys of `tune --json` for what several objectives came to; `stages` and `best` are by draft name."""
    return {
        "objectives": [each.name for each in objectives],
        "alternatives": [
            {
                "name": each.draft.name,
                "objective": best[each.draft.name],
                "batch": each.draft.batch,
                "callers": each.draft.callers,
                "stages": list(stages[each.draft.name]),
                "metrics": constraint_metrics(each),
            }
            for each in proof.alternatives
        ],
        "importance": [asdict(each) for each in study.importance],
        "front": list(study.front),
    }


def nearest_json(nearest: Entrant | None, proof: Proof, shown: str, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the keys of `tune --json` for a tuning without a plan: the limits that bind, and what comes nearest."""
    misfit = proof.misfit
    found: dict[str, Any] = {"binding_constraints": [str(each) for each in (misfit.alone or misfit.together)] if misfit else []}
    if nearest is None:
        return {**found, "nearest": None}
    violations = proof.violations[nearest.draft.name]
    found["nearest"] = {
        "description": shown,
        "batch": nearest.draft.batch,
        "callers": nearest.draft.callers,
        "stages": list(stages),
        "metrics": constraint_metrics(nearest),
        "violations": [
            {
                "constraint": str(each.constraint),
                "value": None if each.value is None or math.isnan(each.value) else each.value,
                "limit": None if each.constraint.metric == TARGETS else each.constraint.limit,
                "percent": each.percent if math.isfinite(each.percent) else None,
                "sentence": each.sentence,
            }
            for each in violations
        ],
        "would_do": relaxed(violations) or None,
    }
    return found


def importance_text(study: StudyRecord) -> str:
    """Say which knobs mattered most on the target that was tried most; "" where too few trials were made to tell."""
    alone = [each for each in study.importance if each.target and each.objective == study.objectives[0]]
    if not alone:
        return ""
    most = max(each.trials for each in alone)
    target = next(each.target for each in alone if each.trials == most)
    top = sorted((each for each in alone if each.target == target), key=lambda each: -each.share)[:_SHOWN_KNOBS]
    shares = ", ".join(f"{each.knob} {each.share:.0%}" for each in top)
    return f"what mattered on {target}, by {most} trials: {shares}"
