"""What speed is traded for: time of a call against throughput, accuracy, memory, energy and what else was asked for, with the front of what
was proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from aivmm.planner.objectives import OBJECTIVES
from aivmm.planner.records import ProofRecord
from aivmm.reports import format as fmt
from aivmm.reports.belief import plan_first
from aivmm.reports.data import ReportData, dig, rate_of
from aivmm.reports.figures import Chart, both, keys_of
from aivmm.reports.intervals import log_ticks, nice_ticks, thinned
from aivmm.reports.svg import INK, MUTED, SURFACE, Canvas, target_colour

LEAST_ERROR = 1e-7  # of a cosine: below it there is rounding only, and all are drawn there
_MOST_TRIALS = 400  # faint dots beyond this say nothing more
_PANEL = 250  # pixels high


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What latency is drawn against. `of` reads it from a proof, in SI units."""

    name: str
    title: str
    column: str  # its heading in the table
    better: int  # -1 where less is better, 1 where more is
    show: Callable[[float | None], str]
    of: Callable[[ProofRecord], float | None]
    trial: str = ""  # the name of a trial's metric, "" where trials have none
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way of running the model that was proven, with its place on each axis that it is known on."""

    proof: ProofRecord
    slot: int
    latency_s: float
    values: Mapping[str, float]  # by the axis' name
    fronts: tuple[str, ...] = ()  # the axes on whose front it is
    alternative: bool = False  # whether the plan keeps it

    def shown(self, axis: Axis) -> str:
        """Return its value on an axis, as a table says it."""
        value = self.values.get(axis.name)
        return "–" if value is None else f"{1 - value:.6f}" if axis.name == "accuracy" else axis.show(value)


@dataclass(frozen=True, kw_only=True)
class Tradeoffs:
    """The section, ready to be written."""

    points: tuple[Point, ...]
    axes: tuple[Axis, ...]  # those that can be drawn
    chart: Chart | None
    absent: tuple[str, ...]  # sentences on the axes that cannot


def _error(proof: ProofRecord) -> float | None:
    cosine = proof.metrics.get("cosine")
    return None if cosine is None else max(LEAST_ERROR, 1 - cosine)


def _power(value: float | None) -> str:
    """Return a small number as an axis has it: `1e-5`."""
    return "–" if value is None else f"{value:.0e}".replace("e-0", "e-")


def _metric(name: str) -> Callable[[ProofRecord], float | None]:
    return lambda proof: proof.metrics.get(name)


AXES = (
    Axis(
        name="throughput",
        title="samples a second",
        column="Samples a second",
        better=1,
        show=fmt.per_second,
        of=rate_of,
        trial="throughput",
    ),
    Axis(name="accuracy", title="error: 1 − cosine to fp32", column="Cosine", better=-1, show=_power, of=_error, trial="cosine", log=True),
    Axis(name="memory", title="peak memory", column="Peak memory", better=-1, show=fmt.size, of=_metric("peak_memory_bytes")),
    Axis(name="energy", title="energy of a sample", column="Energy of a sample", better=-1, show=fmt.joules, of=_metric("energy_j")),
)
WHERE_ASKED = (  # drawn where it is among the objectives
    Axis(name="p99", title="99th percentile of a call", column="p99", better=-1, show=fmt.seconds, of=_metric("p99_s")),
    Axis(
        name="compile", title="time to compile", column="Compiled in", better=-1, show=fmt.seconds, of=_metric("compile_s"), trial="compile"
    ),
    Axis(name="size", title="size on disk", column="On disk", better=-1, show=fmt.size, of=_metric("size_bytes"), trial="size"),
)


def axes_of(data: ReportData) -> tuple[Axis, ...]:
    """Return the axes that a run's report looks at."""
    return (*AXES, *(axis for axis in WHERE_ASKED if axis.name in data.run.objective.split(",")))


