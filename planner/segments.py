"""What is believed of every run of blocks on one choice, given what was measured of some.

Blocks timed alone add up to more than they take together: a cut costs a call, and what could have been fused across it. So

    seconds of a segment = sum of its blocks alone - sum over the boundaries inside it of what running on saves there

Neither is known for sure. Blocks come with the uncertainty of their evidence (small where they were timed, large where they are modelled);
savings are unknown at first, some share of what lies beside the boundary, and alike on one target. Both are Gaussian, each measurement of a
segment is a linear observation of them, and so what follows is exact and cheap (Bayesian linear regression, one Kalman update for each
measurement): the whole model on a target says how much its boundaries save all together, each segment measured says more about those in it,
and of what overlaps with it. A segment that was measured is returned as it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from aivmm.planner.evidence import Estimate

Array = npt.NDArray[np.float64]

# The prior of what running on saves at a boundary, as shares of the smaller of its two blocks (RUNTIMES.md D: a cut costs 3 to 12 %).
_SAVES, _SAVES_ALL, _SAVES_EACH = 0.08, 0.08, 0.06  # mean; standard deviation that all boundaries share; that each has of its own
_ALIKE = 0.03  # relative: a stage's config is not the one that its blocks were timed with; they are faster or slower together
# Relative: what no sum explains of a segment (caches, neighbours), before any was measured; it counts as so many measurements.
_NUGGET, _NUGGET_COUNTS = 0.02, 4
_LEAST = 0.2  # of its blocks alone: no segment is believed to take less
_UNSURE = 0.5  # relative deviation beyond which a belief says no more than that it is unsure


class Segments:
    """Beliefs about [first, last] for one choice of `n` blocks."""

    def __init__(self, alone: Sequence[Estimate | None]) -> None:
        """Start from the blocks alone; None is a block that the choice does not run."""
        self._alone = tuple(alone)
        self.measured: dict[tuple[int, int], Estimate] = {}
        self._surprises: list[float] = []  # squared: how far measurements were from what was believed, beyond what was expected
        seconds = np.array([each.seconds if each else 0.0 for each in alone])
        spread = np.array([each.seconds * each.sigma if each else 0.0 for each in alone])
        self._blocks = np.concatenate([[0.0], np.cumsum(seconds)])
        supported = np.array([each is not None for each in alone])
        self._lacking = np.concatenate([[0], np.cumsum(~supported)])
        beside = np.minimum(seconds[:-1], seconds[1:])
        # Interleaved, so that a segment is a sum of neighbours: block, saving, block, saving, ..., block. Savings are negative.
        size = 2 * len(seconds) - 1
        self._mean = np.zeros(size)
        self._mean[0::2], self._mean[1::2] = seconds, -_SAVES * beside
        shared = np.zeros(size)
        shared[1::2] = _SAVES_ALL * beside
        own = np.zeros(size)
        own[0::2], own[1::2] = spread, _SAVES_EACH * beside
        alike = np.zeros(size)
        alike[0::2] = _ALIKE * seconds
        self._covariance = np.outer(shared, shared) + np.outer(alike, alike) + np.diag(own**2)

    def observe(self, first: int, last: int, found: Estimate) -> None:
        """Take the measurement of a segment, and learn from it about those that share blocks or boundaries with it.

        What is measured again is known better: by both, weighted by how sure they are. The very same numbers once more are no second look.
        """
        if (held := self.measured.get((first, last))) is not None:
            self.measured[first, last] = _together(held, found)
            return
        if self._lacking[last + 1] > self._lacking[first]:
            # It ran, though not all of its blocks ran alone: known as it is, it says nothing about sums.
            self.measured[first, last] = found
            return
        inside = slice(2 * first, 2 * last + 1)
        gain = self._covariance[:, inside].sum(axis=1)
        noise = (found.seconds * math.hypot(found.sigma, self.unexplained)) ** 2
        variance = float(gain[inside].sum())
        gain_scale = 1 / (variance + noise)
        off = found.seconds - float(self._mean[inside].sum())
        self._surprises.append(max(0.0, (off**2 - variance) / found.seconds**2 - found.sigma**2))
        self._mean = self._mean + gain * (gain_scale * off)
        self._covariance = self._covariance - np.outer(gain, gain) * gain_scale
        self.measured[first, last] = found

    def amend(self, first: int, last: int, more_s: float) -> None:
        """Let a segment that was measured take so many seconds more, if it was: less of its time is another's than was thought."""
        if (held := self.measured.get((first, last))) is not None:
            self.measured[first, last] = replace(held, seconds=held.seconds + more_s)

    @property
    def unexplained(self) -> float:
        """The relative deviation of a segment from any sum of parts, as far as measurements have shown it."""
        return math.sqrt((_NUGGET_COUNTS * _NUGGET**2 + sum(self._surprises)) / (_NUGGET_COUNTS + len(self._surprises)))

    def table(self) -> tuple[Array, Array]:
        """Return believed seconds [first, last] and their relative deviations; infinite where the choice does not run a block.

        What was measured has its measured value, and the deviation 0.
        """
        blocks = len(self._alone)
        ends = np.concatenate([[0.0], np.cumsum(self._mean)])
        corner = np.zeros((len(ends), len(ends)))
        corner[1:, 1:] = self._covariance.cumsum(axis=0).cumsum(axis=1)
        low, high = 2 * np.arange(blocks)[:, None], 2 * np.arange(blocks)[None, :] + 1
        high = np.maximum(high, low + 1)
        mean = ends[high] - ends[low]
        variance = corner[high, high] - corner[low, high] - corner[high, low] + corner[low, low]
        sums = self._blocks[high // 2 + 1] - self._blocks[low // 2]
        mean = np.maximum(mean, _LEAST * sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.sqrt(np.maximum(variance, 0.0)) / mean
        relative = np.minimum(np.hypot(np.nan_to_num(relative), self.unexplained), _UNSURE)
        lacking = self._lacking[high // 2 + 1] - self._lacking[low // 2] > 0
        backwards = np.arange(blocks)[:, None] > np.arange(blocks)[None, :]
        mean = np.where(lacking | backwards, math.inf, mean)
        for (first, last), found in self.measured.items():
            mean[first, last], relative[first, last] = found.seconds, 0.0
        return mean, relative

    def judged(self) -> tuple[Array, Array]:
        """Return the table for whoever chooses: what was measured is as likely to be flattered by its noise as it looks good.

        Of thousands of segments the ones that look best were lucky. Their parts tell what to expect of them, with a deviation of
        `unexplained`, the measurement tells with its own; what is believed is the mean of both, weighted by how sure they are.
        """
        mean, relative = self.table()
        own = self.unexplained
        for (first, last), found in self.measured.items():
            if first == last or not found.sigma or self._lacking[last + 1] > self._lacking[first]:
                continue
            parts = max(float(self._mean[2 * first : 2 * last + 1].sum()), _LEAST * float(self._blocks[last + 1] - self._blocks[first]))
            weight = own**2 / (own**2 + found.sigma**2)
            mean[first, last] = weight * found.seconds + (1 - weight) * parts
            relative[first, last] = own * found.sigma / math.hypot(own, found.sigma)
        return mean, relative

    def added(self) -> Array:
        """Return what each block is believed to add to a segment that runs on from the block before it; infinite where it does not run."""
        costs = self._mean[0::2].copy()
        costs[1:] += self._mean[1::2]
        costs = np.maximum(costs, _LEAST * np.diff(self._blocks))
        costs[np.diff(self._lacking) > 0] = math.inf
        return costs

    def segment(self, first: int, last: int) -> Estimate | None:
        """Return what is believed of one segment: as it was measured, or from its blocks; None where a block does not run."""
        if (first, last) in self.measured:
            return self.measured[first, last]
        if self._lacking[last + 1] > self._lacking[first]:
            return None
        if first == last and (alone := self._alone[first]) is not None and alone.source != "measured":
            return alone
        inside = slice(2 * first, 2 * last + 1)
        seconds = max(float(self._mean[inside].sum()), _LEAST * float(self._blocks[last + 1] - self._blocks[first]))
        deviation = math.sqrt(max(0.0, float(self._covariance[inside, inside].sum()))) / seconds
        count = last - first + 1
        because = f"{count} blocks, and {len(self.measured)} segments measured on the same target" if count > 1 else "the block alone"
        return Estimate(seconds=seconds, sigma=min(math.hypot(deviation, self.unexplained), _UNSURE), source="modelled", because=because)


def _together(one: Estimate, other: Estimate) -> Estimate:
    """Return what two measurements of one thing say."""
    if other.seconds == one.seconds or not one.sigma or not other.sigma:
        return other
    weights = one.sigma**-2, other.sigma**-2
    seconds = (weights[0] * one.seconds + weights[1] * other.seconds) / sum(weights)
    return replace(other, seconds=seconds, sigma=sum(weights) ** -0.5)
