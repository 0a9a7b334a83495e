"""How far the costliest operators are from what their target can do at best: the roofline, as measured on it (`aivmm.probes.ceilings`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from aivmm.models.records import Operator
from aivmm.probes.ceilings import PREFIX, Ceilings, bound_of
from aivmm.probes.records import Measured, Outcome
from aivmm.reports import format as fmt
from aivmm.reports.anatomy import config_of
from aivmm.reports.data import ReportData, places_of, stage_target
from aivmm.reports.figures import Chart, axes_of, both
from aivmm.reports.svg import INK, MUTED, SURFACE, Canvas, target_colour

MOST = 10
_BOUNDS = {"compute": "arithmetic", "memory": "memory", "overhead": "the call itself"}


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One of the costliest operators on a target."""

    rank: int
    operator: Operator
    total_s: float  # of all its nodes
    share: float  # of all measured operators on this target
    ceiling: float | None  # the share of its ceiling that it reaches; None where its work is not known
    bound: str  # what limits it
    above_s: float | None  # of all its nodes, the time beyond the least possible


@dataclass(frozen=True, kw_only=True)
class Roof:
    """A target in one precision."""

    target: str
    precision: str
    slot: int
    peak: str
    bandwidth: str
    call: str
    top: tuple[Ranked, ...]
    measured: int  # operators
    chart: Chart | None

    @property
    def sentence(self) -> str:
        """Return what its top operators are and what is left to gain in them."""
        known = [each for each in self.top if each.above_s is not None]
        spent, above = sum(each.total_s for each in self.top), sum(max(0.0, each.above_s or 0.0) for each in known)
        share = fmt.percent(sum(each.share for each in self.top))
        said = f"The {fmt.count(len(self.top), 'operator')} that cost most take {share} of the time"
        return f"{said}; {fmt.percent(above / spent)} of that is above what this target can do at best." if known and spent else f"{said}."


def account(data: ReportData, colours: Mapping[str, int]) -> tuple[Roof, ...]:
    """Return a roofline for each target whose ceilings and operators were measured, in the plan's precision where it was."""
    if data.structure is None:
        return ()
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in data.outcomes:
        if outcome.key.kind == "operator" and isinstance(outcome, Measured):
            groups.setdefault((outcome.key.target, outcome.key.config.precision or ""), []).append(outcome)
    roofs: list[Roof] = []
    for target in data.targets:
        lanes = {precision: found for (name, precision), found in groups.items() if name == target}
        if lanes:
            precision = _precision(data, target, lanes)
            roof = _roof(data, target, precision, lanes[precision], colours.get(target, 0), len(roofs))
            if roof.top:
                roofs.append(roof)
    return tuple(roofs)


