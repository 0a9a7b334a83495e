"""The Matplotlib charts: every sample of the proof, the search, and what each knob did.

Each chart is drawn twice, for a wide page and for a phone; the style sheet shows the one that fits, at its true size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from aivmm.planner.records import ProofRecord, TrialRecord
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, throughput_wanted
from aivmm.reports.intervals import log_ticks, nice_ticks, thinned
from aivmm.reports.svg import INK, LINE, MUTED, SURFACE, Canvas, drawing, target_colour

WIDE, NARROW = 960, 340
MOST_CURVES = 6
MOST_KNOBS = 6
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1.5, 2)), (0, (1, 1.5)), (0, (9, 3)))


@dataclass(frozen=True, kw_only=True)
class Key:
    """A line of a legend, written in HTML beside the chart."""

    label: str
    slot: int
    dashes: str = ""  # SVG stroke-dasharray
    width: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A finished chart in both widths, with its legend."""

    wide: Markup
    narrow: Markup
    legend: tuple[Key, ...] = ()


def both(name: str, title: str, description: str, height: tuple[int, int], draw: Callable[[Canvas, bool], None]) -> tuple[Markup, Markup]:
    made = []
    for kind, width, tall in (("wide", WIDE, height[0]), ("narrow", NARROW, height[1])):
        with drawing(f"aivmm-{name}-{kind}"):
            canvas = Canvas(f"{name}-{kind}-", width, tall)
            draw(canvas, kind == "wide")
            made.append(canvas.to_svg(title=title, description=description, css_class=f"mpl {kind}"))
    return made[0], made[1]


def axes_of(canvas: Canvas, *, left: int, right: int = 16, top: int = 12, bottom: int = 44) -> Axes:
    """Return axes with margins in pixels."""
    width, height = canvas.width, canvas.height
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes: Axes = canvas.figure.add_axes(box)
    axes.tick_params(length=0, pad=6)
    return axes


def distribution(data: ReportData, colours: Mapping[str, int]) -> Chart | None:
    """Draw the share of calls finished within a time, for the plan and the best others; None without samples."""
    ranked = sorted(
        (proof for proof in data.proofs if proof.samples is not None),
        key=lambda proof: (
            proof.role != "plan",
            proof.role != "baseline",
            not proof.eligible,
            proof.samples.median_s if proof.samples else 0.0,
        ),
    )[:MOST_CURVES]
    if not ranked:
        return None
    curves = [(proof, [each * _factor(data, proof) for each in _quantiles(proof)]) for proof in ranked]
    what = "time for each sample" if throughput_wanted(data) else "time of one call"
    low = min(values[0] for _, values in curves)
    high = max(values[int(0.98 * (len(values) - 1))] for _, values in curves)  # the last outlier does not set the scale
    log = high / low > 12

    def draw(canvas: Canvas, wide: bool) -> None:
        axes = axes_of(canvas, left=52)
        for index, (proof, values) in reversed(list(enumerate(curves))):
            shares = [position / (len(values) - 1) for position in range(len(values))]
            colour = target_colour(_slot(proof, colours))
            axes.plot(values, shares, color=colour, linestyle=_DASHES[index], linewidth=3 if proof.role == "plan" else 1.6)
        if log:
            axes.set_xscale("log")
        pad = 0.04 * (high - low or high)  # all calls of null devices take the same
        bounds = (low / 1.1, high * 1.1) if log else (max(0.0, low - pad), high + pad)
        axes.set_xlim(*bounds)
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1.0] if wide else [0, 0.5, 0.9, 1.0])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        _time_ticks(axes, bounds, log, 7 if wide else 3)
        axes.set_xlabel(what)

    wide, narrow = both(
        "distribution",
        "Share of calls finished within a time",
        "; ".join(f"{fmt.shorten(proof.name, 60)}: half within {fmt.seconds(values[len(values) // 2])}" for proof, values in curves),
        (300, 260),
        draw,
    )
    legend = tuple(
        Key(
            label=f"{proof.name}" + (" (plan)" if proof.role == "plan" else "" if proof.eligible else " (not eligible)"),
            slot=_slot(proof, colours),
            dashes=_dasharray(_DASHES[index]),
            width=3 if proof.role == "plan" else 1.6,
        )
        for index, (proof, _) in enumerate(curves)
    )
    return Chart(wide=wide, narrow=narrow, legend=legend)


