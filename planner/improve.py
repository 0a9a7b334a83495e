"""Making a placement better, a few devices at a time: the most loaded device and some others share their groups anew, exactly."""

from __future__ import annotations

import itertools
import time

import numpy as np

from aivmm.planner.compact import Compact, loads_of
from aivmm.planner.program import Program, Spots

_STEP_S = 3.0  # at most for one step: what takes longer is better spent on another set of devices
_LEAST_GAIN = 1e-7  # relative; less is the tolerance of the solver


def improve(merged: Compact, spots: Spots, deadline: float) -> Spots:
    """Return a placement whose largest load is at most that of `spots`, better if time and luck allow."""
    while better := _better(merged, spots, deadline):
        spots = better
    return spots


def _better(merged: Compact, spots: Spots, deadline: float) -> Spots | None:
    """Return a placement in which fewer devices have the largest load, or none has; None when no few devices can bring that about."""
    loads = loads_of(merged, spots)
    worst = max(loads, key=lambda each: loads[each])
    top = loads[worst] * (1 - _LEAST_GAIN)
    others = sorted(loads.keys() - {worst}, key=lambda each: loads[each])
    for partners in itertools.chain.from_iterable(itertools.combinations(others, size) for size in (1, 2, 3)):
        left = deadline - time.perf_counter()
        if left <= 0:
            break
        found = _reshared(merged, spots, {worst, *partners}, loads[worst], min(_STEP_S, left))
        if found and sum(load > top for load in loads_of(merged, found).values()) < sum(load > top for load in loads.values()):
            return found
    return None


def _reshared(merged: Compact, spots: Spots, boxes: set[tuple[int, int]], top: float, seconds: float) -> Spots | None:
    """Return the best way to share the groups of `boxes` among them, all else left as it is."""
    places = np.array(merged.places)
    device = merged.device[places[:, 0]]
    open_places = np.array([(int(kind), int(index)) in boxes for kind, index in zip(device, places[:, 1], strict=True)])
    allowed = np.zeros((len(spots), len(places)), dtype=bool)
    at = {place: position for position, place in enumerate(merged.places)}
    for group, spot in enumerate(spots):
        if (int(merged.device[spot[0]]), spot[1]) in boxes:
            allowed[group] = open_places
        else:
            allowed[group, at[spot]] = True
    program = Program(merged, "throughput", allowed=allowed)
    free = frozenset(program.boxes.index(box) for box in boxes)
    return program.solve(seconds, at_most=top * (1 - _LEAST_GAIN), free=free, others_at_most=top).spots
