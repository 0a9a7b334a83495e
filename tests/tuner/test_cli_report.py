"""`aivmm report` on a finished run: by plan, by model, as text, as tables, beside itself, and as a site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from aivmm.db.database import Database
from tests.tuner.conftest import Tuned
from tests.tuner.harness import Finished


def test_a_plan_finds_its_run_and_markdown_goes_to_standard_output(tuned: Tuned) -> None:
    done = tuned.place.aivmm("report", tuned.plan, "--format", "markdown", "-o", "-")
    assert done.code == 0, done.err
    assert done.out.startswith("**") and "| Median |" in done.out


def test_the_database_holds_the_plan_as_it_was_written(tuned: Tuned) -> None:
    with Database.open(tuned.place.db) as database:
        assert database.plan(database.run("tiny").id) == json.loads((tuned.plan / "plan.json").read_text(encoding="utf-8"))


def test_tables_hold_what_the_report_rests_on(tuned: Tuned, tmp_path: Path) -> None:
    done = tuned.place.aivmm("report", tuned.plan, "--tables", "parquet", "-o", tmp_path / "tables", "--json")
    assert done.json["report"] == str(tmp_path / "tables")
    frames = {path.stem: pd.read_parquet(path) for path in (tmp_path / "tables").iterdir()}
    assert {"probes", "trials", "proofs", "samples", "blocks", "operators", "environments"} == set(frames)
    plan = frames["proofs"].query("role == 'plan'").iloc[0]
    with Database.open(tuned.place.db) as database:  # others may have tuned the same again in this place
        stated = database.run(done.json["run"]).summary
    assert plan["median_s"] == pytest.approx(stated["measured"]["median_s"])
    assert set(frames["samples"]["proof"]) <= set(frames["proofs"]["name"])


def test_a_site_and_a_comparison_are_written(tuned: Tuned, tmp_path: Path) -> None:
    site = tuned.place.aivmm("report", "--all", "-o", tmp_path / "site", "--json")
    assert site.json["report"] == str(tmp_path / "site" / "index.html")
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "site").iterdir()]
    with Database.open(tuned.place.db) as database:  # others may have tuned the same again in this place
        assert sorted(kinds) == ["index.html", "model", *["run"] * len(database.runs())]
    both = tuned.place.aivmm("report", "--compare", tuned.plan, "tiny", "-o", tmp_path / "both.html")
    assert both.code == 0, both.err
    assert "What was different around them" in (tmp_path / "both.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "tiny"], "two runs or more"),
        (["tiny", "tiny"], "several runs were named"),
        (["--all", "tiny"], "takes no run"),
        (["--all", "--compare"], "three different things"),
        (["--format", "pdf"], "unknown format"),
        (["--tables", "xls"], "unknown format of tables"),
        (["--all", "-o", "-"], "standard output"),
        (["nothing-of-this-name"], "no run begins"),
        (["-o", "/dev/null/x.html"], "cannot write"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tuned: Tuned, in_process: Callable[..., Finished], arguments: list[str], said: str) -> None:
    done = in_process(tuned.place, "report", *arguments)
    assert done.code == 2 and len(done.error_lines) == 1 and said in done.err
