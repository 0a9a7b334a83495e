"""Several runs beside each other: what was different around them first, then what changed, and whether the change is real.

Two runs were not interleaved, so their times are compared in two ways. Where both proved the same baseline, the plan's ratio to it is
compared: each ratio comes from one interleaved race, so what the machine was like at the time cancels out. The medians themselves are
compared too, with an interval that is wider by what separate loads differ by (decision 0009).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from aivmm.planner.records import ProofRecord, Verdict
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, call_s, dig, number, places_of, rate_of, stage_target, throughput_wanted
from aivmm.reports.race import Figure, figure_of
from aivmm.runtime.environment import Environment

INDIFFERENCE = 0.01  # below this nobody cares
_BETWEEN_LOADS = 0.015  # standard deviation of the logarithm: the prior of decision 0009
_Z95 = 1.96
_NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing in which runs may differ; a value per run."""

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """True when not all runs have the same."""
        return len(set(self.values)) > 1


@dataclass(frozen=True, kw_only=True)
class Change:
    """How much faster a run's plan is than the first run's: above 1 is faster. `against` is how it was compared."""

    ratio: float
    low: float  # 95 % interval
    high: float
    against: str

    @property
    def verdict(self) -> Verdict:
        """What can be claimed, with a zone of indifference of 1 %."""
        if self.low > 1 + INDIFFERENCE:
            return "faster"
        if self.high < 1 / (1 + INDIFFERENCE):
            return "slower"
        inside = self.low > 1 / (1 + INDIFFERENCE) and self.high < 1 + INDIFFERENCE
        return "same" if inside else "ambiguous"

    @property
    def said(self) -> str:
        """In a few words, for a cell: `1.20× faster (95 % interval 1.15× to 1.26×)`."""
        low, high = (1 / self.high, 1 / self.low) if self.verdict == "slower" else (self.low, self.high)
        words = {
            "faster": f"{fmt.ratio(self.ratio)} faster",
            "slower": f"{fmt.ratio(1 / self.ratio)} slower",
            "same": "the same within 1 %",
            "ambiguous": f"undecided, {fmt.ratio(self.ratio)}",
        }
        return f"{words[self.verdict]} (95 % interval {fmt.ratio(low)} to {fmt.ratio(high)})"

    def sentence(self, this: str, that: str) -> str:
        """Return the claim as a sentence about two runs, without its full stop."""
        if self.verdict == "ambiguous":
            return f"Whether {this} is faster than {that} is {self.said}"
        return f"{this} is {self.said}{',' if self.verdict == 'same' else ''} {'as' if self.verdict == 'same' else 'than'} {that}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One of the runs that are compared. The first has no changes: it is what the others are compared with."""

    data: ReportData
    label: str
    figure: Figure | None
    relative: Change | None = None  # through a baseline that both proved
    absolute: Change | None = None  # by the medians

    @property
    def change(self) -> Change | None:
        """The comparison to believe: the one through a common baseline where the machine is the same, else that of the medians."""
        return self.relative or self.absolute


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a page of comparison shows, in its order."""

    subjects: tuple[Subject, ...]
    verdicts: tuple[str, ...]  # one sentence for each run after the first
    environment: tuple[Row, ...]  # only what differs
    request: tuple[Row, ...]  # only what differs
    plan: tuple[Row, ...]
    figures: tuple[Row, ...]
    baselines: tuple[Row, ...]

    @property
    def same_environment(self) -> bool:
        """True when no target's environment differs."""
        return not self.environment


