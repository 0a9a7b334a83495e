"""A search on real runtimes begins with what was best for a model like it."""

from __future__ import annotations

import pytest

from aivmm.db.database import Database
from aivmm.planner.records import TrialRecord
from aivmm.tuner.told import Point, point_in
from tests.tuner.harness import TINY, Place, write_tiny

GOAL = ("--objective", "throughput", "--batch", "1,32", "--targets", "onnxruntime", "--budget", "25s", "--top", "1", "--json")


def trials(place: Place) -> list[TrialRecord]:
    """Return what the newest run's search was told, in order."""
    with Database.open(place.db) as database:
        return database.trials(database.run(None).id, study_name="search")


def best(place: Place) -> TrialRecord:
    return min((each for each in trials(place) if each.value is not None), key=lambda each: each.value or 0.0)


def first_points(place: Place) -> list[Point]:
    """Return what was known before the newest search, and the three that it asked for first."""
    found = trials(place)
    return [point_in(each) for each in [*(each for each in found if not each.asked), *[each for each in found if each.asked][:3]]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_best_for_one_small_network_is_tried_first_for_a_wider_one_at_its_batch(place: Place) -> None:
    done = place.aivmm("tune", write_tiny(place.work / "tiny.onnx"), *TINY, *GOAL, "--trials", "9")
    assert done.code == 0, done.err
    handed_on = best(place)
    assert handed_on.batch == 32 and handed_on.asked  # a call of a sample is mostly the call: no noise hides that
    done = place.aivmm("tune", write_tiny(place.work / "wider.onnx", layers=4, width=40), *TINY, *GOAL, "--trials", "3")
    assert done.code == 0, done.err
    assert "the search tries first what was best for tiny" in done.err
    assert point_in(handed_on) in first_points(place)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_best_for_squeezenet_is_tried_first_for_inception(place: Place) -> None:
    goal = (*GOAL, "--batch", "1")
    done = place.aivmm("tune", "demo:squeezenet", *goal, "--trials", "9")
    assert done.code == 0, done.err
    handed_on = best(place)
    done = place.aivmm("tune", "demo:inception_v1", *goal, "--trials", "3")
    assert done.code == 0, done.err
    assert "the search tries first what was best for squeezenet" in done.err
    assert point_in(handed_on) in first_points(place)
