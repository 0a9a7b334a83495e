"""What handing a tensor from one target to the next costs, by its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import FuncFormatter

from aivmm.probes.copies import is_copy
from aivmm.probes.records import Measured, handover_of
from aivmm.probes.transfers import TransferFit, fit_boundaries
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData
from aivmm.reports.figures import Chart, Key, axes_of, both
from aivmm.reports.intervals import log_ticks
from aivmm.reports.svg import SURFACE, Canvas, target_colour

_DASHES = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1.5, 2)))
_SHOWN_BYTES = (4096, 1 << 20)  # what a table says the cost of
_LEAST_SIZES = 3  # that a fit needs


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One ordered pair of targets."""

    source: str
    destination: str
    slot: int  # the destination's colour
    costs: tuple[tuple[int, float], ...]  # (bytes, seconds beyond both stages alone); may be negative within the noise
    fixed_s: float | None
    per_byte_s: float | None
    error: float | None

    def said(self, size: int) -> str:
        """Return the fitted cost of so many bytes."""
        if self.fixed_s is None or self.per_byte_s is None:
            return "–"
        return fmt.seconds(self.fixed_s + size * self.per_byte_s) if self.fixed_s + size * self.per_byte_s > 0 else "below noise"


@dataclass(frozen=True, kw_only=True)
class MemoryCopy:
    """Copies along one route, outside any model: what each size takes."""

    source: str
    destination: str
    times: tuple[tuple[int, float], ...]  # (bytes, seconds)

    def said(self, size: int) -> tuple[str, str]:
        """Return the time and the rate at one size, empty where it was not measured."""
        seconds = dict(self.times).get(size)
        return ("–", "") if seconds is None else (fmt.seconds(seconds), f"{size / seconds / 1e9:.3g} GB/s")


@dataclass(frozen=True, kw_only=True)
class Handovers:
    """The section, ready to be written."""

    pairs: tuple[Pair, ...]
    copies: tuple[MemoryCopy, ...]
    chart: Chart | None
    missing: str  # why there are none; "" where there are
    sizes: tuple[int, ...] = _SHOWN_BYTES

    @property
    def copied_sizes(self) -> list[int]:
        """The sizes of copies, ascending."""
        return sorted({size for each in self.copies for size, _ in each.times})


def account(data: ReportData, colours: Mapping[str, int]) -> Handovers:
    """Return the pairs that were measured or reused in this run."""
    found: dict[tuple[str, str], list[tuple[int, Measured]]] = {}
    for outcome in data.outcomes:
        place = handover_of(outcome.key)
        if place is not None and isinstance(outcome, Measured):
            found.setdefault((place[1], outcome.key.target), []).append((place[0], outcome))
    of_memory = {ends: points for ends, points in found.items() if is_copy(*ends)}
    pairs = tuple(
        _pair(*ends, sorted(points, key=lambda each: each[0]), colours) for ends, points in sorted(found.items()) if ends not in of_memory
    )
    copies = tuple(
        MemoryCopy(source=ends[0], destination=ends[1], times=tuple((size, each.samples.median_s) for size, each in points))
        for ends, points in sorted(of_memory.items())
    )
    return Handovers(pairs=pairs, copies=copies, chart=_chart(pairs), missing="" if pairs else _missing(data))


def _missing(data: ReportData) -> str:
    if len({each.target for each in data.environments}) < 2:
        return "One target took part, so nothing is handed over."
    handed = ((place, each.key.target) for each in data.outcomes if (place := handover_of(each.key)) is not None)
    if any(not is_copy(place[1], target) for place, target in handed):
        return "No hand-over between targets could be measured; the reasons are below, under refused and failed."
    return "No hand-over between targets was measured in this run: the budget was spent before, or no cut was in question."


def _pair(source: str, destination: str, points: Sequence[tuple[int, Measured]], colours: Mapping[str, int]) -> Pair:
    fit: TransferFit | None = None
    if len(points) >= _LEAST_SIZES:
        names = ("cost_s", "source_s", "destination_s")
        fit = fit_boundaries([{"size_bytes": size, **{name: each.metrics[name] for name in names}} for size, each in points])
    return Pair(
        source=source,
        destination=destination,
        slot=colours.get(destination, 0),
        costs=tuple((size, each.metrics["cost_s"]) for size, each in points),
        fixed_s=fit.fixed_s if fit else None,
        per_byte_s=fit.per_byte_s if fit else None,
        error=fit.error if fit else None,
    )


def _chart(pairs: Sequence[Pair]) -> Chart | None:
    drawn = [(pair, [(size, cost) for size, cost in pair.costs if cost > 0]) for pair in pairs]
    drawn = [(pair, costs) for pair, costs in drawn if len(costs) > 1][:6]
    if not drawn:
        return None
    sizes = [size for _, costs in drawn for size, _ in costs]
    times = [cost for _, costs in drawn for _, cost in costs]

    def draw(canvas: Canvas, wide: bool) -> None:
        axes = axes_of(canvas, left=72)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for index, (pair, costs) in enumerate(drawn):
            style, colour = _DASHES[index % len(_DASHES)], target_colour(pair.slot)
            axes.plot([size for size, _ in costs], [cost for _, cost in costs], color=colour, linestyle=style, linewidth=1.6)
            axes.scatter(
                [size for size, _ in costs], [cost for _, cost in costs], s=36, color=colour, edgecolor=SURFACE, linewidth=0.8, zorder=3
            )
        axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
        axes.set_ylim(min(times) / 1.6, max(times) * 1.6)
        axes.set_xticks([each for each in (2.0**power for power in range(8, 31, 4 if wide else 6)) if min(sizes) <= each <= max(sizes)])
        axes.set_yticks(log_ticks(min(times) / 1.6, max(times) * 1.6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda each, _: fmt.binary(each)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda each, _: fmt.tick(fmt.seconds(each))))
        axes.minorticks_off()
        axes.set_xlabel("size of what is handed over")

    said = "; ".join(
        f"{fmt.shorten(pair.source, 30)} to {fmt.shorten(pair.destination, 30)}: {pair.said(1 << 20)} for 1 MiB" for pair, _ in drawn
    )
    wide, narrow = both("handovers", "What a hand-over costs by size", said, (280, 260), draw)
    legend = tuple(
        Key(label=f"{pair.source} to {pair.destination}", slot=pair.slot, dashes=_svg_dashes(_DASHES[index % len(_DASHES)]))
        for index, (pair, _) in enumerate(drawn)
    )
    return Chart(wide=wide, narrow=narrow, legend=legend)


def _svg_dashes(style: object) -> str:
    return " ".join(f"{each:g}" for each in style[1]) if isinstance(style, tuple) else ""
