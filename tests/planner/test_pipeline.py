"""Pipelines: the slowest stage beside the others sets the pace; factors are measured for plans that could be best. Against brute force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.planner.pipeline import Pair, Run, pipeline_problem, place_pipeline
from aivmm.planner.problem import Move

MOVES = {("a", "b"): Move(fixed=0.1), ("b", "a"): Move(fixed=0.1)}
EVEN = {"a": [1.0] * 4, "b": [1.0] * 4}


def fixed(factors: Mapping[Pair, float], asked: list[tuple[Run, ...]] | None = None):
    def measure(runs: Sequence[Run]) -> Mapping[Pair, float]:
        if asked is not None:
            asked.append(tuple(runs))
        return factors

    return measure


def test_stages_that_leave_each_other_alone_share_the_work() -> None:
    found = place_pipeline(EVEN, [0] * 3, MOVES, fixed({("a", "b"): 1.0, ("b", "a"): 1.0}))
    assert found is not None
    assert [run[:2] for run in found.runs] == [(0, 1), (2, 3)]
    assert found.load_s == pytest.approx(2.1)  # two blocks, and taking over what crosses
    assert found.bound_s <= found.load_s


def test_stages_that_double_each_others_time_are_not_worth_it() -> None:
    asked: list[tuple[Run, ...]] = []
    assert place_pipeline(EVEN, [0] * 3, MOVES, fixed({("a", "b"): 2.0, ("b", "a"): 2.0}, asked)) is None
    assert len(asked) == 1


def test_the_measured_factor_enters_the_load_and_moves_the_cut() -> None:
    """Beside b, a takes twice as long: a gets less of the chain, and the load is what it takes beside b."""
    found = place_pipeline({"a": [1.0] * 9, "b": [1.0] * 9}, [0] * 8, MOVES, fixed({("a", "b"): 2.0, ("b", "a"): 1.0}))
    assert found is not None
    blocks = {name: last - first + 1 for first, last, name in found.runs}
    assert blocks == {"a": 3, "b": 6}
    assert found.load_s == pytest.approx(max(2.0 * (3 + 0.1 * (found.runs[1][2] == "a")), 6 + 0.1 * (found.runs[1][2] == "b")))
    assert found.factors == {("a", "b"): 2.0, ("b", "a"): 1.0}


def test_a_plan_whose_stages_cannot_be_measured_is_no_plan() -> None:
    assert place_pipeline(EVEN, [0] * 3, MOVES, fixed({})) is None


def test_no_plan_is_measured_twice_and_none_beyond_the_limit() -> None:
    asked: list[tuple[Run, ...]] = []
    place_pipeline({"a": [1.0] * 9, "b": [1.1] * 9}, [0] * 8, MOVES, fixed({("a", "b"): 1.3, ("b", "a"): 1.2}, asked), most=3)
    assert len(asked) == len(set(asked)) <= 3


def test_a_target_that_runs_nothing_and_a_pair_that_cannot_hand_over() -> None:
    assert place_pipeline({"a": [1.0] * 3, "b": [None] * 3}, [0] * 2, MOVES, fixed({})) is None
    assert place_pipeline({"a": [1.0] * 3, "b": [1.0] * 3}, [0] * 2, {}, fixed({})) is None
    only = place_pipeline({"a": [1.0, 1.0, None], "b": [None, 1.0, 1.0]}, [0] * 2, MOVES, fixed({("a", "b"): 9.0, ("b", "a"): 9.0}))
    assert only is not None
    assert {run[2] for run in only.runs} == {"a", "b"}


@st.composite
def chains(draw: st.DrawFn) -> tuple[dict[str, list[float]], dict[Pair, float]]:
    blocks = draw(st.integers(2, 6))
    cost = st.floats(0.1, 5.0)
    costs = {name: draw(st.lists(cost, min_size=blocks, max_size=blocks)) for name in "ab"}
    return costs, {("a", "b"): draw(st.floats(1.0, 3.0)), ("b", "a"): draw(st.floats(1.0, 3.0))}


@settings(max_examples=30, deadline=None)
@given(chains())
def test_no_contiguous_plan_is_better_where_factors_are_those_that_were_measured(
    case: tuple[dict[str, list[float]], dict[Pair, float]],
) -> None:
    costs, factors = case
    blocks = len(costs["a"])

    def load(names: Sequence[str]) -> float:
        used = dict.fromkeys(names)
        parts = {name: sum(costs[name][index] for index in range(blocks) if names[index] == name) for name in used}
        for before, name in pairwise(names):
            parts[name] += 0.1 if before != name else 0.0
        return max(parts[name] * (factors[name, other] if (other := "b" if name == "a" else "a") in used else 1.0) for name in used)

    plans = [names for names in product("ab", repeat=blocks) if sum(a != b for a, b in pairwise(names)) <= 1]
    best = min(map(load, plans))
    found = place_pipeline(costs, [0] * (blocks - 1), MOVES, fixed(factors), most=8)
    single = min(load(["a"] * blocks), load(["b"] * blocks))
    if found is None:
        assert single == pytest.approx(best, rel=1e-4)
    else:
        assert found.load_s == pytest.approx(best, rel=1e-4)
        assert found.load_s < single


def test_the_problem_has_the_factors_of_its_targets_only() -> None:
    problem = pipeline_problem({"a": [1.0, 1.0]}, [8], {}, {("a", "b"): 2.0})
    assert problem.contention == {}