def compare(runs: Sequence[ReportData]) -> Comparison:
    """Compare the first run with each of the others. A pure function of stored rows.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError("a comparison takes two runs or more")
    first, *others = runs
    labels = _labels(runs)
    environment = tuple(row for row in _environments(runs) if row.differs)
    subjects = [Subject(data=first, label=labels[0], figure=_planned_figure(first))]
    for data, label in zip(others, labels[1:], strict=True):
        subjects.append(
            Subject(
                data=data,
                label=label,
                figure=_planned_figure(data),
                relative=through_baseline(first, data) if not environment else None,
                absolute=by_medians(first, data),
            )
        )
    return Comparison(
        subjects=tuple(subjects),
        verdicts=tuple(_sentence(subjects[0], each) for each in subjects[1:]),
        environment=environment,
        request=tuple(row for row in _requests(runs) if row.differs),
        plan=_plans(runs),
        figures=_figures(runs),
        baselines=_baselines(runs),
    )


def by_medians(first: ReportData, second: ReportData) -> Change | None:
    """Compare the plans of two runs by what each measured; None where one has no plan, or they had another goal."""
    one, other = _planned_figure(first), _planned_figure(second)
    if one is None or other is None or first.run.objective != second.run.objective:
        return None
    sign = 1 if throughput_wanted(first) else -1
    log = sign * math.log(other.median / one.median)
    half = math.sqrt(_half(one.low, one.high) ** 2 + _half(other.low, other.high) ** 2 + 2 * (_Z95 * _BETWEEN_LOADS) ** 2)
    return Change(ratio=math.exp(log), low=math.exp(log - half), high=math.exp(log + half), against="the medians of two runs")


def through_baseline(first: ReportData, second: ReportData) -> Change | None:
    """Compare the plans of two runs by their ratios to a baseline that both proved: the one that gives the narrowest interval."""
    if first.run.objective != second.run.objective or first.planned is None or second.planned is None:
        return None
    theirs = {_identity(proof): proof for proof in second.proofs if _anchors(proof)}
    found = [_ratio_of_ratios(proof, theirs[_identity(proof)]) for proof in first.proofs if _anchors(proof) and _identity(proof) in theirs]
    return min(found, key=lambda change: change.high / change.low, default=None)


def _ratio_of_ratios(one: ProofRecord, other: ProofRecord) -> Change:
    assert one.ratio and other.ratio and one.ratio_low and one.ratio_high and other.ratio_low and other.ratio_high
    log = math.log(other.ratio / one.ratio)
    half = math.hypot(_half(one.ratio_low, one.ratio_high), _half(other.ratio_low, other.ratio_high))
    return Change(ratio=math.exp(log), low=math.exp(log - half), high=math.exp(log + half), against=f"{one.name} in both runs")


def _anchors(proof: ProofRecord) -> bool:
    return proof.role == "baseline" and bool(proof.ratio and proof.ratio_low and proof.ratio_high)


def _identity(proof: ProofRecord) -> tuple[str, str, str, int, int]:
    return proof.name, proof.target, proof.config.digest(), proof.batch, proof.callers


def _half(low: float, high: float) -> float:
    return math.log(high / low) / 2 if 0 < low <= high else 0.0


def _planned_figure(data: ReportData) -> Figure | None:
    return figure_of(data, data.planned) if data.planned is not None else None


def _labels(runs: Sequence[ReportData]) -> list[str]:
    """Return A, B, C, ...: short enough for the head of a column, and named in full in the row below."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [letters[index] if index < len(letters) else str(index + 1) for index in range(len(runs))]


def _sentence(first: Subject, other: Subject) -> str:
    if other.data.planned is None or first.data.planned is None:
        missing = " and ".join(each.label for each in (first, other) if each.data.planned is None)
        return f"{other.label} against {first.label}: {missing} proved no plan, so there is nothing to compare."
    if other.change is None:
        return (
            f"{other.label} against {first.label}: best {other.data.run.objective} and best {first.data.run.objective} are not comparable."
        )
    return f"{other.change.sentence(other.label, first.label)}, by {other.change.against}."


def _environments(runs: Sequence[ReportData]) -> Iterable[Row]:
    """Return every field of every target's environment, by target."""
    known: list[Mapping[str, Environment]] = [{each.target: each for each in data.environments} for data in runs]
    for target in dict.fromkeys(name for each in known for name in each):
        mine = [each.get(target) for each in known]
        if None in mine:
            yield Row(name=target, values=tuple("there" if each else "not there" for each in mine))
        for field in fields(Environment):
            if field.name != "target":
                yield Row(
                    name=f"{target}: {field.name.replace('_', ' ')}",
                    values=tuple(_NOTHING if each is None else _text(getattr(each, field.name)) for each in mine),
                )


