"""What is believed of points that were not measured, held to functions that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import approx_fprime
from scipy.stats import norm

from aivmm.planner.candidates import Candidate, Score
from aivmm.planner.objectives import parse_objectives
from aivmm.planner.proposing import Encoding, Proposer
from aivmm.planner.search import Search
from aivmm.planner.surrogate import Surrogate, _density, _distance, log_chance_below, log_expected_improvement
from aivmm.runtime.config import Knob
from tests.planner.test_objectives import CPU, GPU, LAYOUT, cuttable
from tests.planner.test_search import LEVEL, THREADS, by_threads, drive, scored, space

CHANCE = np.random.default_rng(5)
POINTS = CHANCE.random((40, 3))
LOSSES = 2 * POINTS[:, 0] + np.sin(4 * POINTS[:, 1])  # the third matters nothing


def test_the_gradient_is_that_of_the_density() -> None:
    apart = np.stack([_distance(POINTS[:, at, None], POINTS[None, :, at], at != 2) for at in range(3)])
    y = (LOSSES - LOSSES.mean()) / LOSSES.std()
    prior, width = np.array([-1.0, -2.0, -1.5, 0.1, -5.0]), np.ones(5)
    theta = prior + np.array([0.3, -0.2, 0.1, 0.2, 0.5])
    told = approx_fprime(theta, lambda at: _density(at, apart, y, prior, width)[0], 1e-6)
    assert _density(theta, apart, y, prior, width)[1] == pytest.approx(told, rel=1e-3, abs=1e-3)


def test_what_does_not_matter_weighs_least_and_what_was_not_seen_is_foretold() -> None:
    fitted = Surrogate.fit(POINTS, LOSSES, [True] * 3, sigma=0.01)
    assert fitted.weights[2] < 0.2 * min(fitted.weights[:2])
    unseen = CHANCE.random((200, 3))
    truth = 2 * unseen[:, 0] + np.sin(4 * unseen[:, 1])
    mean, sd = fitted.believe(unseen)
    assert float(np.corrcoef(mean, truth)[0, 1]) > 0.97
    assert float(np.mean(np.abs(mean - truth) < 2 * sd)) > 0.85  # it knows how wrong it may be


def test_noise_is_smoothed_and_further_points_are_believed() -> None:
    noisy = LOSSES + CHANCE.normal(0, 0.3, len(LOSSES))
    fitted = Surrogate.fit(POINTS, noisy, [True] * 3, sigma=0.3)
    mean, _ = fitted.believe(POINTS)
    assert np.abs(mean - LOSSES).mean() < 0.7 * np.abs(noisy - LOSSES).mean()
    at = np.array([[0.5, 0.5, 0.5]])
    _, before = fitted.believe(at)
    told = fitted.given(np.repeat(at, 20, axis=0), np.full(20, 9.0))
    after, sd = told.believe(at)
    assert after[0] > 7 and sd[0] < before[0]


def test_categories_have_no_order() -> None:
    kinds = np.array([[float(each)] for each in (0, 1, 2) * 10])
    values = np.array([{0.0: 1.0, 1.0: 0.0, 2.0: 1.0}[at[0]] for at in kinds])
    mean, _ = Surrogate.fit(kinds, values, [False], sigma=0.01).believe(np.array([[0.0], [1.0], [2.0]]))
    assert mean == pytest.approx([1.0, 0.0, 1.0], abs=0.05)


@pytest.mark.parametrize("z", [-4.0, -1.0, 0.0, 1.5])
def test_expected_improvement_is_the_mean_of_what_falls_below(z: float) -> None:
    mean, _ = quad(lambda loss: (0.5 * z - loss) * norm.pdf(loss, 0.0, 0.5), -12.0, 0.5 * z, epsabs=1e-14)
    found = log_expected_improvement(np.zeros(1), np.full(1, 0.5), 0.5 * z)[0]
    assert found == pytest.approx(math.log(mean), abs=1e-3)


def test_expected_improvement_falls_on_where_numbers_end() -> None:
    far = log_expected_improvement(np.zeros(4), np.ones(4), -9.0), log_expected_improvement(np.zeros(4), np.ones(4), -60.0)
    assert np.isfinite(far).all() and (far[1] < far[0]).all()
    assert log_chance_below(np.zeros(1), np.ones(1), 0.0)[0] == pytest.approx(math.log(0.5))


def test_a_point_is_encoded_by_who_takes_part_and_order_is_kept() -> None:
    points = cuttable(CPU, GPU, batches=(1, 2, 8), most_replicas=4)
    encoding = Encoding(points)
    for each in drive(Search(points, seed=3), lambda each: scored(1.0), trials=30):
        at = encoding.encode(each)
        assert len(at) == len(encoding.ordered) and all(0 <= value <= 1 for value, one in zip(at, encoding.ordered, strict=True) if one)
        taking = {target for target, _ in each.policy.targets} if each.policy else {each.target}
        assert (at[0], at[3]) == (float(CPU in taking), float(GPU in taking))


def test_what_is_proposed_is_new_and_near_the_optimum() -> None:
    wide = Knob("threads", "int", "many", low=1, high=64, default=1)
    search = Search(space(wide, LEVEL), seed=1)

    def cost(candidate: object) -> float:
        return 1 + 0.02 * abs(int(candidate.config.get("threads") or 1) - 40)  # type: ignore[attr-defined]

    tried = drive(search, lambda each: scored(cost(each)), trials=24)
    assert len({each.key for each in tried}) == 24
    late = [cost(each) for each in tried[15:]]
    assert min(late) <= 1.02 and sum(late) / len(late) < 1.35  # by chance it would be 1.4


def test_too_little_is_known_to_propose_anything() -> None:
    search = Search(space(THREADS, LEVEL))
    tried = drive(search, by_threads, trials=3)
    known = [(each, by_threads(each)) for each in tried]
    assert Proposer(search.space, search.objectives, ()).propose(known, lambda each: True, np.random.default_rng(0), count=3) == []


WIDE = Knob("threads", "int", "many", low=1, high=64, default=1)


def known_points(count: int, *, by_threads: bool = True) -> list[tuple[Candidate, Score]]:
    """Return points of a space, and how they came out: for latency threads matter (or only kinds do), for energy kinds."""
    found = []
    for each in drive(Search(space(WIDE, LEVEL, LAYOUT), seed=3), lambda each: scored(1.0), trials=count):
        threads, kind = int(each.config.get("threads") or 1), each.config.get("level") or "all"
        kinds = {"off": 2.0, "basic": 1.0, "all": 1.4}[str(kind)]
        seconds = 1 + 0.02 * abs(threads - 40) if by_threads else kinds
        found.append((each, replace(scored(seconds), metrics={"latency": seconds, "energy": kinds * (1 + threads / 200)})))
    return found


def test_what_was_learnt_of_losses_that_were_weighed_otherwise_is_not_believed() -> None:
    known, goals = known_points(40), parse_objectives("latency,energy")
    points = space(WIDE, LEVEL, LAYOUT)
    used = Proposer(points, goals, ())
    for seed in range(3):
        fresh = Proposer(points, goals, ())
        asked = [each.propose(known, lambda each: True, np.random.default_rng(seed), count=3) for each in (used, fresh)]
        assert asked[0] == asked[1]
    assert used._fitted == {}


def test_what_matters_is_learnt_anew_where_more_is_known_than_is_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aivmm.planner.proposing._MOST", 20)
    points, goals = space(WIDE, LEVEL, LAYOUT), parse_objectives("latency")
    few, many = known_points(60)[:25], known_points(60, by_threads=False)
    used, fresh = Proposer(points, goals, ()), Proposer(points, goals, ())
    used.propose(few, lambda each: True, np.random.default_rng(0), count=1)
    for each in (used, fresh):
        each.propose(many, lambda each: True, np.random.default_rng(1), count=1)
    assert used._fitted[""][0] == 60 and (used._fitted[""][1].weights == fresh._fitted[""][1].weights).all()
