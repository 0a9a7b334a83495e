"""Exact placement of chains, held to brute force over every assignment and every set of cuts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import Infeasible, UsageError
from aivmm.planner.chain import ChainPlan, place

Segment = tuple[int, int, int]
INF = math.inf


def every_plan(blocks: int, width: int) -> list[list[Segment]]:
    """Return every way to cut a chain and to choose for each segment."""
    plans = []
    for cuts in itertools.product([False, True], repeat=blocks - 1):
        firsts = [0, *(at + 1 for at, here in enumerate(cuts) if here)]
        lasts = [first - 1 for first in firsts[1:]] + [blocks - 1]
        for picks in itertools.product(range(width), repeat=len(firsts)):
            plans.append(list(zip(firsts, lasts, picks, strict=True)))
    return plans


class Problem:
    """A small chain in all its parts, and what any plan of it costs by the definition."""

    def __init__(
        self,
        costs: np.ndarray,
        boundary: np.ndarray,
        cut: np.ndarray | None,
        least: int = 1,
        most: int | None = None,
        measured: dict[Segment, float] | None = None,
    ) -> None:
        self.costs, self.boundary, self.cut, self.least, self.most, self.measured = costs, boundary, cut, least, most, measured or {}

    def price(self, plan: list[Segment]) -> float:
        if len(plan) < self.least or (self.most is not None and len(plan) > self.most):
            return INF
        total = sum(self.measured.get(each, self.costs[each[0] : each[1] + 1, each[2]].sum()) for each in plan)
        for (_, last, one), (_, _, other) in itertools.pairwise(plan):
            if one != other:
                total += self.boundary[last, one, other]
            else:
                total += INF if self.cut is None else self.cut[last, one]
        return float(total)

    def best(self) -> tuple[float, int]:
        """Return the least cost, and the fewest segments that reach it."""
        return min((self.price(plan), len(plan)) for plan in every_plan(*self.costs.shape))

    def place(self, **changes: object) -> ChainPlan[int]:
        override: Callable[[int, int, int], float | None] = lambda first, last, pick: self.measured.get((first, last, pick))  # noqa: E731
        options = {
            "cut": self.cut,
            "min_segments": self.least,
            "max_segments": self.most,
            "segment_cost": override if self.measured else None,
        } | changes
        return place(self.costs, self.boundary, **options)  # type: ignore[call-overload]


@st.composite
def problems(draw: st.DrawFn, *, limits: bool = True, measured: bool = False) -> Problem:
    """Draw small problems of whole numbers, so that ties are common and sums exact; zeros and the impossible included."""
    blocks, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    number = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 7.0, INF])

    def array(*shape: int) -> np.ndarray:
        size = math.prod(shape)
        return np.array(draw(st.lists(number, min_size=size, max_size=size)), dtype=float).reshape(shape)

    boundary = array(blocks - 1, width, width)
    boundary[:, np.arange(width), np.arange(width)] = 0
    least = draw(st.integers(1, blocks + 1)) if limits else 1
    most = draw(st.none() | st.integers(least, blocks + 2)) if limits else None
    cut = array(blocks - 1, width) if draw(st.booleans()) else None
    whole = st.tuples(st.integers(0, blocks - 1), st.integers(0, blocks - 1), st.integers(0, width - 1)).filter(
        lambda each: each[0] <= each[1]
    )
    return Problem(array(blocks, width), boundary, cut, least, most, draw(st.dictionaries(whole, number, min_size=1)) if measured else None)


def agree_with_brute_force(problem: Problem) -> None:
    best, fewest = problem.best()
    if best == INF:
        with pytest.raises(Infeasible):
            problem.place()
        return
    plan = problem.place()
    assert plan.cost_s == plan.bound_s == best
    assert problem.price(list(plan.segments)) == best, "the plan costs what it says"
    assert len(plan.segments) == fewest, "of equal plans the one with the fewest segments is taken"
    assert [first for first, _, _ in plan.segments] == [0, *(last + 1 for _, last, _ in plan.segments[:-1])]
    assert plan.segments[-1][1] == len(problem.costs) - 1
    assert plan.assignment == tuple(pick for first, last, pick in plan.segments for _ in range(first, last + 1))


@settings(deadline=None, max_examples=200)
@given(problems(limits=False))
def test_the_optimum_is_that_of_brute_force(problem: Problem) -> None:
    agree_with_brute_force(problem)


@settings(deadline=None, max_examples=200)
@given(problems())
def test_with_limits_on_segments_too(problem: Problem) -> None:
    agree_with_brute_force(problem)


@settings(deadline=None, max_examples=200)
@given(problems(measured=True))
def test_and_with_measured_segments(problem: Problem) -> None:
    agree_with_brute_force(problem)


@settings(deadline=None, max_examples=50)
@given(problems())
def test_both_searches_agree_where_no_segment_is_measured(problem: Problem) -> None:
    try:
        expected = problem.place()
    except Infeasible:
        with pytest.raises(Infeasible):
            problem.place(segment_cost=lambda *_: None)
        return
    assert problem.place(segment_cost=lambda *_: None).cost_s == expected.cost_s


@settings(deadline=None)
@given(problems(), st.data())
def test_a_faster_choice_never_makes_the_optimum_worse(problem: Problem, data: st.DataObject) -> None:
    try:
        before = problem.place().cost_s
    except Infeasible:
        before = INF
    block = data.draw(st.integers(0, len(problem.costs) - 1))
    pick = data.draw(st.integers(0, problem.costs.shape[1] - 1))
    problem.costs[block, pick] = min(problem.costs[block, pick], data.draw(st.sampled_from([0.0, 0.5, 2.0])))
    try:
        assert problem.place().cost_s <= before
    except Infeasible:
        assert before == INF


@settings(deadline=None)
@given(problems())
def test_another_choice_never_makes_the_optimum_worse(problem: Problem) -> None:
    try:
        before = problem.place().cost_s
    except Infeasible:
        return
    blocks, width = problem.costs.shape
    boundary = np.zeros((blocks - 1, width + 1, width + 1))
    boundary[:, :width, :width] = problem.boundary
    cut = None if problem.cut is None else np.column_stack([problem.cut, np.zeros(blocks - 1)])
    wider = Problem(np.column_stack([problem.costs, np.full(blocks, 1.5)]), boundary, cut, problem.least, problem.most)
    assert wider.place().cost_s <= before


def test_real_costs_are_added_without_losing_digits() -> None:
    random = np.random.default_rng(3)
    costs, boundary = random.exponential(1e-3, (300, 4)), random.exponential(1e-4, (299, 4, 4))
    boundary[:, range(4), range(4)] = 0
    plan = place(costs, boundary)
    parts = [costs[block, pick] for block, pick in enumerate(plan.assignment)]
    parts += [boundary[at, one, other] for at, (one, other) in enumerate(itertools.pairwise(plan.assignment))]
    assert plan.cost_s == math.fsum(parts)
    assert len(plan.segments) > 10


# --- what it says ---


def test_choices_may_have_names_and_what_is_not_listed_is_not_supported() -> None:
    costs = [{"gpu": 1.0}, {"cpu": 4.0, "gpu": 1.0}, {"cpu": 1.0}]
    plan = place(costs, [[0.0, 2.0], [3.0, 0.0]])  # gpu to cpu costs 2, cpu to gpu 3: the order in which costs names them
    assert plan.assignment == ("gpu", "gpu", "cpu")
    assert plan.segments == ((0, 1, "gpu"), (2, 2, "cpu"))
    assert plan.cost_s == 5.0
    assert place(costs, [[0.0, 3.0], [9.0, 0.0]], choices=["cpu", "gpu"]).cost_s == 12.0
    assert plan.seconds > 0


def test_a_forced_cut_is_put_where_it_is_cheapest() -> None:
    plan = place(np.array([[1.0], [1.0], [1.0], [1.0]]), cut=[[5.0], [0.5], [4.0]], min_segments=2)
    assert plan.segments == ((0, 1, 0), (2, 3, 0))
    assert plan.cost_s == 4.5


def test_a_measured_segment_replaces_the_sum_of_its_blocks_for_better_or_worse() -> None:
    costs = [{"a": 1.0, "b": 1.1}] * 3
    assert place(costs).assignment == ("a", "a", "a")
    measured = {(0, 2, "a"): 5.0}
    assert place(costs, [[0, 1], [1, 0]], segment_cost=lambda *key: measured.get(key)).assignment == ("b", "b", "b")
    measured = {(1, 2, "b"): 0.1}
    assert place(costs, [[0, 1], [1, 0]], segment_cost=lambda *key: measured.get(key)).segments == ((0, 0, "a"), (1, 2, "b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"costs": np.array([[1.0], [INF], [INF]])}, r"no choice supports block 1 \(nor 1 more\); allow more targets"),
        ({"costs": [{"cpu": 1.0}, {}]}, "no choice supports block 1; allow"),
        ({"costs": [{}, {}]}, r"no choice supports block 0 \(nor 1 more\)"),
        ({"costs": np.array([[1.0, INF], [INF, 1.0]]), "boundary": [[0, INF], [INF, 0]]}, "no placement connects the blocks"),
        ({"costs": np.ones((3, 2)), "min_segments": 4}, "3 blocks cannot make 4 segments; ask for at most 3"),
        ({"costs": np.ones((3, 1)), "min_segments": 2}, "the chain cannot be cut into 2 segments; ask for fewer, or allow cuts within"),
        ({"costs": np.array([[1, INF], [INF, 1], [1, INF]]), "max_segments": 2}, "no placement has at most 2 segments; allow 3"),
        (
            {
                "costs": np.array([[9, INF], [INF, 9], [9, INF]]),
                "max_segments": 1,
                "segment_cost": lambda i, j, c: 1.0 if j == 1 and not i else None,
            },
            "no placement has at most 1 segments; allow 2",
        ),
    ],
)
def test_what_cannot_be_placed_says_which_block_or_limit_is_to_blame(arguments: dict[str, object], words: str) -> None:
    costs = arguments.pop("costs")
    with pytest.raises(Infeasible, match=words):
        place(costs, **arguments)  # type: ignore[call-overload]


def test_contradicting_limits_are_refused() -> None:
    for limits in ({"min_segments": 0}, {"min_segments": 3, "max_segments": 2}):
        with pytest.raises(UsageError, match="no plan has at least"):
            place(np.ones((4, 2)), **limits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"costs": np.ones((0, 2))},
        {"costs": []},
        {"costs": np.ones(3)},
        {"costs": np.array([[math.nan]])},
        {"costs": np.array([[-INF]])},
        {"costs": np.ones((3, 2)), "boundary": np.ones((2, 2, 2))},
        {"costs": np.ones((3, 2)), "boundary": 1.0},
        {"costs": np.ones((3, 2)), "boundary": np.zeros((3, 2, 2))},
        {"costs": np.ones((3, 2)), "cut": [[1.0, 2.0, 3.0]]},
        {"costs": np.ones((3, 2)), "cut": math.nan},
        {"costs": [{"cpu": 1.0}], "choices": ["gpu"]},
        {"costs": np.ones((3, 2)), "segment_cost": lambda *_: math.nan},
    ],
)
def test_what_makes_no_problem_is_an_error(arguments: dict[str, object]) -> None:
    costs = arguments.pop("costs")
    with pytest.raises(ValueError, match=r"costs|chain|diagonal|boundary|cut|choices|broadcast|NaN|blocks"):
        place(costs, **arguments)  # type: ignore[call-overload]


def test_ten_thousand_blocks_and_twenty_four_choices_take_less_than_five_seconds() -> None:
    random = np.random.default_rng(0)
    costs, boundary = random.exponential(1.0, (10_000, 24)), random.exponential(1.0, (9_999, 24, 24))
    boundary[:, range(24), range(24)] = 0
    started = time.process_time()  # the process's own time: the machine may be busy with others
    plan = place(costs, boundary)
    assert time.process_time() - started < 5
    assert plan.cost_s < 10_000 * 0.5


def test_two_hundred_blocks_with_measured_segments_take_less_than_two_seconds() -> None:
    random = np.random.default_rng(0)
    costs, boundary = random.exponential(1.0, (200, 12)), np.full((12, 12), 0.3)
    np.fill_diagonal(boundary, 0)
    measured = {(first, first + 5, pick): 0.1 for first, pick in random.integers(0, (195, 12), (300, 2)).tolist()}
    started = time.process_time()
    plan = place(costs, boundary, cut=0.01, segment_cost=lambda *key: measured.get(key))
    assert time.process_time() - started < 2
    assert plan.cost_s < place(costs, boundary, cut=0.01).cost_s
