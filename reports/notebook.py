"""A result as a notebook shows it: the verdict and the comparison, in HTML without styles or scripts of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from aivmm.reports import format as fmt
from aivmm.reports.data import dig, number

_ROW = Markup("<tr><td>{}</td><td style='text-align:right'>{}</td><td style='text-align:right'>{}</td><td>{}</td></tr>")


def notebook(summary: Mapping[str, Any], report: str) -> str:
    """Return HTML of the object of `tune --json`. Every name is escaped and cut to a length that can be read."""
    measured = summary.get("measured") or {}
    rows = [_row("the plan", number(measured.get("median_s")), measured.get("ci95_s"), "")] if measured else []
    for each in summary.get("baselines") or ():
        if not each.get("eligible"):
            said = f"not eligible: {each.get('reason') or ''}"
        else:
            said = f"{each.get('verdict') or 'not compared'} ({fmt.ratio(number(each.get('ratio_to_plan')))})"
        rows.append(_row(str(each.get("name")), number(each.get("median_s")), each.get("ci95_s"), said))
    head = Markup("<tr><th></th><th>median</th><th>95 % interval</th><th>the plan is</th></tr>")
    verdict = Markup("<p><b>{}</b></p>").format(fmt.shorten(str(summary.get("verdict", "")), 600))
    plan = dig(summary, "plan", "path")
    places = (
        Markup("<p>plan <code>{}</code>, report <code>{}</code></p>").format(fmt.clean(str(plan)), fmt.clean(report))
        if plan
        else Markup("")
    )
    return verdict + Markup("<table>") + head + Markup("").join(rows) + Markup("</table>") + places


def _row(name: str, median_s: float | None, interval: Any, said: str) -> Markup:
    pair = [number(each) for each in interval] if isinstance(interval, (list, tuple)) and len(interval) == 2 else [None, None]
    between = f"{fmt.seconds(pair[0])} to {fmt.seconds(pair[1])}" if None not in pair else "–"
    return _ROW.format(fmt.shorten(name, 80), fmt.seconds(median_s), between, fmt.shorten(said, 120))