def account(data: ReportData, colours: Mapping[str, int]) -> Tradeoffs:
    """Return what was proven on all axes. Fronts are among what is eligible; the search's trials are drawn faintly behind it."""
    axes, kept = axes_of(data), _kept(data)
    points = [_point(proof, axes, colours) for proof in plan_first(data.proofs) if proof.samples is not None]
    drawn = tuple(axis for axis in axes if sum(axis.name in point.values for point in points) > 1)
    fronts = {axis.name: _front(points, axis) for axis in drawn}
    marked = tuple(
        Point(
            proof=each.proof,
            slot=each.slot,
            latency_s=each.latency_s,
            values=each.values,
            fronts=tuple(name for name, members in fronts.items() if index in members),
            alternative=each.proof.name in kept,
        )
        for index, each in enumerate(points)
    )
    chart = _chart(data, marked, drawn, colours) if drawn else None
    return Tradeoffs(points=marked, axes=drawn, chart=chart, absent=tuple(_absent(data, points, axes, drawn)))


def _kept(data: ReportData) -> set[str]:
    """Return the names of the alternatives that are in the plan."""
    found = dig(data.run.summary, "alternatives")
    return {str(dig(each, "name")) for each in found} if isinstance(found, list) else set()


def _point(proof: ProofRecord, axes: Sequence[Axis], colours: Mapping[str, int]) -> Point:
    assert proof.samples is not None
    values = {axis.name: value for axis in axes if (value := axis.of(proof)) is not None}
    return Point(
        proof=proof, slot=colours.get(proof.target.split(" + ")[0], 0), latency_s=proof.samples.median_s * proof.callers, values=values
    )


def _front(points: Sequence[Point], axis: Axis) -> set[int]:
    known = {index: each for index, each in enumerate(points) if each.proof.eligible and axis.name in each.values}
    return {index for index, mine in known.items() if not any(_beats(other, mine, axis) for other in known.values())}


def _beats(one: Point, other: Point, axis: Axis) -> bool:
    """Say whether `one` is no worse in both respects and better in one, where what differs by less than a tolerance is the same."""
    faster = _gain(other.latency_s / one.latency_s, "latency")
    ratio = one.values[axis.name] / other.values[axis.name]
    better = _gain(ratio if axis.better > 0 else 1 / ratio, axis.name)
    return min(faster, better) >= 0 and max(faster, better) > 0


def _gain(factor: float, objective: str) -> int:
    """Return 1 for a factor above 1 by more than the objective's tolerance, -1 for one below it, else 0."""
    tolerance = 1 + OBJECTIVES[objective].tolerance
    return 1 if factor > tolerance else -1 if factor < 1 / tolerance else 0


def _absent(data: ReportData, points: Sequence[Point], axes: Sequence[Axis], drawn: Sequence[Axis]) -> Iterator[str]:
    if len(points) < 2:
        return
    told = dig(data.run.summary, "measured", "not_measured")
    for axis in axes:
        if axis not in drawn:
            why = told.get(axis.name) if isinstance(told, Mapping) else None
            yield f"Not drawn against {axis.name}: {why or 'it was measured of fewer than two of what was proven'}."


