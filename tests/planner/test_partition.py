"""Cut plans from block costs that are made up, so that the best one is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from aivmm.errors import UsageError
from aivmm.models.records import Block, CutPoint, Structure
from aivmm.planner.candidates import Draft
from aivmm.planner.partition import BYTES_PER_S, CUT_S, crossing_s, cut_drafts
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target
from aivmm.tensors import TensorSpec

CPU = Target(runtime="one", name="CPU", device=Device(kind="cpu", model="made-up"), runtime_version="1")
GPU = Target(runtime="two", name="GPU.0", device=Device(kind="gpu", model="made-up"), runtime_version="1")
MS = 1e-3


def structure(blocks: int, *, crossing: Sequence[int | None] = ()) -> Structure:
    """Return a chain of `blocks` blocks of ten nodes each; `crossing` are the bytes at its cut points."""
    tensor = TensorSpec(name="t", dtype="float32", shape=(1,))
    made = tuple(
        Block(
            index=index,
            first=10 * index,
            last=10 * index + 9,
            structure=f"s{index}",
            content=f"c{index}",
            inputs=(tensor,),
            outputs=(tensor,),
            op_types={"Relu": 10},
            flops=1.0,
            weight_bytes=0,
        )
        for index in range(blocks)
    )
    sizes = [*crossing, *[0] * (blocks - 1 - len(crossing))]
    cuts = tuple(CutPoint(position=10 * (index + 1), tensors=(tensor,), bytes=size) for index, size in enumerate(sizes))
    return Structure(
        structure="s", content="c", node_count=10 * blocks, flops=1.0, weight_bytes=0, operators=(), cut_points=cuts, blocks=made
    )  # fmt: skip


def cuts(
    costs: Mapping[Target, Sequence[float | None]],
    *,
    min_segments: int = 1,
    uncut_s: float | None = None,
    wholes: Mapping[str, float] | None = None,
    configs: Mapping[str, Config] | None = None,
    crossing: Sequence[int | None] = (),
    batch: int = 1,
    segment_s: Mapping[tuple[int, int, str], float] | None = None,
) -> list[tuple[Draft, float]]:
    """Place a chain with these seconds of each block on each target; None is a block that a target does not run right."""
    blocks = len(next(iter(costs.values())))
    medians = {(index, str(target)): cost for target, row in costs.items() for index, cost in enumerate(row) if cost is not None}
    return cut_drafts(
        structure(blocks, crossing=crossing),
        tuple(costs),
        medians,
        configs=configs or {},
        wholes=wholes or {},
        min_segments=min_segments,
        uncut_s=uncut_s,
        batch=batch,
        segment_s=segment_s,
    )


def placed(draft: Draft) -> list[tuple[str, int, int]]:
    return [(str(piece.target), piece.first, piece.last) for piece in draft.pieces]


def test_a_forced_cut_is_returned_whatever_it_promises() -> None:
    ((draft, predicted),) = cuts({CPU: [MS, MS, MS]}, min_segments=2, uncut_s=0.1 * MS)
    assert len(draft.pieces) == 2
    assert (draft.pieces[0].first, draft.pieces[-1].last) == (0, 2)
    assert draft.pieces[0].last + 1 == draft.pieces[1].first
    assert predicted == pytest.approx(3 * MS + CUT_S)


def test_a_forced_cut_lies_where_least_crosses() -> None:
    ((draft, predicted),) = cuts({CPU: [MS] * 4}, min_segments=2, crossing=[4_000_000, 1_000, 4_000_000])
    assert placed(draft) == [("one:CPU", 0, 1), ("one:CPU", 2, 3)]
    assert predicted == pytest.approx(4 * MS + CUT_S + 1_000 / BYTES_PER_S)


def test_as_many_segments_are_made_as_are_asked_for() -> None:
    (draft, _), *_ = cuts({CPU: [MS] * 4, GPU: [MS] * 4}, min_segments=4)
    assert [(piece.first, piece.last) for piece in draft.pieces] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_where_the_best_forced_cut_stays_on_one_target_the_best_that_does_not_is_proven_too() -> None:
    found = cuts({CPU: [MS, MS, MS], GPU: [2 * MS, 3 * MS, None]}, min_segments=2)
    assert [draft.name for draft, _ in found] == ["cut plan", "hybrid plan"]
    assert {name for name, _, _ in placed(found[0][0])} == {"one:CPU"}
    assert placed(found[1][0]) == [("two:GPU.0", 0, 0), ("one:CPU", 1, 2)]
    assert found[1][1] == pytest.approx(4 * MS + CUT_S)


def test_a_forced_cut_that_uses_several_targets_is_proven_alone() -> None:
    assert len(cuts({CPU: [MS, 9 * MS], GPU: [9 * MS, MS]}, min_segments=2)) == 1


def test_more_segments_than_blocks_cannot_be_had() -> None:
    with pytest.raises(UsageError, match=r"2 blocks.*3 segments") as refused:
        cuts({CPU: [MS, MS]}, min_segments=3)
    assert "--min-segments" in refused.value.advice


def test_each_block_goes_where_it_is_cheap_when_that_pays_for_the_cuts() -> None:
    ((draft, predicted),) = cuts({CPU: [1 * MS, 9 * MS, 1 * MS], GPU: [5 * MS, 1 * MS, 5 * MS]}, uncut_s=11 * MS)
    assert placed(draft) == [("one:CPU", 0, 0), ("two:GPU.0", 1, 1), ("one:CPU", 2, 2)]
    assert predicted == pytest.approx(3 * MS + 2 * CUT_S)


def test_bytes_that_cross_can_cost_more_than_the_better_target_saves() -> None:
    costs = {CPU: [1 * MS, 3 * MS], GPU: [3 * MS, 1 * MS]}
    assert cuts(costs, uncut_s=4 * MS, crossing=[1_000]) != []
    assert cuts(costs, uncut_s=4 * MS, crossing=[int(2.1 * MS * BYTES_PER_S)]) == []


@pytest.mark.parametrize(("uncut_ms", "promising"), [(3.2, True), (3.0, False), (2.0, False)])
def test_an_unforced_cut_has_to_promise_more_than_noise(uncut_ms: float, promising: bool) -> None:
    drafts = cuts({CPU: [1 * MS, 9 * MS, 1 * MS], GPU: [9 * MS, 1 * MS, 9 * MS]}, uncut_s=uncut_ms * MS)
    assert bool(drafts) is promising  # it would take 3.03 ms


def test_nothing_is_cut_that_no_target_gains_from() -> None:
    assert cuts({CPU: [MS, MS], GPU: [2 * MS, 2 * MS]}, uncut_s=100 * MS) == []


def test_without_an_uncut_plan_the_cut_is_proven() -> None:
    ((draft, _),) = cuts({CPU: [MS, None], GPU: [None, MS]})
    assert placed(draft) == [("one:CPU", 0, 0), ("two:GPU.0", 1, 1)]


def test_a_block_runs_only_where_it_is_known_to_run_right() -> None:
    ((draft, _),) = cuts({CPU: [MS, None, MS], GPU: [50 * MS, 50 * MS, 50 * MS]}, min_segments=2)
    assert placed(draft)[1] == ("two:GPU.0", 1, 1)


def test_a_block_that_nothing_runs_right_leaves_no_cut_and_a_forced_one_says_which() -> None:
    costs = {CPU: [MS, None, MS], GPU: [MS, None, MS]}
    assert cuts(costs, uncut_s=100 * MS) == []
    with pytest.raises(UsageError, match="block 1"):
        cuts(costs, min_segments=2)


def test_a_model_of_one_block_is_not_cut() -> None:
    assert cuts({CPU: [MS], GPU: [0.1 * MS]}, uncut_s=MS) == []


def test_blocks_alone_are_scaled_to_the_whole_since_a_cut_costs_fusion() -> None:
    # Alone they add up to 4 ms, together they take 2: half of each.
    ((_, predicted),) = cuts({CPU: [2 * MS, 2 * MS]}, wholes={"one:CPU": 2 * MS}, min_segments=2)
    assert predicted == pytest.approx(2 * MS + CUT_S)


def test_blocks_that_are_faster_alone_are_not_made_slower() -> None:
    ((_, predicted),) = cuts({CPU: [MS, MS]}, wholes={"one:CPU": 9 * MS}, min_segments=2)
    assert predicted == pytest.approx(2 * MS + CUT_S)


def test_a_target_that_lacks_a_block_is_not_scaled() -> None:
    (draft, predicted), *_ = cuts(
        {CPU: [2 * MS, 2 * MS], GPU: [MS, None]}, wholes={"one:CPU": 2 * MS, "two:GPU.0": 0.1 * MS}, min_segments=2
    )
    assert predicted == pytest.approx(min(2 * MS + CUT_S, 1 * MS + 1 * MS + CUT_S))
    assert len(draft.pieces) == 2


def test_each_piece_has_the_best_known_config_of_its_target_or_plain_fp32() -> None:
    tuned = Config.of({"threads": 2}, precision="bf16")
    ((draft, _),) = cuts({CPU: [MS, 9 * MS], GPU: [9 * MS, MS]}, configs={"two:GPU.0": tuned}, uncut_s=10 * MS, batch=4)
    assert [piece.config for piece in draft.pieces] == [Config(precision="fp32"), tuned]
    assert draft.batch == 4


def test_unknown_bytes_at_a_cut_count_as_none() -> None:
    ((_, predicted),) = cuts({CPU: [MS, MS]}, min_segments=2, crossing=[None])
    assert predicted == pytest.approx(2 * MS + CUT_S)


def test_what_a_whole_segment_takes_in_its_place_replaces_the_sum_of_its_blocks() -> None:
    costs = {CPU: [1 * MS, 1 * MS, 10 * MS], GPU: [10 * MS, 10 * MS, 1 * MS]}
    ((before, predicted),) = cuts(costs, min_segments=2)
    assert placed(before) == [("one:CPU", 0, 1), ("two:GPU.0", 2, 2)]
    ((after, slower),) = cuts(costs, min_segments=2, segment_s={(0, 1, "one:CPU"): 60 * MS})
    assert ("one:CPU", 0, 1) not in placed(after)
    assert slower > predicted


def test_a_measured_handover_prices_the_cut_instead_of_the_model_of_it() -> None:
    crossing = structure(2, crossing=[1000])
    assert crossing_s(crossing, 1, "one:CPU", "two:GPU.0", lambda source, destination, size: size * 1e-6) == pytest.approx(CUT_S + 1 * MS)
    assert crossing_s(crossing, 1, "one:CPU", "two:GPU.0", lambda source, destination, size: None) == CUT_S + 1000 / BYTES_PER_S
