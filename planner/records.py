"""What a tuning run leaves behind besides probes: the run, its trials, its proofs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from aivmm.models.records import ModelFacts
from aivmm.probes.records import Caution, Samples
from aivmm.runtime.config import Config

Verdict = Literal["faster", "slower", "same", "ambiguous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One tuning. `request` is the digest of all that decides what it searches: the same request again measures nothing but the proof."""

    id: str  # UUID
    request: str
    started_at: datetime  # UTC
    finished_at: datetime | None = None
    status: Literal["running", "searched", "complete", "infeasible", "interrupted", "failed"] = "running"
    model: ModelFacts
    objective: str
    constraints: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # as given, JSON values
    command: str = ""
    seed: int = 0
    aivmm_version: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)  # the object of `tune --json`
    notes: tuple[str, ...] = ()  # what a reader should know: refused targets, defaults assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One point of the search. `value` is the ratio of its time per sample to the reference's of the same race: below 1 is faster."""

    number: int
    target: str
    config: Config
    batch: int
    callers: int
    state: Literal["complete", "pruned", "refused", "failed"]
    value: float | None
    low: float | None = None  # 95 % interval of the ratio
    high: float | None = None
    median_s: float | None = None
    reused: bool = False  # taken from the database, not measured in this run
    reason: str = ""  # why refused, failed or pruned
    seconds: float = 0.0
    asked: bool = False  # by the search; else it was known before, a baseline or a row of the database
    policy: Mapping[str, Any] | None = None  # of what is cut (see `planner.candidates.Policy`), replicated, or deeper than 1
    metrics: Mapping[str, float] = field(default_factory=dict)  # by the names that constraints use, in SI units

    @property
    def replicas(self) -> int:
        """How many copies of the whole ran side by side."""
        return int((self.policy or {}).get("replicas", 1))

    @property
    def depth(self) -> int:
        """How many requests each stage and replica of a pipeline had in flight."""
        return int((self.policy or {}).get("depth", 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How much of the variation in one objective one knob explains, of 1 for all knobs of its target (of all targets: "")."""

    objective: str
    target: str
    knob: str
    share: float
    trials: int  # that it was computed from


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """What a search came to. `front` are the numbers of the trials that none beats in all objectives."""

    name: str = "search"
    objectives: tuple[str, ...] = ()
    front: tuple[int, ...] = ()
    importance: tuple[Importance, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofRecord:
    """The end-to-end measurement of one bundle, interleaved with the others of the same run.

    `samples` are durations of one call of the engine with a whole batch; with several callers the times between two answers, and a call
    takes `callers` times as long. `verdict` is of the plan against this one, `ratio` this one's time
    over the plan's: above 1 the plan is faster. Both are None on the plan itself.
    """

    name: str
    role: Literal["plan", "baseline", "candidate"]
    target: str  # several are joined by " + "
    config: Config
    batch: int
    callers: int
    eligible: bool
    why_not: str = ""
    samples: Samples | None = None  # None when it could not run; `why_not` says why
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    verdict: Verdict | None = None
    metrics: Mapping[str, float] = field(
        default_factory=dict
    )  # throughput_per_s, peak_memory_bytes, compile_s, first_inference_s, cosine, ...
    cautions: tuple[Caution, ...] = ()