def _chart(data: ReportData, points: Sequence[Point], drawn: Sequence[Axis], colours: Mapping[str, int]) -> Chart:
    across = 3 if len(drawn) == 3 else 2

    def draw(canvas: Canvas, wide: bool) -> None:
        columns = across if wide else 1
        rows = -(-len(drawn) // columns)
        for index, axis in enumerate(drawn):
            axes = panel(canvas, index % columns, index // columns, columns, rows, left=74)
            _draw(axes, axis, points, _trials(data, axis, colours))
            axes.text(0, 1.06, f"against {axis.title}", transform=axes.transAxes, fontsize=12, color=INK)

    wide, narrow = both(
        "tradeoffs",
        "What speed is traded for",
        "; ".join(f"front against {axis.name}: {_members(points, axis)}" for axis in drawn),
        (-(-len(drawn) // across) * _PANEL, len(drawn) * _PANEL),
        draw,
    )
    return Chart(wide=wide, narrow=narrow, legend=keys_of((each.proof.target.split(" + ")[0] for each in points), colours))


def _members(points: Sequence[Point], axis: Axis) -> str:
    on = [each for each in points if axis.name in each.fronts]
    return fmt.listing((f"{fmt.shorten(each.proof.name, 50)} ({fmt.seconds(each.latency_s)}, {each.shown(axis)})" for each in on), 6)


def _trials(data: ReportData, axis: Axis, colours: Mapping[str, int]) -> list[tuple[float, float, int]]:
    """Return (seconds of a call, value, colour) of the trials that have the metric."""
    if not axis.trial:
        return []
    known = [each for each in data.trials if each.median_s is not None and axis.trial in each.metrics][:_MOST_TRIALS]
    turned = [max(LEAST_ERROR, 1 - each.metrics[axis.trial]) if axis.name == "accuracy" else each.metrics[axis.trial] for each in known]
    return [
        ((each.median_s or 0.0) * each.callers, value, colours.get(each.target.split(" + ")[0], 0))
        for each, value in zip(known, turned, strict=True)
        if value > 0
    ]


def _draw(axes: Axes, axis: Axis, points: Sequence[Point], trials: Sequence[tuple[float, float, int]]) -> None:
    known = [each for each in points if axis.name in each.values]
    times, values = [each.latency_s for each in known], [each.values[axis.name] for each in known]
    trials = [each for each in trials if _near(each[0], times) and _near(each[1], values)]
    times, values = times + [time for time, _, _ in trials], values + [value for _, value, _ in trials]
    axes.scatter(
        [x for x, _, _ in trials], [y for _, y, _ in trials], s=12, c=[target_colour(s) for _, _, s in trials], alpha=0.35, linewidth=0
    )
    line = sorted((each.latency_s, each.values[axis.name]) for each in known if axis.name in each.fronts)
    axes.step([x for x, _ in line], [y for _, y in line], where="post", color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    for each in known:
        _dot(axes, each, axis)
    _limit(axes, "x", times, fmt.seconds, log=max(times) / min(times) > 5)
    _limit(axes, "y", values, axis.show, log=axis.log or max(values) / min(values) > 12)
    axes.set_xlabel("time of one call")


def _near(value: float, proven: Sequence[float]) -> bool:
    """Say whether a trial's value is among those proven, or not far beyond: what is proven sets the scale."""
    return min(proven) / 2 <= value <= max(proven) * 2


def _dot(axes: Axes, point: Point, axis: Axis) -> None:
    """Mark what it is: a square is a baseline, a large circle the plan, a small one a finalist; hollow: not eligible, ringed: the front."""
    fill, role = target_colour(point.slot), point.proof.role
    axes.scatter(
        [point.latency_s],
        [point.values[axis.name]],
        s={"plan": 110, "baseline": 52, "candidate": 52}[role],
        marker="s" if role == "baseline" else "o",
        color=fill if point.proof.eligible else SURFACE,
        edgecolor=INK if axis.name in point.fronts else fill if not point.proof.eligible else SURFACE,
        linewidth=1.6,
        zorder=4 if role == "plan" else 3,
    )


def _limit(axes: Axes, which: str, values: Sequence[float], show: Callable[[float | None], str], *, log: bool) -> None:
    """Set scale, bounds and ticks of one axis to hold all values with some room."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    factor = max(1.1, (high / low) ** 0.1) if log else 1.0
    bounds = (low / factor, high * factor) if log else (low - room, high + room)
    name = {"x": axes.xaxis, "y": axes.yaxis}[which]
    if log:
        axes.set_xscale("log") if which == "x" else axes.set_yscale("log")
    axes.set_xlim(*bounds) if which == "x" else axes.set_ylim(*bounds)
    ticks = log_ticks(*bounds) if log else nice_ticks(*bounds, 4)
    ticks = thinned(ticks if len(ticks) > 1 else [low, high] if high > low else [low], 4)
    axes.set_xticks(ticks) if which == "x" else axes.set_yticks(ticks)
    name.set_major_formatter(FuncFormatter(lambda value, _: fmt.tick(show(value)) if value > 0 else "0" if value == 0 else ""))
    axes.minorticks_off()


def panel(canvas: Canvas, column: int, row: int, columns: int, rows: int, *, left: int = 60, top: int = 34, bottom: int = 46) -> Axes:
    """Return axes in one place of a grid, with margins in pixels."""
    width, height, right = canvas.width / columns, canvas.height / rows, 18
    box: Any = (
        (column * width + left) / canvas.width,
        1 - ((row + 1) * height - bottom) / canvas.height,
        (width - left - right) / canvas.width,
        (height - top - bottom) / canvas.height,
    )
    axes: Axes = canvas.figure.add_axes(box)
    axes.tick_params(length=0, pad=6)
    return axes
