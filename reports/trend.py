"""How a model's best plan went over time: one chart for each goal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from matplotlib.dates import date2num, num2date
from matplotlib.ticker import FuncFormatter

from aivmm.reports import format as fmt
from aivmm.reports.figures import Chart, Key, axes_of, both
from aivmm.reports.history import Entry, History
from aivmm.reports.palette import OTHER, SLOTS
from aivmm.reports.svg import INK, Canvas, target_colour

_HEIGHT = (260, 240)
_LEAST_ROOM_DAYS = 1 / 1440


def charts(history: History) -> tuple[tuple[str, Chart], ...]:
    """Return a caption and a chart for each goal with two plans or more."""
    by_goal: dict[str, list[Entry]] = {}
    for entry in reversed(history.entries):
        if entry.figure is not None:
            by_goal.setdefault(entry.data.run.objective.partition(",")[0], []).append(entry)
    return tuple((_caption(goal), _chart(goal, entries)) for goal, entries in by_goal.items() if len(entries) > 1)


def _caption(goal: str) -> str:
    what = "Samples a second of the plan, more is better" if goal == "throughput" else "Median time of one call of the plan, less is better"
    return f"{what}. Bars are 95 % intervals; a ring marks a regression against the run before. Lines join runs on one machine."


def _chart(goal: str, entries: Sequence[Entry]) -> Chart:
    machines = list(dict.fromkeys(entry.machine for entry in entries))
    slots = {name: min(index, OTHER) for index, name in enumerate(machines)}
    show = fmt.per_second if goal == "throughput" else fmt.seconds

    def draw(canvas: Canvas, wide: bool) -> None:
        axes = axes_of(canvas, left=72, top=16)
        for name in machines:
            mine = [entry for entry in entries if entry.machine == name and entry.figure]
            times = [float(date2num(_utc(entry.data.run.started_at))) for entry in mine]
            values = [entry.figure.median for entry in mine if entry.figure]
            errors = [
                [max(0.0, e.figure.median - e.figure.low) for e in mine if e.figure],
                [max(0.0, e.figure.high - e.figure.median) for e in mine if e.figure],
            ]
            axes.errorbar(times, values, yerr=errors, color=target_colour(slots[name]), marker="o", markersize=5, linewidth=1.4, capsize=0)
            bad = [(time, value) for time, value, entry in zip(times, values, mine, strict=True) if entry.regressed]
            if bad:
                axes.scatter(
                    [time for time, _ in bad], [value for _, value in bad], s=110, facecolor="none", edgecolor=INK, linewidth=1.4, zorder=5
                )
        moments = [float(date2num(_utc(entry.data.run.started_at))) for entry in entries]
        room = max(_LEAST_ROOM_DAYS, 0.04 * (max(moments) - min(moments)))  # runs of one moment have no extent
        axes.set_xlim(min(moments) - room, max(moments) + room)
        shown = moments if len(moments) == 1 or min(moments) == max(moments) else _spread(min(moments), max(moments), 6 if wide else 3)
        pattern = "%m-%d %H:%M" if max(moments) - min(moments) < 5 else "%Y-%m-%d"
        axes.set_xticks(list(dict.fromkeys(shown)), [num2date(each, tz=UTC).strftime(pattern) for each in dict.fromkeys(shown)])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.tick(show(value)) if value > 0 else "0"))

    description = "; ".join(f"{fmt.moment(entry.data.run.started_at)}: {entry.value}" for entry in entries[-20:])
    wide, narrow = both(f"trend-{goal}", f"Best {goal} over time", description, _HEIGHT, draw)
    legend = tuple(Key(label=name, slot=slots[name] % SLOTS, width=0) for name in machines)
    return Chart(wide=wide, narrow=narrow, legend=legend)


def _spread(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * index / (count - 1) for index in range(count)]


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)
