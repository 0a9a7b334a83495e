"""Every solver, held to brute force over all placements, and to what its bounds claim."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aivmm.errors import Infeasible, UsageError
from aivmm.planner import elimination
from aivmm.planner import solve as solving
from aivmm.planner.evaluate import evaluate
from aivmm.planner.problem import Choice, Edge, Goal, Move, Node, Place, PlacedDevice, Problem
from aivmm.planner.problem_files import read_problem
from aivmm.planner.solve import Solution, solve
from tests.planner.placing import chain, constrained, dense, optima, problems, published, relaxations

EACH_KIND = [
    pytest.param(goal, contiguous, id=f"{goal}{' contiguous' * contiguous}")
    for goal in ("latency", "throughput")
    for contiguous in (False, True)
]
WITHIN = 1e-6  # HiGHS's tolerance


def agrees_with_brute_force(problem: Problem, goal: Goal, contiguous: bool, best: float | None = None) -> None:
    best = optima(problem)[goal, contiguous] if best is None else best
    if best == math.inf:
        with pytest.raises(Infeasible):
            solve(problem, goal, contiguous=contiguous)
        return
    found = solve(problem, goal, contiguous=contiguous)
    assert found.objective == pytest.approx(best, abs=1e-9)
    assert found.bound <= best + WITHIN * max(best, 1), "a bound that is not one"
    assert found.gap <= WITHIN * max(best, 1), "small problems are settled"
    assert found.contiguous or not contiguous
    priced = evaluate(problem, found.assignment)
    assert not priced.broken
    assert priced.objective(goal) == found.objective


@pytest.mark.parametrize(("goal", "contiguous"), EACH_KIND)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_the_optimum_is_that_of_brute_force(problem: Problem, goal: Goal, contiguous: bool) -> None:
    agrees_with_brute_force(problem, goal, contiguous)


@pytest.mark.parametrize("seed", range(2))
def test_tensors_that_pass_a_segment_by_are_neither_paid_nor_forgotten_there(seed: int) -> None:
    problem = dense(seed)
    for (goal, contiguous), best in optima(problem).items():
        agrees_with_brute_force(problem, goal, contiguous, best)


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_with_everything_in_the_way_at_once_is_that_of_brute_force(seed: int) -> None:
    problem = constrained(seed)
    for (goal, contiguous), best in optima(problem).items():
        agrees_with_brute_force(problem, goal, contiguous, best)


def test_each_thing_in_the_way_changes_some_of_those_optima_for_both_goals() -> None:
    """Else the test above would show nothing of it. Contention is of throughput alone."""
    binds: set[tuple[str, Goal]] = set()
    for seed in range(8):
        problem = constrained(seed)
        best = optima(problem)
        for name, relaxed in relaxations(problem).items():
            binds |= {(name, goal) for (goal, contiguous), value in optima(relaxed).items() if value < best[goal, contiguous]}
    names = ("memory", "colocation", "pairs", "edges")
    assert binds == {("contention", "throughput"), *((name, goal) for name in names for goal in ("latency", "throughput"))}


@pytest.mark.parametrize("seed", range(8, 12))
def test_without_something_in_the_way_the_optimum_is_never_worse(seed: int) -> None:
    def least(problem: Problem, goal: Goal, contiguous: bool) -> float:
        try:
            return solve(problem, goal, contiguous=contiguous).objective
        except Infeasible:
            return math.inf

    problem = constrained(seed)
    for goal, contiguous in product(("latency", "throughput"), (False, True)):
        before = least(problem, goal, contiguous)
        for name, relaxed in relaxations(problem).items():
            assert least(relaxed, goal, contiguous) <= before + 1e-9, name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("goal", "contiguous"), EACH_KIND)
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_the_optimum_is_that_of_brute_force_many_times(problem: Problem, goal: Goal, contiguous: bool) -> None:
    agrees_with_brute_force(problem, goal, contiguous)


@pytest.fixture
def few_downsets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every graph count as one with too many downsets."""
    monkeypatch.setattr(solving, "_MOST_DOWNSETS", 1)
    yield


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(problem=problems(contention=False))
def test_with_too_many_downsets_the_integer_program_finds_the_contiguous_optimum(few_downsets: None, problem: Problem, goal: Goal) -> None:
    agrees_with_brute_force(problem, goal, contiguous=True)