def _requests(runs: Sequence[ReportData]) -> Iterable[Row]:
    """Return what was asked of each run."""
    yield Row(name="model", values=tuple(data.run.model.name for data in runs))
    yield Row(name="model's SHA-256", values=tuple(data.run.model.sha256[:16] for data in runs))
    yield Row(name="objective", values=tuple(data.run.objective for data in runs))
    yield Row(name="constraints", values=tuple(", ".join(data.run.constraints) or "none" for data in runs))
    yield Row(name="aivmm", values=tuple(data.run.aivmm_version or _NOTHING for data in runs))
    yield Row(name="seed", values=tuple(str(data.run.seed) for data in runs))
    ignored = {"output", "db", "fresh", "model", "objective", "constraints", "seed"}
    for name in sorted({name for data in runs for name in data.run.options} - ignored):
        yield Row(name=f"option {name}", values=tuple(_text(data.run.options.get(name)) for data in runs))


def _plans(runs: Sequence[ReportData]) -> tuple[Row, ...]:
    """Return what each run decided."""
    return (
        Row(name="targets", values=tuple(" → ".join(map(_where, data.stages)) or _NOTHING for data in runs)),
        Row(name="precision", values=tuple(_of_plan(data, lambda proof: proof.config.precision or "default") for data in runs)),
        Row(name="settings", values=tuple(_of_plan(data, _settings) for data in runs)),
        Row(name="batch", values=tuple(_of_plan(data, lambda proof: str(proof.batch)) for data in runs)),
        Row(name="callers", values=tuple(_of_plan(data, lambda proof: str(proof.callers)) for data in runs)),
    )


def _where(stage: Mapping[str, Any]) -> str:
    return " beside ".join(map(stage_target, places_of(stage)))


def _figures(runs: Sequence[ReportData]) -> tuple[Row, ...]:
    """Return what each plan's proof measured."""
    stated = ("accuracy", "value")
    return (
        Row(name="median of a call", values=tuple(_of_plan(data, lambda proof: fmt.seconds(_median(proof))) for data in runs)),
        Row(
            name="throughput",
            values=tuple(fmt.per_second(_rate(data)) for data in runs),
        ),
        Row(name="peak memory", values=_metric(runs, "peak_memory_bytes", fmt.size)),
        Row(name="compile time", values=_metric(runs, "compile_s", fmt.seconds)),
        Row(name="load from cache", values=_metric(runs, "load_cached_s", fmt.seconds)),
        Row(name="first inference", values=_metric(runs, "first_inference_s", fmt.seconds)),
        Row(name="accuracy", values=tuple(fmt.similarity(number(dig(data.run.summary, *stated))) for data in runs)),
        Row(name="cautions on the plan", values=tuple(_of_plan(data, lambda proof: str(len(proof.cautions))) for data in runs)),
    )


def _baselines(runs: Sequence[ReportData]) -> tuple[Row, ...]:
    """Return the median of each baseline in each run: what the machine and the runtimes themselves changed."""
    known = [{proof.name: proof for proof in data.proofs if proof.role == "baseline"} for data in runs]
    names = dict.fromkeys(name for each in known for name in each)
    return tuple(Row(name=name, values=tuple(fmt.seconds(_median(each.get(name))) for each in known)) for name in names)


def _metric(runs: Sequence[ReportData], name: str, show: Any) -> tuple[str, ...]:
    return tuple(_of_plan(data, lambda proof: show(proof.metrics.get(name))) for data in runs)


def _of_plan(data: ReportData, ask: Any) -> str:
    return str(ask(data.planned)) if data.planned is not None else _NOTHING


def _median(proof: ProofRecord | None) -> float | None:
    return call_s(proof) if proof is not None else None


def _settings(proof: ProofRecord) -> str:
    return ", ".join(f"{name}={value}" for name, value in proof.config.settings) or "default"


def _rate(data: ReportData) -> float | None:
    stated = number(dig(data.run.summary, "measured", "throughput_per_s"))
    return stated or (rate_of(data.planned) if data.planned is not None else None)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return _NOTHING if value is None or value == "" or value == {} else str(value)
