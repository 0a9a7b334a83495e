"""The page above several reports: one row for each plan of a bundle, with a link to the report of its own. It loads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from aivmm.reports.render import render_page


@dataclass(frozen=True, kw_only=True)
class Row:
    """A plan: its name, a file beside the page to read on in, and what the columns say."""

    name: str
    cells: tuple[str, ...]
    link: str = ""
    tone: str = ""  # "good", "bad" or neutral


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What the page shows."""

    title: str
    lines: tuple[str, ...]  # the verdict: the news first, then a line for each plan
    columns: tuple[str, ...]  # the first is over the rows' names
    rows: tuple[Row, ...]
    facts: tuple[tuple[str, str], ...] = ()
    facts_title: str = ""
    notes: tuple[str, ...] = ()
    created: str = ""


def render_family(overview: Overview) -> str:
    """Return the page. A pure function; every name is escaped, as in `render`."""
    return render_page("family.html.j2", overview=overview)
