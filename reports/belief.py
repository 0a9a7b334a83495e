"""Can it be believed: what was expected of each plan before its proof, and how near the outputs are to the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from aivmm.planner.evidence import SOURCES
from aivmm.planner.promise import Promise, kept
from aivmm.planner.records import ProofRecord
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, call_s, dig, number

# Names of accuracy metrics, with what a reader calls them and how they are written.
METRICS = ("metric", "cosine", "sqnr", "relative_l2", "max_abs", "top1_agreement", "top5_agreement")
_EXACT_DB = 200.0  # what is stored where nothing differs
TITLES = {
    "metric": "Your metric",
    "cosine": "Cosine",
    "sqnr": "SQNR",
    "relative_l2": "Relative error",
    "max_abs": "Largest error",
    "top1_agreement": "Top-1 agrees",
    "top5_agreement": "Top-5 agrees",
}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What was expected of one proof, as a ratio to the reference's time per sample, beside what the proof measured."""

    proof: ProofRecord
    slot: int
    predicted: float
    measured: float
    sigma: float | None  # of the prediction's logarithm
    proven_sigma: float  # of the measured one's, by its rounds
    share: float | None  # of the prediction that rests on measurements

    @property
    def off(self) -> float:
        """Measured over predicted, less 1: above 0 it took longer than expected."""
        return self.measured / self.predicted - 1

    @property
    def within(self) -> str:
        """Whether that is within the 95 % that prediction and proof make together; "unclear" where the proof leaves too much open."""
        if not self.sigma:
            return "–"
        return {True: "yes", False: "no", None: "unclear"}[kept(self.predicted, self.measured, self.sigma, self.proven_sigma)]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The section `predicted against measured`."""

    rows: tuple[Expected, ...]
    reference: str
    median_off: float | None
    certificate: str
    promise: str  # what became of it
    sources: str  # "80 % measured, 20 % modelled"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One proof's accuracy, a cell for each metric."""

    proof: ProofRecord
    slot: int
    cells: tuple[tuple[float | None, str], ...]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The section `accuracy`."""

    sentence: str
    columns: tuple[str, ...]
    rows: tuple[Judged, ...]


def plan_first(proofs: Sequence[ProofRecord]) -> list[ProofRecord]:
    """Return proofs as tables list them: the plan, then the others, fastest first."""
    return sorted(proofs, key=lambda each: (each.role != "plan", call_s(each) or inf, each.name))


def predictions(data: ReportData, colours: Mapping[str, int]) -> Predictions:
    """Return each proof of which something was expected. Ratios are to the reference of the search, proven in the same race."""
    name = str(dig(data.run.summary, "predicted", "reference") or "")
    reference = next((each for each in data.proofs if each.name == name and each.samples is not None), None)
    rows = []
    for proof in plan_first(data.proofs):
        predicted = number(proof.metrics.get("predicted_ratio"))
        if predicted and proof.samples is not None and reference is not None and reference.samples is not None:
            rows.append(
                Expected(
                    proof=proof,
                    slot=_slot(proof, colours),
                    predicted=predicted,
                    measured=number(proof.metrics.get("proven_ratio")) or proof.samples.median_s / reference.samples.median_s,
                    sigma=number(proof.metrics.get("predicted_sigma")),
                    proven_sigma=number(proof.metrics.get("proven_sigma")) or 0.0,
                    share=number(proof.metrics.get("predicted_measured")),
                )
            )
    offs = sorted(abs(each.off) for each in rows if each.proof is not reference)
    shares = [(source, number(dig(data.run.summary, "certificate", "rests_on", source))) for source in SOURCES]
    said = dig(data.run.summary, "certificate", "sentence")
    return Predictions(
        rows=tuple(rows),
        reference=name,
        median_off=offs[len(offs) // 2] if offs else None,
        certificate=said if isinstance(said, str) else "",
        promise=promise.sentence if (promise := promise_of(data)) else "",
        sources=", ".join(f"{share:.0%} {source}" for source, share in shares if share),
    )


def promise_of(data: ReportData) -> Promise | None:
    """Return what was expected of the plan beside what its proof found; None where nothing was.

    Runs that were stored before the proof's own ratio was have that of the medians.
    """
    plan, told = data.planned, dig(data.run.summary, "predicted")
    expected_s = number(dig(told, "median_s"))
    if plan is None or plan.samples is None or not expected_s:
        return None
    name, ratio = str(dig(told, "reference") or ""), number(dig(told, "ratio_to_reference"))
    beside = next((each for each in data.proofs if each.name == name and each.samples is not None), None)
    reference_proven_s = number(dig(told, "reference_proven_s")) or (beside.samples.median_s if beside and beside.samples else None)
    ends = dig(told, "reference_proven_interval_s")
    low, high = map(number, ends if isinstance(ends, Sequence) and len(ends) == 2 else (None, None))
    by_medians = (call_s(plan) or 0.0) / reference_proven_s if reference_proven_s else None
    return Promise(
        reference=name,
        expected_s=expected_s,
        proven_s=number(dig(data.run.summary, "measured", "median_s")) or call_s(plan) or 0.0,
        ratio=ratio,
        sigma=number(plan.metrics.get("predicted_sigma")) or 0.0,
        proven_ratio=number(dig(told, "proven_ratio")) or by_medians,
        proven_sigma=number(plan.metrics.get("proven_sigma")) or 0.0,
        reference_s=number(dig(told, "reference_s")) or (expected_s / ratio if ratio else None),
        reference_proven_s=reference_proven_s,
        reference_proven_interval_s=(low, high) if low and high else None,
        is_reference=plan.name == name,
        per_sample=beside is not None and (beside.batch, beside.callers) != (plan.batch, plan.callers),
    )


def accuracy(data: ReportData, colours: Mapping[str, int]) -> Accuracy:
    """Return how near each proof's outputs are to the reference, in every metric that any of them has."""
    proofs = [proof for proof in plan_first(data.proofs) if any(name in proof.metrics for name in METRICS)]
    known = [name for name in METRICS if any(name in proof.metrics for proof in proofs)]
    rows = tuple(Judged(proof=proof, slot=_slot(proof, colours), cells=tuple(_cell(proof, name) for name in known)) for proof in proofs)
    return Accuracy(sentence=_sentence(data, proofs), columns=tuple(TITLES[name] for name in known), rows=rows)


