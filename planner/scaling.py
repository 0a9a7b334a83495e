"""The cost of one thing at a size that was not measured, from sizes that were: batches and shapes.

Interpolated is not time but how much of the ceiling is reached. The least time of a size by the target's ceilings (`probes.ceilings`)
is its *floor*, time over floor its *slowness* (the inverse of utilisation). Between two measured sizes slowness is linear in 1 / floor,
which is right for whatever takes a fixed time and then one in proportion to its work, also where the bound goes over from bandwidth to
compute. Beyond the measured sizes it is held. Without a measured size there is no number. The farther away what was measured, on both
sides, the less sure is what lies between.

Batches of one model need no ceilings: each sample is the same work, so the floor is in proportion to the samples, and what is done once
for all of them (weights are read once) belongs to the fixed time (docs/decisions/0057).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from aivmm.planner.evidence import Estimate

# How far predictions were from measurements, as standard deviations of the logarithm: benchmarks/results/prediction.md.
_BETWEEN = 0.05  # where the neighbours are a factor of four apart, as they are when one of the powers of two is left out
_BEYOND = 0.25  # for each factor of e beyond the measured sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured size: the least seconds it could take here, and what it took."""

    floor_s: float
    seconds: float
    sigma: float = 0.0

    @property
    def slowness(self) -> float:
        """Time over floor: 1 at the ceiling."""
        return self.seconds / self.floor_s


def scaled(points: Sequence[Point], floor_s: float, *, unit: str = "sizes") -> Estimate | None:
    """Return the cost of a size whose least time is `floor_s`; a measured size is returned untouched. None without points.

    Raises:
        ValueError: a floor is not positive.
    """
    if not floor_s > 0 or any(not point.floor_s > 0 for point in points):
        raise ValueError("a floor is a positive time")
    ordered = sorted(points, key=lambda point: point.floor_s)
    if not ordered:
        return None
    same = [point for point in ordered if math.isclose(point.floor_s, floor_s, rel_tol=1e-9)]
    if same:
        return Estimate(seconds=same[0].seconds, sigma=same[0].sigma, source="measured", because="this very size")
    place = bisect.bisect([point.floor_s for point in ordered], floor_s)
    if place in (0, len(ordered)):
        edge = ordered[0] if place == 0 else ordered[-1]
        sigma = math.hypot(edge.sigma, _BEYOND * abs(math.log(floor_s / edge.floor_s)))
        return Estimate(seconds=edge.slowness * floor_s, sigma=sigma, source="interpolated", because=f"held beyond {len(ordered)} {unit}")
    below, above = ordered[place - 1], ordered[place]
    share = (1 / below.floor_s - 1 / floor_s) / (1 / below.floor_s - 1 / above.floor_s)
    slowness = below.slowness + share * (above.slowness - below.slowness)
    near, far = (math.log(wanted / floor) for wanted, floor in ((floor_s, below.floor_s), (above.floor_s, floor_s)))
    sigma = math.hypot(max(below.sigma, above.sigma), _BETWEEN * 2 * math.sqrt(near * far) / math.log(4))
    return Estimate(seconds=slowness * floor_s, sigma=sigma, source="interpolated", because=f"between 2 of {len(ordered)} {unit}")


def batch_points(seconds: Mapping[int, float]) -> list[Point]:
    """Return the sizes of one model that were measured, from what a call with so many samples takes. Floors are in samples: see above."""
    return [Point(floor_s=float(batch), seconds=each) for batch, each in seconds.items()]


def left_out(points: Sequence[Point]) -> list[tuple[Point, Estimate]]:
    """Return each point but the first and the last, with what the others say of it."""
    ordered = sorted(points, key=lambda point: point.floor_s)
    found = []
    for index, _ in enumerate(pairwise(ordered[1:])):
        point = ordered[index + 1]
        estimate = scaled([each for each in ordered if each is not point], point.floor_s)
        if estimate is not None:
            found.append((point, estimate))
    return found
