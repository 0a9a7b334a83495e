"""Each solver alone, so that none hides behind another: what it says a plan costs is the optimum of brute force, or a bound on it."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from aivmm.planner.balance import balanced
from aivmm.planner.bounds import counting_bound, load_bound
from aivmm.planner.compact import Compact, assignment_of, compact, condensed, loads_of, spots_of
from aivmm.planner.downsets import Search, depends_on_sender, every_downset, swept_downsets
from aivmm.planner.elimination import Elimination
from aivmm.planner.evaluate import evaluate
from aivmm.planner.improve import improve
from aivmm.planner.problem import Choice, Edge, Goal, Move, Node, PlacedDevice, Problem
from aivmm.planner.program import Program
from aivmm.planner.solve import solve
from tests.planner.placing import chain, dense, optima, problems

GOALS: tuple[Goal, ...] = ("latency", "throughput")
ALIKE, BY_PAIR = (0, 2, 4, 6), (1, 3, 5, 7)  # seeds: whether a reader pays the same wherever a tensor comes from
_FOUND: dict[int, dict[tuple[Goal, bool], float]] = {}


def in_time() -> float:
    return time.perf_counter() + 60


def problem_and_optima(seed: int) -> tuple[Problem, dict[tuple[Goal, bool], float]]:
    problem = dense(seed)
    return problem, _FOUND.setdefault(seed, optima(problem))


def without_memory(problem: Problem) -> Problem:
    return replace(problem, devices=[replace(each, memory_bytes=math.inf) for each in problem.devices])


def test_the_problems_are_what_these_tests_need() -> None:
    assert [depends_on_sender(compact(dense(seed))) for seed in ALIKE] == [False] * 4
    assert [depends_on_sender(compact(dense(seed))) for seed in BY_PAIR] == [True] * 4
    limited = [problem_and_optima(seed)[1] for seed in ALIKE]
    free = [optima(without_memory(dense(seed))) for seed in ALIKE]
    assert any(one != other for one, other in zip(limited, free, strict=True)), "memory binds somewhere"


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("seed", ALIKE)
def test_downsets_are_exact_where_prices_do_not_depend_on_the_sender(seed: int, goal: Goal) -> None:
    problem, best = problem_and_optima(seed)
    merged = condensed(compact(problem))
    family = every_downset(merged, 1000, in_time())
    assert family is not None and family.complete
    found = Search(merged, family, goal, "exact").run(in_time())
    assert found is not None
    spots, value = found
    assert value == pytest.approx(best[goal, True])
    priced = evaluate(problem, assignment_of(problem, merged, spots))
    assert not priced.broken and priced.contiguous
    assert priced.objective(goal) == pytest.approx(value)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("seed", BY_PAIR)
def test_downsets_bracket_the_optimum_where_prices_depend_on_the_sender(seed: int, goal: Goal) -> None:
    problem, best = problem_and_optima(seed)
    merged = condensed(compact(problem))
    family = every_downset(merged, 1000, in_time())
    assert family is not None
    least, most = (Search(merged, family, goal, doubt).run(in_time()) for doubt in ("least", "most"))  # type: ignore[arg-type]
    assert least is not None and most is not None
    assert least[1] <= best[goal, True] * (1 + 1e-12)
    assert most[1] >= best[goal, True] * (1 - 1e-12)


def one_way(seed: int) -> Problem:
    """Return a dense graph on two devices, between which tensors move in one direction only."""
    whole = dense(seed)
    names = ("a", "b")
    return replace(
        whole,
        devices=[PlacedDevice(name=name) for name in names],
        choices=[each for each in whole.choices if each.name in names],
        nodes=[replace(each, costs={name: each.costs[name] for name in names if name in each.costs} or {"a": 5.0}) for each in whole.nodes],
        transfers={("b", "a"): whole.transfers["b", "a"]},
        unsupported=frozenset({("a", "b")}),
        exports={},
    )


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("seed", ALIKE)
def test_downsets_keep_to_the_pairs_that_are_supported(seed: int, goal: Goal) -> None:
    problem = one_way(seed)
    merged = condensed(compact(problem))
    family = every_downset(merged, 1000, in_time())
    assert family is not None and not depends_on_sender(merged)
    found = Search(merged, family, goal, "exact").run(in_time())
    assert (math.inf if found is None else found[1]) == pytest.approx(optima(problem)[goal, True])


@pytest.mark.parametrize(("goal", "value"), [("latency", 3 + 1 + 1 + 5), ("throughput", 1 + 1 + 5)])
def test_a_segment_does_not_pay_for_a_tensor_that_passes_it_by(goal: Goal, value: float) -> None:
    problem = chain({"a": 1.0}, {"b": 1.0}, {"c": 1.0}, boundary=1.0)
    skip = Edge(source="0", reader="2", tensor="skip", bytes=4.0)
    moves = {pair: Move(1.0, 1.0) for pair in problem.transfers}
    merged = condensed(compact(replace(problem, edges=[*problem.edges, skip], transfers=moves)))
    family = every_downset(merged, 1000, in_time())
    assert family is not None
    found = Search(merged, family, goal, "exact").run(in_time())
    assert found is not None
    assert found[1] == value  # b receives from a, c receives from b, and the skip goes from a to c


def test_some_downsets_give_a_plan_that_costs_what_they_say() -> None:
    for seed in ALIKE:
        problem, best = problem_and_optima(seed)
        merged = condensed(compact(problem))
        family = swept_downsets(merged)
        assert family is not None and not family.complete
        found = Search(merged, family, "throughput", "exact").run(in_time())
        if found is not None:
            priced = evaluate(problem, assignment_of(problem, merged, found[0]))
            assert priced.objective("throughput") == pytest.approx(found[1])
            assert found[1] >= best["throughput", True] * (1 - 1e-12)


def test_too_many_downsets_and_no_time_are_no_answer() -> None:
    merged = condensed(compact(dense(0)))
    assert every_downset(merged, 1, in_time()) is None
    assert every_downset(merged, 1000, time.perf_counter() - 1) is None


def test_of_a_graph_too_wide_for_memory_no_downsets_are_made() -> None:
    wide = replace(chain(*[{"a": 1.0, "b": 2.0}] * 6000), edges=[])  # its second level alone has 18 million, of 6000 bits each
    merged = condensed(compact(wide))
    assert every_downset(merged, 20_000, in_time()) is None
    assert swept_downsets(merged) is None


def test_devices_beyond_one_a_node_change_nothing() -> None:
    problem = replace(chain({"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 3.0}), edges=[])
    for contention in ({}, {("a", "a"): 1.5, ("b", "a"): 2.0}):
        found = []
        for count in (2, 10**30):
            many = replace(problem, devices=[replace(each, count=count) for each in problem.devices], contention=contention)
            found += [solve(many, goal, contiguous=way).objective for goal in GOALS for way in (False, True)]
        assert found[:4] == found[4:]


def test_a_row_has_one_downset_more_than_groups() -> None:
    merged = replace_edges(compact(dense(0)), [(index, index + 1) for index in range(4)])
    family = every_downset(merged, 100, in_time())
    assert family is not None
    assert family.heights.ravel().tolist() == [0, 1, 2, 3, 4, 5]


def replace_edges(merged: Compact, edges: list[tuple[int, int]]) -> Compact:
    tensor = merged.tensors[0]
    return replace(merged, tensors=tuple(replace(tensor, source=one, readers=(other,)) for one, other in edges))


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("seed", [ALIKE[1], BY_PAIR[0]])
def test_the_integer_program_is_exact_alone(seed: int, contiguous: bool, goal: Goal) -> None:
    problem, best = problem_and_optima(seed)
    merged = condensed(compact(problem)) if contiguous else compact(problem)
    answer = Program(merged, goal, contiguous=contiguous).solve(60)
    assert answer.spots is not None
    assert answer.bound == pytest.approx(best[goal, contiguous], rel=1e-5)
    priced = evaluate(problem, assignment_of(problem, merged, answer.spots))
    assert not priced.broken and priced.contiguous >= contiguous
    assert priced.objective(goal) == pytest.approx(best[goal, contiguous], rel=1e-5)


def test_the_integer_program_says_when_nothing_is_below_a_limit() -> None:
    problem, best = problem_and_optima(0)
    limit = best["throughput", False] * 0.99
    answer = Program(compact(problem), "throughput").solve(60, at_most=limit)
    assert answer.spots is None and answer.bound == limit


def test_the_integer_program_sees_a_circle_of_three_devices() -> None:
    rows = [chain({one: 1.0}, {other: 1.0}) for one, other in (("a", "b"), ("b", "c"), ("c", "a"))]
    nodes = [replace(node, id=f"{row}.{node.id}") for row, each in enumerate(rows) for node in each.nodes]
    edges = [Edge(source=f"{row}.0", reader=f"{row}.1") for row in range(3)]
    problem = replace(chain({"a": 1.0}, {"b": 1.0}, {"c": 1.0}), nodes=nodes, edges=edges)
    answer = Program(condensed(compact(problem)), "latency", contiguous=True).solve(60)
    assert answer.spots is None and answer.bound == math.inf


@pytest.mark.parametrize("hub_cells", [4096, 0])  # 0: each source is a hub for one of its tensors
@pytest.mark.parametrize("seed", range(8))
def test_elimination_is_exact_where_memory_does_not_bind(seed: int, hub_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aivmm.planner.elimination._HUB_CELLS", hub_cells)
    problem = without_memory(dense(seed))
    merged = compact(problem)
    spots, value = Elimination(merged).solve(merged)
    assert spots is not None
    assert value == pytest.approx(optima(problem)["latency", False])
    assert evaluate(problem, assignment_of(problem, merged, spots)).objective("latency") == pytest.approx(value)


@pytest.mark.parametrize("seed", range(8))
def test_prices_never_claim_more_than_the_optimum(seed: int) -> None:
    problem, best = problem_and_optima(seed)
    bounds = [bound for _, bound in balanced(compact(problem), in_time())]
    assert len(bounds) > 5
    assert max(bounds) <= best["throughput", False] * (1 + 1e-12)
    assert max(bounds) > bounds[0] or len(set(bounds)) == 1, "prices that move do better than equal ones"


@pytest.mark.parametrize("seed", range(8))
def test_quick_bounds_never_claim_more_than_the_optimum(seed: int) -> None:
    problem, best = problem_and_optima(seed)
    for merged, optimum in ((compact(problem), best["throughput", False]), (condensed(compact(problem)), best["throughput", True])):
        assert 0 < load_bound(merged) <= optimum * (1 + 1e-6)
        assert counting_bound(merged) <= optimum * (1 + 1e-12)


def test_five_equal_nodes_on_two_devices_put_three_on_one() -> None:
    merged = compact(chain(*[{"a": 2.0, "b": 2.0, "slow": 9.0}] * 5))
    assert counting_bound(merged) == pytest.approx(6.0)
    assert load_bound(merged) == pytest.approx(6.0)


@pytest.mark.parametrize("seed", range(4))
def test_sharing_anew_never_makes_a_plan_worse_and_keeps_the_limits(seed: int) -> None:
    problem, best = problem_and_optima(seed)
    merged = compact(problem)
    start = Program(merged, "latency").solve(60).spots
    assert start is not None
    better = improve(merged, start, in_time())
    priced = evaluate(problem, assignment_of(problem, merged, better))
    assert not priced.broken
    assert best["throughput", False] <= priced.objective("throughput") + 1e-9
    assert priced.objective("throughput") <= max(loads_of(merged, start).values())


def test_the_arrays_price_a_plan_as_the_definition_does() -> None:
    random = np.random.default_rng(0)
    for seed in range(8):
        problem = dense(seed)
        merged = compact(problem)
        for _ in range(5):
            spots = [
                merged.places[random.choice(np.flatnonzero(np.isfinite(costs[[choice for choice, _ in merged.places]])))]
                for costs in merged.cost
            ]
            assignment = assignment_of(problem, merged, spots)
            assert spots_of(problem, merged, assignment) == spots
            loads = {(problem.devices[kind].name, number): load for (kind, number), load in loads_of(merged, spots).items() if load}
            assert loads == pytest.approx(dict(evaluate(problem, assignment).loads))


@settings(max_examples=60, deadline=None)
@given(problems(contention=False))
def test_elimination_with_hubs_is_exact_for_ties_zero_costs_and_what_is_unsupported(problem: Problem) -> None:
    problem = without_memory(problem)
    merged = compact(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aivmm.planner.elimination._HUB_CELLS", 0)
        way = Elimination(merged)
        assert way.possible
        spots, value = way.solve(replace(merged, count=np.ones_like(merged.count)))
    # One of the identical devices is enough where memory does not bind: the others would only add transfers.
    best = optima(replace(problem, devices=[replace(each, count=1) for each in problem.devices]))["latency", False]
    assert value == pytest.approx(best) if math.isfinite(best) else spots is None


def test_a_tensor_that_many_read_does_not_make_a_wide_graph() -> None:
    """A mask that each of 30 layers reads: 31 groups in one table would be 3 ** 31 cells."""
    random = np.random.default_rng(3)
    names = ["a", "b", "c"]
    layers = [str(index) for index in range(30)]
    nodes = [Node(id=each, costs={name: float(random.integers(1, 9)) for name in names}) for each in ["mask", *layers]]
    edges = [Edge(source="mask", reader=each, bytes=1.0) for each in layers]
    edges += [Edge(source=one, reader=other, bytes=2.0) for one, other in itertools.pairwise(layers)]
    problem = Problem(
        devices=[PlacedDevice(name=name) for name in names],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=nodes,
        edges=edges,
        transfers={(one, other): Move(float(random.integers(0, 3)), 1.0) for one in names for other in names},
        exports={"b": Move(1.0, 0.0)},
    )
    merged = compact(problem)
    way = Elimination(merged)
    assert way.possible
    spots, value = way.solve(merged)
    assert spots is not None
    assert evaluate(problem, assignment_of(problem, merged, spots)).objective("latency") == pytest.approx(value)
    assert value == pytest.approx(Program(merged, "latency").solve(60).bound, rel=1e-4)
