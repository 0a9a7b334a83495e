"""The proof: each finalist and each baseline as a bundle, loaded by the engine in a worker of its own, and raced on fresh samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Draft
from aivmm.planner.constraints import Constraint, Violation, check, unjudged
from aivmm.planner.records import ProofRecord
from aivmm.probes.client import Worker, WorkerDied
from aivmm.probes.compare import Comparison, cautions, compare, median_interval
from aivmm.probes.lab import COMPILE_LIMIT_S
from aivmm.probes.machine import BackgroundLoad, machine_cautions
from aivmm.probes.operations import BATCH_BELOW_S
from aivmm.probes.race import Contestant, RaceState, block_s, leader_of, per_sample_s, race, versus
from aivmm.probes.records import Caution, Samples
from aivmm.runtime.cpu import usable_cores

# Seconds of racing: as many as the entrants' own speed asks for, within these. Loading, the tail and the report come on top.
_LEAST_S, _MOST_S = 6.0, 15.0
_ROUNDS = 15
_SWITCH_S = 0.03  # between two workers: until the one before has stopped spinning
TAIL_SAMPLES = 500  # below this a 99th percentile is not given
TAIL_S = 3.0
TAIL_ASKED_S = 40.0  # when a constraint asks for it


@dataclass(slots=True)
class Entrant:
    """A written bundle in the proof."""

    draft: Draft
    role: str  # "candidate" or "baseline"
    bundle: Path
    size_bytes: int
    sample: Path
    reference: Path
    samples: Sequence[Path] = ()
    references: Sequence[Path] = ()
    worker: Worker | None = None
    contestant: Contestant | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""  # why it cannot be the plan; "" when nothing is against it
    fatal: bool = False  # it could not run at all
    choosing: Samples | None = None  # of the first race
    confirmed: Samples | None = None  # of the second, which chose nothing

    @property
    def running(self) -> bool:
        """True while it can be measured."""
        return self.contestant is not None and self.contestant.failed is None

    @property
    def eligible(self) -> bool:
        """True when it may be the plan, as far as accuracy goes."""
        return self.running and not self.problem


@dataclass(slots=True)
class Proof:
    """What the proof found. `plan` is what to emit; None when nothing meets the constraints."""

    entrants: list[Entrant]
    plan: Entrant | None = None
    best_baseline: Entrant | None = None
    beaten: bool = False  # a candidate of the search beat the best eligible baseline beyond noise
    challenger: Comparison | None = None  # the best candidate against the best baseline
    violations: dict[str, tuple[Violation, ...]] = field(default_factory=dict)  # by draft name
    cautions: tuple[Caution, ...] = ()

    def records(self) -> list[ProofRecord]:
        """Return what the database keeps."""
        return [self._record(each) for each in self.entrants]

    def against(self, entrant: Entrant) -> Comparison | None:
        """Compare the plan's time per sample with an entrant's."""
        if self.plan is None or self.plan.confirmed is None or entrant.confirmed is None:
            return None
        return compare(self.plan.confirmed, entrant.confirmed, scale=entrant.draft.batch / self.plan.draft.batch)

    def _record(self, entrant: Entrant) -> ProofRecord:
        found = self.against(entrant) if entrant is not self.plan else None
        first = entrant.draft.pieces[0]
        against = "; ".join(each.sentence for each in self.violations.get(entrant.draft.name, ()))
        known: dict[str, Any] = {}
        if found is not None:
            # The other way round: how many times the plan's time this one takes.
            known = {"ratio": 1 / found.ratio, "ratio_low": 1 / found.high, "ratio_high": 1 / found.low, "verdict": found.verdict}
        return ProofRecord(
            name=entrant.draft.name,
            role="plan" if entrant is self.plan else "baseline" if entrant.role == "baseline" else "candidate",
            target=entrant.draft.targets,
            config=first.config,
            batch=entrant.draft.batch,
            callers=entrant.draft.callers,
            eligible=entrant.eligible and not against,
            why_not=entrant.problem or against or (entrant.contestant.dropped if entrant.contestant else ""),
            samples=entrant.confirmed or entrant.choosing,
            metrics=entrant.metrics,
            cautions=(*(cautions(entrant.confirmed) if entrant.confirmed else ()), *self.cautions),
            **known,
        )


class Prover:
    """Loads entrants, races them twice (to choose, then to confirm on fresh samples), and decides."""

    def __init__(
        self,
        entrants: Sequence[Entrant],
        *,
        constraints: Sequence[Constraint],
        cosine_limit: float | None,
        seed: int,
        tell: Callable[[str, RaceState | None], None],
        forced: bool = False,
    ) -> None:
        self._proof = Proof(entrants=list(entrants))
        self._constraints = constraints
        self._cosine_limit = cosine_limit
        self._seed = seed
        self._tell = tell
        self._forced = forced
        self._asks_tail = any(constraint.metric == "p99" for constraint in constraints)

    def run(self) -> Proof:
        """Prove. The workers are ended in any case."""
        entrants = self._proof.entrants
        try:
            self._tell("loading the finalists and the baselines", None)
            with ThreadPoolExecutor(max_workers=2) as pool:
                list(pool.map(self._load, entrants))
            contestants = [each.contestant for each in entrants if each.contestant is not None]
            if contestants:
                self._race(contestants)
                self._decide()
        finally:
            for each in entrants:
                if each.worker is not None:
                    each.worker.close()
        return self._proof

    def _load(self, entrant: Entrant) -> None:
        entrant.worker = Worker(f"proof of {entrant.draft.name}")
        try:
            answer = entrant.worker.call(
                "load_bundle",
                limit_s=COMPILE_LIMIT_S,
                name="engine",
                bundle=str(entrant.bundle),
                inputs=str(entrant.sample),
                reference=str(entrant.reference),
            )
            accuracy, problem = answer["accuracy"], answer["problem"]
            for sample, reference in zip(entrant.samples, entrant.references, strict=True):
                again = entrant.worker.call("judge", limit_s=COMPILE_LIMIT_S, name="engine", inputs=str(sample), reference=str(reference))
                problem = problem or again["problem"]
                accuracy = _worse(accuracy, again["accuracy"])
        except (WorkerDied, AivmmError) as error:
            entrant.problem = f"{error.reason}" if isinstance(error, WorkerDied) else error.message
            entrant.fatal = True
            return
        entrant.metrics = {
            "load_s": answer["load_s"],
            "compile_s": answer["compile_s"],
            "first_inference_s": answer["first_inference_s"],
            "size_bytes": float(entrant.size_bytes),
            **accuracy,
        }
        if self._cosine_limit is not None:
            if problem:
                entrant.problem = problem
            elif accuracy["cosine"] < self._cosine_limit:
                entrant.problem = f"cosine {accuracy['cosine']:.5f} is below the limit of {self._cosine_limit:g}"
        if answer["events"] and any("fallback" in event for event in answer["events"]):
            entrant.problem = "; ".join(answer["events"])
        expected = answer["first_inference_s"]
        entrant.contestant = Contestant(
            "engine",
            entrant.worker,
            batch=entrant.draft.batch,
            callers=entrant.draft.callers,
            expected_s=expected,
            keep=entrant.role == "baseline",
        )

    def _race(self, contestants: list[Contestant]) -> None:
        pids = [each.worker.pid for each in contestants]
        load = BackgroundLoad(pids)
        finalists = [
            each.contestant for each in self._proof.entrants if each.role == "candidate" and each.eligible and each.contestant is not None
        ]
        next_round = 0
        if len(finalists) > 1:
            # First to choose among the finalists ...
            next_round = race(
                finalists,
                budget_s=0.6 * _racing_s(finalists),
                least_rounds=6,
                most_rounds=20,
                seed=self._seed,
                tell=lambda state: self._tell("choosing among the finalists", state),
            )
            chosen = leader_of(finalists)
            for each in finalists:
                if each is not chosen:
                    each.dropped = each.dropped or "another candidate was faster"
        # ... then, on samples that chose nothing, to confirm.
        for entrant in self._proof.entrants:
            entrant.choosing = entrant.contestant.samples() if entrant.contestant else None
        for each in contestants:
            each.durations.clear()
            each.rounds.clear()
        race(
            contestants,
            budget_s=_racing_s([each for each in contestants if each.racing]),
            least_rounds=10,
            most_rounds=40,
            seed=self._seed + 1,
            first_round=next_round,
            tell=lambda state: self._tell("proving the plan against the baselines", state),
        )
        self._proof.cautions = machine_cautions(load.read(pids), usable_cores())
        for entrant in self._proof.entrants:
            if entrant.contestant is None:
                continue
            if entrant.contestant.failed is not None:
                entrant.problem, entrant.fatal = entrant.contestant.failed.reason, True
                continue
            entrant.confirmed = entrant.contestant.samples()
            self._measure(entrant)

    def _measure(self, entrant: Entrant) -> None:
        if entrant.confirmed is None or entrant.contestant is None:
            return
        samples = entrant.confirmed
        entrant.metrics |= {
            "latency_s": samples.median_s * (entrant.draft.callers if entrant.draft.callers > 1 else 1),
            "throughput_per_s": entrant.draft.batch / samples.median_s,
            "peak_memory_bytes": float(entrant.contestant.memory_bytes),
        }

    def _decide(self) -> None:
        proof = self._proof
        measured = [each for each in proof.entrants if each.eligible and each.confirmed is not None]
        for each in measured:
            self._tail(each, wanted=self._asks_tail)
            metrics, targets = constraint_metrics(each), [str(piece.target) for piece in each.draft.pieces]
            found = check(self._constraints, metrics, targets=targets)
            for missing in unjudged(self._constraints, metrics, targets=targets):
                sentence = f"{missing.metric} could not be measured in the time there is, so {missing} is not shown to hold"
                found = (*found, Violation(constraint=missing, value=math.nan, percent=math.inf, sentence=sentence))
            if found:
                proof.violations[each.draft.name] = found
        allowed = [each for each in measured if each.draft.name not in proof.violations]
        baselines = [each for each in allowed if each.role == "baseline"]
        candidates = [each for each in allowed if each.role == "candidate"]
        proof.best_baseline = min(baselines, key=_time, default=None)
        best = min(candidates, key=_time, default=None)
        if best is not None and proof.best_baseline is not None:
            assert best.contestant and proof.best_baseline.contestant
            proof.challenger = versus(best.contestant, proof.best_baseline.contestant)
            proof.beaten = proof.challenger.verdict == "faster"
        if best is not None and (proof.best_baseline is None or proof.beaten or self._forced):
            proof.plan = best
        else:
            # A device name that only OpenVINO resolves at load is the last choice among equals: a plan should say where it runs.
            named = [each for each in baselines if not each.draft.targets.endswith(":AUTO")]
            real = min(named, key=_time, default=None)
            proof.plan = (
                real
                if real is not None and (proof.best_baseline is real or not _clearly_slower(real, proof.best_baseline))
                else proof.best_baseline
            )
        if proof.plan is not None:
            self._tail(proof.plan, wanted=True)

    def _tail(self, entrant: Entrant, *, wanted: bool) -> None:
        """Run on until there are enough samples for a 99th percentile, where that takes seconds only."""
        contestant = entrant.contestant
        if not wanted or contestant is None or entrant.draft.callers > 1 or entrant.confirmed is None:
            return
        median = entrant.confirmed.median_s
        # Below 100 µs the durations of a race are means of several calls, and a mean has no tail.
        durations = list(entrant.confirmed.timed_s) if median >= BATCH_BELOW_S else []
        missing = TAIL_SAMPLES - len(durations)
        if missing > 0 and median * missing <= (TAIL_ASKED_S if self._asks_tail else TAIL_S):
            try:
                answer = contestant.worker.call("timed", limit_s=60 + TAIL_ASKED_S, name="engine", seconds=0.0, least=missing, each=True)
            except WorkerDied:
                return  # the confirmed samples stand; the tail is then not known
            durations += answer["durations"]
        if len(durations) >= TAIL_SAMPLES:
            entrant.metrics["p99_s"] = Samples(timed_s=tuple(durations)).quantile_s(0.99)


def constraint_metrics(entrant: Entrant) -> dict[str, float]:
    """Return an entrant's metrics under the names that constraints use."""
    names = {
        "latency": "latency_s",
        "p99": "p99_s",
        "throughput": "throughput_per_s",
        "memory": "peak_memory_bytes",
        "size": "size_bytes",
        "compile": "compile_s",
        "first_inference": "first_inference_s",
        "cosine": "cosine",
    }
    return {ours: entrant.metrics[theirs] for ours, theirs in names.items() if theirs in entrant.metrics}


def _racing_s(contestants: Sequence[Contestant]) -> float:
    """Return how long to race: so many rounds as make an interval, within limits that keep the whole proof below 30 s."""
    return min(_MOST_S, max(_LEAST_S, _ROUNDS * sum(block_s(each.expected_s, each.callers) + _SWITCH_S for each in contestants)))


def interval_s(entrant: Entrant) -> tuple[float, float]:
    """Return the 95 % interval of the median duration of one call."""
    assert entrant.confirmed
    return median_interval(entrant.confirmed)


def _time(entrant: Entrant) -> float:
    assert entrant.contestant
    return per_sample_s(entrant.contestant)


def _clearly_slower(entrant: Entrant, other: Entrant | None) -> bool:
    if other is None or other.contestant is None or entrant.contestant is None:
        return False
    return versus(entrant.contestant, other.contestant).verdict == "slower"


def _worse(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    worst = {}
    for name in a.keys() | b.keys():
        pick = min if name == "cosine" else max
        worst[name] = pick(a.get(name, math.nan), b.get(name, math.nan)) if name in a and name in b else a.get(name, b.get(name, math.nan))
    return worst
