"""A search on real runtimes begins with what was best for a model like it."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from aivmm.db.database import Database
from aivmm.planner.records import TrialRecord
from aivmm.tuner.told import point_in
from tests.tuner.harness import TINY, Place, write_tiny

GOAL = ("--objective", "throughput", "--targets", "onnxruntime", "--budget", "10s", "--trials", "3", "--top", "1", "--json")


def trials(place: Place) -> list[TrialRecord]:
    """Return what the newest run's search was told, in order."""
    with Database.open(place.db) as database:
        return database.trials(database.run(None).id, study_name="search")


def hand_on_the_last(place: Place) -> TrialRecord:
    """Have the database say that the last point asked for was best by far: which one really was is the machine's mood."""
    last = [each for each in trials(place) if each.asked and each.value is not None][-1]
    with closing(sqlite3.connect(place.db)) as connection, connection:
        connection.execute("UPDATE trial SET value = 0.001 WHERE asked AND number = ?", [last.number])
    return last


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_best_for_one_network_is_tried_first_for_a_wider_one_at_its_batch(place: Place) -> None:
    done = place.aivmm("tune", write_tiny(place.work / "tiny.onnx"), *TINY, *GOAL, "--batch", "1,4")
    assert done.code == 0, done.err
    best = hand_on_the_last(place)
    done = place.aivmm("tune", write_tiny(place.work / "wider.onnx", layers=4, width=40), *TINY, *GOAL, "--batch", "1,4")
    assert done.code == 0, done.err
    assert "the search tries first what was best for tiny" in done.err
    assert point_in(best) in [point_in(each) for each in trials(place) if each.asked]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_best_for_squeezenet_is_tried_first_for_inception(place: Place) -> None:
    done = place.aivmm("tune", "demo:squeezenet", *GOAL, "--batch", "1")
    assert done.code == 0, done.err
    best = hand_on_the_last(place)
    done = place.aivmm("tune", "demo:inception_v1", *GOAL, "--batch", "1")
    assert done.code == 0, done.err
    assert "the search tries first what was best for squeezenet" in done.err
    assert point_in(best) in [point_in(each) for each in trials(place) if each.asked]