def search(data: ReportData, colours: Mapping[str, int]) -> Chart | None:
    """Draw each trial's ratio to the reference in order, with the best so far; None without trials that gave a number."""
    done = [trial for trial in data.trials if trial.value is not None and trial.value > 0]
    if not done:
        return None
    lost = [trial for trial in data.trials if trial.value is None]
    low, high = min(trial.value or 1.0 for trial in done), max(trial.value or 1.0 for trial in done)
    low = min([low, *(max(trial.low, low / 2) for trial in done if trial.low is not None)])  # bars are shown, and do not set the scale
    high = max([high, *(min(trial.high, high * 1.6) for trial in done if trial.high is not None)])
    log = high / low > 4
    lows, highs = (low / 1.08, high * 1.2) if log else (low - 0.08 * (high - low + 0.02), high + 0.14 * (high - low + 0.02))

    def draw(canvas: Canvas, wide: bool) -> None:
        axes = axes_of(canvas, left=60)
        if log:
            axes.set_yscale("log")
        axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for slot in sorted({colours.get(trial.target, 0) for trial in done}):
            mine = [trial for trial in done if colours.get(trial.target, 0) == slot]
            known = [(trial.number, trial.low, trial.high) for trial in mine if trial.low is not None and trial.high is not None]
            if known:
                numbers, lows_at, highs_at = zip(*known, strict=True)
                axes.vlines(numbers, lows_at, highs_at, colors=target_colour(slot), linewidth=1.4, alpha=0.45)
            axes.scatter(
                [t.number for t in mine], [t.value or 0 for t in mine], s=46, color=target_colour(slot), edgecolor=SURFACE, linewidth=0.8
            )
        steps = _best_so_far(done, max(trial.number for trial in data.trials))
        axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=INK, linewidth=1.6)
        top = highs / 1.05 if log else highs - 0.05 * (highs - lows)
        axes.scatter([trial.number for trial in lost], [top] * len(lost), marker="x", s=34, color=MUTED, linewidth=1.2)
        axes.set_ylim(lows, highs)
        last = max(trial.number for trial in data.trials)
        axes.set_xlim(-1 - last / 80, last + 1 + last / 80)
        ticks = log_ticks(lows, highs) if log else nice_ticks(lows, highs)
        axes.set_yticks(ticks if len(ticks) > 1 else [low, high])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
        axes.minorticks_off()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("trial")

    best = min(done, key=lambda trial: trial.value or 0)
    wide, narrow = both(
        "search",
        "Search history",
        f"{len(data.trials)} trials; the best, on {fmt.shorten(best.target, 60)}, takes {best.value:.3g} of the reference's time",
        (300, 260),
        draw,
    )
    return Chart(wide=wide, narrow=narrow, legend=keys_of((trial.target for trial in done), colours))


