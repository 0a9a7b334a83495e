"""Pages beside the report of one run: a comparison of runs, and a static site over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from aivmm.reports import format as fmt
from aivmm.reports import trend
from aivmm.reports.compare import Comparison
from aivmm.reports.data import ReportData
from aivmm.reports.history import History, histories, machines
from aivmm.reports.render import render_page


def render_comparison(comparison: Comparison, generated_at: datetime) -> str:
    """Return a comparison as one HTML file. A pure function, like `render`, and as careful with names."""
    return render_page("compare.html.j2", generated_at=generated_at, comparison=comparison)


def render_site(runs: Sequence[ReportData], generated_at: datetime) -> Iterator[tuple[str, str]]:
    """Yield file names and HTML: `index.html`, and a page for each model. The reports of the runs, which they link to, are not among them.

    File names are made from digests, so no name from a model reaches the file system.
    """
    found = histories(runs)
    yield (
        "index.html",
        render_page(
            "index.html.j2", generated_at=generated_at, histories=found, machines=machines(runs), runs=len(runs), headline=_headline(found)
        ),
    )
    for history in found:
        yield (
            history.page,
            render_page(
                "model.html.j2", generated_at=generated_at, history=history, charts=trend.charts(history), headline=_model_headline(history)
            ),
        )


def _headline(found: Sequence[History]) -> str:
    if not found:
        return "Nothing has been tuned yet."
    worse = [history for history in found if history.latest.regressed]
    if not worse:
        return f"{fmt.count(len(found), 'model')}, none slower than in the run before."
    names = fmt.listing(fmt.shorten(each.name, 40) for each in worse)
    return f"{fmt.count(len(worse), 'model')} of {len(found)} slower than in the run before: {names}."


def _model_headline(history: History) -> str:
    latest = history.latest
    if latest.figure is None:
        return "no plan yet"
    said = f"{latest.value} on {latest.targets}"
    if latest.change is None:
        return said
    return f"{said}, {'a regression: ' if latest.regressed else ''}{latest.change.said} against the run before"
