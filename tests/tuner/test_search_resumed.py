"""A search on devices made of arithmetic: killed and gone on with, replayed by its seed, warm-started, with energy for an objective."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aivmm.db.database import Database
from aivmm.planner.records import TrialRecord
from aivmm.runtime.engine import Engine
from tests.tuner.harness import TINY, Finished, Place, write_tiny

ARGUMENTS = (
    *TINY,
    "--backend",
    "null",
    "--targets",
    "null:CPU",
    "--budget",
    "60s",
    "--trials",
    "12",
    "--top",
    "1",
    "--seed",
    "3",
    "--json",
)


def asked(place: Place) -> list[tuple[Any, ...]]:
    """Return what the newest run's search asked for, in order, and how it came out."""
    with Database.open(place.db) as database:
        run = database.run(None)
        return [_point(each) for each in database.trials(run.id, study_name="search") if each.asked]


def _point(trial: TrialRecord) -> tuple[Any, ...]:
    return trial.target, trial.config.key(), trial.batch, trial.callers, trial.state, trial.value and round(trial.value, 6)


def until_asked(place: Place, process: subprocess.Popen[str], least: int, limit_s: float = 200.0) -> None:
    """Wait until so many points that were asked for are stored."""
    deadline, found = time.monotonic() + limit_s, 0
    while found < least:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{found} trials were stored"
        if place.db.exists():
            try:
                with closing(sqlite3.connect(f"file:{place.db}?mode=ro", uri=True, timeout=5)) as connection:
                    found = int(connection.execute("SELECT count(*) FROM trial WHERE asked").fetchone()[0])
            except sqlite3.OperationalError:
                pass  # it is being made
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Finished]:
    """A tune that nobody disturbed."""
    place = Place.at(tmp_path_factory.mktemp("whole"))
    return place, place.aivmm("tune", write_tiny(place.work / "tiny.onnx"), *ARGUMENTS)


@pytest.mark.slow
@pytest.mark.timeout(900)  # several tunes of a minute and more, on a machine that others keep busy
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("least", [3, 6])
def test_a_search_that_was_killed_goes_on_to_the_same_points(place: Place, whole: tuple[Place, Finished], least: int) -> None:
    model = write_tiny(place.work / "tiny.onnx")
    with place.started("tune", model, *ARGUMENTS) as process:
        until_asked(place, process, least)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    before = asked(place)
    assert least <= len(before) < 12
    done = place.aivmm("tune", model, *ARGUMENTS)
    assert done.code == 0, done.err
    assert "the search goes on where run" in done.err and f"{len(before)} trials of it are known" in done.err
    after = asked(place)
    assert after[: len(before)] == before
    assert after == asked(whole[0])
    with Database.open(place.db) as database:
        assert database.check() == []
        assert database.run(None).status == "complete"


