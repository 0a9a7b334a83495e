"""Copies on several targets: rates add up less what copies cost each other; memory limits; against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.planner.copies import Counts, Pair, Way, best_copies, place_copies, rates
from aivmm.runtime.plan import MOST_EXECUTABLES

FREE: Mapping[Pair, float] = dict.fromkeys(itertools.product("abc", repeat=2), 1.0)


def way(name: str, seconds: float, **fields: float) -> Way:
    return Way(name=name, device=name, seconds=seconds, **fields)  # type: ignore[arg-type]


def fixed(factors: Mapping[Pair, float], asked: list[Counts] | None = None):
    def measure(counts: Counts) -> Mapping[Pair, float]:
        if asked is not None:
            asked.append(counts)
        return factors

    return measure


def test_two_cards_answer_twice_as_much_and_a_slow_one_gets_its_part() -> None:
    found = place_copies([way("a", 0.01), way("b", 0.01), way("c", 0.1)], fixed(FREE))
    assert found is not None
    assert found.counts == {"a": 1, "b": 1, "c": 1}
    assert found.rate_per_s == pytest.approx(210)
    assert found.shares == pytest.approx({"a": 100 / 210, "b": 100 / 210, "c": 10 / 210})
    assert found.bound_per_s == pytest.approx(210)


def test_copies_that_double_each_others_time_are_no_plan_and_are_asked_for_once() -> None:
    asked: list[Counts] = []
    assert place_copies([way("a", 0.01), way("b", 0.01)], fixed({("a", "b"): 2.0, ("b", "a"): 2.0}, asked)) is None
    assert asked == [{"a": 1, "b": 1}]


def test_a_slow_copy_that_costs_the_fast_one_more_than_it_gives_is_left_out() -> None:
    factors = {**FREE, ("a", "c"): 1.5, ("b", "c"): 1.5}
    found = place_copies([way("a", 0.01), way("b", 0.01), way("c", 0.1)], fixed(factors))
    assert found is not None
    assert found.counts == {"a": 1, "b": 1}


def test_no_more_replicas_than_the_memory_holds() -> None:
    ways = [way("a", 0.01, memory_bytes=10.0, most=4)]
    found = place_copies(ways, fixed(FREE), capacity={"a": 25.0})
    assert found is not None
    assert found.counts == {"a": 2}
    assert place_copies(ways, fixed(FREE), capacity={"a": 15.0}) is None
    assert place_copies(ways, fixed(FREE), capacity={"a": 5.0}) is None


def test_no_more_replicas_than_a_stage_may_have() -> None:
    found = place_copies([way("a", 0.01, most=40), way("b", 0.01, most=40)], fixed(FREE))
    assert found is not None and sum(found.counts.values()) == MOST_EXECUTABLES


def test_two_targets_of_one_device_share_its_memory() -> None:
    ways = [Way(name=name, device="d", seconds=0.01, memory_bytes=10.0) for name in "ab"]
    assert place_copies(ways, fixed(FREE), capacity={"d": 19.0}) is None
    assert place_copies(ways, fixed(FREE), capacity={"d": 20.0}) is not None


def test_copies_on_one_processor_have_no_more_threads_together_than_it_has_cores() -> None:
    """Both on all cores would be the best by what each takes alone, and wait for each other's slices: it is not even measured."""
    asked: list[Counts] = []
    whole = [Way(name=name, device="cpu", seconds=0.01, cores=2.0, most=2) for name in "ab"]
    parts = [Way(name=f"{name} on 1", device="cpu", seconds=0.015, cores=1.0, most=2) for name in "ab"]
    free = dict.fromkeys(itertools.product((each.name for each in (*whole, *parts)), repeat=2), 1.0)
    found = place_copies([*whole, *parts], fixed(free, asked), cores={"cpu": 2.0})
    assert found is not None and sum(found.counts.values()) == 2
    assert all(name.endswith("on 1") for counts in asked for name in counts)
    assert place_copies(whole, fixed(free, asked), cores={"cpu": 2.0}) is None


def test_the_best_of_several_is_asked_for_where_one_alone_is_better() -> None:
    ways = [way("a", 0.01, cores=2.0), way("b", 0.05, cores=2.0), *(way(name, 0.04, cores=1.0) for name in "cd")]
    ways = [Way(name=each.name, device="cpu", seconds=each.seconds, cores=each.cores) for each in ways]
    assert best_copies(ways, {}, {}, cores={"cpu": 2.0}) == {"a": 1}
    assert best_copies(ways, {}, {}, cores={"cpu": 2.0}, least=2) == {"c": 1, "d": 1}
    assert best_copies(ways[:2], {}, {}, cores={"cpu": 2.0}, least=2) == {}


def test_copies_whose_factors_cannot_be_measured_are_no_plan() -> None:
    assert place_copies([way("a", 0.01), way("b", 0.01)], fixed({})) is None
    assert place_copies([way("a", 0.01)], fixed({})) is None
    assert place_copies([], fixed({})) is None


def test_a_plan_that_cannot_be_measured_leaves_those_with_fewer_copies() -> None:
    """Three copies do not load, as where each takes more memory than was counted; two do."""
    asked: list[Counts] = []

    def measure(counts: Counts) -> Mapping[Pair, float]:
        asked.append(counts)
        return FREE if sum(counts.values()) <= 2 else {}

    found = place_copies([way("a", 0.01, most=2), way("b", 0.02)], measure)
    assert found is not None
    assert found.counts == {"a": 2} and asked == [{"a": 2, "b": 1}, {"a": 2}]
    assert found.bound_per_s == pytest.approx(200)


