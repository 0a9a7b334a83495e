"""The section on precision: the front is what nothing beats, blocks that cost the most stand out, and odd rows do no harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aivmm.reports.data import ReportData
from aivmm.reports.precision import account
from aivmm.reports.render import render


def form(precision: str, median: float | None, sqnr: float | None, **more: Any) -> dict[str, Any]:
    accuracy = {} if sqnr is None else {"sqnr": sqnr, "cosine": 0.99}
    return {"target": "openvino:CPU", "precision": precision, "median_s": median, "accuracy": accuracy, **more}


TRIED = [
    form("fp32", 0.010, 200.0),
    form("int8:nncf-mixed", 0.004, 20.0, weight_bytes=1e6, file_bytes=1.1e6),
    form("int8:ort-minmax", 0.005, 12.0, problem="cosine 0.6 is below the limit of 0.99"),
    form("int8:nncf-mixed-but-0a1b2c3d", 0.0045, 35.0),
    form("int4:<script>alert(1)</script>", None, 5.0),
]
PARTS = [{"first": 0, "last": 0, "operators": 3, "noise": 1e-4}, {"first": 1, "last": 4, "operators": 9, "noise": 0.02}]


def told(full: ReportData, **precision: Any) -> ReportData:
    return replace(full, run=replace(full.run, summary={**full.run.summary, "precision": precision}))


def test_the_front_is_what_nothing_else_beats(full: ReportData) -> None:
    found = account(told(full, tried=TRIED), {})
    assert found is not None and found.chart is not None
    assert {each.precision for each in found.forms if each.in_front} == {"fp32", "int8:nncf-mixed", "int8:nncf-mixed-but-0a1b2c3d"}
    assert [each.median_s for each in found.forms] == [0.004, 0.0045, 0.005, 0.010, None]


def test_blocks_are_told_by_their_noise(full: ReportData) -> None:
    found = account(told(full, tried=TRIED, sensitivity={"int8:nncf-mixed": PARTS}), {})
    assert found is not None
    first, second = found.parts["int8:nncf-mixed"]
    assert (first.blocks, second.blocks) == ("block 0", "blocks 1 to 4")
    assert first.sqnr_db == pytest.approx(40.0) and second.bar == 100.0 and first.bar == pytest.approx(0.5)


def test_the_report_shows_it_and_escapes_every_name(full: ReportData, page: Any) -> None:
    text = render(told(full, tried=TRIED, sensitivity={"<b>x</b>": PARTS}, sentence="int8 except 3 blocks: 2.9x faster"))
    assert "int8 except 3 blocks: 2.9x faster" in text and 'id="precision"' in text and "<script>alert" not in text and "<b>x" not in text
    assert page(text).unclosed == ()


def test_without_lowered_forms_there_is_no_section(full: ReportData) -> None:
    assert account(full, {}) is None and 'id="precision"' not in render(full)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"tried": []},
        {"tried": "x"},
        {"tried": [1, None]},
        {"tried": TRIED, "sensitivity": []},
        {"tried": [{}], "sensitivity": {"a": [{}, 3]}},
    ],
)
def test_odd_rows_do_no_harm(full: ReportData, odd: dict[str, Any]) -> None:
    render(told(full, **odd))