def _sentence(data: ReportData, proofs: Sequence[ProofRecord]) -> str:
    kind = str(dig(data.run.summary, "accuracy", "data") or "")
    limit, metric = number(dig(data.run.summary, "accuracy", "limit")), str(dig(data.run.summary, "accuracy", "metric") or "cosine")
    out = sum(not proof.eligible for proof in proofs)
    said = f"The limit is {metric} {fmt.similarity(limit)}" if limit is not None else "No limit was set"
    said += f"; judged on {kind} inputs." if kind else "."
    if kind == "synthetic":
        said += " Real data may come out otherwise: bring --inputs or --dataset."
    return said + (f" {fmt.count(out, 'entrant')} may not be the plan." if out else "")


def _cell(proof: ProofRecord, name: str) -> tuple[float | None, str]:
    value = number(proof.metrics.get(name))
    if value is None:
        return None, "–"
    match name:
        case "cosine":
            return value, fmt.similarity(value)
        case "sqnr":
            return value, "exact" if value >= _EXACT_DB else f"{value:.1f} dB"
        case "top1_agreement" | "top5_agreement":
            return value, f"{value:.1%}"
        case "metric":
            return value, f"{value:.4g}"
    return value, f"{value:.1e}" if value else "0"


def _slot(proof: ProofRecord, colours: Mapping[str, int]) -> int:
    return colours.get(proof.target.split(" + ")[0], 0)