@pytest.fixture
def no_narrow_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every graph count as too wide for elimination."""
    monkeypatch.setattr(elimination, "_MOST_CELLS", 0)
    yield


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(problem=problems(contention=False))
def test_on_graphs_too_wide_for_elimination_the_integer_program_finds_the_optimum(
    no_narrow_graphs: None, problem: Problem, goal: Goal
) -> None:
    agrees_with_brute_force(problem, goal, contiguous=False)


def test_with_too_many_ways_to_use_the_devices_the_bound_leaves_contention_out() -> None:
    names = ["a", "b"]
    problem = Problem(
        devices=[PlacedDevice(name=name, count=20) for name in names],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=[Node(id=str(index), costs={"a": 2.0, "b": 3.0}) for index in range(20)],
        contention={("a", "a"): 1.01, ("b", "a"): 1.01, ("a", "b"): 1.01},
    )
    found = solve(problem, "throughput", time_limit_s=3)
    assert found.bound == 2.0
    assert 2.0 < found.objective <= 2.0 * (1 + 0.01 * 39)


@pytest.mark.parametrize(("goal", "contiguous"), EACH_KIND)
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(), data=st.data())
def test_a_faster_choice_never_makes_the_optimum_worse(problem: Problem, goal: Goal, contiguous: bool, data: st.DataObject) -> None:
    try:
        before = solve(problem, goal, contiguous=contiguous).objective
    except Infeasible:
        return
    at = data.draw(st.integers(0, len(problem.nodes) - 1))
    node, choice = problem.nodes[at], data.draw(st.sampled_from([each.name for each in problem.choices]))
    costs = dict(node.costs) | {choice: min(node.costs.get(choice, math.inf), data.draw(st.sampled_from([0.0, 0.5, 2.0])))}
    faster = replace(problem, nodes=[*problem.nodes[:at], replace(node, costs=costs), *problem.nodes[at + 1 :]])
    assert solve(faster, goal, contiguous=contiguous).objective <= before + 1e-9


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_pieces_are_never_worse_than_one_segment_on_each_device(problem: Problem) -> None:
    for goal in ("latency", "throughput"):
        try:
            contiguous = solve(problem, goal, contiguous=True)
        except Infeasible:
            continue
        assert solve(problem, goal).objective <= contiguous.objective + 1e-9


# --- cases by hand ---


def spots(found: Solution) -> list[str]:
    return [place.choice for _, place in sorted(found.assignment.items())]


def test_one_node_goes_where_it_is_cheapest() -> None:
    for goal in ("latency", "throughput"):
        found = solve(chain({"a": 2.0, "b": 1.5}), goal)
        assert (found.objective, found.bound, found.gap, spots(found)) == (1.5, 1.5, 0.0, ["b"])


def test_latency_goes_back_and_forth_where_that_pays_and_contiguous_does_not() -> None:
    problem = chain({"a": 1, "b": 9}, {"a": 9, "b": 1}, {"a": 1, "b": 9}, boundary=2.0)
    assert spots(solve(problem, "latency")) == ["a", "b", "a"]
    assert solve(problem, "latency").objective == 7
    assert solve(problem, "latency", contiguous=True).objective == 11


def test_throughput_shares_the_work() -> None:
    problem = chain({"a": 2, "b": 2}, {"a": 2, "b": 2}, {"a": 2, "b": 2}, {"a": 2, "b": 2}, boundary=0.5)
    found = solve(problem, "throughput")
    assert found.objective == 4.5  # the second pays for receiving
    assert found.gap < 1e-6


def test_a_memory_limit_that_binds_moves_the_rest() -> None:
    costs = [{"a": 1.0, "b": 5.0}] * 3
    assert solve(chain(*costs), "latency").objective == 3
    assert solve(chain(*costs, a=2.0), "latency").objective == 8  # two nodes fit, one goes to b, and something crosses once
    assert solve(chain(*costs, a=2.0), "latency").gap < 1e-6


def test_models_that_share_a_machine_are_one_problem_whose_graph_is_not_connected() -> None:
    problem = Problem(
        devices=[PlacedDevice(name="a"), PlacedDevice(name="b")],
        choices=[Choice(name="a", target="a", device="a"), Choice(name="b", target="b", device="b")],
        nodes=[Node(id=f"{model} {index}", costs={"a": 1, "b": 1}) for model in ("one", "two") for index in range(3)],
        edges=[Edge(source=f"{model} {index}", reader=f"{model} {index + 1}") for model in ("one", "two") for index in range(2)],
        transfers={("a", "b"): Move(1.0), ("b", "a"): Move(1.0)},
    )
    found = solve(problem, "throughput")
    assert found.objective == 3.0
    assert len({place for id, place in found.assignment.items() if id.startswith("one")}) == 1


def test_contention_can_make_one_device_better_than_two() -> None:
    problem = chain({"a": 2, "b": 2}, {"a": 2, "b": 2}, boundary=0.0)
    assert solve(problem, "throughput").objective == 2
    slowed = replace(problem, contention={("a", "b"): 1.5, ("b", "a"): 1.5})
    assert solve(slowed, "throughput").objective == 3
    stalled = replace(problem, contention={("a", "b"): 9.0, ("b", "a"): 9.0})
    assert solve(stalled, "throughput").objective == 4
    assert solve(stalled, "latency").objective == 4


@pytest.mark.parametrize(("factor", "best"), [(1.0, 2.0), (1.5, 3.0), (9.0, 4.0)])
def test_identical_devices_slow_each_other_and_not_themselves(factor: float, best: float) -> None:
    problem = Problem(
        devices=[PlacedDevice(name="a", count=2)],
        choices=[Choice(name="a", target="a", device="a")],
        nodes=[Node(id=id, costs={"a": 2.0}) for id in ("0", "1")],
        contention={("a", "a"): factor},
    )
    found = solve(problem, "throughput")
    assert (found.objective, found.gap) == (best, 0.0)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (chain({"a": 1}, {}), "no choice supports node '1'; allow more choices"),
        (chain({"a": 1}, {"a": 1}, a=0.5), "no device that supports node '0' has the memory for it; raise memory_bytes"),
        (chain({"a": 1}, {"a": 1}, a=1.5), "no plan keeps the limits on memory.*; raise memory_bytes"),
        (
            replace(chain({"a": 1}, {"b": 1}), transfers={("a", "a"): Move(), ("b", "a"): Move()}, unsupported=frozenset({("a", "b")})),
            "no plan keeps the unsupported pairs",
        ),
        (
            replace(
                chain({"a": 1}, {"b": 1}),
                nodes=[Node(id="0", costs={"a": 1}, colocation="k"), Node(id="1", costs={"b": 1}, colocation="k")],
            ),
            "no choice supports nodes '0', '1' together; allow more choices, or part what is colocated",
        ),
    ],
)
@pytest.mark.parametrize(("goal", "contiguous"), EACH_KIND)
def test_what_has_no_plan_says_why(problem: Problem, words: str, goal: Goal, contiguous: bool) -> None:
    with pytest.raises(Infeasible, match=words):
        solve(problem, goal, contiguous=contiguous)


def test_what_is_infeasible_only_because_it_has_to_be_contiguous_says_so() -> None:
    problem = chain({"a": 1}, {"b": 1}, {"a": 1})
    assert solve(problem, "latency").objective == 5
    with pytest.raises(Infeasible, match="no plan keeps one segment on each device; drop --contiguous, or"):
        solve(problem, "latency", contiguous=True)


def test_a_time_limit_that_is_no_number_of_seconds_is_refused() -> None:
    for limit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="the time limit is"):
            solve(chain({"a": 1}), "latency", time_limit_s=limit)


# --- larger ones ---


def random_graph(size: int, *, seed: int, targets: int = 4, pairs: bool = True) -> Problem:
    """Return a graph like a model's: mostly a row, with skips; each node on each target with an efficiency of its own."""
    random = np.random.default_rng(seed)
    names = [f"t{index}" for index in range(targets)]
    work = random.exponential(1e-3, size)
    edges = {(index, index + 1) for index in range(size - 1)} | {
        (index, min(size - 1, index + int(skip)))
        for index, skip in enumerate(random.integers(2, 6, size))
        if index % 3 == 0 and index < size - 2
    }
    sizes = random.exponential(1e5, size)
    return Problem(
        devices=[PlacedDevice(name=name) for name in names],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=[Node(id=str(index), costs={name: float(work[index] * random.lognormal(0, 0.7)) for name in names}) for index in range(size)],
        edges=[Edge(source=str(one), reader=str(other), bytes=float(sizes[one])) for one, other in sorted(edges)],
        transfers={
            (one, other): Move(1e-5, float(random.uniform(1e-10, 5e-10)) if pairs else 2e-10)
            for one in names
            for other in names
            if one != other
        },
    )


