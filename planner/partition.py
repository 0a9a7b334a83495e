"""Cut plans: blocks placed on targets exactly, from what the blocks cost alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from aivmm.errors import Infeasible, UsageError
from aivmm.models.records import Structure
from aivmm.planner.candidates import Draft, Piece
from aivmm.planner.chain import ChainPlan, place
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target

Handover = Callable[[str, str, int], float | None]  # source, destination, bytes -> seconds

# What a cut costs on host memory, modelled: the floor of an extra bound call, and writing plus reading the tensors that cross it where
# handing over has not been measured.
CUT_S = 15e-6
BYTES_PER_S = 4e9
_PROMISE = 0.97  # an unforced cut has to be predicted at least this far below the best uncut plan to be worth proving


def cut_drafts(
    structure: Structure,
    targets: Sequence[Target],
    medians: Mapping[tuple[int, str], float],
    *,
    configs: Mapping[str, Config],
    wholes: Mapping[str, float],
    min_segments: int,
    uncut_s: float | None,
    batch: int,
    handover_s: Handover = lambda source, destination, size_bytes: None,
    segment_s: Mapping[tuple[int, int, str], float] | None = None,
) -> list[tuple[Draft, float]]:
    """Return cut plans worth proving, each with its predicted seconds.

    Args:
        medians: (block index, target) -> seconds, for those that run and whose numbers were right.
        configs: target -> the best config known for the whole model there.
        wholes: target -> seconds of the whole model. Blocks timed alone add up to more than the whole, since a cut costs fusion; their
            sum is scaled to it.
        min_segments: the fewest segments asked for; above 1 the best cut is returned whatever it promises, and where it stays on one target
            also the best that does not: which one wins is for the proof to say.
        uncut_s: the best uncut plan.
        segment_s: (first block, last block, target) -> measured seconds of a whole segment in its place, less what the boundary before it
            is priced at (`crossing_s`).
        handover_s: measured seconds of handing so many bytes from one target (by name) to another; None where that is not known.

    Raises:
        UsageError: cuts were asked for, and there is no such plan.
    """
    blocks = structure.blocks
    forced = min_segments > 1
    if forced and len(blocks) < min_segments:
        raise UsageError(
            f"the model has {len(blocks)} blocks, so it cannot be cut into {min_segments} segments", advice="lower --min-segments"
        )
    complete = all(any((block.index, str(target)) in medians for target in targets) for block in blocks)
    if not complete or len(blocks) < 2:
        if forced:
            lacking = next(block.index for block in blocks if not any((block.index, str(target)) in medians for target in targets))
            raise UsageError(f"no target is known to run block {lacking} right, so no cut plan can be made", advice="drop --min-segments")
        return []
    scales = {str(target): _scale(structure, medians, wholes, str(target)) for target in targets}
    costs = [
        {
            str(target): medians[block.index, str(target)] * scales[str(target)]
            for target in targets
            if (block.index, str(target)) in medians
        }
        for block in blocks
    ]
    names = [str(target) for target in targets]
    prices = _prices(structure, names, handover_s)  # [boundary, from, to]
    width = len(names)
    boundary = prices * (1 - np.eye(width))[None]

    def placed(cut: npt.NDArray[np.float64] | None) -> ChainPlan[str]:
        priced = _segment_cost(segment_s)
        return place(costs, boundary, choices=names, cut=cut, min_segments=min_segments, segment_cost=priced)

    try:
        plans = [placed(np.diagonal(prices, axis1=1, axis2=2))]
    except Infeasible as error:
        raise UsageError(
            f"the model cannot be cut into {min_segments} segments here: {error.message}", advice="lower --min-segments"
        ) from error
    if len(plans[0].segments) == 1 or (not forced and uncut_s is not None and plans[0].cost_s > _PROMISE * uncut_s):
        return []
    if forced and len({name for _, _, name in plans[0].segments}) == 1:
        with suppress(Infeasible):  # without cuts within one target, each segment is on another one than the last
            plans.append(placed(None))
    by_name = {str(target): target for target in targets}

    def draft(name: str, plan: ChainPlan[str]) -> Draft:
        pieces = tuple(
            Piece(target=by_name[target], config=configs.get(target, Config(precision="fp32")), first=first, last=last)
            for first, last, target in plan.segments
        )
        return Draft(name=name, pieces=pieces, batch=batch)

    return [(draft(name, plan), plan.cost_s) for name, plan in zip(("cut plan", "hybrid plan"), plans, strict=False)]


def _scale(structure: Structure, medians: Mapping[tuple[int, str], float], wholes: Mapping[str, float], target: str) -> float:
    parts = [medians.get((block.index, target)) for block in structure.blocks]
    if target not in wholes or any(part is None for part in parts):
        return 1.0
    return min(1.0, wholes[target] / sum(part for part in parts if part is not None))


def _segment_cost(measured: Mapping[tuple[int, int, str], float] | None) -> Callable[[int, int, str], float | None] | None:
    return None if not measured else lambda first, last, target: measured.get((first, last, target))


def crossing_s(structure: Structure, index: int, source: str, destination: str, handover_s: Handover) -> float:
    """Return what the boundary before the block `index` is priced at between two targets, in seconds."""
    size = _crossing_bytes(structure, index)
    measured = handover_s(source, destination, size)
    return CUT_S + (size / BYTES_PER_S if measured is None else measured)


def _prices(structure: Structure, names: Sequence[str], handover_s: Handover) -> npt.NDArray[np.float64]:
    """Return what each boundary costs between each two targets, in seconds: [boundary, from, to]."""
    boundaries = range(1, len(structure.blocks))
    table = [[[crossing_s(structure, index, a, b, handover_s) for b in names] for a in names] for index in boundaries]
    return np.array(table).reshape(len(boundaries), len(names), len(names))


def _crossing_bytes(structure: Structure, index: int) -> int:
    """Return the bytes that cross the boundary before the block `index`; 0 where they are not known before the run."""
    first = structure.blocks[index].first
    return next((cut.bytes or 0 for cut in structure.cut_points if cut.position == first), 0)
