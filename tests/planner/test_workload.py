"""Dividing a machine among models: limits in the order of priority, the rest shared; against brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import UsageError
from aivmm.planner.workload import Demand, Option, divide, expect, rank, thread_ladder

CPU = {"cpu": 4}


def options(model: str, *, one: float, cores: int = 4, device: str = "cpu", replicas: tuple[int, ...] = (1,)) -> list[Option]:
    """Threads 1 to `cores` that help by 70 % each time they double."""
    return [
        Option(
            name=f"{model}-{threads}x{copies}", model=model, device=device, threads=threads, service_s=one / threads**0.77, replicas=copies
        )
        for threads in range(1, cores + 1)
        for copies in replicas
        if threads * copies <= cores
    ]


def test_a_limit_of_the_first_priority_gets_the_threads_that_it_needs() -> None:
    found = divide(
        [Demand(name="a", priority=1, latency_s=0.045), Demand(name="b", priority=2, latency_s=0.045)],
        [*options("a", one=0.1), *options("b", one=0.1)],
        CPU,
    )[0]
    assert found.options["a"].threads == 3
    assert found.options["b"].threads == 1
    assert found.broken == ("b",)


def test_the_order_of_priority_decides_who_is_served_and_not_the_order_of_the_list() -> None:
    demands = [Demand(name="a", priority=2, latency_s=0.045), Demand(name="b", priority=1, latency_s=0.045)]
    assert divide(demands, [*options("a", one=0.1), *options("b", one=0.1)], CPU)[0].broken == ("a",)


def test_what_nobody_needs_is_shared() -> None:
    found = divide([Demand(name="a"), Demand(name="b")], [*options("a", one=0.1), *options("b", one=0.02)], CPU)[0]
    assert {name: each.threads for name, each in found.options.items()} == {"a": 2, "b": 2}


def test_a_rate_beyond_one_replica_takes_several() -> None:
    found = divide([Demand(name="a", rate_per_s=25)], options("a", one=0.1, replicas=(1, 2, 4)), CPU)[0]
    assert found.broken == ()
    assert found.options["a"].replicas / found.options["a"].service_s > 25


def test_another_device_takes_what_the_processor_cannot() -> None:
    gpu = Option(name="b-gpu", model="b", device="gpu", threads=1, service_s=0.03)
    found = divide(
        [Demand(name="a", latency_s=0.036), Demand(name="b", latency_s=0.036)],
        [*options("a", one=0.1), *options("b", one=0.1), gpu],
        {"cpu": 4, "gpu": 1},
    )[0]
    assert found.options["b"] is gpu
    assert found.options["a"].threads == 4
    assert found.broken == ()


def test_more_models_than_cores_find_room_only_when_they_share() -> None:
    demands = [Demand(name=name) for name in "abc"]
    each = [option for name in "abc" for option in options(name, one=0.1, cores=2)]
    assert divide(demands, each, {"cpu": 2}) == ()
    found = divide(demands, each, {"cpu": 2}, level=2)[0]
    assert sum(option.units for option in found.options.values()) <= 4
    assert all(expected.latency_s >= 2 * found.options[name].service_s for name, expected in found.expected.items())


def test_a_slowdown_that_was_seen_enters_the_choice() -> None:
    demands = [Demand(name="a", latency_s=0.11), Demand(name="b", priority=2)]
    each = [*options("a", one=0.1), *options("b", one=0.1)]
    assert divide(demands, each, CPU)[0].options["a"].threads == 2
    slowed = divide(demands, each, CPU, slowdown={"a": 2.2})[0]
    assert slowed.options["a"].threads == 3
    assert slowed.broken == ()


def test_waiting_grows_with_the_rate_until_nothing_helps() -> None:
    (option,) = options("a", one=0.01, cores=1)
    waits = [expect(Demand(name="a", rate_per_s=rate), option).latency_s for rate in (1, 50, 90)]
    assert waits == sorted(waits)
    assert waits[1] == pytest.approx(0.01 + 0.5 * 0.01 / (2 * 0.5))
    assert expect(Demand(name="a", rate_per_s=96), option).latency_s == math.inf
    assert expect(Demand(name="a"), option).latency_s == 0.01


@pytest.mark.parametrize("rate", [0.5, 30.0, 70.0, 90.0])
def test_the_tail_of_waiting_is_near_what_a_simulated_queue_shows(rate: float) -> None:
    """One server of fixed service time, Lindley's recursion over 100,000 arrivals: a tail told too short promises what does not hold."""
    (option,) = options("a", one=0.01, cores=1)
    random, wait, waits = np.random.default_rng(0), 0.0, []
    for gap in random.exponential(1 / rate, 100_000):
        waits.append(wait)
        wait = max(0.0, wait + 0.01 - gap)
    seen = 0.01 + float(np.quantile(waits, 0.99))
    expected = expect(Demand(name="a", rate_per_s=rate), option).p99_s
    assert seen * 0.95 <= expected <= seen * 1.5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"priority": 0}, "priority of 'a' is 0"),
        ({"latency_s": 0.0}, "latency of 'a' is 0"),
        ({"latency_s": math.nan}, "latency of 'a' is nan"),
        ({"rate_per_s": -1.0}, "rate of 'a' is -1"),
        ({"latency_s": 0.02, "p99_s": 0.01}, "contradict"),
    ],
)
def test_what_cannot_be_asked_for(fields: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Demand(name="a", **fields)  # type: ignore[arg-type]


def test_a_model_without_an_option_and_an_unknown_device_are_named() -> None:
    with pytest.raises(UsageError, match="nothing here runs 'b'"):
        divide([Demand(name="b")], options("a", one=0.1), CPU)
    with pytest.raises(UsageError, match="on 'gpu', which is no device here"):
        divide([Demand(name="a")], options("a", one=0.1, device="gpu"), CPU)


@pytest.mark.parametrize(("cores", "ladder"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (20, [1, 2, 3, 4, 6, 8, 10, 12, 16, 20])])
def test_threads_worth_trying(cores: int, ladder: list[int]) -> None:
    assert thread_ladder(cores) == ladder


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Demand], list[Option], dict[str, int]]:
    units = {"cpu": draw(st.integers(1, 4)), "gpu": 1}
    demands, found = [], []
    times = st.sampled_from([0.01, 0.02, 0.05, 0.1])
    for name in "abc"[: draw(st.integers(1, 3))]:
        limit = draw(st.none() | times)
        rate = draw(st.none() | st.sampled_from([1.0, 10.0, 30.0]))
        demands.append(Demand(name=name, priority=draw(st.integers(1, 3)), latency_s=limit, rate_per_s=rate))
        for number in range(draw(st.integers(1, 4))):
            device = draw(st.sampled_from(["cpu", "cpu", "gpu"]))
            threads = 1 if device == "gpu" else draw(st.integers(1, 3))
            found.append(Option(name=f"{name}{number}", model=name, device=device, threads=threads, service_s=draw(times)))
    return demands, found, units


