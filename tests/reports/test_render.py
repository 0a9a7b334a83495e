"""The report as a file: complete, the same twice, safe whatever the names are, and small."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aivmm.reports.data import ReportData
from aivmm.reports.render import render

SECTIONS = (
    "figures",
    "plan",
    "candidates",
    "tradeoffs",
    "time",
    "scaling",
    "transfers",
    "search",
    "predictions",
    "accuracy",
    "refused",
    "cautions",
    "devices",
    "environment",
    "reproduce",
    "run",
)


@pytest.fixture(scope="session")
def rendered() -> Callable[[ReportData], str]:
    """Render each data once for all tests."""
    known: dict[int, str] = {}

    def once(data: ReportData) -> str:
        if id(data) not in known:
            known[id(data)] = render(data)
        return known[id(data)]

    return once


@pytest.fixture(params=["full", "split", "infeasible", "refused", "hostile", "large"])
def data(request: pytest.FixtureRequest) -> ReportData:
    found: ReportData = request.getfixturevalue(request.param)
    return found


def attribute_values(page: Any, name: str) -> list[str]:
    return [element.attributes[name] for element in page.elements if element.attributes.get(name)]


def test_every_tag_that_opens_closes(data: ReportData, rendered: Any, page: Any) -> None:
    assert page(rendered(data)).unclosed == ()


def test_sections_come_in_the_promised_order(data: ReportData, rendered: Any, page: Any) -> None:
    shown = [element.attributes["id"] for element in page(rendered(data)).all("section")]
    assert tuple(shown) == SECTIONS


def test_ids_are_unique_and_every_reference_finds_one(data: ReportData, rendered: Any, page: Any) -> None:
    seen = page(rendered(data))
    ids = attribute_values(seen, "id")
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for value in attribute_values(seen, "href") if value.startswith("#")}
    wanted |= {each for value in attribute_values(seen, "aria-labelledby") for each in value.split()}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", rendered(data)))
    assert wanted <= set(ids)


def test_nothing_is_loaded_from_anywhere(data: ReportData, rendered: Any, page: Any) -> None:
    html = rendered(data)
    seen = page(html)
    assert {element.tag for element in seen.elements}.isdisjoint(
        {"img", "iframe", "object", "embed", "base", "form", "foreignobject", "image"}
    )
    assert all(value.startswith("#") or value == "data:," for value in attribute_values(seen, "href"))
    assert not attribute_values(seen, "src")
    assert "http:" not in html and "https:" not in html and "@import" not in html


def test_the_policy_names_exactly_the_one_script(data: ReportData, rendered: Any, page: Any) -> None:
    seen = page(rendered(data))
    (script,) = seen.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [element.attributes["content"] for element in seen.all("meta") if element.attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert f"script-src 'sha256-{digest}';" in policy
    assert not [name for element in seen.elements for name in element.attributes if name.startswith("on")]


def test_tables_and_pictures_can_be_read_aloud(data: ReportData, rendered: Any, page: Any) -> None:
    seen = page(rendered(data))
    assert all(element.attributes.get("scope") in ("col", "row") for element in seen.all("th"))
    assert len(seen.all("caption")) == len(seen.all("table"))
    for element in seen.all("svg"):
        hidden = element.attributes.get("aria-hidden") == "true" or ("li" in element.path and "role" not in element.attributes)
        assert hidden or (
            element.attributes.get("role") == "img" and (element.attributes.get("aria-label") or element.attributes.get("aria-labelledby"))
        )
    assert next(element.tag for element in seen.elements if re.fullmatch("h[1-6]", element.tag)) == "h1"


def test_every_table_scrolls_in_a_box_that_the_keyboard_reaches(full: ReportData, rendered: Any, page: Any) -> None:
    seen = page(rendered(full))
    boxes = [element for element in seen.all("div") if element.attributes.get("class") == "scroll"]
    assert len(boxes) == len(seen.all("table")) > 5
    assert all(box.attributes["tabindex"] == "0" and box.attributes["aria-label"] for box in boxes)


def test_the_same_rows_give_the_same_bytes_in_another_process(full: ReportData, rendered: Any, pytestconfig: pytest.Config) -> None:
    code = (
        "import importlib.util as u, sys, hashlib\n"
        "spec = u.spec_from_file_location('fixtures', sys.argv[1]); m = u.module_from_spec(spec); sys.modules['fixtures'] = m\n"
        "spec.loader.exec_module(m)\n"
        "from aivmm.reports.render import render\n"
        "print(hashlib.sha256(render(m.full_data()).encode()).hexdigest())\n"
    )
    where = pytestconfig.rootpath / "tests" / "reports" / "conftest.py"
    other = subprocess.run([sys.executable, "-c", code, str(where)], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(rendered(full).encode()).hexdigest()


def test_a_users_matplotlib_settings_change_nothing(full: ReportData, rendered: Any) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"lines.linewidth": 9, "svg.fonttype": "path", "font.size": 30, "axes.grid": False}):
        assert render(full) == rendered(full)


def test_hostile_names_stay_text(hostile: ReportData, rendered: Any, page: Any) -> None:
    html = rendered(hostile)
    seen = page(html)
    assert "<script>alert(1)" not in html and "<img" not in html
    assert len(seen.scripts) == 1 and len(seen.all("script")) == 1
    for name in ("<script>alert(1)</script>", "$x^2$ and $\\frac{1}{0}$", "שלום עולם", "🙂 model 🚀", "{{ 7 * 7 }}"):
        assert name in seen.text
    assert not re.search("[\x00-\x08\u202a-\u202e\u2066-\u2069]", html)
    html.encode("utf-8")  # no lone surrogates


def test_a_long_name_is_cut_everywhere_but_in_the_code_to_copy(hostile: ReportData, rendered: Any, page: Any) -> None:
    assert page(rendered(hostile)).text.count("x" * 10_000) == len(hostile.run.model.inputs[:1]) + len(hostile.run.model.outputs[:1])


def test_five_hundred_blocks_on_three_targets_stay_below_two_megabytes(large: ReportData, rendered: Any) -> None:
    assert large.structure is not None and large.structure.node_count > 2500
    assert len(rendered(large).encode()) < 2_000_000


def test_numbers_are_there_for_people(full: ReportData, rendered: Any, page: Any) -> None:
    text = page(rendered(full)).text
    for said in (
        "2.71 ms",
        "1.92×",
        "369/s",
        "148 MB",
        "GFLOP/s",
        "GB/s",
        "limit 0.999, synthetic data",
        "not eligible",
        "cosine 0.9984 is below 0.999",
    ):
        assert said in text, said


def test_what_is_missing_says_why(infeasible: ReportData, rendered: Any, page: Any) -> None:
    seen = page(rendered(infeasible))
    assert len([element for element in seen.elements if "empty" in (element.attributes.get("class") or "").split()]) >= 9
    for said in ("No plan meets latency<1ms", "none meets the constraints (latency<1ms)", "There is no plan to run", "Nothing was refused"):
        assert said in seen.text
    assert not seen.all("table")


def test_refusals_are_told_in_the_runtimes_words(refused: ReportData, full: ReportData, rendered: Any, page: Any) -> None:
    assert "OpenVINO cannot convert If-16 with subgraphs of different ranks" in page(rendered(refused)).text
    text = page(rendered(full)).text
    assert "the worker died with signal 9" in text and "bad allocation" in text
    assert "libOpenCL.so.1 is missing" in text and "install the Intel compute runtime" in text


def test_p99_waits_for_500_samples(full: ReportData, page: Any) -> None:
    plan = full.planned
    assert plan is not None and plan.samples is not None
    few = replace(plan, samples=replace(plan.samples, timed_s=plan.samples.timed_s[:88], rounds=plan.samples.rounds[:88]))
    text = page(render(replace(full, proofs=(few, *full.proofs[1:]), trials=()))).text
    assert "needs 500 samples, this proof has 88" in text


def test_a_throughput_run_compares_samples_a_second(full: ReportData, page: Any) -> None:
    text = page(render(replace(full, run=replace(full.run, objective="throughput"), trials=()))).text
    assert "Samples a second, more is better" in text


@pytest.mark.parametrize("status", ["running", "searched", "complete", "interrupted", "failed"])
def test_a_run_without_anything_still_reports(infeasible: ReportData, status: Any, page: Any) -> None:
    bare = replace(infeasible, run=replace(infeasible.run, status=status, summary={}, constraints=()))
    assert page(render(bare)).all("h1")


def test_the_record_of_a_report_needs_no_drawing_libraries() -> None:
    code = "import sys, aivmm.reports.data; print(sorted({'matplotlib', 'jinja2', 'pandas', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(full: ReportData, rendered: Any, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for graphics, against page and soft background."""
    style = re.search(r"<style>(.*?)</style>", rendered(full), re.S)
    assert style
    roots = re.findall(r":root \{(.*?)\}", style[1], re.S)
    colours = dict(re.findall(r"(--[\w]+): (#[0-9a-f]{6})", roots[0 if scheme == "light" else 1]))
    for name in ("--ink", "--muted", "--accent", "--good", "--bad"):
        assert min(contrast(colours[name], colours[back]) for back in ("--paper", "--soft")) >= 4.5, name
    for slot in range(8):
        assert contrast(colours[f"--t{slot}"], colours["--paper"]) >= 3, slot


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
