"""Comparisons of runs, and the site over all of them: what is claimed, what is marked, and that no name becomes markup or a path."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from aivmm.probes.records import Samples
from aivmm.reports.compare import Change, by_medians, compare, through_baseline
from aivmm.reports.data import ReportData
from aivmm.reports.history import histories, machines
from aivmm.reports.pages import render_comparison, render_site
from tests.reports.rows import EARLIER


def scaled(data: ReportData, factor: float, *, days: int = 1, plan_only: bool = False) -> ReportData:
    """Return the same run `days` later, `factor` times as slow: all of it, or the plan alone."""

    def slower(samples: Samples | None) -> Samples | None:
        return None if samples is None else replace(samples, timed_s=tuple(each * factor for each in samples.timed_s))

    proofs = []
    for each in data.proofs:
        if each.role == "plan" or not plan_only:
            each = replace(each, samples=slower(each.samples))
        if plan_only and each.role != "plan" and each.ratio and each.ratio_low and each.ratio_high:
            each = replace(each, ratio=each.ratio / factor, ratio_low=each.ratio_low / factor, ratio_high=each.ratio_high / factor)
        proofs.append(each)
    summary = {name: value for name, value in data.run.summary.items() if name != "measured"}
    identity = f"{abs(hash((data.run.id, factor, days))) % 16**8:08x}{data.run.id[8:]}"
    run = replace(data.run, id=identity, started_at=data.run.started_at + timedelta(days=days), summary=summary)
    return replace(data, run=run, proofs=tuple(proofs))


def test_a_slower_machine_on_the_day_is_not_taken_for_a_slower_plan(full: ReportData) -> None:
    later = scaled(full, 1.3)  # everything took longer: the machine was busy
    relative = through_baseline(full, later)
    absolute = by_medians(full, later)
    assert relative is not None and relative.verdict in ("same", "ambiguous") and math.isclose(relative.ratio, 1, rel_tol=1e-9)
    assert absolute is not None and absolute.verdict == "slower" and math.isclose(absolute.ratio, 1 / 1.3, rel_tol=0.02)
    assert compare([full, later]).subjects[1].change == relative


def test_a_slower_plan_is_found_and_said(full: ReportData) -> None:
    later = scaled(full, 1.25, plan_only=True)
    found = compare([full, later])
    change = found.subjects[1].change
    assert change is not None and change.verdict == "slower" and math.isclose(change.ratio, 0.8, rel_tol=1e-9)
    assert found.verdicts[0].startswith("B is 1.25× slower") and "than A" in found.verdicts[0]
    assert found.same_environment and not found.request


def test_unlike_environments_come_first_and_are_compared_by_medians(full: ReportData) -> None:
    changed = tuple(replace(each, runtime_version="2027.0") if each.target == "openvino:CPU" else each for each in full.environments)
    found = compare([full, replace(scaled(full, 0.5), environments=changed)])
    assert [row.name for row in found.environment] == ["openvino:CPU: runtime version"]
    assert found.environment[0].values == ("2026.4.1", "2027.0")
    assert found.subjects[1].relative is None
    assert found.subjects[1].change is not None and found.subjects[1].change.verdict == "faster"


def test_other_goals_and_missing_plans_are_not_compared(full: ReportData, infeasible: ReportData) -> None:
    other = replace(full, run=replace(full.run, objective="throughput"))
    found = compare([full, other, infeasible])
    assert [each.change for each in found.subjects] == [None, None, None]
    assert "not comparable" in found.verdicts[0] and "proved no plan" in found.verdicts[1]
    with pytest.raises(ValueError):
        compare([full])


def test_what_is_claimed_of_two_runs_is_rarely_wrong() -> None:
    """Two runs of the same plan, each with the luck of its own load (decision 0009), are called different in at most 5 of 100."""
    chance = random.Random(5)
    wrong = 0
    for _ in range(400):
        log = chance.gauss(0, 0.015 * math.sqrt(2))
        half = 1.96 * 0.015 * math.sqrt(2)
        change = Change(ratio=math.exp(log), low=math.exp(log - half), high=math.exp(log + half), against="")
        wrong += change.verdict in ("faster", "slower")
    assert wrong <= 20


def test_a_regression_is_marked_and_an_upgrade_that_slows_all_is_one(full: ReportData) -> None:
    upgraded = tuple(replace(each, runtime_version="2027.0") for each in full.environments)
    slower = replace(scaled(full, 1.4, days=2), environments=upgraded)
    (history,) = histories([slower, full, scaled(full, 1.0, days=1)])
    assert [each.regressed for each in history.entries] == [True, False, False]  # newest first
    assert history.entries[0].before == history.entries[1].data.run.id and history.entries[2].change is None
    assert machines([full, slower])[0][1] == 2


def test_another_machine_or_goal_is_no_regression(full: ReportData) -> None:
    elsewhere = tuple(replace(each, device_model="Another CPU") for each in full.environments)
    (history,) = histories([full, replace(scaled(full, 3), environments=elsewhere)])
    assert history.regressions == 0


def test_pages_are_complete_safe_and_name_files_by_digest(full: ReportData, hostile: ReportData, page: Callable[[str], Any]) -> None:
    later = scaled(full, 1.4, plan_only=True)
    files = dict(render_site([full, later, hostile], EARLIER))
    files["comparison"] = render_comparison(compare([full, later, hostile]), EARLIER)
    assert set(files) - {"index.html", "comparison"} == {each.page for each in histories([full, later, hostile])}
    for name, text in files.items():
        assert re.fullmatch(r"(index|model-[0-9a-f]{16})\.html|comparison", name)
        seen = page(text)
        assert seen.unclosed == ()
        assert len(seen.all("script")) == 1 and not seen.all("img") and not seen.all("iframe")
        links = [each.attributes["href"] for each in seen.all("a")]
        assert all(re.fullmatch(r"#\w+|index\.html|(run|model)-[0-9a-f]{16}\.html", each) for each in links)
        ids = [each.attributes["id"] for each in seen.elements if each.attributes.get("id")]
        assert len(ids) == len(set(ids))
        for table in seen.all("table"):
            assert table is not None
    assert "regression" in files[histories([full, later])[0].page]


def test_an_empty_database_has_a_page_that_says_so(page: Callable[[str], Any]) -> None:
    files = dict(render_site([], EARLIER))
    assert list(files) == ["index.html"] and "aivmm-tune MODEL" in files["index.html"]