@settings(max_examples=200)
@given(workloads())
def test_no_division_is_better_than_the_one_found(case: tuple[list[Demand], list[Option], dict[str, int]]) -> None:
    demands, found, units = case
    allowed = []
    for chosen in product(*([each for each in found if each.model == demand.name] for demand in demands)):
        if all(sum(each.units for each in chosen if each.device == device) <= most for device, most in units.items()):
            expected = [expect(demand, each) for demand, each in zip(demands, chosen, strict=True)]
            broken = [demand.name for demand, each in zip(demands, expected, strict=True) if each.broken(demand)]
            allowed.append(rank(demands, broken))
    best = divide(demands, found, units)
    if not allowed:
        assert best == ()
        return
    assert rank(demands, best[0].broken) == min(allowed)
    used = list(best[0].options.values())
    assert all(sum(each.units for each in used if each.device == device) <= most for device, most in units.items())


@settings(max_examples=100)
@given(workloads(), st.integers(2, 5))
def test_further_divisions_come_in_order_and_each_once(case: tuple[list[Demand], list[Option], dict[str, int]], count: int) -> None:
    demands, found, units = case
    several = divide(demands, found, units, count=count)
    assert [each.key for each in several] == sorted(each.key for each in several)
    names = [tuple(option.name for option in each.options.values()) for each in several]
    assert len(set(names)) == len(names)
    assert several[:1] == divide(demands, found, units)


@settings(max_examples=100)
@given(workloads())
def test_a_larger_machine_never_breaks_more(case: tuple[list[Demand], list[Option], dict[str, int]]) -> None:
    demands, found, units = case
    small, large = divide(demands, found, units), divide(demands, found, {**units, "cpu": units["cpu"] + 1})
    if small:
        assert rank(demands, large[0].broken) <= rank(demands, small[0].broken)


@settings(max_examples=100)
@given(workloads(), st.sampled_from([1, 2]), st.sampled_from([1.0, 1.5, 3.0]))
def test_the_rest_is_shared_best_too_with_slowdowns_and_shared_cores(
    case: tuple[list[Demand], list[Option], dict[str, int]], level: int, slowdown: float
) -> None:
    """Of the divisions that break the fewest limits in order, none waits less in proportion to each model's fastest option."""
    demands, found, units = case
    slowdowns = {demands[0].name: slowdown}

    def key(chosen: tuple[Option, ...]) -> tuple[float, ...]:
        missed, waits = [], 0.0
        for demand, each in zip(demands, chosen, strict=True):
            factor = max(slowdowns.get(demand.name, 1.0), level)
            expected = expect(demand, each, slowdown=factor)
            missed += [demand.name] * expected.broken(demand)
            # A queue without end counts as a hundred times as long as the replicas are busy.
            waited = expected.latency_s if math.isfinite(expected.latency_s) else each.service_s * factor * (1 + 100 * expected.busy)
            waits += math.log(waited / min(other.service_s for other in found if other.model == demand.name))
        return (*rank(demands, missed), waits)

    allowed = [
        chosen
        for chosen in product(*([each for each in found if each.model == demand.name] for demand in demands))
        if all(sum(each.units for each in chosen if each.device == device) <= most * level for device, most in units.items())
    ]
    best = divide(demands, found, units, level=level, slowdown=slowdowns)
    if not allowed:
        assert best == ()
    else:
        assert key(tuple(best[0].options[each.name] for each in demands)) == pytest.approx(min(map(key, allowed)))


@settings(max_examples=60)
@given(workloads(), st.integers(0, 2))
def test_a_faster_model_or_a_wider_limit_never_breaks_more(case: tuple[list[Demand], list[Option], dict[str, int]], which: int) -> None:
    demands, found, units = case
    name = demands[which % len(demands)].name
    faster = [replace(each, service_s=each.service_s / 2) if each.model == name else each for each in found]
    wider = [replace(each, latency_s=each.latency_s * 3) if each.name == name and each.latency_s else each for each in demands]
    before = divide(demands, found, units)
    for after in (divide(demands, faster, units), divide(wider, found, units)):
        assert bool(after) == bool(before)
        if before:
            assert rank(demands, after[0].broken) <= rank(demands, before[0].broken)
