"""The choice: something that keeps every limit is chosen whenever there is one; else what binds and what comes nearest are named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.planner.choice import Option, alternatives, as_good, best_in, choose, distance, misfit, preferred, rank, relaxed, violated
from aivmm.planner.constraints import Constraint, beyond, check, parse
from aivmm.planner.objectives import OBJECTIVES, parse_objectives

LATENCY = OBJECTIVES["latency"]
TARGETS = st.sampled_from(["openvino:CPU", "openvino:GPU.0", "openvino:NPU", "onnxruntime:CPU"])
VALUE = st.floats(1e-6, 1e6) | st.just(math.nan)
OPTIONS = st.lists(
    st.builds(
        lambda values, on: Option(metrics=values, targets=tuple(on)),
        st.fixed_dictionaries({}, optional={"latency": VALUE, "throughput": VALUE, "memory": VALUE, "cosine": st.floats(-1, 1)}),
        st.lists(TARGETS, min_size=1, max_size=2),
    ),
    max_size=8,
)
LIMIT = st.floats(1e-6, 1e6)
CONSTRAINTS = st.lists(
    st.builds(Constraint, metric=st.sampled_from(["latency", "memory"]), operator=st.sampled_from(["<", "<="]), limit=LIMIT)
    | st.builds(Constraint, metric=st.just("throughput"), operator=st.sampled_from([">", ">="]), limit=LIMIT)
    | st.builds(Constraint, metric=st.just("cosine"), operator=st.just(">="), limit=st.floats(-0.9, 1))
    | st.builds(lambda names: Constraint(metric="targets", operator="in", names=tuple(names)), st.lists(TARGETS, min_size=1, max_size=2)),
    max_size=4,
)
PREFER = st.lists(st.sampled_from(["openvino:NPU", "openvino", "*:CPU", "openvino:GPU"]), max_size=3)


@given(OPTIONS, CONSTRAINTS, PREFER, st.sampled_from(sorted(OBJECTIVES)))
def test_whenever_something_keeps_every_limit_it_is_chosen(
    options: list[Option], constraints: list[Constraint], prefer: list[str], objective: str
) -> None:
    keyed = dict(enumerate(options))
    kept = {at for at, each in keyed.items() if not violated(each, constraints)}
    found, why = choose(keyed, constraints, OBJECTIVES[objective], prefer)
    assert set(found) <= kept
    assert bool(found) is bool(kept)
    assert (why is not None) is (not kept and bool(options))
    if found:
        best = min(rank(keyed[at].targets, prefer) for at in kept)
        assert all(rank(keyed[at].targets, prefer) == best for at in found)


@given(OPTIONS, CONSTRAINTS)
def test_what_binds_is_kept_by_nothing_or_by_nothing_together(options: list[Option], constraints: list[Constraint]) -> None:
    found = misfit(options, constraints)
    if found is None:
        assert not options or any(not violated(each, constraints) for each in options)
        return
    for each in found.alone:
        assert all(each in violated(option, constraints) for option in options)
    if not found.alone:
        assert len(found.together) >= 2 and all(violated(option, found.together) for option in options)


@given(OPTIONS, CONSTRAINTS)
def test_what_comes_nearest_passes_the_limits_that_it_is_said_to_need(options: list[Option], constraints: list[Constraint]) -> None:
    for option in options:
        broken = check(constraints, option.metrics, targets=option.targets)
        text = relaxed(broken)
        if not broken or not text:
            continue
        assert not check(parse(text), option.metrics)


def test_a_limit_nothing_keeps_is_named_alone_and_a_conflict_is_named_whole() -> None:
    fast = Option(metrics={"latency": 0.001, "memory": 9e9}, targets=("openvino:CPU",))
    small = Option(metrics={"latency": 0.1, "memory": 1e6}, targets=("openvino:CPU",))
    together = misfit([fast, small], parse("latency<10ms, memory<1GB"))
    assert str(together) == "nothing that was proven keeps latency<10ms and memory<1GB at once, though each is kept by something"
    assert str(misfit([fast, small], parse("latency<10us, memory<1GB"))) == "nothing that was proven keeps latency<10us"
    assert misfit([fast, small], parse("latency<10ms")) is None


def test_what_comes_nearest_breaks_its_worst_limit_by_the_least() -> None:
    limits = parse("latency<10ms, memory<1GB")
    near = check(limits, {"latency": 0.011, "memory": 1.1e9})
    far = check(limits, {"latency": 0.010, "memory": 2e9})
    assert distance(near) < distance(far)
    assert relaxed(near) == "latency<=11ms, memory<=1.1GB"
    assert relaxed(check(parse("targets in (openvino)"), {}, targets=["onnxruntime:CPU"])) == ""


def test_what_all_break_alike_does_not_hide_what_is_nearer_in_the_rest() -> None:
    limits = parse("latency<1us, size<1KB")
    slow, fast = (check(limits, {"latency": seconds, "size": size}) for seconds, size in ((98e-6, 2_100_000.0), (90e-6, 2_100_050.0)))
    assert distance(fast) < distance(slow)


def test_hardware_is_taken_in_the_order_in_which_it_is_wanted() -> None:
    options = {
        name: Option(metrics={"latency": seconds}, targets=(name,))
        for name, seconds in (("onnxruntime:CPU", 0.001), ("openvino:CPU", 0.002), ("openvino:GPU.0", 0.003))
    }
    assert preferred(options, ["openvino:NPU", "openvino:GPU", "*:CPU"]) == ["openvino:GPU.0"]
    assert choose(options, parse("latency<2500us"), LATENCY, ["openvino:GPU", "openvino"])[0] == ["openvino:CPU"]
    assert preferred(options, ["*:CPU"]) == ["onnxruntime:CPU", "openvino:CPU"]
    assert rank(["openvino:GPU.0", "onnxruntime:CPU"], ["openvino:GPU", "*:CPU"]) == 1  # as wanted as its least wanted part
    assert preferred(options, []) == list(options)


def test_what_differs_by_less_than_the_tolerance_is_as_good() -> None:
    options = {name: Option(metrics={"memory": value}, targets=()) for name, value in (("a", 100.0), ("b", 104.0), ("c", 110.0))}
    assert as_good(options, OBJECTIVES["memory"]) == ["a", "b"]
    assert as_good(options, LATENCY) == ["a", "b", "c"]  # nothing is known, so nothing is worse


def test_alternatives_beat_the_plan_somewhere_by_more_than_noise_and_are_beaten_nowhere_at_once() -> None:
    def option(latency: float, throughput: float) -> Option:
        return Option(metrics={"latency": latency, "throughput": throughput}, targets=())

    options = {"plan": option(1.0, 1.0), "batched": option(4.0, 3.0), "beaten": option(5.0, 2.0), "same": option(1.001, 1.01)}
    assert alternatives(options, "plan", [OBJECTIVES["latency"], OBJECTIVES["throughput"]]) == ["batched"]


def test_alternatives_differ_from_each_other_and_each_is_named_by_what_it_is_best_in() -> None:
    """Seen on a recommender: cosines that differ in the fourteenth digit, and sizes that differ by 23 bytes."""

    def option(throughput: float, cosine: float, size: float) -> Option:
        return Option(metrics={"throughput": throughput, "cosine": cosine, "size": size}, targets=())

    goals = parse_objectives("throughput,accuracy,size")
    options = {
        "plan": option(489_000, 1.0, 6_455_340),
        "one at a time": option(56_000, 1.0, 6_455_317),
        "another": option(300_000, 0.99999999999999, 6_455_339),
        "small": option(400_000, 0.9991, 1_700_000),
        "small too": option(399_000, 0.9991, 1_699_990),
    }
    assert alternatives(options, "plan", goals) == ["small"]  # and not what is within noise of it
    assert best_in({name: options[name] for name in ("plan", "small")}, "plan", "small", goals) == ["size"]
    assert best_in(options, "plan", "one at a time", goals) == []
    assert best_in({**options, "exact": option(1, 1.0, 9e6), "plan": options["small"]}, "plan", "one at a time", goals) == ["accuracy"]


@pytest.mark.parametrize("text", ["latency<10ms", "throughput>=5/s", "metric<0.5", "sqnr>0dB"])
@given(value=st.floats(-1e3, 1e3))
def test_beyond_is_above_zero_exactly_where_a_limit_is_broken(text: str, value: float) -> None:
    (limit,) = parse(text)
    assert (beyond(limit, value) > 0) is (not limit.allows(value))
    assert math.isnan(beyond(limit, math.nan))
