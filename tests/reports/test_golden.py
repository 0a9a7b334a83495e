"""The report of a run in a stored database file is what the golden file says; see `golden.py` for how to renew it."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

from aivmm.reports.render import render
from tests.reports.golden import PAGE, plain, stored


def test_the_report_of_the_stored_run_is_the_golden_one(tmp_path: Path) -> None:
    page = render(stored(tmp_path))
    expected, found = PAGE.read_text(encoding="utf-8").splitlines(), plain(page).splitlines()
    difference = "\n".join(list(unified_diff(expected, found, "golden/report.html", "this report", lineterm="", n=1))[:60])
    assert not difference, f"renew it with `python -m tests.reports.golden` if it is meant:\n{difference}"


def test_the_stored_run_reaches_every_section(tmp_path: Path) -> None:
    """A golden file of a page that says "nothing was measured" everywhere would guard nothing."""
    data = stored(tmp_path)
    page = render(data)
    for chart in ("distribution", "tradeoffs", "roof-0", "scaling", "handovers", "search", "knobs"):
        assert f'id="{chart}-wide-title"' in page, chart
    assert data.planned is not None and 'id="predictions"' in page and len(page.encode()) < 2_000_000


def test_the_golden_file_has_all_of_the_page_but_style_and_script(tmp_path: Path) -> None:
    page = render(stored(tmp_path))
    for tag in ("<title>", "<h1", "<h2", "<dt>", "<table", "<figure", "<svg"):
        assert plain(page).count(tag) == page.count(tag) > 0, tag