def test_latency_of_a_graph_is_solved_to_the_end() -> None:
    problem = random_graph(150, seed=1)
    found = solve(problem, "latency")
    assert found.gap == 0.0
    assert found.objective < min(sum(node.costs[name] for node in problem.nodes) for name in ("t0", "t1", "t2", "t3"))


def test_the_time_limit_is_kept_with_a_plan_and_a_bound_that_are_right() -> None:
    problem = random_graph(300, seed=2)
    started = time.perf_counter()
    found = solve(problem, "throughput", time_limit_s=1.0)
    taken = time.perf_counter() - started
    assert found.bound <= found.objective < sum(node.costs["t0"] for node in problem.nodes)
    assert found.bound > 0
    # No absolute time is promised: what is asked is that it does not run on to the end, which is minutes away.
    assert taken < 20
    assert found.seconds <= taken


def test_a_long_chain_for_latency_is_exact() -> None:
    random = np.random.default_rng(0)
    names = [f"c{index}" for index in range(6)]
    problem = replace(
        chain(*[{name: float(cost) for name, cost in zip(names, row, strict=True)} for row in random.exponential(1.0, (1000, 6))]),
        unit="ms",
    )
    found = solve(problem, "latency")
    assert found.gap == 0.0 and found.bound == found.objective


