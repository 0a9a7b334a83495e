"""The picture of the verdict: the plan against every baseline and finalist, medians with 95 % intervals on one axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aivmm.planner.records import ProofRecord
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, call_s, dig, number, rate_of, throughput_wanted
from aivmm.reports.intervals import log_ticks, median_interval, nice_ticks, thinned


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one proof measured, in the unit of the objective: seconds a call, or samples a second."""

    median: float
    low: float  # 95 % interval of the median
    high: float
    inner: tuple[float, float]  # the middle 80 % of the samples


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One row of the picture and of the table; positions are percentages of the axis."""

    proof: ProofRecord
    slot: int
    figure: Figure | None
    x: float = 0.0
    x_low: float = 0.0
    x_high: float = 0.0
    x_inner: tuple[float, float] = (0.0, 0.0)
    value: str = "–"
    interval: str = ""
    compared: str = ""
    description: str = ""

    @property
    def style(self) -> str:
        """CSS classes: role and eligibility."""
        return f"{self.proof.role} {'eligible' if self.proof.eligible else 'ineligible'}"


@dataclass(frozen=True, kw_only=True)
class Race:
    """All rows, and the axis they share: the plan, then the others best first, then what is not eligible, then what could not run."""

    runners: tuple[Runner, ...]
    ticks: tuple[tuple[float, str], ...] = ()
    axis: str = ""
    plan_x: float | None = None


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """Return the position of `value` in percent, held within the axis."""
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 3)


def figure_of(data: ReportData, proof: ProofRecord) -> Figure | None:
    """Return what `proof` measured, with the run's own interval where its summary has one; None when it could not run."""
    if proof.samples is None:
        return None
    samples = proof.samples
    call = _call_s(data, proof)
    shift = call / samples.median_s
    low, high = _stated_interval(data, proof) or tuple(each * shift for each in median_interval(samples))
    inner = (samples.quantile_s(0.1) * proof.callers, samples.quantile_s(0.9) * proof.callers)
    if not throughput_wanted(data):
        return Figure(median=call, low=low, high=high, inner=inner)
    turned = [proof.batch * proof.callers / each for each in (high, low, inner[1], inner[0])]
    return Figure(median=proof.batch * proof.callers / call, low=turned[0], high=turned[1], inner=(turned[2], turned[3]))


def _call_s(data: ReportData, proof: ProofRecord) -> float:
    """Return what a call took as the run tells it: where throughput is wanted by the rate, which has the machine's stalls in it."""
    rate = rate_of(proof) if throughput_wanted(data) else None
    if rate:
        return proof.batch * proof.callers / rate
    return call_s(proof) or 0.0


def lay_out(data: ReportData, colours: Mapping[str, int]) -> Race:
    """Place every proof on one axis. An empty race has no axis."""
    figures = [(proof, figure_of(data, proof)) for proof in data.proofs]
    known = [figure for _, figure in figures if figure]
    show = fmt.per_second if throughput_wanted(data) else fmt.seconds
    if not known:
        return Race(runners=tuple(_unmeasured(proof, colours) for proof, _ in figures))
    scale = _scale(known)
    runners = [_place(proof, figure, scale, colours, show) if figure else _unmeasured(proof, colours) for proof, figure in figures]
    runners.sort(key=lambda runner: _order(runner, higher_is_better=throughput_wanted(data)))
    raw = thinned(log_ticks(scale.low, scale.high), 6) if scale.log else nice_ticks(scale.low, scale.high, 6)
    what = "Samples a second, more is better" if throughput_wanted(data) else "Time of one call, less is better"
    note = "; logarithmic axis" if scale.log else "; the axis does not start at zero" if scale.low > 0 else ""
    plan_x = next((runner.x for runner in runners if runner.proof.role == "plan" and runner.figure), None)
    return Race(
        runners=tuple(runners), ticks=tuple((scale.at(tick), fmt.tick(show(tick))) for tick in raw), axis=what + note, plan_x=plan_x
    )


