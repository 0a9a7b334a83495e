"""The whole command, twice and eight times at once on one file, and once on a server."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from aivmm.db.database import Database
from tests.tuner.harness import LIMIT_S, SMALL, TINY, Place, write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_S)]


def is_whole(location: str, summaries: list[dict[str, object]]) -> None:
    """Check that each run has everything that its summary speaks of."""
    with Database.open(location) as database:
        assert database.check() == []
        runs = database.runs()
        assert len(runs) == len(summaries)
        assert {run.status for run in runs} == {"complete"}
        by_path = {database.plan_path(run.id): run for run in runs}
        for summary in summaries:
            plan, probes, baselines = summary["plan"], summary["probes"], summary["baselines"]
            assert isinstance(plan, dict) and isinstance(probes, dict) and isinstance(baselines, list)
            run = by_path[plan["path"]]
            outcomes = database.run_outcomes(run.id)
            assert sum(not reused for _, reused in outcomes) >= probes["measured"] > 0 or probes["reused"] > 0
            assert {proof.name for proof in database.proofs(run.id)} >= {each["name"] for each in baselines}
            assert database.trials(run.id)
            assert database.run_structure(run.id) is not None


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.timeout(8 * LIMIT_S)
def test_tunes_on_one_file_all_end_and_nothing_is_lost(tmp_path: Path, count: int) -> None:
    place = Place.at(tmp_path)
    models = [write_tiny(place.work / f"m{number}.onnx", layers=1 + number % 3) for number in range(count)]
    with ExitStack() as stack:
        started = [stack.enter_context(place.started("tune", each, *TINY, *SMALL, "--json")) for each in models]
        ended = [process.communicate(timeout=count * LIMIT_S) for process in started]
        for process, (_, errors) in zip(started, ended, strict=True):
            assert process.returncode == 0, errors
            assert "locked" not in errors
    is_whole(str(place.db), [json.loads(out) for out, _ in ended])


def test_a_tune_on_a_server_and_a_second_one_that_reuses_what_it_measured(location: str, tmp_path: Path) -> None:
    if "://" not in location:
        pytest.skip("every other test of aivmm-tune runs on a SQLite file")
    place = Place.at(tmp_path)
    model = write_tiny(place.work / "tiny.onnx")
    summaries = []
    for name in ("first", "second"):
        done = place.aivmm("tune", model, *TINY, *SMALL, "--db", location, "--json", "-o", place.work / name)
        assert done.code == 0, done.err
        summaries.append(done.json)
    is_whole(location, summaries)
    assert summaries[0]["probes"]["measured"] > 0
    assert summaries[1]["probes"]["reused"] > 0  # not all: the search may ask for another point this time
    assert summaries[1]["probes"]["measured"] < summaries[0]["probes"]["measured"]
    report = place.aivmm("report", "--db", location, "-o", place.work / "again.html")
    assert report.code == 0, report.err
