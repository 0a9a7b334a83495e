"""Placing a chain of blocks under a policy, exactly.

In any pieces: `chain.place` with a limit on segments. One piece for each target: dynamic programming over (block, targets used, target it
is on), O(n k² 2^k) for n blocks and k targets, vectorised over the sets; k is the handful of targets of one machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivmm.errors import Infeasible
from aivmm.planner.chain import place

Array = npt.NDArray[np.float64]
_MOST_TARGETS = 12  # sets of more would not fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Segments as (first block, last block, column), and what they cost: as thought, with cuts at their own price and not the policy's."""

    segments: tuple[tuple[int, int, int], ...]
    cost_s: float


def place_under(costs: Array, boundary: Array, *, most_pieces: int, cut_price: float = 1.0, contiguous: bool = True) -> Placed:
    """Return the cheapest placement that a policy allows.

    Args:
        costs: [blocks, targets] in seconds; infinite where a target cannot run a block.
        boundary: [blocks - 1, targets, targets], the price of going from one to another behind a block; its diagonal is not read.
        most_pieces: the most segments.
        cut_price: what boundaries are multiplied by while choosing.
        contiguous: whether a target may have one segment only.

    Raises:
        Infeasible: the policy allows no placement.
    """
    width = costs.shape[1]
    off = boundary * (1 - np.eye(width))[None]
    most = min(most_pieces, len(costs))
    if contiguous:
        segments = _one_each(costs, off * cut_price, min(most, width))
    else:
        segments = place(costs, off * cut_price, max_segments=most).segments
    found = tuple((int(first), int(last), int(on)) for first, last, on in segments)
    return Placed(segments=found, cost_s=priced(found, costs, off))


def priced(segments: Sequence[tuple[int, int, int]], costs: Array, boundary: Array) -> float:
    """Return what segments cost, under these prices or under others than those that placed them."""
    inside = math.fsum(float(costs[first : last + 1, on].sum()) for first, last, on in segments)
    between = math.fsum(float(boundary[b[0] - 1, a[2], b[2]]) for a, b in itertools.pairwise(segments))
    return inside + between


def _one_each(costs: Array, boundary: Array, most: int) -> tuple[tuple[int, int, int], ...]:
    count, width = costs.shape
    if width > _MOST_TARGETS:
        raise Infeasible(f"{width} targets are too many for one piece each", advice="allow any pieces, or name fewer targets")
    sets = np.arange(1 << width)
    sizes = np.array([int(each).bit_count() for each in sets])
    table = np.full((1 << width, width), math.inf)  # the cheapest way to be on a target, having used a set
    for on in range(width):
        table[1 << on, on] = costs[0, on]
    came = np.full((count, 1 << width, width), -1, dtype=np.int16)  # the target before; -1: it stayed
    for block in range(1, count):
        following = table + costs[block][None, :]
        for on in range(width):
            without = sets[((sets >> on) & 1 == 1) & (sizes <= most) & (sizes > 1)]
            for before in range(width):
                if before == on:
                    continue
                moved = table[without ^ (1 << on), before] + boundary[block - 1, before, on] + costs[block, on]
                better = moved < following[without, on]
                following[without[better], on] = moved[better]
                came[block, without[better], on] = before
        table = following
    used, last = divmod(int(np.argmin(table)), width)
    if not math.isfinite(table[used, last]):
        raise Infeasible("no placement with one piece for each target runs every block", advice="allow any pieces")
    return _walk(came, used, last)


def _walk(came: npt.NDArray[np.int16], used: int, on: int) -> tuple[tuple[int, int, int], ...]:
    segments, last = [], len(came) - 1
    for block in range(len(came) - 1, 0, -1):
        before = int(came[block, used, on])
        if before >= 0:
            segments.append((block, last, on))
            used, on, last = used ^ (1 << on), before, block - 1
    segments.append((0, last, on))
    return tuple(reversed(segments))
