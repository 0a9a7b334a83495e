"""Pipelines: the slowest stage beside the others sets the pace; factors are measured for plans that could be best. Against brute force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise, permutations, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aivmm.planner.pipeline import Pair, Replicas, Room, Run, hoped_pipeline, look_at_pipelines, pipeline_problem, place_pipeline
from aivmm.planner.problem import Move

MOVES = {("a", "b"): Move(fixed=0.1), ("b", "a"): Move(fixed=0.1)}
EVEN = {"a": [1.0] * 4, "b": [1.0] * 4}


def fixed(factors: Mapping[Pair, float], asked: list[tuple[Run, ...]] | None = None):
    def measure(runs: Sequence[Run], replicas: Replicas) -> Mapping[Pair, float]:
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


def test_nothing_is_measured_once_it_is_to_stop() -> None:
    asked: list[tuple[Run, ...]] = []
    costs, dear = {"a": [1.0] * 9, "b": [1.0] * 9}, fixed({("a", "b"): 2.0, ("b", "a"): 1.0}, asked)
    assert look_at_pipelines(costs, [0] * 8, MOVES, dear, stop=lambda: True) == [] and asked == []
    assert len(look_at_pipelines(costs, [0] * 8, MOVES, dear, stop=lambda: bool(asked))) == 1 == len(asked)
    assert len(look_at_pipelines(costs, [0] * 8, MOVES, dear)) > 1  # looks that are not stopped go on


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


def test_a_target_without_the_memory_for_the_whole_gets_what_it_has_room_for() -> None:
    room = Room(block_bytes=[10.0] * 4, memory_bytes={"a": 25.0, "b": 20.0})
    free = {("a", "b"): 1.0, ("b", "a"): 1.0}
    found = place_pipeline({"a": [1.0] * 4, "b": [50.0] * 4}, [0] * 3, MOVES, fixed(free), room=room)
    assert found is not None
    assert {name: last - first + 1 for first, last, name in found.runs} == {"a": 2, "b": 2}
    assert place_pipeline(EVEN, [0] * 3, MOVES, fixed(free), room=Room(block_bytes=[10.0] * 4, memory_bytes={"a": 15.0, "b": 15.0})) is None


def test_replicas_of_the_slow_stage_are_used_where_they_leave_each_other_alone_and_have_room() -> None:
    costs = {"a": [6.0, None], "b": [None, 2.0]}
    free = dict.fromkeys((("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")), 1.0)
    room = Room(block_bytes=[10.0, 10.0], memory_bytes={"a": 25.0}, most_replicas={"a": 4})
    found = place_pipeline(costs, [0], MOVES, fixed(free), room=room)
    assert found is not None
    assert found.replicas == {"a": 2}  # a third has no room
    assert found.load_s == pytest.approx(3.0)
    slowed = place_pipeline(costs, [0], MOVES, fixed({**free, ("a", "a"): 2.0}), room=room)
    assert slowed is not None
    assert slowed.load_s == pytest.approx(6.0)


# Two in which the whole, in two replicas that are hoped to leave each other alone, would be the best.
@example(({"a": [4.0, 1.0, 0.5], "b": [4.0, 1.0, 1.0]}, {("a", "b"): 1.0, ("b", "a"): 3.0}), 2.0, 6)
@example(({"a": [4.0, 1.0, 3.0], "b": [4.0, 1.0, 0.5]}, {("a", "b"): 1.0, ("b", "a"): 1.0}), 2.5, 6)
@settings(max_examples=20, deadline=None)
@given(chains(), st.floats(1.0, 2.5), st.integers(2, 6))
def test_replicas_in_limited_memory_are_as_good_as_any_by_brute_force(
    case: tuple[dict[str, list[float]], dict[Pair, float]], own: float, memory: int
) -> None:
    costs, factors = case
    factors = {**factors, ("a", "a"): own, ("b", "b"): own}
    blocks = len(costs["a"])
    room = Room(block_bytes=[1.0] * blocks, memory_bytes={"a": float(memory), "b": float(memory)}, most_replicas={"a": 2, "b": 2})

    def load(names: Sequence[str], replicas: Mapping[str, int]) -> float:
        used = list(dict.fromkeys(names))
        if any(names.count(name) * replicas[name] > memory for name in used):
            return float("inf")
        loads = []
        for name in used:
            taken_over = 0.1 * sum(before != name == after for before, after in pairwise(names))
            mine = sum(costs[name][index] for index in range(blocks) if names[index] == name) + taken_over
            beside = factors[name, "b" if name == "a" else "a"] if len(used) > 1 else 1.0
            loads.append(mine * beside * (1 + (replicas[name] - 1) * (own - 1)) / replicas[name])
        return max(loads)

    numbers = [{"a": one, "b": other} for one in (1, 2) for other in (1, 2)]
    cut = [names for names in product("ab", repeat=blocks) if sum(a != b for a, b in pairwise(names)) == 1]
    best = min(load(names, each) for names in cut for each in numbers)
    single = min(load([name] * blocks, {"a": 1, "b": 1}) for name in "ab")
    stacked = min(load([name] * blocks, each) for name in "ab" for each in numbers)
    found = place_pipeline(costs, [0] * (blocks - 1), MOVES, fixed(factors), room=room, most=12)
    if found is not None:
        assert best * (1 - 1e-9) <= found.load_s <= single
        assert (
            load([name for first, last, name in found.runs for _ in range(first, last + 1)], {"a": 1, "b": 1} | dict(found.replicas)) < 1e9
        )
    if best < min(single, stacked) * (1 - 1e-6):
        assert found is not None
        assert found.load_s == pytest.approx(best, rel=1e-4)


@st.composite
def gapped(draw: st.DrawFn) -> tuple[dict[str, list[float | None]], dict[Pair, Move], dict[Pair, float]]:
    """Draw chains over three targets, with blocks that a target does not run, targets that cannot hand over, ties and costs of nothing."""
    blocks = draw(st.integers(1, 4))
    cost = st.sampled_from([None, 0.0, 1.0, 1.0, 2.0, 5.0])
    costs = {name: draw(st.lists(cost, min_size=blocks, max_size=blocks)) for name in "abc"}
    pairs = list(permutations("abc", 2))
    moves = {pair: Move(fixed=draw(st.sampled_from([0.0, 0.5, 3.0]))) for pair in pairs if draw(st.integers(0, 3))}
    return costs, moves, {pair: draw(st.sampled_from([1.0, 1.0, 1.5, 3.0])) for pair in pairs}


def loads_by_cuts(
    costs: Mapping[str, Sequence[float | None]], moves: Mapping[Pair, Move], factors: Mapping[Pair, float]
) -> dict[int, float]:
    """Return the least load of any contiguous plan by the number of its stages, by brute force."""
    best: dict[int, float] = {}
    for names in product(costs, repeat=len(costs["a"])):
        stages = [name for name, _ in groupby(names)]
        runs = all(costs[name][index] is not None for index, name in enumerate(names))
        if not runs or len(set(stages)) < len(stages) or any(pair not in moves for pair in pairwise(stages)):
            continue
        parts = {name: sum(costs[name][index] or 0.0 for index in range(len(names)) if names[index] == name) for name in stages}
        for before, name in pairwise(stages):
            parts[name] += moves[before, name].fixed
        load = max(parts[name] * (1 + sum(factors[name, other] - 1 for other in stages if other != name)) for name in stages)
        best[len(stages)] = min(best.get(len(stages), load), load)
    return best


@settings(max_examples=15, deadline=None)
@given(gapped())
def test_forced_and_hoped_for_pipelines_are_the_best_of_several_stages_by_brute_force(
    case: tuple[dict[str, list[float | None]], dict[Pair, Move], dict[Pair, float]],
) -> None:
    costs, moves, factors = case
    sizes = [0] * (len(costs["a"]) - 1)
    cut = [load for stages, load in loads_by_cuts(costs, moves, factors).items() if stages > 1]
    found = look_at_pipelines(costs, sizes, moves, fixed(factors), most=30, forced=True)
    assert [each.load_s for each in found] == sorted(each.load_s for each in found)
    assert all(len(each.runs) > 1 for each in found)
    assert (found[0].load_s == pytest.approx(min(cut))) if cut else found == []
    free = [load for stages, load in loads_by_cuts(costs, moves, dict.fromkeys(factors, 1.0)).items() if stages > 1]
    hoped = hoped_pipeline(costs, sizes, moves)
    assert (hoped is not None and hoped.load_s == pytest.approx(min(free))) if free else hoped is None


@settings(max_examples=8, deadline=None)
@given(gapped(), st.sampled_from("abc"), st.sampled_from(["faster", "calmer", "nearer"]))
def test_what_gets_better_never_makes_the_best_forced_pipeline_worse(
    case: tuple[dict[str, list[float | None]], dict[Pair, Move], dict[Pair, float]], which: str, how: str
) -> None:
    costs, moves, factors = case
    better = {
        "faster": ({**costs, which: [None if each is None else each / 2 for each in costs[which]]}, moves, factors),
        "calmer": (costs, moves, {pair: 1.0 if pair[0] == which else factor for pair, factor in factors.items()}),
        "nearer": (costs, {**moves, **{pair: Move() for pair in factors if pair[1] == which}}, factors),
    }[how]
    sizes = [0] * (len(costs["a"]) - 1)
    before, after = (look_at_pipelines(one, sizes, two, fixed(three), most=30, forced=True) for one, two, three in (case, better))
    assert not before or after[0].load_s <= before[0].load_s + 1e-9
