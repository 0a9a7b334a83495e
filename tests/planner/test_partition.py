"""Cut plans from block costs that are made up, so that the best one is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import UsageError
from aivmm.models.records import Block, Structure
from aivmm.planner.chain import ChainPlan, place
from aivmm.planner.evidence import Estimate
from aivmm.planner.partition import BYTES_PER_S, CUT_S, ChainEvidence, beliefs_of, place_cuts
from aivmm.planner.placement import problem_of, runs_of
from aivmm.planner.segments import Segments
from aivmm.planner.solve import solve
from aivmm.runtime.target import Device, Target
from aivmm.tensors import TensorSpec

CPU = Target(runtime="one", name="CPU", device=Device(kind="cpu", model="made-up"), runtime_version="1")
GPU = Target(runtime="two", name="GPU.0", device=Device(kind="gpu", model="made-up"), runtime_version="1")
MS = 1e-3


def structure(blocks: int, *, crossing: Sequence[int | None] = (), reads: Mapping[int, Sequence[int]] | None = None) -> Structure:
    """Return a chain of `blocks` blocks of ten nodes each; `crossing` are the bytes that each but the last hands on, None unknown.

    `reads` says of which earlier blocks a block reads; without, of the one before it.
    """
    sizes = [*crossing, *[0] * (blocks - len(crossing))]
    made = [TensorSpec(name=f"t{index}", dtype="uint8", shape=(size,)) for index, size in enumerate(sizes)]
    blocks_ = tuple(
        Block(
            index=index,
            first=10 * index,
            last=10 * index + 9,
            structure=f"s{index}",
            content=f"c{index}",
            inputs=tuple(made[other] for other in (reads or {}).get(index, [index - 1] if index else [])),
            outputs=(made[index],),
            op_types={"Relu": 10},
            flops=1.0,
            weight_bytes=100,
        )
        for index in range(blocks)
    )
    return Structure(
        structure="s", content="c", node_count=10 * blocks, flops=1.0, weight_bytes=0, operators=(), cut_points=(), blocks=blocks_
    )  # fmt: skip


def cuts(
    costs: Mapping[Target, Sequence[float | None]],
    *,
    min_segments: int = 1,
    uncut_s: float | None = None,
    wholes: Mapping[str, float] | None = None,
    crossing: Sequence[int | None] = (),
    segment_s: Mapping[tuple[int, int, str], float] | None = None,
) -> list[tuple[str, ChainPlan[str]]]:
    """Place a chain with these seconds of each block on each target, known exactly; None is a block that a target does not run right.

    `uncut_s` is the whole model on the first target, `segment_s` what was measured in its place.
    """
    blocks = len(next(iter(costs.values())))
    alone = {(index, str(target)): exactly(cost) for target, row in costs.items() for index, cost in enumerate(row) if cost is not None}
    known = {name: exactly(seconds) for name, seconds in (wholes or {}).items()}
    if uncut_s is not None:
        known[str(next(iter(costs)))] = exactly(uncut_s)
    model = structure(blocks, crossing=crossing)
    beliefs = beliefs_of(model, [str(target) for target in costs], alone, known)
    for (first, last, name), seconds in (segment_s or {}).items():
        beliefs[name].observe(first, last, exactly(seconds))
    found = place_cuts(ChainEvidence(structure=model, beliefs=beliefs), lambda spans: {}, min_segments=min_segments)
    return [(name, looked.plan) for name, looked in found.worth_proving]


def exactly(seconds: float) -> Estimate:
    return Estimate(seconds=seconds, sigma=0.0, source="measured")


def placed(plan: ChainPlan[str]) -> list[tuple[str, int, int]]:
    return [(target, first, last) for first, last, target in plan.segments]


def test_a_forced_cut_is_returned_whatever_it_promises() -> None:
    ((name, plan),) = cuts({CPU: [MS, MS, MS]}, min_segments=2, uncut_s=2.5 * MS)
    assert name == "cut plan" and len(plan.segments) == 2
    assert (plan.segments[0][0], plan.segments[-1][1]) == (0, 2)
    assert plan.segments[0][1] + 1 == plan.segments[1][0]
    assert 2.5 * MS < plan.cost_s <= 3 * MS + CUT_S  # of what running on saves, a part is lost


@pytest.mark.parametrize(
    ("unseen", "said", "advice"), [({1}, "block 1 was not measured on every target", "--budget"), ((), "no target", "drop")]
)
def test_a_block_that_the_budget_left_out_is_not_said_to_run_nowhere(unseen: set[int], said: str, advice: str) -> None:
    model = structure(3)
    evidence = ChainEvidence(
        structure=model, beliefs=beliefs_of(model, [str(CPU)], {(0, str(CPU)): exactly(MS), (2, str(CPU)): exactly(MS)}, {})
    )
    with pytest.raises(UsageError, match=said) as refused:
        place_cuts(evidence, lambda spans: {}, min_segments=2, unseen=unseen)
    assert advice in refused.value.advice
    assert place_cuts(evidence, lambda spans: {}, min_segments=1, unseen=unseen).looked is None


def test_where_no_block_has_room_there_is_no_cut_and_that_is_an_error_only_where_one_was_asked_for() -> None:
    """As with `memory<1MB`: whether any plan keeps that is for the verdict to say."""
    model = structure(3)
    beliefs = beliefs_of(model, [str(CPU)], {(index, str(CPU)): exactly(MS) for index in range(3)}, {})
    evidence = ChainEvidence(structure=model, beliefs=beliefs, memory_bytes={str(CPU): -1.0})
    assert place_cuts(evidence, lambda spans: {}, min_segments=1).looked is None
    with pytest.raises(UsageError, match="cannot be cut into 2 segments here"):
        place_cuts(evidence, lambda spans: {}, min_segments=2)


def test_a_forced_cut_lies_where_least_crosses() -> None:
    ((_, plan),) = cuts({CPU: [MS] * 4}, min_segments=2, crossing=[4_000_000, 1_000, 4_000_000])
    assert placed(plan) == [("one:CPU", 0, 1), ("one:CPU", 2, 3)]


def test_as_many_segments_are_made_as_are_asked_for() -> None:
    (_, plan), *_ = cuts({CPU: [MS] * 4, GPU: [MS] * 4}, min_segments=4)
    assert [(first, last) for first, last, _ in plan.segments] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert plan.cost_s == pytest.approx(4 * MS + 3 * CUT_S)


def test_where_the_best_forced_cut_stays_on_one_target_the_best_that_does_not_is_proven_too() -> None:
    found = cuts({CPU: [MS, MS, MS], GPU: [2 * MS, 3 * MS, None]}, min_segments=2)
    assert [name for name, _ in found] == ["cut plan", "hybrid plan"]
    assert {name for name, _, _ in placed(found[0][1])} == {"one:CPU"}
    assert placed(found[1][1]) == [("two:GPU.0", 0, 0), ("one:CPU", 1, 2)]


def test_a_forced_cut_that_uses_several_targets_is_proven_alone() -> None:
    assert len(cuts({CPU: [MS, 9 * MS], GPU: [9 * MS, MS]}, min_segments=2)) == 1


def test_more_segments_than_blocks_cannot_be_had() -> None:
    with pytest.raises(UsageError, match=r"2 blocks.*3 segments") as refused:
        cuts({CPU: [MS, MS]}, min_segments=3)
    assert "--min-segments" in refused.value.advice


def test_each_block_goes_where_it_is_cheap_when_that_pays_for_the_cuts() -> None:
    ((_, plan),) = cuts({CPU: [1 * MS, 9 * MS, 1 * MS], GPU: [5 * MS, 1 * MS, 5 * MS]}, uncut_s=11 * MS)
    assert placed(plan) == [("one:CPU", 0, 0), ("two:GPU.0", 1, 1), ("one:CPU", 2, 2)]
    assert plan.cost_s == pytest.approx(3 * MS + 2 * CUT_S, rel=0.01)


def test_bytes_that_cross_can_cost_more_than_the_better_target_saves() -> None:
    costs = {CPU: [1 * MS, 3 * MS], GPU: [3 * MS, 1 * MS]}
    assert cuts(costs, uncut_s=4 * MS, crossing=[1_000]) != []
    assert cuts(costs, uncut_s=4 * MS, crossing=[int(2.1 * MS * BYTES_PER_S)]) == []


@pytest.mark.parametrize(("uncut_ms", "promising"), [(3.3, True), (3.05, False), (2.0, False)])
def test_an_unforced_cut_has_to_promise_more_than_noise(uncut_ms: float, promising: bool) -> None:
    # Its segments are measured: it takes 3.03 ms.
    costs = {CPU: [1 * MS, 9 * MS, 1 * MS], GPU: [9 * MS, 1 * MS, 9 * MS]}
    measured = {(0, 0, "one:CPU"): MS, (1, 1, "two:GPU.0"): MS, (2, 2, "one:CPU"): MS}
    assert bool(cuts(costs, uncut_s=uncut_ms * MS, segment_s=measured)) is promising


def test_nothing_is_cut_that_no_target_gains_from() -> None:
    assert cuts({CPU: [MS, MS], GPU: [2 * MS, 2 * MS]}, uncut_s=2 * MS) == []


def test_without_an_uncut_plan_the_cut_is_proven() -> None:
    ((_, plan),) = cuts({CPU: [MS, None], GPU: [None, MS]})
    assert placed(plan) == [("one:CPU", 0, 0), ("two:GPU.0", 1, 1)]


def test_a_block_runs_only_where_it_is_known_to_run_right() -> None:
    ((_, plan),) = cuts({CPU: [MS, None, MS], GPU: [50 * MS, 50 * MS, 50 * MS]}, min_segments=2)
    assert placed(plan)[1] == ("two:GPU.0", 1, 1)


def test_a_block_that_nothing_runs_right_leaves_no_cut_and_a_forced_one_says_which() -> None:
    costs = {CPU: [MS, None, MS], GPU: [MS, None, MS]}
    assert cuts(costs, uncut_s=100 * MS) == []
    with pytest.raises(UsageError, match="block 1"):
        cuts(costs, min_segments=2)


def test_a_model_of_one_block_is_not_cut() -> None:
    assert cuts({CPU: [MS], GPU: [0.1 * MS]}, uncut_s=MS) == []


def test_what_the_whole_takes_says_what_running_on_saves() -> None:
    # Alone they add up to 4 ms, together they take 3.
    ((_, plan),) = cuts({CPU: [MS, MS, MS, MS]}, wholes={"one:CPU": 3 * MS}, min_segments=2)
    assert 3 * MS < plan.cost_s < 3.7 * MS


def test_unknown_bytes_at_a_cut_count_as_none() -> None:
    ((_, plan),) = cuts({CPU: [MS, MS]}, min_segments=2, crossing=[None])
    assert plan.cost_s == pytest.approx(2 * MS + CUT_S)


def test_what_a_whole_segment_takes_in_its_place_replaces_the_sum_of_its_blocks() -> None:
    costs = {CPU: [1 * MS, 1 * MS, 10 * MS], GPU: [10 * MS, 10 * MS, 1 * MS]}
    ((_, before),) = cuts(costs, min_segments=2)
    assert placed(before) == [("one:CPU", 0, 1), ("two:GPU.0", 2, 2)]
    ((_, after),) = cuts(costs, min_segments=2, segment_s={(0, 1, "one:CPU"): 60 * MS})
    assert ("one:CPU", 0, 1) not in placed(after)
    assert after.cost_s > before.cost_s


def test_a_measured_handover_prices_the_cut_instead_of_the_model_of_it() -> None:
    model = structure(2, crossing=[1000])
    known = ChainEvidence(structure=model, beliefs={}, handover_s=lambda source, destination, size: size * 1e-6)
    found = known.crossing(1, "one:CPU", "two:GPU.0")
    assert found and found.seconds == pytest.approx(CUT_S + 1 * MS) and found.source == "interpolated"
    modelled = ChainEvidence(structure=model, beliefs={}).crossing(1, "one:CPU", "two:GPU.0")
    assert modelled and modelled.seconds == CUT_S + 1000 / BYTES_PER_S and modelled.source == "modelled"


def test_what_passes_by_a_block_is_not_priced_at_its_boundaries() -> None:
    model = structure(3, crossing=[4_000_000, 8_000], reads={1: [], 2: [0, 1]})
    found = ChainEvidence(structure=model, beliefs={})
    first, second = found.crossing(1, "one:CPU", "two:GPU.0"), found.crossing(2, "two:GPU.0", "one:CPU")
    assert first and first.seconds == CUT_S
    assert second and second.seconds == CUT_S + 8_000 / BYTES_PER_S


def test_the_placement_by_the_graph_is_measured_where_it_promises_something() -> None:
    """Block 1 stands apart: what block 0 hands to block 2 need not move for it."""
    model = structure(3, crossing=[40_000_000, 0, 0], reads={1: [], 2: [0, 1]})
    costs = {CPU: [2 * MS, 9 * MS, 2 * MS], GPU: [9 * MS, 1 * MS, 9 * MS]}
    alone = {(index, str(target)): exactly(cost) for target, row in costs.items() for index, cost in enumerate(row)}
    beliefs = beliefs_of(model, [str(target) for target in costs], alone, {"one:CPU": exactly(13 * MS)})
    asked: list[list[tuple[int, int, str]]] = []

    def measure(spans: Sequence[tuple[int, int, str]]) -> dict[tuple[int, int, str], Estimate]:
        asked.append(list(spans))
        return {span: exactly(sum(costs[CPU if span[2] == "one:CPU" else GPU][span[0] : span[1] + 1])) for span in spans}

    found = place_cuts(ChainEvidence(structure=model, beliefs=beliefs), measure, targets=(CPU, GPU), min_segments=1, most=4)
    assert asked[0] == [(0, 0, "one:CPU"), (1, 1, "two:GPU.0"), (2, 2, "one:CPU")]
    assert found.worth_proving and placed(found.worth_proving[0][1].plan) == [("one:CPU", 0, 0), ("two:GPU.0", 1, 1), ("one:CPU", 2, 2)]


def test_a_device_takes_no_more_than_its_memory() -> None:
    model = structure(4)
    small = replace(GPU, device=replace(GPU.device, memory_bytes=250))
    beliefs = beliefs_of(
        model,
        ["one:CPU", "two:GPU.0"],
        {(i, name): exactly(ms * MS) for i in range(4) for name, ms in (("one:CPU", 5), ("two:GPU.0", 1))},
        {},
    )
    problem = problem_of(model, (CPU, small), beliefs, lambda source, destination, size: 0.0)
    found = solve(problem, "latency")
    assert [choice for _, _, choice in runs_of(model, found.assignment)].count("two:GPU.0") >= 1
    assert sum(place.choice == "two:GPU.0" for place in found.assignment.values()) == 2
    assert found.gap == 0


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=6), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_on_a_chain_the_graph_and_the_chain_agree(rows: list[tuple[int, int]], move: int) -> None:
    """By costs of blocks alone, where a boundary saves nothing."""
    costs = [{"one:CPU": float(a), "two:GPU.0": float(b)} for a, b in rows]
    model = structure(len(rows))
    beliefs = {name: Segments([exactly(row[name]) for row in costs]) for name in ("one:CPU", "two:GPU.0")}
    problem = problem_of(model, (CPU, GPU), beliefs, lambda source, destination, size: float(move))
    added = np.stack([belief.added() for belief in beliefs.values()], axis=1)
    boundary = np.full((2, 2), float(move)) - move * np.eye(2)
    assert solve(problem, "latency").objective == pytest.approx(place(added, boundary).cost_s)