@pytest.mark.slow
@pytest.mark.timeout(900)  # several tunes of a minute and more, on a machine that others keep busy
@pytest.mark.parametrize("recorded", [0, 1])
def test_what_was_raced_and_not_recorded_before_the_kill_is_asked_for_again(
    place: Place, whole: tuple[Place, Finished], recorded: int
) -> None:
    """The moment between the row of a race and those of its trials, which no kill from outside hits: the file is made to look like it."""
    assert whole[1].code == 0, whole[1].err
    shutil.copy(whole[0].db, place.db)
    with closing(sqlite3.connect(place.db)) as connection, connection:
        connection.execute(
            "DELETE FROM trial WHERE asked AND id NOT IN (SELECT id FROM trial WHERE asked ORDER BY number LIMIT ?)", [recorded]
        )
        connection.execute("UPDATE run SET status = 'running', finished_at = NULL, summary = '{}'")
        connection.execute("UPDATE study SET front = NULL, importance = NULL")
        for table in ("proof", "plan"):
            connection.execute(f"DELETE FROM {table}")
    done = place.aivmm("tune", write_tiny(place.work / "tiny.onnx"), *ARGUMENTS)
    assert done.code == 0, done.err
    assert asked(place) == asked(whole[0])
    with Database.open(place.db) as database:  # what the first had no time for, such as operators, may be measured now; no point is again
        anew = [each.key for each, reused in database.run_outcomes(database.run(None).id) if not reused]
    assert [each for each in anew if each.kind == "model"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # several tunes of a minute and more, on a machine that others keep busy
def test_the_same_seed_gives_the_same_trials_on_another_day_and_another_seed_others(place: Place, whole: tuple[Place, Finished]) -> None:
    assert whole[1].code == 0, whole[1].err
    model = write_tiny(place.work / "tiny.onnx")
    again = place.aivmm("tune", model, *ARGUMENTS)
    assert again.code == 0, again.err
    assert asked(place) == asked(whole[0])
    other = place.aivmm("tune", model, *ARGUMENTS, "--seed", "4", "--fresh")
    assert other.code == 0, other.err
    assert {each[:2] for each in asked(place)} != {each[:2] for each in asked(whole[0])}


@pytest.mark.slow
@pytest.mark.timeout(900)  # several tunes of a minute and more, on a machine that others keep busy
def test_a_search_starts_from_what_was_best_for_a_similar_model_and_says_so(place: Place) -> None:
    first, second = write_tiny(place.work / "tiny.onnx"), write_tiny(place.work / "wider.onnx", layers=4, width=48)
    done = place.aivmm("tune", first, *ARGUMENTS)
    assert done.code == 0, done.err
    with Database.open(place.db) as database:
        trials = [each for each in database.trials(database.run(None).id, study_name="search") if each.value is not None]
        best = min(trials, key=lambda each: each.value or 0.0)
    done = place.aivmm("tune", second, *ARGUMENTS, "--trials", "6")
    assert done.code == 0, done.err
    assert "the search tries first what was best for tiny" in done.err
    found = asked(place)
    assert (best.target, best.config.key()) in [each[:2] for each in found[:4]]


@pytest.mark.slow
@pytest.mark.timeout(900)  # several tunes of a minute and more, on a machine that others keep busy
def test_two_goals_leave_an_alternative_that_can_be_loaded(place: Place) -> None:
    model = write_tiny(place.work / "tiny.onnx")
    goals = ("--objective", "latency,throughput", "--targets", "null:CPU", "--budget", "120s", "--trials", "30", "--top", "1", "--json")
    done = place.aivmm("tune", model, *TINY, "--backend", "null", *goals)
    assert done.code == 0, done.err
    found = done.json
    (other,) = [each for each in found["alternatives"] if "throughput" in each["objective"]]
    assert other["metrics"]["throughput"] > 1.03 * found["measured"]["throughput_per_s"]
    with Engine.load(place.work / "tiny.aivmm", alternative="throughput") as engine:
        assert (engine.plan.batch, engine.plan.callers) == (other["batch"], other["callers"])
        inputs = {each.name: np.ones(each.shape, each.dtype) for each in engine.inputs}  # type: ignore[arg-type]
        assert all(each.shape[0] == other["batch"] for each in engine.run(inputs).values())
    with Database.open(place.db) as database:
        (study,) = [each for each in database.studies(database.run(None).id) if each.name == "search"]
    assert study.objectives == ("latency", "throughput") and len(study.front) >= 1


@pytest.mark.slow
def test_the_service_level_low_power_finds_the_plan_that_needs_least(place: Place, tiny: Path) -> None:
    done = place.aivmm(
        "tune", tiny, *TINY, "--backend", "null", "--service-level", "low-power", "--budget", "6s", "--trials", "4", "--top", "1", "--json"
    )
    assert done.code == 0, done.err
    assert "service level low-power: objective energy" in done.err
    found = done.json
    assert found["objectives"] == ["energy"] and found["measured"]["energy_j"] > 0 and found["measured"]["power_w"] > 0
    with Database.open(place.db) as database:
        run = database.run(None)
        rivals = [each.metrics["energy_j"] for each in database.proofs(run.id) if "energy_j" in each.metrics]
        trials = database.trials(run.id, study_name="search")
    assert found["measured"]["energy_j"] == pytest.approx(min(rivals)) and len(rivals) >= 2
    assert min(each.metrics["energy"] for each in trials if each.metrics) >= 0.5 * min(rivals)
    assert "energy for a sample" in found["verdict"]
