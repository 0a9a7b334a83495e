"""The report and its sister pages in a real browser: nothing is fetched, nothing fails, all of it fits and can be read by everyone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aivmm.reports.compare import compare
from aivmm.reports.data import ReportData
from aivmm.reports.history import histories
from aivmm.reports.pages import render_comparison, render_site
from aivmm.reports.render import render
from tests.reports.conftest import copies_data, full_data, hostile_data, infeasible_data, large_data, split_data
from tests.reports.rows import EARLIER

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed: pip install '.[test]'"),
]

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PAPER = {"width": 717, "height": 1046}  # A4 within the browser's margins, in CSS pixels
SOME = [("full", "light"), ("full", "dark"), ("hostile", "light"), ("comparison", "dark"), ("index", "light"), ("model", "dark")]
PAGES = ("full", "split", "copies", "infeasible", "hostile", "comparison", "index", "model")

# All pages share one style sheet: a sample of pages in both schemes each time, all of them in the long tier.
SCHEMES = [
    pytest.param(name, scheme, marks=() if (name, scheme) in SOME else pytest.mark.slow) for name in PAGES for scheme in ("light", "dark")
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of page as a file."""
    folder = tmp_path_factory.mktemp("pages")
    full, hostile = full_data(), hostile_data()
    texts = {"full": render(full), "split": render(split_data()), "infeasible": render(infeasible_data()), "hostile": render(hostile)}
    texts["copies"] = render(copies_data())
    texts["comparison"] = render_comparison(compare([full, split_data(), hostile]), EARLIER)
    site = dict(render_site([full, split_data(), hostile], EARLIER))
    texts["index"], texts["model"] = site["index.html"], site[histories([full])[0].page]
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox of Chromium does not start for root; the pages are ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """An open page, and what went wrong on it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": WIDE, **options})
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_and_nothing_fails(browser: Any, pages: dict[str, Path], name: str) -> None:
    with Visit(browser, pages[name]) as visit:
        visit.page.wait_for_load_state("networkidle")
        assert visit.problems == []
        assert [url for url in visit.requests if not url.startswith("data:")] == [pages[name].as_uri()]


@pytest.mark.parametrize(("name", "scheme"), SCHEMES)
def test_a_phone_shows_it_without_scrolling_sideways_in_both_schemes(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    with Visit(browser, pages[name], viewport=NARROW, color_scheme=scheme) as visit:
        width = visit.page.evaluate("document.documentElement.scrollWidth")
        assert width <= NARROW["width"]
        paper, ink = (visit.page.evaluate(f"getComputedStyle(document.body).{each}") for each in ("backgroundColor", "color"))
        bright = sum(map(int, paper[4:-1].split(","))) > 384
        assert bright == (scheme == "light") and paper != ink


@pytest.mark.parametrize(("name", "scheme"), SCHEMES)
def test_axe_finds_nothing_serious(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    import axe_playwright_python

    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    with Visit(browser, pages[name], color_scheme=scheme, bypass_csp=True) as visit:
        visit.page.evaluate(axe)
        found = visit.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        f"{each['id']}: {node['html'][:160]} ({node['failureSummary']})"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert serious == []


def test_copies_lie_above_each_other_in_the_picture_and_fill_their_blocks(browser: Any, pages: dict[str, Path]) -> None:
    """What a reader sees: three bands without gaps over the blocks of the first stage, in the colours that the legend has for them."""
    with Visit(browser, pages["copies"]) as visit:
        strip = visit.page.locator("#plan figure.strip svg").first
        box = strip.bounding_box()
        first = strip.locator("g").first
        bands = first.locator("rect").evaluate_all(
            "all => all.map(each => ({...each.getBoundingClientRect().toJSON(), fill: getComputedStyle(each).fill}))"
        )
        assert [round(each["top"] - box["y"]) for each in bands] == [0, 18, 36]
        assert bands[-1]["bottom"] == pytest.approx(box["y"] + box["height"], abs=0.5)
        fills = [each["fill"] for each in bands]
        assert fills[0] == fills[1] != fills[2] and "none" not in fills
        chips = visit.page.locator("#plan ul.legend .chip").evaluate_all("all => all.map(each => getComputedStyle(each).backgroundColor)")
        assert chips[:2] == [fills[0], fills[2]]
        assert strip.locator("g").count() == 17
        assert "beside" in first.locator("title").text_content()


def test_tables_sort_by_number_with_gaps_last_and_filter(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["full"]) as visit:
        table = visit.page.locator("#candidates table[data-sort]").first
        button = table.locator("thead th button", has_text="Median")
        values = "rows => rows.map(row => row.cells[1].dataset.v).filter(Boolean).map(Number)"
        button.click()
        up = table.locator("tbody tr").evaluate_all(values)
        button.click()
        down = table.locator("tbody tr").evaluate_all(values)
        assert len(up) > 3 and up == sorted(up) and down == sorted(up, reverse=True)
        assert table.locator("thead th[aria-sort=descending]").count() == 1
        box = visit.page.locator("label.filter input").first
        rows = visit.page.locator("table[data-filter]").first.locator("tbody tr:visible")
        everything = rows.count()
        box.fill("no row holds this")
        assert rows.count() == 0
        box.fill("")
        assert rows.count() == everything > 0


def test_the_keyboard_reaches_what_scrolls_and_the_way_past_the_head(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["full"]) as visit:
        visit.page.keyboard.press("Tab")
        assert visit.page.evaluate("document.activeElement.className") == "skip"
        visit.page.keyboard.press("Enter")
        assert visit.page.evaluate("location.hash") == "#main"
        assert visit.page.locator(".scroll:not([tabindex='0'])").count() == 0


@pytest.mark.parametrize("name", ["full", "hostile", "comparison", "index"])
def test_without_scripts_nothing_is_hidden(browser: Any, pages: dict[str, Path], name: str) -> None:
    words = "document.querySelector('main').innerText.replace(/\\s+/g, ' ')"
    with Visit(browser, pages[name]) as visit:
        shown = visit.page.evaluate(words)
        buttons = visit.page.locator("main button.copy, main label.filter").all_inner_texts()
    with Visit(browser, pages[name], java_script_enabled=False) as visit:
        still = " ".join(visit.page.locator("main").inner_text().split())
    added = {word for text in buttons for word in text.split()}
    assert set(shown.split()) - set(still.split()) <= added


def test_hostile_names_stay_text(browser: Any, pages: dict[str, Path]) -> None:
    for name in ("hostile", "comparison", "index"):
        with Visit(browser, pages[name]) as visit:
            assert visit.problems == []
            assert "<script>alert(1)</script>" in visit.page.locator("body").inner_text()
            assert visit.page.locator("script").count() == 1 and visit.page.locator("img").count() == 0


def test_it_prints_on_paper_with_everything(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    with Visit(browser, pages["full"], viewport=PAPER) as visit:
        visit.page.emulate_media(media="print")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PAPER["width"], "what is wider than the paper is lost"
        assert visit.page.locator("nav").is_hidden()
        visit.page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_a_report_of_many_blocks_stays_small(large: ReportData) -> None:  # 500 blocks
    assert len(render(large).encode()) < 2_000_000


@pytest.mark.slow
def test_a_report_of_ten_thousand_nodes_stays_small() -> None:
    data = large_data(1800)
    assert data.structure is not None and data.structure.node_count > 10_000
    assert len(render(data).encode()) < 10_000_000
