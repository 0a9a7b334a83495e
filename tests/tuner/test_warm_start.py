"""A search on real runtimes begins with what was best for a model like it."""

from __future__ import annotations

import pytest

from aivmm.db.database import Database
from tests.tuner.harness import Place

# For throughput hardly a default is best: there is something to hand on.
GOAL = ("--objective", "throughput", "--batch", "1", "--targets", "onnxruntime", "--budget", "25s", "--top", "1", "--json")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_best_for_one_convolutional_network_is_tried_first_for_another(place: Place) -> None:
    done = place.aivmm("tune", "demo:squeezenet", *GOAL, "--trials", "9")
    assert done.code == 0, done.err
    with Database.open(place.db) as database:
        first = database.run(None)
        trials = database.trials(first.id, study_name="search")
    best = min((each for each in trials if each.value is not None), key=lambda each: each.value or 0.0)
    assert best.asked, f"a baseline was best, {best}: there is nothing to hand on"
    done = place.aivmm("tune", "demo:inception_v1", *GOAL, "--trials", "3")
    assert done.code == 0, done.err
    assert "the search tries first what was best for squeezenet" in done.err
    with Database.open(place.db) as database:
        trials = database.trials(database.run(None).id, study_name="search")
    tried = [(each.target, each.config, each.callers, each.replicas) for each in trials if each.asked]
    assert (best.target, best.config, best.callers, best.replicas) in tried, (best, tried)
