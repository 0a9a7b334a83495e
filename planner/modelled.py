"""The cost of nodes that run together, modelled from what each takes alone.

Operators timed alone add up to more than what is made of them inside one compiled model: some have no kernel of their own there, they
went into another's (`probes.fusion`), and the others find their inputs in a cache. So

    seconds = call + own_factor * (operators with a kernel of their own) + fused_factor * (the others)

each operator less the call that it paid alone. The factors are fitted to what was measured both ways on one target: blocks, whole models.
An operator that was not measured is taken from measured ones of its type at other sizes (`scaling`), by its floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from aivmm.planner.evidence import Estimate
from aivmm.planner.scaling import Point, scaled

# What the factors are taken for before anything was fitted, and how much that counts: as one measurement that is off by half.
_OWN, _FUSED, _WEIGHT = 0.9, 0.2, 0.5
_UNFITTED = 0.5  # sigma with fewer than three measurements to be held against
_LEAST = 0.05  # no sum of operators is surer than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """What the operators of a piece take alone, in seconds less the call: those that have a kernel of their own, and the others."""

    own_s: float
    fused_s: float
    call_s: float

    @classmethod
    def of(cls, operators: Iterable[tuple[float, int, int]], call_s: float) -> Alone:
        """Add up operators, each as (seconds of one, nodes with a kernel of their own, nodes without)."""
        own = fused = 0.0
        for seconds, with_kernel, without in operators:
            work_s = max(seconds - call_s, 0.0)
            own += with_kernel * work_s
            fused += without * work_s
        return cls(own_s=own, fused_s=fused, call_s=call_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What a second alone is worth inside a compiled model, and how far predictions by it were off (sigma of the logarithm)."""

    own: float = _OWN
    fused: float = _FUSED
    sigma: float = _UNFITTED
    fitted_to: int = 0

    @classmethod
    def fitted(cls, known: Sequence[tuple[Alone, float]]) -> Factors:
        """Fit them to pieces that were measured: relative errors are least, factors are not negative (Lawson, Hanson 1974).

        The middle half of the errors makes sigma, so that one piece that is unlike all others does not.
        """
        rows = [(alone.own_s / seconds, alone.fused_s / seconds, 1 - min(0.9, alone.call_s / seconds)) for alone, seconds in known]
        rows += [(_WEIGHT, 0.0, _WEIGHT * _OWN), (0.0, _WEIGHT, _WEIGHT * _FUSED)]
        table = np.array(rows)
        (own, fused), _ = nnls(table[:, :2], table[:, 2])
        found = cls(own=float(own), fused=float(fused), fitted_to=len(known))
        errors = sorted(math.log(found.seconds(alone) / seconds) for alone, seconds in known)
        if len(errors) < 3:
            return found
        middle = errors[len(errors) // 2]
        spread = sorted(abs(error - middle) for error in errors)[len(errors) // 2]
        sigma = max(_LEAST, math.hypot(1.4826 * spread, middle))
        return cls(own=found.own, fused=found.fused, sigma=sigma, fitted_to=len(known))

    def seconds(self, alone: Alone) -> float:
        """Return what a piece is expected to take."""
        return max(alone.call_s + self.own * alone.own_s + self.fused * alone.fused_s, 1e-9)

    def estimate(self, alone: Alone) -> Estimate:
        """Return it with its uncertainty and source."""
        because = f"operators alone, and {self.fitted_to} pieces measured both ways"
        return Estimate(seconds=self.seconds(alone), sigma=self.sigma, source="modelled", because=because)


def operator(op_type: str, floor_s: float, known: Mapping[str, Sequence[Point]]) -> Estimate | None:
    """Return what an operator that was not measured takes alone, from measured ones of its type; None where there is none to go by.

    `floor_s` is the least it could take by the target's ceilings (`probes.ceilings`), the call included.
    """
    return scaled(known.get(op_type, ()), floor_s, unit=f"{op_type} operators")
