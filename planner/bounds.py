"""Quick lower bounds on the largest load of any plan. Transfers and memory are left out, so they hold for every plan."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from aivmm.planner.compact import Array, Compact
from aivmm.planner.program import Program

_SHARED_S = 5.0
_HALVINGS = 40
_MOST_SETS = 300


def load_bound(merged: Compact) -> float:
    """Return the best of the bounds; infinite where a group can run nowhere."""
    if not np.isfinite(merged.cheapest).all():
        return math.inf
    shared = Program(replace(merged, tensors=()), "throughput").solve(_SHARED_S, relaxed=True).bound
    return counting_bound(merged, max(shared, float(merged.cheapest.max())))


def counting_bound(merged: Compact, least: float = 0.0) -> float:
    """Return a bound, at least `least`, from how many of the largest groups the devices can hold below it: pigeons and holes.

    Below a load T a device holds at most as many groups of a set as the cheapest of them there sum up to T. Where all devices together hold
    fewer than the set has, T is below every plan.
    """
    costs = np.stack([merged.cost[:, merged.device == kind].min(axis=1, initial=np.inf) for kind in range(len(merged.count))])
    largest_first = np.argsort(-merged.cheapest, kind="stable")
    size = len(largest_first)
    for count in range(1, size + 1, math.ceil(size / _MOST_SETS)):
        summed = np.cumsum(np.sort(costs[:, largest_first[:count]], axis=1), axis=1)
        low, high = least, float(merged.cheapest.sum())
        if low < high and _held(merged, summed, low) < count:
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if _held(merged, summed, middle) < count else (low, middle)
            least = low
    return least


def _held(merged: Compact, summed: Array, top: float) -> int:
    """Return how many groups of a set all devices together hold at a load of at most `top`."""
    return int(((summed <= top).sum(axis=1) * merged.count).sum())