def compared(proof: ProofRecord) -> str:
    """Return the comparison from the plan's side: `plan 1.92× faster`."""
    if proof.role == "plan":
        return "the plan"
    if proof.ratio is None or proof.verdict is None:
        return "not compared"
    if proof.verdict == "same":
        return "same within noise"
    if proof.verdict == "ambiguous":
        return f"undecided ({fmt.ratio(proof.ratio)})"
    return f"plan {fmt.ratio(proof.ratio)} faster" if proof.verdict == "faster" else f"plan {fmt.ratio(1 / proof.ratio)} slower"


def ratio_interval(proof: ProofRecord, *, turned: bool = False) -> str:
    """Return `1.88× to 1.96×`, or nothing; `turned` is of how much slower the plan is."""
    if proof.ratio_low is None or proof.ratio_high is None:
        return ""
    if turned and proof.ratio_low > 0:
        return f"{fmt.ratio(1 / proof.ratio_high)} to {fmt.ratio(1 / proof.ratio_low)}"
    return f"{fmt.ratio(proof.ratio_low)} to {fmt.ratio(proof.ratio_high)}"


def best_baseline(data: ReportData) -> ProofRecord | None:
    """Return the eligible baseline that the plan gains least over: the one it has to beat."""
    known = [proof for proof in data.proofs if proof.role == "baseline" and proof.eligible and proof.ratio is not None]
    return min(known, key=lambda proof: proof.ratio or 0.0, default=None)


def _stated_interval(data: ReportData, proof: ProofRecord) -> tuple[float, float] | None:
    if proof.role == "plan":
        pair: Any = dig(data.run.summary, "measured", "ci95_s")
    else:
        rows = data.run.summary.get("baselines") if proof.role == "baseline" else None
        named = [row for row in rows if dig(row, "name") == proof.name] if isinstance(rows, Sequence) else []
        pair = dig(named[0], "ci95_s") if named else None
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return None
    low, high = number(pair[0]), number(pair[1])
    middle = _call_s(data, proof)  # an interval beside its own median is not of these samples
    return (low, high) if low and high and 0 < low <= middle * 1.02 and middle * 0.98 <= high else None


def _scale(figures: Sequence[Figure]) -> _Scale:
    """Choose the axis: near medians are zoomed in on, far ones get a logarithmic axis, and the rest starts at zero."""
    low = min(min(figure.low, figure.median) for figure in figures)
    high = max(max(figure.high, figure.median) for figure in figures)
    inner_low = min(figure.inner[0] for figure in figures)
    inner_high = max(figure.inner[1] for figure in figures)
    if high / low > 12:
        return _Scale(min(low, inner_low) * 0.85, max(high, inner_high) * 1.15, True)
    if high / low > 1.5:
        return _Scale(0.0, max(high, min(inner_high, high * 1.5)) * 1.06, False)
    width = max(high - low, 0.02 * high)
    return _Scale(max(0.0, max(inner_low, low - width) - 0.15 * width), min(inner_high, high + width) + 0.15 * width, False)


def _place(proof: ProofRecord, figure: Figure, scale: _Scale, colours: Mapping[str, int], show: Any) -> Runner:
    interval = f"{show(figure.low)} to {show(figure.high)}"
    state = "" if proof.eligible else f", not eligible: {proof.why_not}"
    return Runner(
        proof=proof,
        slot=_slot(proof, colours),
        figure=figure,
        x=scale.at(figure.median),
        x_low=scale.at(figure.low),
        x_high=scale.at(figure.high),
        x_inner=(scale.at(figure.inner[0]), scale.at(figure.inner[1])),
        value=show(figure.median),
        interval=interval,
        compared=compared(proof),
        description=f"{proof.name}: median {show(figure.median)}, 95 % interval {interval}{state}",
    )


def _unmeasured(proof: ProofRecord, colours: Mapping[str, int]) -> Runner:
    return Runner(
        proof=proof, slot=_slot(proof, colours), figure=None, compared="could not run", description=f"{proof.name}: could not run"
    )


def _slot(proof: ProofRecord, colours: Mapping[str, int]) -> int:
    return colours.get(proof.target.split(" + ")[0], 0)


def _order(runner: Runner, *, higher_is_better: bool) -> tuple[int, bool, float]:
    if runner.figure is None:
        return 3, True, 0.0
    rank = 0 if runner.proof.role == "plan" else 1 if runner.proof.eligible else 2
    return rank, False, -runner.figure.median if higher_is_better else runner.figure.median
