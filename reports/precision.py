"""What lower precision gives and costs: time against accuracy with the front marked, and the blocks that cost the most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import FuncFormatter

from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, dig, number
from aivmm.reports.figures import Chart, Key, axes_of, both
from aivmm.reports.intervals import log_ticks, nice_ticks
from aivmm.reports.svg import INK, MUTED, SURFACE, target_colour

_MOST_DB = 80.0  # beyond it outputs differ by rounding alone; all are drawn there
_MOST_ROWS = 40
_LABEL_DB = 7.0  # the height of a name in the chart


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the model on one target."""

    target: str
    precision: str  # "fp32", "int8:nncf-mixed"
    median_s: float | None
    sqnr_db: float | None
    cosine: float | None
    top1: float | None
    weight_bytes: float | None
    file_bytes: float | None
    memory_bytes: float | None  # peak of a fresh process that runs it
    energy_j: float | None  # of a sample, where it was counted
    speedup: float | None  # over the fastest form that is fp32, on whichever target
    name: str  # in words: "int8 except 3 blocks"
    method: str  # how it was lowered, "" for what was not
    problem: str  # why it may not be the plan, "" when it may
    in_front: bool  # none is both faster and nearer to fp32
    is_plan: bool  # the plan runs it, perhaps with other settings


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring blocks, lowered alone."""

    blocks: str
    operators: int
    sqnr_db: float | None
    bar: float  # its share of the noise, in per cent


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The section, ready to be written."""

    sentence: str
    forms: tuple[Form, ...]
    chart: Chart | None
    parts: Mapping[str, tuple[Part, ...]]  # by the lowered form that was taken apart
    data: str  # "real" or "synthetic"

    @property
    def has_top1(self) -> bool:
        """True when agreement is known of any form."""
        return any(each.top1 is not None for each in self.forms)

    @property
    def has_memory(self) -> bool:
        """True when the memory of any form is known."""
        return any(each.memory_bytes is not None for each in self.forms)

    @property
    def has_energy(self) -> bool:
        """True when the energy of any form was counted."""
        return any(each.energy_j is not None for each in self.forms)


def account(data: ReportData, colours: Mapping[str, int]) -> Precision | None:
    """Return the section from what the run recorded; None when no lower precision was tried."""
    told = dig(data.run.summary, "precision")
    rows = told.get("tried") if isinstance(told, Mapping) else None
    if not isinstance(rows, Sequence) or not any(isinstance(each, Mapping) for each in rows):
        return None
    forms = _forms([each for each in rows if isinstance(each, Mapping)])
    sensitivity = told.get("sensitivity")
    parts = {str(name): _parts(found) for name, found in sensitivity.items()} if isinstance(sensitivity, Mapping) else {}
    return Precision(
        sentence=str(told.get("sentence") or ""),
        forms=forms[:_MOST_ROWS],
        chart=_chart(forms, colours),
        parts={name: found for name, found in parts.items() if found},
        data=str(dig(data.run.summary, "accuracy", "data") or "synthetic"),
    )


def _forms(rows: Sequence[Mapping[str, Any]]) -> tuple[Form, ...]:
    places = [(number(each.get("median_s")), number(dig(each, "accuracy", "sqnr"))) for each in rows]
    plain = [time for each, (time, _) in zip(rows, places, strict=True) if time and _is_fp32(str(each.get("precision") or ""))]
    found = []
    for each, (median, sqnr) in zip(rows, places, strict=True):
        precision = str(each.get("precision") or "")
        name, method = _in_words(precision, str(each.get("kept") or ""))
        found.append(
            Form(
                target=str(each.get("target") or ""),
                precision=precision,
                name=name,
                method=method,
                median_s=median,
                speedup=min(plain) / median if plain and median else None,
                sqnr_db=sqnr,
                cosine=number(dig(each, "accuracy", "cosine")),
                top1=number(dig(each, "accuracy", "top1_agreement")),
                weight_bytes=number(each.get("weight_bytes")),
                file_bytes=number(each.get("file_bytes")),
                memory_bytes=number(each.get("peak_memory_bytes")),
                energy_j=number(each.get("energy_j")),
                problem=str(each.get("problem") or ""),
                is_plan=each.get("is_plan") is True,
                in_front=median is not None and sqnr is not None and not any(_beats(other, (median, sqnr)) for other in places),
            )
        )
    return tuple(sorted(found, key=lambda form: (form.median_s is None, form.median_s or 0.0, form.target, form.precision)))


def _is_fp32(precision: str) -> bool:
    return precision in ("fp32", "default (fp32)")


