"""What a proof is made of: the entrants, what was measured of them, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from aivmm.planner.candidates import Draft
from aivmm.planner.choice import Misfit
from aivmm.planner.constraints import ACCURACY, Violation
from aivmm.planner.records import ProofRecord
from aivmm.probes.client import Worker
from aivmm.probes.compare import Comparison, cautions, compare, median_interval, rate_interval_s, rate_s, round_medians
from aivmm.probes.race import Contestant, by_of, versus
from aivmm.probes.records import Caution, Samples
from aivmm.runtime.target import Target


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
    extras: Sequence[Path | None] = ()  # what the user's data set says of `samples`, and then of `sample`
    judged: list[dict[str, float]] = field(default_factory=list)  # accuracy, sample by sample
    worker: Worker | None = None
    contestant: Contestant | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""  # why it cannot be the plan; "" when nothing is against it
    fatal: bool = False  # it could not run at all
    choosing: Samples | None = None  # of the first race
    confirmed: Samples | None = None  # of the second, which chose nothing
    absent: dict[str, str] = field(default_factory=dict)  # what could not be measured of it, and why
    cards_only: bool = False  # the energy that counts is that of its cards: nothing counts the host's
    strays: str = ""  # which nodes its accelerators leave to the CPU, and what they cost; "" where there are none
    ends: tuple[str, ...] = ()  # objectives in which nothing that was searched is better: proven whatever its speed

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
    absent: dict[str, str] = field(default_factory=dict)  # what could not be measured of the plan, and why
    alternatives: list[Entrant] = field(default_factory=list)  # what the plan is traded for where another objective counts
    misfit: Misfit | None = None  # why there is no plan, where limits are the reason

    def records(self) -> list[ProofRecord]:
        """Return what the database keeps."""
        return [self._record(each) for each in self.entrants]

    def against(self, entrant: Entrant) -> Comparison | None:
        """Compare the plan's time per sample with an entrant's; what one process and another differ by counts as noise."""
        if self.plan is None or self.plan.confirmed is None or entrant.confirmed is None:
            return None
        assert self.plan.contestant and entrant.contestant
        everyone = [each.contestant for each in self.entrants if each.contestant is not None and each.confirmed is not None]
        return versus(self.plan.contestant, entrant.contestant, field=everyone)

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
            cautions=(
                *(cautions(entrant.confirmed) if entrant.confirmed else ()),
                *(entrant.contestant.cautions if entrant.contestant else ()),
                *self.cautions,
            ),
            **known,
        )


def constraint_metrics(entrant: Entrant) -> dict[str, float]:
    """Return an entrant's metrics under the names that constraints use."""
    names = {
        "latency": "latency_s",
        "p99": "p99_s",
        "throughput": "throughput_per_s",
        "memory": "peak_memory_bytes",
        "device_memory": "device_memory_bytes",
        "energy": "card_energy_j" if entrant.cards_only else "energy_j",
        "power": "power_w",
        "size": "size_bytes",
        "compile": "compile_s",
        "first_inference": "first_inference_s",
        **dict(zip(ACCURACY, ACCURACY, strict=True)),
    }
    return {ours: entrant.metrics[theirs] for ours, theirs in names.items() if theirs in entrant.metrics}


def targets_of(entrant: Entrant) -> set[Target]:
    """Return the targets that an entrant runs on."""
    return set(entrant.draft.all_targets)


def call_s(entrant: Entrant) -> float:
    """Return what one call typically takes: with several callers the time between two completions holds one of each."""
    assert entrant.confirmed
    return typical_s(entrant, entrant.confirmed) * entrant.draft.callers


def typical_s(entrant: Entrant, samples: Samples) -> float:
    """Return the median duration of calls; where windows were timed the seconds from one answer to the next, stalls included."""
    return rate_s(samples) if _windows(entrant) else samples.median_s


def _windows(entrant: Entrant) -> bool:
    return entrant.contestant is not None and entrant.contestant.windows


def interval_s(entrant: Entrant) -> tuple[float, float]:
    """Return the 95 % interval of `call_s`."""
    assert entrant.confirmed
    low, high = (rate_interval_s if _windows(entrant) else median_interval)(entrant.confirmed)
    return low * entrant.draft.callers, high * entrant.draft.callers


def least_s(entrant: Entrant) -> float | None:
    """Return the least duration that was timed in the whole proof; None where nothing was."""
    timed = [min(each.timed_s) for each in (entrant.choosing, entrant.confirmed) if each is not None]
    return min(timed, default=None)


def sample_s(entrant: Entrant) -> float:
    """Return seconds per sample: the median over rounds. A slow round holds fewer calls, and must not weigh less for that."""
    assert entrant.confirmed
    if _windows(entrant):
        return rate_s(entrant.confirmed) / entrant.draft.batch
    return float(median(round_medians(entrant.confirmed).values())) / entrant.draft.batch


def by_rounds(a: Entrant, b: Entrant) -> Comparison:
    """Compare by the noise of rounds alone.

    This decides what is emitted, while `Proof.against` says what may be claimed: of two that a few percent set apart the one that was
    faster in round after round is the better bet, even where another pair of processes might turn them around.
    """
    assert a.confirmed and b.confirmed and a.contestant and b.contestant
    return compare(a.confirmed, b.confirmed, scale=b.draft.batch / a.draft.batch, by=by_of(a.contestant, b.contestant))


def unbeaten(entrants: Sequence[Entrant]) -> Entrant | None:
    """Return the fastest of those that no other one beats when compared round by round."""
    found = [each for each in entrants if not any(by_rounds(each, other).verdict == "slower" for other in entrants if other is not each)]
    return min(found or entrants, key=sample_s, default=None)
