"""Several objectives at once: what is told, what the front holds, how limits steer, and what is replayed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from aivmm.errors import UsageError
from aivmm.planner.candidates import Candidate, Policy, Rejection, Score
from aivmm.planner.constraints import parse
from aivmm.planner.importance import LEAST_TRIALS, importances
from aivmm.planner.objectives import OBJECTIVES, counts_rate, drive_of, parse_objectives, searched
from aivmm.planner.pareto import dominates, ends, front
from aivmm.planner.search import Search
from aivmm.planner.space import Space
from aivmm.runtime.config import Config, Knob
from tests.planner.test_search import THREADS, by_threads, drive, scored, space, states, target

LAYOUT = Knob("layout", "choice", "kinds", choices=("plain", "blocked"), default="plain")
LOSSES = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 3), max_size=12)
CPU, GPU, NPU = target("CPU"), target("GPU.0"), target("NPU")


@pytest.mark.parametrize(
    ("objectives", "limit", "rate"),
    [
        ("throughput", "memory<=1GB", True),
        ("throughput", "p99<=2ms", True),  # its calls are timed one by one in any case
        ("throughput", "latency<=2ms", False),
        ("throughput,latency", "memory<=1GB", False),
        ("latency", "throughput>=5/s", False),
    ],
)
def test_means_count_where_no_latency_is_asked_for_beside_throughput(objectives: str, limit: str, rate: bool) -> None:
    assert counts_rate(parse_objectives(objectives), parse(limit)) is rate


def traded(candidate: Candidate) -> Score:
    """Threads cost energy: the fastest is the hungriest."""
    threads = candidate.config.get("threads") or THREADS.default
    assert isinstance(threads, int)
    seconds = 1 / threads
    return Score(ratio=seconds, low=seconds, high=seconds, median_s=seconds, metrics={"latency": seconds, "energy": threads**2 * seconds})


def cuttable(*targets: object, **changes: object) -> Space:
    return space(THREADS, targets=targets or (CPU, GPU, NPU), most_pieces=3, cut_prices=(0.5, 1.0, 2.0), **changes)


# --- objectives and fronts ---


def test_objectives_are_read_in_order_and_refused_by_name() -> None:
    assert [each.name for each in parse_objectives("latency, size")] == ["latency", "size"]
    for text, words in (("speed", "unknown objective 'speed'"), ("latency,latency", "twice"), ("", "unknown objective ''")):
        with pytest.raises(UsageError, match=words):
            parse_objectives(text)
    assert drive_of(parse_objectives("latency,throughput")) == "throughput" and drive_of(parse_objectives("p99,size")) == "latency"
    assert [each.name for each in searched(parse_objectives("memory"))] == ["latency"]
    assert [each.name for each in searched(parse_objectives("memory,energy"))] == ["energy"]


@pytest.mark.parametrize("text", ["throughput,p99", "p99, throughput"])
def test_objectives_that_are_not_seen_of_the_same_calls_are_refused_in_a_line(text: str) -> None:
    with pytest.raises(UsageError, match="p99 is measured of one call at a time") as refused:
        parse_objectives(text)
    assert refused.value.advice and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_counter_that_reads_nothing_has_a_loss_too(name: str) -> None:
    objective = OBJECTIVES[name]
    assert math.isfinite(objective.loss_of(0.0))
    assert objective.better == "more" or objective.loss_of(0.0) < objective.loss_of(1e-6)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_better_value_is_a_smaller_loss(name: str) -> None:
    objective = OBJECTIVES[name]
    worse, better = (0.5, 0.9) if objective.better == "more" else (0.9, 0.5)
    assert objective.loss_of(better) < objective.loss_of(worse)


@given(LOSSES)
def test_the_front_is_what_nothing_dominates_and_dominates_the_rest(losses: list[tuple[float, ...]]) -> None:
    kept = front(losses)
    assert all(not dominates(other, losses[at]) for at in kept for other in losses)
    for at, mine in enumerate(losses):
        assert at in kept or any(dominates(losses[each], mine) or losses[each] == mine for each in kept)
    assert len({losses[at] for at in kept}) == len(kept)
    for which, at in enumerate(ends(losses)):
        assert at in kept and losses[at][which] == min(each[which] for each in losses)


def test_a_search_for_two_goals_keeps_what_each_is_traded_for() -> None:
    search = Search(space(THREADS), objectives=parse_objectives("latency,energy"))
    drive(search, traded)
    assert {each.config.get("threads") or 4 for each, _ in search.front()} == set(range(1, 9))
    assert search.best(1)[0][0].config.get("threads") == 8
    assert search.best(1, OBJECTIVES["energy"])[0][0].config.get("threads") == 1
    assert all(len(trial.values) == 2 for trial in search.studied())
    assert search.records[0].metrics.keys() == {"latency", "energy"}


def test_a_call_is_what_latency_counts_and_a_sample_what_throughput_counts() -> None:
    one = Candidate(target=CPU, config=Config(), batch=4, callers=2)
    assert OBJECTIVES["latency"].loss(one, scored(0.5)) == pytest.approx(math.log(4.0))
    assert OBJECTIVES["throughput"].loss(one, scored(0.5)) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("state", ["refused", "failed", "pruned"])
def test_what_has_no_numbers_is_pruned_with_several_objectives_too(state: str) -> None:
    search = Search(space(THREADS, LAYOUT), objectives=parse_objectives("latency,energy"), seed=2)
    drive(search, lambda each: traded(each) if each.config.get("layout") is None else Rejection(state=state, reason="no"))
    assert set(states(search)) == {TrialState.COMPLETE, TrialState.PRUNED} and search.exhausted


# --- limits ---


def test_what_breaks_a_limit_is_told_and_is_on_no_front() -> None:
    search = Search(space(THREADS), objectives=parse_objectives("latency,energy"), limits=parse("energy<=4J"))
    drive(search, traded)
    assert {each.config.get("threads") or 4 for each, _ in search.front()} == {1, 2, 3, 4}
    broken = {trial.params["toy:CPU threads"] for trial in search.studied() if any(value > 0 for value in trial.constraints.values())}
    assert broken == {5, 6, 7, 8}


def test_a_limit_steers_the_search_away_from_where_it_is_broken() -> None:
    wide = Knob("threads", "int", "many", low=1, high=400, default=1)
    late: list[int] = []
    for seed in range(3):
        tried = drive(Search(space(wide), limits=parse("energy<=20J"), seed=seed), traded, trials=60)
        late += [int(each.config.get("threads") or 1) for each in tried[30:]]
    assert sum(each <= 20 for each in late) > len(late) / 7  # by chance it would be a twentieth


# --- cut policies ---


def test_a_policy_comes_from_ordered_numbers_and_takes_two_targets_at_least() -> None:
    tried = drive(Search(cuttable(), seed=1), lambda each: scored(1.0 + 0.1 * (each.policy is None)), trials=60)
    cut = [each.policy for each in tried if each.policy]
    assert len(cut) > 10
    assert all(2 <= len(each.targets) <= 3 and 2 <= each.most_pieces <= 3 and each.cut_price in (0.5, 1.0, 2.0) for each in cut)
    assert all(each.most_pieces <= len(each.targets) for each in cut if each.contiguous)
    assert len({each.key for each in tried}) == len(tried)


@pytest.mark.parametrize("targets", [(CPU, GPU), (CPU, GPU, NPU)])
def test_a_point_spelled_as_parameters_is_the_same_point(targets: Sequence[object]) -> None:
    points = cuttable(*targets, batches=(1, 2), most_depth=2, most_replicas=2)
    for each in drive(Search(points, seed=4), lambda each: scored(1.0), trials=40):
        params = points.params(each)
        assert params is not None and points.canonical(params) == each
        known = points.distributions(params)
        assert known is not None and all(known[name]._contains(known[name].to_internal_repr(value)) for name, value in params.items())


def test_replicas_have_a_caller_each_and_are_points_of_their_targets_alone() -> None:
    points = space(THREADS, targets=(CPU, GPU), most_callers=3, most_replicas=2, replicated=frozenset({str(CPU)}))
    tried = drive(Search(points, seed=4), lambda each: scored(1.0))
    assert len(tried) == len({each.key for each in tried}) == points.size() == 8 * (3 + 2) + 8 * 3
    assert all(each.replicas <= each.callers for each in tried)
    assert {each.target for each in tried if each.replicas > 1} == {CPU}
    for each in tried:
        params = points.params(each)
        assert params is not None and points.canonical(params) == each
    assert points.params(Candidate(target=GPU, config=Config(precision="fp32"), callers=2, replicas=2)) is None
    search = Search(points)
    search.tell(Candidate(target=CPU, config=Config(precision="fp32"), callers=3, replicas=2), scored(0.5))
    assert (search.records[0].replicas, search.records[0].policy) == (2, {"replicas": 2})


def test_a_known_policy_is_told_and_one_outside_the_space_is_not() -> None:
    search = Search(cuttable())
    every = tuple((each, Config(precision="fp32")) for each in (CPU, GPU, NPU))
    inside = Policy(targets=every, most_pieces=3, cut_price=2.0, contiguous=False)
    search.tell(Candidate(target=CPU, config=every[0][1], policy=inside), scored(0.5))
    assert search.studied()[0].params["pieces"] == 3
    outside = Policy(targets=every, most_pieces=7, contiguous=False)
    search.tell(Candidate(target=CPU, config=every[0][1], policy=outside), scored(0.4))
    assert len(search.studied()) == 1 and len(search.records) == 2
    assert search.records[0].target == "toy:CPU + toy:GPU.0 + toy:NPU" and search.records[0].policy is not None


# --- replay ---


@pytest.mark.parametrize("cut_at", [1, 4, 9, 17])
def test_a_search_that_is_told_again_what_it_was_told_goes_on_as_if_never_stopped(cut_at: int) -> None:
    whole = drive(Search(cuttable(), seed=7), by_threads, trials=24)
    again = Search(cuttable(), seed=7)
    head = drive(again, by_threads, trials=cut_at)
    del again  # killed; what it was told is in the database
    fresh = Search(cuttable(), seed=7)
    remembered = {each.key: by_threads(each) for each in head}
    tried = drive(fresh, lambda each: remembered.get(each.key) or by_threads(each), trials=24)
    assert tried == whole


def test_chance_from_outside_changes_nothing() -> None:
    import random

    import numpy as np

    runs = []
    for outside in (1, 2):
        random.seed(outside)
        np.random.seed(outside)
        runs.append(drive(Search(cuttable(), seed=3), by_threads, trials=15))
    assert runs[0] == runs[1]


# --- importance ---


def weighty(candidate: Candidate) -> Score:
    """Threads decide, the layout hardly matters."""
    threads = candidate.config.get("threads") or THREADS.default
    assert isinstance(threads, int)
    return scored(1 + abs(threads - 6) + 0.01 * (candidate.config.get("layout") == "blocked"))


def test_the_knob_that_decides_is_the_most_important_one() -> None:
    search = Search(space(THREADS, LAYOUT, targets=(CPU, GPU)), seed=1)
    drive(search, weighty)
    found = importances(search)
    for name in ("toy:CPU", "toy:GPU.0"):
        mine = [each for each in found if each.target == name]
        assert mine[0].knob == "threads" and mine[0].share > 0.7
        assert sum(each.share for each in mine) == pytest.approx(1.0)
    assert [each.knob for each in found if not each.target] == ["target"]


def test_of_a_handful_of_trials_nothing_is_said_and_each_goal_has_its_own() -> None:
    few = Search(space(THREADS, LAYOUT))
    drive(few, weighty, trials=LEAST_TRIALS - 1)
    assert importances(few) == []
    both = Search(space(THREADS, LAYOUT), objectives=parse_objectives("latency,energy"))
    drive(both, traded)
    assert {each.objective for each in importances(both)} == {"latency", "energy"}
    same = Search(space(THREADS, LAYOUT))
    drive(same, lambda each: scored(1.0))
    assert importances(same) == []


def test_every_combination_of_a_small_space_is_reached_with_two_goals() -> None:
    search = Search(space(THREADS, LAYOUT), objectives=parse_objectives("latency,energy"), seed=5)
    tried = drive(search, traded)
    assert {(each.config.get("threads") or 4, each.config.get("layout") or "plain") for each in tried} == set(
        itertools.product(range(1, 9), LAYOUT.choices)
    )