def _precision(data: ReportData, target: str, lanes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the precision to look at: that of the plan on this target, else the one with the most operators."""
    places = [place for stage in data.stages for place in places_of(stage)]
    planned = [str(each.get("precision") or config_of(each.get("config"))[1]) for each in places if stage_target(each) == target]
    chosen = next((each for each in planned if each in lanes), None)
    return chosen if chosen is not None else max(lanes, key=lambda each: (len(lanes[each]), each in ("", "fp32", "f32"), each))


def _roof(data: ReportData, target: str, precision: str, outcomes: Sequence[Outcome], slot: int, number: int) -> Roof:
    assert data.structure is not None
    ceilings = Ceilings.of(each for each in outcomes if each.key.subject.startswith(PREFIX))
    times = {
        each.key.subject.partition("@")[0]: each
        for each in outcomes
        if isinstance(each, Measured) and not each.key.subject.startswith(PREFIX)
    }
    known = [(operator, times[operator.signature]) for operator in data.structure.operators if operator.signature in times]
    whole = sum(operator.count * outcome.samples.median_s for operator, outcome in known)
    ordered = sorted(known, key=lambda pair: (-pair[0].count * pair[1].samples.median_s, pair[0].signature))[:MOST]
    top = tuple(_ranked(rank, operator, outcome, whole, ceilings) for rank, (operator, outcome) in enumerate(ordered, 1))
    return Roof(
        target=target,
        precision=precision,
        slot=slot,
        peak=fmt.rate(ceilings.flops_per_s, "flop") if ceilings else "–",
        bandwidth=fmt.rate(ceilings.bytes_per_s, "byte") if ceilings else "–",
        call=fmt.seconds(ceilings.call_s) if ceilings else "–",
        top=top,
        measured=len(known),
        chart=_chart(f"{target} {precision}".strip(), number, slot, ceilings, known, ordered)
        if ceilings and ceilings.flops_per_s
        else None,
    )


def _ranked(rank: int, operator: Operator, outcome: Measured, whole: float, ceilings: Ceilings | None) -> Ranked:
    median = outcome.samples.median_s
    share, bound = outcome.metrics.get("ceiling_share"), bound_of(outcome.metrics)
    if share is None and ceilings is not None:
        found = ceilings.roofline(seconds=median, flops=operator.flops, moved_bytes=operator.bytes)
        share, bound = (found.share, found.bound) if found else (None, None)
    total = operator.count * median
    return Ranked(
        rank=rank,
        operator=operator,
        total_s=total,
        share=total / whole if whole else 0.0,
        ceiling=share,
        bound=_BOUNDS[bound] if bound else "",
        above_s=None if share is None else total * (1 - share),
    )


def _chart(
    name: str,
    number: int,
    slot: int,
    ceilings: Ceilings,
    known: Sequence[tuple[Operator, Measured]],
    ordered: Sequence[tuple[Operator, Measured]],
) -> Chart | None:
    dots = [
        (operator.flops / operator.bytes, operator.flops / outcome.samples.median_s, operator, outcome)
        for operator, outcome in known
        if operator.flops and operator.bytes
    ]
    if not dots:
        return None
    ranks = {operator.signature: rank for rank, (operator, _) in enumerate(ordered, 1)}
    peak, bandwidth = ceilings.flops_per_s or 1.0, ceilings.bytes_per_s
    cache = max(size / seconds for size, seconds in ceilings.copies)

    def draw(canvas: Canvas, wide: bool) -> None:
        axes = axes_of(canvas, left=96, top=16)
        low, high = min(x for x, *_ in dots) / 2, max(max(x for x, *_ in dots), peak / bandwidth) * 3
        axes.set_xscale("log")
        axes.set_yscale("log")
        xs = [low, peak / bandwidth, high] if low < peak / bandwidth else [low, high]
        axes.plot(xs, [min(peak, x * bandwidth) for x in xs], color=INK, linewidth=1.6)
        cached = [low, min(high, peak / cache)] if low < peak / cache else []
        axes.plot(cached, [x * cache for x in cached], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        for x, y, operator, outcome in dots:
            _dot(axes, canvas, x, y, ranks.get(operator.signature), slot, operator.count * outcome.samples.median_s)
        axes.set_xlim(low, high)
        floor = min(min(y for _, y, *_ in dots), low * bandwidth) / 2
        axes.set_ylim(floor, max(peak, *(y for _, y, *_ in dots)) * 2.5)
        axes.set_xticks(_powers(low, high))
        axes.set_yticks(_powers(floor, peak * 2.5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda each, _: f"{each:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda each, _: fmt.tick(fmt.rate(each, "flop"))))
        axes.minorticks_off()
        axes.set_xlabel("operations for each byte moved" if wide else "operations per byte")

    described = f"peak {fmt.rate(peak, 'flop')}, memory {fmt.rate(bandwidth, 'byte')}; {fmt.count(len(dots), 'operator')} below it"
    wide, narrow = both(f"roof-{number}", f"Roofline of {fmt.shorten(name, 60)}", described, (320, 280), draw)
    return Chart(wide=wide, narrow=narrow)


def _dot(axes: Axes, canvas: Canvas, x: float, y: float, rank: int | None, slot: int, total_s: float) -> None:
    if rank is None:
        axes.scatter([x], [y], s=18, color=target_colour(slot), alpha=0.45, linewidth=0)
        return
    axes.scatter([x], [y], s=58, color=target_colour(slot), edgecolor=SURFACE, linewidth=0.8, zorder=3)
    place, side = ((7, 4), "left") if rank % 2 else ((-7, -11), "right")  # neighbours are often alike
    axes.annotate(canvas.say(str(rank)), (x, y), textcoords="offset points", xytext=place, ha=side, fontsize=12, color=MUTED)


def _powers(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(-3, 19) if low <= 10.0**power <= high]
