"""The search, held to devices made of arithmetic, on which the best point is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from aivmm.errors import Unsupported
from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.search import Search
from aivmm.planner.space import Space, distribution
from aivmm.runtime.config import Config, Knob
from aivmm.runtime.null import NullBackend
from aivmm.runtime.null_device import NullDevice
from aivmm.runtime.target import Device, Target

Outcome: TypeAlias = Score | Rejection
THREADS = Knob("threads", "int", "a count", low=1, high=8, default=4)
STREAMS = Knob("streams", "int", "only for throughput", low=1, high=4, default=1, objectives=frozenset({"throughput"}))
LEVEL = Knob("level", "choice", "kinds", choices=("off", "basic", "all"), default="all")
FIXED = Knob("fixed", "choice", "one value is no choice", choices=("only",), default="only")


def target(name: str = "CPU", *precisions: str) -> Target:
    device = Device(kind="cpu", model=f"made-up {name}")
    return Target(runtime="toy", name=name, device=device, runtime_version="1", precisions=precisions or ("fp32",))


def space(*knobs: Knob, objective: str = "latency", **changes: Any) -> Space:
    """Return a space over one target, or over those in `targets` with the same knobs each."""
    targets: Sequence[Target] = changes.pop("targets", (target(),))
    precisions = changes.pop("precisions", {str(each): each.precisions for each in targets})
    return Space(targets=targets, knobs={str(each): knobs for each in targets}, objective=objective, precisions=precisions, **changes)


def scored(ratio: float) -> Score:
    return Score(ratio=ratio, low=ratio * 0.99, high=ratio * 1.01, median_s=ratio * 1e-3)


def drive(search: Search, cost: Callable[[Candidate], Outcome], *, trials: int = 10**6, group: int = 3) -> list[Candidate]:
    """Ask, measure and tell until the space is exhausted or `trials` points were tried; return them in order."""
    tried: list[Candidate] = []
    while not search.exhausted and len(tried) < trials:
        asked = search.ask(min(group, trials - len(tried)))
        if not asked:
            break
        for candidate in asked:
            search.tell(candidate, cost(candidate))
        tried += asked
    return tried


def states(search: Search) -> list[TrialState]:
    return [trial.state for trial in search._study.get_trials(deepcopy=False)]


def by_threads(candidate: Candidate) -> Score:
    """A cost with its optimum at 6 threads and `basic`."""
    threads = candidate.config.get("threads") or THREADS.default
    level = candidate.config.get("level") or LEVEL.default
    assert isinstance(threads, int)
    return scored(1 + 0.1 * abs(threads - 6) + {"off": 0.3, "basic": 0.0, "all": 0.1}[str(level)])


# --- what is asked -------------------------------------------------------------------------------------------------------------------


def test_ordered_knobs_are_integer_and_float_distributions_and_only_kinds_are_categories() -> None:
    assert distribution(THREADS) == IntDistribution(1, 8)
    assert distribution(Knob("chunk", "int", "doubles", low=1, high=1024, log=True)) == IntDistribution(1, 1024, log=True)
    assert distribution(Knob("share", "float", "a part", low=0.1, high=1.0)) == FloatDistribution(0.1, 1.0)
    assert distribution(LEVEL) == CategoricalDistribution(("off", "basic", "all"))


def test_the_study_itself_sees_the_order_of_knobs_batches_and_callers() -> None:
    search = Search(space(THREADS, STREAMS, LEVEL, objective="throughput", batches=(1, 2, 4, 8), most_callers=4), seed=1)
    drive(search, lambda candidate: scored(1.0 + 0.01 * candidate.batch), trials=12)
    found = search._study.get_trials(deepcopy=False)[0].distributions
    kinds = {name.removeprefix("toy:CPU "): type(each) for name, each in found.items()}
    assert kinds == {
        "threads": IntDistribution,
        "streams": IntDistribution,
        "level": CategoricalDistribution,
        "batch index": IntDistribution,
        "callers": IntDistribution,
    }


def test_what_has_one_value_or_serves_another_goal_is_no_parameter() -> None:
    search = Search(space(THREADS, STREAMS, FIXED))
    drive(search, by_threads, trials=4)
    assert {name for trial in search._study.get_trials(deepcopy=False) for name in trial.params} == {"toy:CPU threads"}


def test_a_candidate_says_nothing_of_what_stays_at_its_default() -> None:
    tried = drive(Search(space(THREADS, LEVEL)), by_threads)
    assert all(each.config.get("threads") != THREADS.default and each.config.get("level") != LEVEL.default for each in tried)
    assert Candidate(target=target(), config=Config(precision="fp32")) in tried


def test_a_knob_is_asked_for_only_under_its_own_target() -> None:
    cpu, gpu = target("CPU"), target("GPU.0")
    both = Space(
        targets=(cpu, gpu),
        knobs={str(cpu): [THREADS], str(gpu): [LEVEL]},
        objective="latency",
        precisions={str(cpu): ["fp32"], str(gpu): ["fp32"]},
    )
    tried = drive(Search(both, seed=3), lambda candidate: scored(1.0))
    assert len(tried) == both.size() == 8 + 3
    assert all(set(each.config.as_dict()) <= ({"threads"} if each.target == cpu else {"level"}) for each in tried)


def test_every_allowed_precision_and_batch_is_within_reach() -> None:
    pair = space(THREADS, targets=(target("CPU", "fp32", "bf16"),), batches=(1, 4))
    tried = drive(Search(pair, seed=2), lambda candidate: scored(1.0))
    assert {(each.config.precision, each.batch) for each in tried} == set(itertools.product(("fp32", "bf16"), (1, 4)))


def test_the_size_of_a_space_counts_its_points() -> None:
    assert space(THREADS, STREAMS, LEVEL, FIXED).size() == 8 * 3
    assert space(THREADS, STREAMS, objective="throughput", batches=(1, 2, 4), most_callers=5).size() == 8 * 4 * 3 * 5
    assert space(targets=(target("CPU", "fp32", "bf16"), target("GPU.0"))).size() == 3
    assert space(Knob("share", "float", "a part", low=0.1, high=1.0)).size() == math.inf


# --- hygiene -------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), group=st.integers(1, 5), refused=st.integers(0, 8))
def test_every_trial_asked_is_told_and_no_point_is_asked_twice(seed: int, group: int, refused: int) -> None:
    def cost(candidate: Candidate) -> Outcome:
        threads = candidate.config.get("threads") or THREADS.default
        return Rejection(state="refused", reason="too many") if isinstance(threads, int) and threads > refused else by_threads(candidate)

    search = Search(space(THREADS, LEVEL), seed=seed)
    tried = drive(search, cost, group=group)
    assert len({each.key for each in tried}) == len(tried)
    assert {TrialState.RUNNING, TrialState.FAIL}.isdisjoint(states(search))
    assert search.exhausted


@pytest.mark.parametrize("state", ["refused", "failed", "pruned"])
def test_what_has_no_score_is_told_as_pruned_which_the_sampler_learns_from(state: str) -> None:
    search = Search(space(THREADS))
    (candidate,) = search.ask(1)
    search.tell(candidate, Rejection(state=state, reason="because"))
    assert states(search) == [TrialState.PRUNED]
    assert (search.records[0].state, search.records[0].reason, search.records[0].value) == (state, "because", None)


def test_a_space_of_a_few_points_is_tried_whole_and_then_exhausted() -> None:
    search = Search(space(LEVEL, targets=(target("CPU", "fp32", "bf16"),)))
    tried = drive(search, lambda candidate: scored(1.0))
    assert len(tried) == 6 and search.exhausted
    assert search.ask(3) == []


def test_a_space_of_one_point_gives_that_point() -> None:
    search = Search(space())
    assert search.ask(5) == [Candidate(target=target(), config=Config(precision="fp32"))]
    assert search.exhausted


def test_what_was_known_before_is_not_asked_for() -> None:
    search = Search(space(THREADS), seed=5)
    known = [Candidate(target=target(), config=Config.of({"threads": count}, precision="fp32")) for count in (1, 2, 3)]
    for candidate in known:
        search.tell(candidate, by_threads(candidate))
    tried = drive(search, by_threads)
    assert {each.key for each in tried}.isdisjoint(each.key for each in known)
    assert len(tried) == 5
    assert [each.number for each in search.records] == list(range(8))


def test_what_a_runtime_computes_in_when_left_alone_is_not_asked_for_again() -> None:
    cpu = target("CPU", "fp32", "bf16")
    search = Search(space(THREADS, targets=(cpu,), defaults={str(cpu): "bf16"}), seed=5)
    search.tell(Candidate(target=cpu, config=Config()), scored(1.0))
    search.enqueue(Candidate(target=cpu, config=Config(precision=each)) for each in ("bf16", "fp32"))
    tried = drive(search, by_threads)
    assert tried[0] == Candidate(target=cpu, config=Config(precision="fp32")) and len(tried) == 8 * 2 - 1
    assert Candidate(target=cpu, config=Config(precision="bf16")) not in tried


def test_what_was_known_before_is_told_to_the_sampler() -> None:
    search = Search(space(THREADS, LEVEL))
    candidate = Candidate(target=target(), config=Config.of({"threads": 6, "level": "basic"}, precision="fp32"))
    search.tell(candidate, scored(0.5))
    (trial,) = search._study.get_trials(deepcopy=False)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, pytest.approx(math.log(0.5)))
    assert trial.params == {"toy:CPU threads": 6, "toy:CPU level": "basic"}


def test_defaults_that_are_enqueued_are_asked_for_first() -> None:
    cpu, gpu = target("CPU"), target("GPU.0")
    search = Search(space(THREADS, LEVEL, targets=(cpu, gpu)), seed=4)
    defaults = [Candidate(target=each, config=Config(precision="fp32")) for each in (cpu, gpu)]
    search.enqueue(defaults)
    assert search.ask(2) == defaults


def test_the_same_seed_searches_alike_and_another_one_does_not() -> None:
    one, two, three = (drive(Search(space(THREADS, LEVEL), seed=seed), by_threads, trials=12) for seed in (1, 1, 2))
    assert one == two != three


# --- results -------------------------------------------------------------------------------------------------------------------------


def test_the_best_come_first_and_rejected_ones_never() -> None:
    search = Search(space(THREADS))
    outcomes: dict[int, Outcome] = {
        1: scored(1.5),
        2: Rejection(state="pruned", reason="inaccurate", ratio=0.1),
        3: scored(0.7),
        5: scored(0.9),
    }
    for count, outcome in outcomes.items():
        search.tell(Candidate(target=target(), config=Config.of({"threads": count}, precision="fp32")), outcome)
    assert [candidate.config.get("threads") for candidate, _ in search.best(2)] == [3, 5]
    assert len(search.best(10)) == 3
    assert [each.value for each in search.records] == [1.5, 0.1, 0.7, 0.9]


def test_the_record_of_a_trial_holds_what_was_found() -> None:
    search = Search(space(THREADS))
    (candidate,) = search.ask(1)
    search.tell(candidate, Score(ratio=0.8, low=0.7, high=0.9, median_s=2e-3, seconds=1.5, reused=True))
    (record,) = search.records
    assert (record.target, record.config, record.batch, record.callers) == ("toy:CPU", candidate.config, 1, 1)
    assert (record.state, record.value, record.low, record.high, record.median_s) == ("complete", 0.8, 0.7, 0.9, 2e-3)
    assert (record.seconds, record.reused) == (1.5, True)


# --- the optimum ---------------------------------------------------------------------------------------------------------------------


def dense() -> bytes:
    """A product large enough for threads and layouts to matter."""
    shape = (256, 256)
    names = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "b", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "dense", names[:2], names[2:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def null_search(
    seed: int, *, objective: str, callers: int, cores: int = 8
) -> tuple[Search, NullBackend, Target, Callable[[Candidate], Outcome]]:
    """Return a search over a made-up CPU, and the cost that its arithmetic gives."""
    layouts = {"layout": {"plain": 1.0, "blocked": 0.8, "odd": 1.3}}
    backend = NullBackend([NullDevice(cores=cores, serial=0.1, thread_overhead=0.03, choices=layouts)])
    found = backend.targets()[0]
    assert isinstance(found, Target)
    model = dense()
    default_s = backend.expect_s(model, found, Config())

    def cost(candidate: Candidate) -> Outcome:
        try:
            seconds = backend.expect_s(model, candidate.target, candidate.config, callers=candidate.callers)
        except Unsupported as error:
            return Rejection(state="refused", reason=error.message)
        return scored(seconds / default_s)

    precisions = {str(found): ("fp32",)}
    points = Space(
        targets=(found,), knobs={str(found): backend.knobs(found)}, objective=objective, precisions=precisions, most_callers=callers
    )
    return Search(points, seed=seed), backend, found, cost


@pytest.mark.parametrize("seed", range(5))
def test_the_known_optimum_for_latency_is_found(seed: int) -> None:
    search, backend, found, cost = null_search(seed, objective="latency", callers=1)
    tried = drive(search, cost)
    best, seconds = backend.optimum(dense(), found)
    assert search.best(1)[0][1].ratio == pytest.approx(seconds / backend.expect_s(dense(), found, Config()))
    assert len(tried) <= search.space.size()
    assert best.get("layout") == "blocked"


@pytest.mark.parametrize("seed", range(3))
def test_the_known_optimum_for_throughput_is_nearly_reached_in_a_tenth_of_the_points(seed: int) -> None:
    search, backend, found, cost = null_search(seed, objective="throughput", callers=8)
    assert search.space.size() == 16 * 4 * 3 * 8
    drive(search, cost, trials=150)
    least = min(backend.optimum(dense(), found, callers=count)[1] for count in range(1, 9))
    assert search.best(1)[0][1].ratio <= 1.03 * least / backend.expect_s(dense(), found, Config())
