"""What a report is made of: the stored rows of one run, and nothing else. Importing this needs neither Matplotlib nor Jinja."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aivmm.models.records import Structure
from aivmm.planner.records import ProofRecord, RunRecord, TrialRecord
from aivmm.probes.records import Outcome, ProbeKey
from aivmm.runtime.environment import Environment
from aivmm.runtime.target import Unavailable


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The rows of one run. Equal data renders to equal bytes.

    `outcomes` are the whole-model, segment and operator probes of the environments of this run: unlike environments never merge, so the
    caller picks the rows. `plan` is the content of `plan.json`, read tolerantly; without it the stages come from `run.summary`.
    """

    run: RunRecord
    generated_at: datetime  # UTC
    structure: Structure | None = None
    environments: tuple[Environment, ...] = ()
    unavailable: tuple[Unavailable, ...] = ()
    proofs: tuple[ProofRecord, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    plan: Mapping[str, Any] | None = None
    reused: frozenset[ProbeKey] = frozenset()  # probes taken from the database, not measured in this run

    @property
    def planned(self) -> ProofRecord | None:
        """The proof of the plan itself; None when no plan was proven."""
        return next((proof for proof in self.proofs if proof.role == "plan"), None)

    @property
    def has_plan(self) -> bool:
        """True when a plan was written."""
        return bool(self.plan) or bool(self.run.summary.get("plan"))

    @property
    def targets(self) -> tuple[str, ...]:
        """Every single target that any row names, the plan's first, then in order of appearance."""
        named = [stage_target(place) for stage in self.stages for place in places_of(stage)]
        named += [environment.target for environment in self.environments]
        for proof in self.proofs:
            named += proof.target.split(" + ")
        named += [trial.target for trial in self.trials]
        named += [outcome.key.target for outcome in self.outcomes]
        return tuple(dict.fromkeys(name for name in named if name))

    @property
    def stages(self) -> tuple[Mapping[str, Any], ...]:
        """The plan's stages as stored; empty without a plan."""
        for source in (self.plan, self.run.summary.get("plan")):
            stages = source.get("stages") if isinstance(source, Mapping) else None
            if isinstance(stages, (list, tuple)) and stages:
                return tuple(stage for stage in stages if isinstance(stage, Mapping))
        return ()


def throughput_wanted(data: ReportData) -> bool:
    """Say whether the objective counts samples a second, so that higher is better."""
    return data.run.objective.partition(",")[0] == "throughput"


def call_s(proof: ProofRecord) -> float | None:
    """Return the median duration of one call, in seconds: with several callers the time between two answers holds one of each."""
    return proof.samples.median_s * proof.callers if proof.samples is not None else None


def rate_of(proof: ProofRecord) -> float | None:
    """Return the samples a second that a proof measured."""
    stated = proof.metrics.get("throughput_per_s")
    return stated or (proof.batch / proof.samples.median_s if proof.samples is not None else None)


def stage_target(stage: Mapping[str, Any]) -> str:
    """Return a stage's target as text; empty when the stage names none."""
    target = stage.get("target", "")
    if isinstance(target, Mapping):
        return f"{target.get('runtime', '')}:{target.get('name', '')}"
    return str(target)


def places_of(stage: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return all that runs a stage: itself, then its copies as far as they can be read."""
    copies = stage.get("copies")
    return (stage, *(each for each in copies if isinstance(each, Mapping))) if isinstance(copies, (list, tuple)) else (stage,)


def dig(source: Any, *path: str) -> Any:
    """Return the value at `path` in nested mappings, or None where any step is missing."""
    for step in path:
        if not isinstance(source, Mapping):
            return None
        source = source.get(step)
    return source


def number(value: Any) -> float | None:
    """Return `value` as a finite float, or None when it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return float(value)
