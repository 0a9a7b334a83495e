"""Blocks that the budget left unmeasured, modelled from operators that are known: in this run, or from other models in the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from aivmm.models.records import Operator, Structure
from aivmm.planner.evidence import Estimate
from aivmm.planner.modelled import Alone, Factors, operator
from aivmm.planner.scaling import Point
from aivmm.probes.ceilings import Ceilings
from aivmm.probes.records import Measured, Outcome

PRECISION = "fp32"  # in which blocks are timed


def modelled_blocks(
    structure: Structure,
    nodes: Sequence[Sequence[str]],
    targets: Iterable[str],
    *,
    blocks: Mapping[tuple[int, str], Outcome],
    operators: Mapping[tuple[str, str, str], Outcome],
    ceilings: Mapping[tuple[str, str], Ceilings],
    wholes: Mapping[str, Estimate],
) -> dict[tuple[int, str], Estimate]:
    """Return what blocks without an outcome are expected to take, by (block, target), as far as all of their operators can be told.

    `nodes` are the names of each block's nodes; `operators` came out by (signature, target, precision). How much operators are worth inside
    a block is fitted to the blocks that were measured on the target, and to the whole model there. A block whose time depends on values is
    not guessed.
    """
    by_node = {node: each for each in structure.operators for node in each.nodes}
    found: dict[tuple[int, str], Estimate] = {}
    for target in targets:
        limits = ceilings.get((target, PRECISION))
        lacking = [block.index for block in structure.blocks if (block.index, target) not in blocks and not block.data_dependent]
        if limits is None or not lacking:
            continue
        seconds = _operator_seconds(structure.operators, target, operators, limits)
        alone = [_alone([by_node[node] for node in names if node in by_node], seconds, limits.call_s) for names in nodes]
        known = [
            (piece, outcome.samples.median_s)
            for index, piece in enumerate(alone)
            if piece is not None and isinstance(outcome := blocks.get((index, target)), Measured)
        ]
        whole = _alone(by_node.values(), seconds, limits.call_s)
        if whole is not None and target in wholes:
            known.append((whole, wholes[target].seconds))
        factors = Factors.fitted(known)
        found |= {(index, target): factors.estimate(piece) for index in lacking if (piece := alone[index]) is not None}
    return found


def _operator_seconds(
    operators: Sequence[Operator], target: str, outcomes: Mapping[tuple[str, str, str], Outcome], limits: Ceilings
) -> dict[str, float]:
    """Return the seconds of each operator alone by signature: as measured, or from others of its type; what cannot be told is left out."""
    found: dict[str, float] = {}
    points: dict[str, list[Point]] = {}
    floors = {each.signature: limits.roofline(seconds=1.0, flops=each.flops, moved_bytes=each.bytes) for each in operators}
    for each in operators:
        outcome = outcomes.get((each.signature, target, PRECISION))
        if isinstance(outcome, Measured):
            found[each.signature] = median(outcome.samples.timed_s)
            floor = floors[each.signature]
            if floor is not None:
                points.setdefault(each.op_type, []).append(Point(floor_s=floor.share, seconds=found[each.signature]))
    for each in operators:
        floor = floors[each.signature]
        if each.signature not in found and floor is not None and (guess := operator(each.op_type, floor.share, points)):
            found[each.signature] = guess.seconds
    return found


def _alone(operators: Iterable[Operator], seconds: Mapping[str, float], call_s: float) -> Alone | None:
    """Return what nodes take alone, given the operator of each; None where one cannot be told."""
    counts = Counter(each.signature for each in operators)
    if not counts or any(signature not in seconds for signature in counts):
        return None
    return Alone.of([(seconds[signature], count, 0) for signature, count in counts.items()], call_s)