def test_refusals_count_among_the_plans_that_may_be_measured() -> None:
    asked: list[Counts] = []
    assert place_copies([way("a", 0.01, most=9)], fixed({}, asked), most=3) is None
    assert asked == [{"a": 9}, {"a": 8}, {"a": 7}]


def test_no_more_plans_are_measured_than_allowed() -> None:
    asked: list[Counts] = []

    def measure(counts: Counts) -> Mapping[Pair, float]:
        asked.append(counts)
        return {pair: 1.0 + 2.0 * len(asked) for pair in itertools.product(counts, repeat=2)}

    place_copies([way(name, 0.01, most=2) for name in "abc"], measure, most=2)
    assert len(asked) <= 2


def test_nothing_is_measured_once_it_is_to_stop() -> None:
    asked: list[Counts] = []
    ways = [way("a", 0.01), way("b", 0.01), way("c", 0.1)]
    assert place_copies(ways, fixed(FREE, asked), stop=lambda: True) is None and asked == []
    place_copies(ways, fixed({}, asked), stop=lambda: bool(asked))
    assert len(asked) == 1
    place_copies(ways, fixed({}, asked))
    assert len(asked) > 2  # looks that are not stopped go on


def test_a_copy_that_adds_no_more_than_noise_is_left_out() -> None:
    ways = [way("a", 0.01, most=4), way("b", 0.01, most=4)]
    noisy = {("a", "a"): 1.95, ("b", "b"): 1.93, ("a", "b"): 1.0, ("b", "a"): 1.0}
    found = place_copies(ways, fixed(noisy), tolerance=0.05)
    assert found is not None
    assert found.counts == {"a": 1, "b": 1}
    assert found.bound_per_s > found.rate_per_s


@pytest.mark.parametrize("most", [1, 3])  # one by one, and copy by copy
def test_of_equal_plans_the_fewest_copies(most: int) -> None:
    ways = [way(name, 0.01, most=most) for name in ("a", "b", *(f"{index}" for index in range(10 * (most > 1))))]
    alone = dict.fromkeys(itertools.product((each.name for each in ways), repeat=2), 1000000000.0)
    assert sum(best_copies(ways, {}, alone).values()) == 1


COSTS = st.sampled_from([0.01, 0.01, 0.02, 0.03, 0.1])
FACTORS = st.sampled_from([1.0, 1.0, 1.2, 2.0, 3.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Way], dict[str, float], dict[Pair, float]]:
    devices = draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3))
    ways = [
        Way(
            name=f"{index}",
            device=device,
            seconds=draw(COSTS),
            memory_bytes=draw(st.sampled_from([0.0, 1.0, 2.0])),
            cores=draw(st.sampled_from([0.0, 1.0, 2.0])),
            most=draw(st.integers(1, 3)),
        )
        for index, device in enumerate(devices)
    ]
    capacity = {device: draw(st.sampled_from([0.0, 1.0, 3.0, math.inf])) for device in set(devices)}
    names = [each.name for each in ways]
    return ways, capacity, {pair: draw(FACTORS) for pair in itertools.product(names, repeat=2)}


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_plan_is_better_by_brute_force_and_none_breaks_a_limit(case: tuple[list[Way], dict[str, float], dict[Pair, float]]) -> None:
    ways, capacity, factors = case
    cores = {"x": 2.0, "y": 3.0}

    def rate(numbers: tuple[int, ...]) -> float:
        """By the definition, copy by copy."""
        each = [way for way, number in zip(ways, numbers, strict=True) for _ in range(number)]
        for device, limit in capacity.items():
            if sum(way.memory_bytes for way in each if way.device == device) > limit:
                return -1.0
        if any(sum(way.cores for way in each if way.device == device) > limit for device, limit in cores.items()):
            return -1.0
        total = 0.0
        for index, one in enumerate(each):
            total += 1 / (one.seconds * (1 + sum(factors[one.name, other.name] - 1 for at, other in enumerate(each) if at != index)))
        return total

    every = [rate(numbers) for numbers in itertools.product(*(range(way.most + 1) for way in ways)) if any(numbers)]
    best = best_copies(ways, capacity, factors, cores=cores)
    if max(every) < 0:
        assert best == {}
    else:
        assert rate(tuple(best.get(way.name, 0) for way in ways)) == pytest.approx(max(every))
        assert sum(rates(ways, best, factors).values()) == pytest.approx(max(every))
    found = place_copies(ways, fixed(factors), capacity=capacity, cores=cores, most=200)
    single = max((rate(tuple(int(at == index) for at in range(len(ways)))) for index in range(len(ways))), default=-1.0)
    if found is None:
        assert max(every) <= max(single, 0.0) * (1 + 1e-9)
    else:
        assert found.rate_per_s == pytest.approx(max(every))
        assert found.rate_per_s > single


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2))
def test_a_faster_target_never_makes_the_best_rate_worse(case: tuple[list[Way], dict[str, float], dict[Pair, float]], which: int) -> None:
    ways, capacity, factors = case
    which %= len(ways)
    faster = [
        Way(
            name=each.name,
            device=each.device,
            seconds=each.seconds / (2 if index == which else 1),
            memory_bytes=each.memory_bytes,
            cores=each.cores,
            most=each.most,
        )
        for index, each in enumerate(ways)
    ]
    before, after = (sum(rates(each, best_copies(each, capacity, factors), factors).values()) for each in (ways, faster))
    assert after >= before * (1 - 1e-12)


def test_many_ways_are_placed_copy_by_copy_within_memory() -> None:
    ways = [Way(name=f"{index}", device="d", seconds=0.01 * (1 + index), memory_bytes=1.0, most=3) for index in range(12)]
    found = best_copies(ways, {"d": 5.0}, {})
    assert found == {"0": 3, "1": 2}