# --- published instances: Tarnawski et al., NeurIPS 2020 ---


@pytest.mark.parametrize(("name", "best"), [("bert24_layer", 17.790), ("resnet50_layer", 33.775), ("bert3_operator", 27.919)])
def test_the_contiguous_optimum_of_a_published_instance_is_found_and_proven(name: str, best: float) -> None:
    found = solve(read_problem(published(name)), "throughput", contiguous=True)
    assert found.objective == pytest.approx(best, abs=6e-4)  # the published figures have three digits
    assert found.gap == 0.0 and found.contiguous


@pytest.mark.slow
@pytest.mark.parametrize(("name", "best"), [("bert24_layer", 17.778), ("resnet50_layer", 33.775), ("bert3_operator", 27.574)])
def test_in_pieces_a_published_instance_does_better_than_the_best_known(name: str, best: float) -> None:
    found = solve(read_problem(published(name)), "throughput", time_limit_s=28)
    assert found.objective < best
    assert found.gap < 0.02


def test_places_of_identical_devices_have_numbers_without_gaps() -> None:
    found = solve(read_problem(published("bert24_layer")), "throughput", contiguous=True)
    used = sorted({place for place in found.assignment.values() if place.choice == "acc"})
    assert used == [Place("acc", index) for index in range(len(used))]


@pytest.mark.parametrize("contiguous", [True, False])
def test_without_any_time_there_is_the_plan_in_one_place(contiguous: bool) -> None:
    problem = chain(*[{"a": 2.0, "b": 1.0, "c": 9.0}] * 6, b=3.0)  # b has no memory for all
    found = solve(problem, "throughput", contiguous=contiguous, time_limit_s=1e-9)
    assert found.objective <= 12.0 and not found.evaluation.broken
    assert found.bound <= found.objective