def knobs(data: ReportData, colours: Mapping[str, int]) -> Chart | None:
    """Draw each knob's values against the ratio, for the knobs whose medians differ most; None where no knob took two values."""
    effects = knob_effects(data.trials)[:MOST_KNOBS]
    if not effects:
        return None
    rows = -(-len(effects) // 3)

    def draw(canvas: Canvas, wide: bool) -> None:
        columns = 3 if wide else 1
        lines = -(-len(effects) // columns)
        for index, effect in enumerate(effects):
            _small(canvas, effect, colours, index % columns, index // columns, columns, lines)

    wide, narrow = both(
        "knobs",
        "What each knob did",
        "; ".join(f"{fmt.shorten(effect.name, 40)}: best at {fmt.shorten(effect.best, 40)}" for effect in effects),
        (rows * 220, len(effects) * 200),
        draw,
    )
    return Chart(wide=wide, narrow=narrow)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One knob: for each of its values, the trials that took it, and how far apart the medians of their ratios are."""

    name: str
    values: tuple[str, ...]
    trials: tuple[tuple[TrialRecord, ...], ...]
    medians: tuple[float, ...]

    @property
    def best(self) -> str:
        """The value with the lowest median."""
        return self.values[self.medians.index(min(self.medians))]

    @property
    def spread(self) -> float:
        """Highest median over lowest."""
        return max(self.medians) / min(self.medians)


def knob_effects(trials: Sequence[TrialRecord]) -> list[Effect]:
    """Return the knobs that took two values or more, the strongest first. Marginal: the other knobs vary at the same time."""
    by_knob: dict[str, dict[Any, list[TrialRecord]]] = {}
    for trial in trials:
        if trial.value is None or trial.value <= 0:
            continue
        taken: dict[str, Any] = dict(trial.config.settings)
        taken.update(
            {
                "target": trial.target,
                "precision": trial.config.precision or "default",
                "batch": trial.batch,
                "callers": trial.callers,
                "replicas": trial.replicas,
            }
        )
        for name, value in taken.items():
            by_knob.setdefault(name, {}).setdefault(value, []).append(trial)
    effects = []
    for name, groups in by_knob.items():
        ordered = sorted(groups, key=lambda value: (isinstance(value, str), isinstance(value, str) or value, str(value)))
        if 2 <= len(ordered) <= 12:
            medians = tuple(statistics.median(trial.value or 0.0 for trial in groups[value]) for value in ordered)
            effects.append(
                Effect(name=name, values=tuple(map(str, ordered)), trials=tuple(tuple(groups[each]) for each in ordered), medians=medians)
            )
    return sorted(effects, key=lambda effect: (-effect.spread, effect.name))


def _small(canvas: Canvas, effect: Effect, colours: Mapping[str, int], column: int, line: int, columns: int, lines: int) -> None:
    """Draw one small multiple in its place of the grid."""
    width, height = canvas.width / columns, canvas.height / lines
    left, right, top, bottom = 52, 14, 34, 34
    box = (
        (column * width + left) / canvas.width,
        1 - ((line + 1) * height - bottom) / canvas.height,
        (width - left - right) / canvas.width,
        (height - top - bottom) / canvas.height,
    )
    axes: Axes = canvas.figure.add_axes(box)
    axes.tick_params(length=0, pad=6)
    axes.grid(visible=False, axis="x")
    for place, group in enumerate(effect.trials):
        spread = [place + 0.24 * (index / max(1, len(group) - 1) - 0.5) for index in range(len(group))]
        shades = [target_colour(colours.get(trial.target, 0)) for trial in group]
        axes.scatter(spread, [trial.value or 0.0 for trial in group], s=30, c=shades, edgecolor=SURFACE, linewidth=0.6)
        axes.plot([place - 0.3, place + 0.3], [effect.medians[place]] * 2, color=INK, linewidth=2)
    axes.set_xlim(-0.6, len(effect.values) - 0.4)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    axes.set_yticks(nice_ticks(low, high, 4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    room = max(4, int((width - left - right) / 7.2 / len(effect.values)))
    axes.set_xticks(range(len(effect.values)), [canvas.say(fmt.shorten(value, room)) for value in effect.values])
    axes.text(0, 1.08, canvas.say(fmt.shorten(effect.name, 32)), transform=axes.transAxes, fontsize=12, color=INK)
    for spine in axes.spines.values():
        spine.set_color(LINE)


def _quantiles(proof: ProofRecord) -> list[float]:
    """Return 201 quantiles: enough for the eye, whatever the number of samples."""
    assert proof.samples is not None
    ordered = sorted(proof.samples.timed_s)
    if len(ordered) <= 201:
        return ordered if len(ordered) > 2 else ordered * 3
    return [ordered[round(index * (len(ordered) - 1) / 200)] for index in range(201)]


def _factor(data: ReportData, proof: ProofRecord) -> float:
    """Return what turns the times between answers into what is drawn: seconds for each sample, or of one call."""
    return 1 / proof.batch if throughput_wanted(data) else proof.callers


def _slot(proof: ProofRecord, colours: Mapping[str, int]) -> int:
    return colours.get(proof.target.split(" + ")[0], 0)


def _time_ticks(axes: Axes, bounds: tuple[float, float], log: bool, about: int) -> None:
    ticks = thinned(log_ticks(*bounds), about) if log else nice_ticks(*bounds, about)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.tick(fmt.seconds(value)) if value > 0 else "0"))
    axes.minorticks_off()


def _best_so_far(done: Sequence[TrialRecord], last: int) -> list[tuple[int, float]]:
    steps: list[tuple[int, float]] = []
    for trial in sorted(done, key=lambda trial: trial.number):
        value = trial.value or 0.0
        if not steps or value < steps[-1][1]:
            steps.append((trial.number, value))
    return [*steps, (last, steps[-1][1])]


def keys_of(targets: Iterable[str], colours: Mapping[str, int]) -> tuple[Key, ...]:
    """Return a legend of targets, each once, in the order of their colours."""
    names = sorted(set(targets), key=lambda name: (colours.get(name, 0), name))
    return tuple(Key(label=name, slot=colours.get(name, 0), width=0) for name in names)


def _dasharray(style: Any) -> str:
    return "" if isinstance(style, str) else " ".join(f"{each:g}" for each in style[1])
