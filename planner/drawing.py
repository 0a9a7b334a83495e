"""Drawing parameters of points by chance: whole points, and what lies beside a value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from aivmm.planner.space import Params

_NEIGHBOUR = 0.7
_DRAWS = 200


def another(known: BaseDistribution, value: Any, chance: np.random.Generator) -> Any:
    """Return another value of a distribution (the same where there is one only): of ordered ones more often a neighbour than not."""
    if isinstance(known, IntDistribution):
        near = [each for each in (value - 1, value + 1) if known.low <= each <= known.high]
        if near and chance.random() < _NEIGHBOUR:
            return near[int(chance.integers(len(near)))]
    for _ in range(_DRAWS):
        found = any_of(known, chance)
        if found != value:
            return found
    return value


def any_of(known: BaseDistribution, chance: np.random.Generator) -> Any:
    """Return a value of a distribution by chance."""
    if isinstance(known, CategoricalDistribution):
        return known.choices[int(chance.integers(len(known.choices)))]
    assert isinstance(known, IntDistribution | FloatDistribution)
    if known.log:
        found = math.exp(chance.uniform(math.log(known.low), math.log(known.high + isinstance(known, IntDistribution))))
        return min(int(found), known.high) if isinstance(known, IntDistribution) else found
    return int(chance.integers(known.low, known.high + 1)) if isinstance(known, IntDistribution) else chance.uniform(known.low, known.high)


class Drawing:
    """Answers from parameters, and by chance for what they lack; keeps what was asked for."""

    def __init__(self, chance: np.random.Generator, params: Params | None = None) -> None:
        self._chance, self._given = chance, params or {}
        self.params: Params = {}

    def suggest(self, name: str, known: BaseDistribution) -> Any:
        """Return a value, and keep it."""
        self.params[name] = self._given[name] if name in self._given else any_of(known, self._chance)
        return self.params[name]
