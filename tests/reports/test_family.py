"""The page above several reports: a row for each plan, links that stay beside it, and names from outside that do nothing."""

from __future__ import annotations

from html.parser import HTMLParser

from aivmm.reports.family import Overview, Row, render_family

HOSTILE = "<script>alert(1)</script>\"'\u202e&{{ 7*7 }}"


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(page: Overview) -> _Seen:
    parser = _Seen()
    parser.feed(render_family(page))
    return parser


def page(**changes: object) -> Overview:
    rows = (Row(name="a", cells=("fast", "kept"), link="report-0.html", tone="good"), Row(name="b", cells=("slow", "not kept"), tone="bad"))
    fields = {"title": "two", "lines": ("News.", "a: fast", "b: slow"), "columns": ("model", "plan", "verdict"), "rows": rows}
    return Overview(**{**fields, **changes})  # type: ignore[arg-type]


def test_each_plan_has_a_row_and_each_line_a_place() -> None:
    found = seen(page(facts=(("rows", "padded with zeros"),), facts_title="Smaller", notes=("a note",), created="aivmm"))
    assert found.tags.count("tr") == 3
    assert found.tags.count("h1") == 1
    for text in ("News.", "a: fast", "b: slow", "kept", "not kept", "padded with zeros", "a note"):
        assert text in found.text
    assert [each for each in found.links if each.endswith(".html")] == ["report-0.html"]
    assert "leads to the report" in found.text


def test_without_links_none_are_promised_and_without_rows_there_is_no_table() -> None:
    assert "leads to the report" not in seen(page(rows=(Row(name="b", cells=("x", "y")),))).text
    assert "table" not in seen(page(rows=())).tags


def test_names_from_outside_stay_text() -> None:
    row = Row(name=HOSTILE, cells=(HOSTILE, HOSTILE), link="report-0.html")
    text = render_family(
        page(title=HOSTILE, lines=(HOSTILE, HOSTILE), rows=(row,), facts=((HOSTILE, HOSTILE),), facts_title="x", notes=(HOSTILE,))
    )
    assert "<script>alert" not in text
    assert "49" not in seen(page(title=HOSTILE)).text
    assert "\u202e" not in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_the_same_page_gives_the_same_bytes() -> None:
    assert render_family(page()) == render_family(page())
