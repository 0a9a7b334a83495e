"""Speed against batch, threads and precision: the best that each target gave at each value of one of them, whatever the others were."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from aivmm.probes.records import Measured
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData
from aivmm.reports.figures import Chart, both, keys_of
from aivmm.reports.intervals import nice_ticks
from aivmm.reports.svg import INK, SURFACE, Canvas, target_colour
from aivmm.reports.tradeoffs import panel
from aivmm.runtime.config import Config

# What a runtime calls the number of threads that one call may use.
THREADS = ("INFERENCE_NUM_THREADS", "intra_op_num_threads")
_HEIGHT = 250


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One measured way of running the whole model."""

    target: str
    config: Config
    batch: int
    callers: int
    rate: float  # samples a second


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best of the ways that share a target and a value of the knob."""

    target: str
    slot: int
    value: str
    order: float  # where on the axis
    rate: float
    median: float
    ways: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One knob, with what each target gave at each of its values."""

    name: str
    points: tuple[Best, ...]
    missing: str  # why there is nothing to see; "" where there is


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The section, ready to be written."""

    sweeps: tuple[Sweep, ...]
    chart: Chart | None

    @property
    def shown(self) -> tuple[Sweep, ...]:
        """Those with something to see."""
        return tuple(each for each in self.sweeps if not each.missing)


def account(data: ReportData, colours: Mapping[str, int]) -> Scaling:
    """Return the three sweeps, from the trials of the search and the whole-model probes of this run."""
    seen = _seen(data)
    sweeps = (
        _sweep("batch", seen, lambda each: str(each.batch), colours, "Only batch {one} was tried; name more with --batch 1,8,32."),
        _sweep(
            "threads", [each for each in seen if _threads(each)], _threads, colours, "No two numbers of threads were tried on a target."
        ),
        _sweep("precision", seen, lambda each: each.config.precision or "default", colours, "Only one precision was tried ({one})."),
    )
    shown = [each for each in sweeps if not each.missing]
    return Scaling(sweeps=sweeps, chart=_chart(shown, colours) if shown else None)


def _threads(each: Seen) -> str:
    return next((str(value) for name in THREADS if (value := each.config.get(name)) is not None and value != 0), "")


def _seen(data: ReportData) -> list[Seen]:
    found: dict[tuple[str, str, int, int], Seen] = {}
    timed = [
        (each.key.target, each.key.config, each.key.batch, each.key.callers, each.samples.median_s)
        for each in data.outcomes
        if isinstance(each, Measured) and each.key.kind == "model" and each.key.replicas == 1
    ]
    timed += [
        (each.target, each.config, each.batch, each.callers, each.median_s) for each in data.trials if each.median_s and not each.policy
    ]
    for target, config, batch, callers, median_s in timed:
        rate = batch / median_s  # with several callers it is the time between two answers
        found[target, config.key(), batch, callers] = Seen(target=target, config=config, batch=batch, callers=callers, rate=rate)
    return list(found.values())


def _sweep(name: str, seen: Sequence[Seen], value: Callable[[Seen], str], colours: Mapping[str, int], missing: str) -> Sweep:
    values = sorted({value(each) for each in seen}, key=lambda text: (not text.isdigit(), float(text) if text.isdigit() else 0.0, text))
    groups: dict[tuple[str, str], list[float]] = {}
    for each in seen:
        groups.setdefault((each.target, value(each)), []).append(each.rate)
    points = tuple(
        Best(
            target=target,
            slot=colours.get(target, 0),
            value=text,
            order=float(values.index(text)),
            rate=max(rates),
            median=statistics.median(rates),
            ways=len(rates),
        )
        for (target, text), rates in sorted(groups.items(), key=lambda item: (item[0][0], values.index(item[0][1])))
    )
    varied = any(sum(each.target == target for each in points) > 1 for target in {each.target for each in points})
    why = "" if varied else missing.format(one=values[0] if values else "none")
    return Sweep(name=name, points=points, missing=why)


def _chart(sweeps: Sequence[Sweep], colours: Mapping[str, int]) -> Chart:
    def draw(canvas: Canvas, wide: bool) -> None:
        columns = max(2, len(sweeps)) if wide else 1
        for index, sweep in enumerate(sweeps):
            axes = panel(canvas, index % columns, index // columns, columns, -(-len(sweeps) // columns), left=66)
            _draw(axes, sweep, canvas)

    wide, narrow = both("scaling", "Speed against batch, threads and precision", _said(sweeps), (_HEIGHT, len(sweeps) * _HEIGHT), draw)
    return Chart(wide=wide, narrow=narrow, legend=keys_of((each.target for sweep in sweeps for each in sweep.points), colours))


def _said(sweeps: Iterable[Sweep]) -> str:
    return "; ".join(
        f"{sweep.name}: best {fmt.per_second(best.rate)} at {fmt.shorten(best.value, 40)} on {fmt.shorten(best.target, 40)}"
        for sweep in sweeps
        for best in [max(sweep.points, key=lambda each: each.rate)]
    )


def _draw(axes: Axes, sweep: Sweep, canvas: Canvas) -> None:
    axes.grid(visible=False, axis="x")
    for target in dict.fromkeys(each.target for each in sweep.points):
        mine = [each for each in sweep.points if each.target == target]
        colour = target_colour(mine[0].slot)
        if sweep.name != "precision":  # an order, so a line says something
            axes.plot([each.order for each in mine], [each.rate for each in mine], color=colour, linewidth=1.6)
        axes.scatter(
            [each.order for each in mine], [each.rate for each in mine], s=46, color=colour, edgecolor=SURFACE, linewidth=0.8, zorder=3
        )
    labels = {each.order: each.value for each in sweep.points}
    room = max(4, int((axes.get_position().width * canvas.width) / 7.2 / len(labels)))
    axes.set_xticks(sorted(labels), [canvas.say(fmt.shorten(labels[each], room)) for each in sorted(labels)])
    axes.set_xlim(min(labels) - 0.5, max(labels) + 0.5)
    high = max(each.rate for each in sweep.points) * 1.12
    axes.set_ylim(0, high)
    axes.set_yticks(nice_ticks(0, high, 4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda each, _: fmt.tick(fmt.per_second(each)) if each > 0 else "0"))
    axes.text(0, 1.06, f"samples a second by {sweep.name}", transform=axes.transAxes, fontsize=12, color=INK)