def _in_words(precision: str, kept: str) -> tuple[str, str]:
    """Return what a form is called, and how it was lowered: "int8:nncf-mixed-but-0a1b2c3d" is "int8 except 3 blocks", by nncf-mixed."""
    family, _, method = precision.partition(":")
    method, is_mixture, _ = method.partition("-but-")
    return f"{family} except {kept or 'some blocks'}" if is_mixture else family, method


def _beats(one: tuple[float | None, float | None], other: tuple[float, float]) -> bool:
    (time, sqnr), (other_time, other_sqnr) = one, other
    if time is None or sqnr is None:
        return False
    return time <= other_time and sqnr >= other_sqnr and (time, sqnr) != other


def _parts(rows: object) -> tuple[Part, ...]:
    if not isinstance(rows, Sequence):
        return ()
    usable = [each for each in rows if isinstance(each, Mapping) and number(each.get("noise")) is not None]
    noises = [max(0.0, number(each.get("noise")) or 0.0) for each in usable]
    worst = max(noises, default=0.0)
    found = []
    for each, noise in zip(usable, noises, strict=True):
        first, last = each.get("first"), each.get("last")
        found.append(
            Part(
                blocks=f"block {first}" if first == last else f"blocks {first} to {last}",
                operators=int(number(each.get("operators")) or 0),
                sqnr_db=-10 * math.log10(noise) if noise > 0 else None,
                bar=100 * noise / worst if worst else 0.0,
            )
        )
    return tuple(found)


def _labelled(drawn: Sequence[tuple[Form, float, float]], *, every: bool) -> list[tuple[Form, float, float]]:
    """Return the points to name: those of the front first, and of those that nearly coincide the first alone."""
    span = math.log(max(time for _, time, _ in drawn) / min(time for _, time, _ in drawn)) or 1.0
    named: list[tuple[Form, float, float]] = []
    for each in sorted(drawn, key=lambda point: not point[0].in_front):
        near = any(
            abs(math.log(each[1] / time)) < (0.14 if every else 0.3) * span and abs(each[2] - value) < _LABEL_DB for _, time, value in named
        )
        if not near and (every or each[0].in_front):
            named.append(each)
    return named


def _chart(forms: Sequence[Form], colours: Mapping[str, int]) -> Chart | None:
    drawn = [(form, form.median_s, min(form.sqnr_db, _MOST_DB)) for form in forms if form.median_s and form.sqnr_db is not None]
    if len(drawn) < 2:
        return None
    times, accuracies = [time for _, time, _ in drawn], [value for _, _, value in drawn]
    low, high = min(times), max(times)
    log = high / low > 4
    bounds = (low / 1.1, high * 1.15) if log else (low - 0.1 * (high - low + 1e-9), high + 0.1 * (high - low + 1e-9))
    front = sorted((time, value) for form, time, value in drawn if form.in_front)

    def draw(canvas: Any, wide: bool) -> None:
        axes = axes_of(canvas, left=60)
        if log:
            axes.set_xscale("log")
        axes.plot([x for x, _ in front], [y for _, y in front], color=INK, linewidth=1.6, drawstyle="steps-post")
        for form, time, value in drawn:
            fill = target_colour(colours.get(form.target, 0))
            axes.scatter(
                [time],
                [value],
                s=90 if form.in_front else 46,
                color=SURFACE if form.problem else fill,
                edgecolor=INK if form.in_front else fill if form.problem else SURFACE,
                linewidth=1.4,
                zorder=3,
            )
        for form, time, value in _labelled(drawn, every=wide):
            axes.annotate(
                canvas.say(fmt.shorten(form.name, 24)),
                (time, value),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=INK if form.in_front else MUTED,
            )
        axes.set_xlim(*bounds)
        axes.set_xticks(log_ticks(*bounds) if log else nice_ticks(*bounds, 6 if wide else 3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda each, _: fmt.tick(fmt.seconds(each)) if each > 0 else "0"))
        axes.minorticks_off()
        axes.set_ylim(min(0.0, *accuracies) - 4, max(accuracies) + 12)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda each, _: f"{each:g} dB"))
        axes.axhline(0.0, color=MUTED, linewidth=1)
        axes.set_xlabel("time of one call")

    best = front[0] if front else (low, accuracies[0])
    names = sorted({form.target for form, _, _ in drawn}, key=lambda name: colours.get(name, 0))
    wide, narrow = both(
        "precision",
        "Time against accuracy",
        f"{len(drawn)} forms of the model; the fastest on the front takes {fmt.seconds(best[0])} with an SQNR of {best[1]:.0f} dB",
        (320, 280),
        draw,
    )
    return Chart(wide=wide, narrow=narrow, legend=tuple(Key(label=name, slot=colours.get(name, 0), width=0) for name in names))
