"""Throughput by prices: the work of each device is priced, the cheapest plan is found exactly, and what is overloaded gets dearer.

For any prices that add up to one, the largest load is at least the priced sum of the loads, so the price of the cheapest plan is a lower
bound on the throughput of all plans (Lagrange). The plans on the way are good ones where devices are unlike. Of identical devices one is
enough for the bound: at equal prices nothing is gained by parting work between them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from aivmm.planner.compact import Compact, loads_of
from aivmm.planner.elimination import Elimination, Spots

_ROUNDS = 150
_PATIENCE = 15  # rounds without a better bound or plan
_GAIN = 1e-4  # relative; less is not better
_STEP = 0.3  # of the first round: by how much the price of the most loaded device grows, as an exponent


def balanced(merged: Compact, deadline: float) -> Iterator[tuple[Spots | None, float]]:
    """Yield plans with a bound on the throughput of any plan, memory left aside, which may be infinite: there is none."""
    one_each = np.ones_like(merged.count)
    loose = replace(merged, count=one_each, capacity=np.full(len(merged.capacity), np.inf))
    way = Elimination(loose)
    if not way.possible:
        return
    prices = np.ones(len(merged.count))
    highest, lowest, last = 0.0, np.inf, 0  # bound, plan, and the round that made one of them better
    for round in range(_ROUNDS):
        if time.perf_counter() > deadline or round > last + _PATIENCE:
            return
        prices /= prices.sum()
        spots, bound = way.solve(loose.scaled(one_each, prices / merged.count))
        yield spots, bound
        if spots is None or len(prices) == 1:
            return
        loads = np.array([loads_of(loose, spots)[device, 0] for device in range(len(prices))]) / merged.count
        if bound > highest * (1 + _GAIN) or loads.max() < lowest * (1 - _GAIN):
            highest, lowest, last = max(highest, bound), min(lowest, float(loads.max())), round
        if loads.max() > 0:
            prices *= np.exp(_STEP / (1 + round / 10) * loads / loads.max())
