"""What the planner may ask about a cost, and how sure the answer is.

Every number says where it comes from. *Measured* is returned untouched. *Interpolated* stands between measurements of the same thing at
other sizes (`scaling`) and *modelled* is put together from measurements of its parts (`modelled`, `segments`). How sure a number is, is the
standard deviation of its natural logarithm: 0.05 is about 5 %, and half as much or twice as much are equally far away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aivmm.probes.records import Samples, Source

SOURCES: tuple[Source, ...] = ("measured", "interpolated", "modelled")  # the surest first
_Z95 = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A cost in seconds, with its source and its uncertainty.

    Raises:
        ValueError: the seconds are not positive and finite, or sigma is negative or NaN.
    """

    seconds: float
    sigma: float  # of the natural logarithm of the seconds
    source: Source
    because: str = ""  # what it rests on, for readers

    def __post_init__(self) -> None:
        if not (0 < self.seconds < math.inf and self.sigma >= 0):
            raise ValueError(f"an estimate needs positive finite seconds and a sigma of 0 or more, got {self.seconds} and {self.sigma}")

    @property
    def interval_s(self) -> tuple[float, float]:
        """The 95 % interval, in seconds."""
        return self.seconds * math.exp(-_Z95 * self.sigma), self.seconds * math.exp(_Z95 * self.sigma)

    def optimistic_s(self, deviations: float) -> float:
        """Return what it may be at best, so many standard deviations below; what was measured is what it is."""
        return self.seconds if self.source == "measured" else self.seconds * math.exp(-deviations * self.sigma)


class Evidence(Protocol):
    """What is known of the segments of one model, and of the boundaries between them. The planner asks this and never sees SQL.

    Small on purpose: whoever has numbers for runs of blocks can be planned for. A `choice` is a target in a precision with a config.
    """

    def segment(self, first: int, last: int, choice: str) -> Estimate | None:
        """Return the cost of the blocks [first, last] as one segment; None where the choice cannot run them, or nothing is known."""

    def crossing(self, block: int, source: str, destination: str) -> Estimate | None:
        """Return the cost of the boundary before a block, between two choices; None where it cannot be crossed."""


def measured(samples: Samples, because: str = "") -> Estimate:
    """Return the median of what was measured, untouched, and how far another median of as many samples may be from it.

    The standard error of a median is 1.2533 times that of a mean (Kenney, Keeping 1962), the deviation of the samples that of their middle
    half (IQR / 1.349), so that a few disturbed runs do not count.
    """
    quarter, three = samples.quantile_s(0.25), samples.quantile_s(0.75)
    middle = samples.median_s
    sigma = 1.2533 * (three - quarter) / 1.349 / middle / math.sqrt(len(samples.timed_s))
    return Estimate(seconds=middle, sigma=sigma, source="measured", because=because or f"{len(samples.timed_s)} samples")


def total(parts: Sequence[Estimate], because: str = "") -> Estimate:
    """Return the sum of parts whose errors are independent, which rests on the least sure of its sources."""
    seconds = math.fsum(part.seconds for part in parts)
    spread = math.sqrt(math.fsum((part.seconds * part.sigma) ** 2 for part in parts))
    source = max((part.source for part in parts), key=SOURCES.index)
    return Estimate(seconds=seconds, sigma=spread / seconds, source=source, because=because)


def shares(parts: Iterable[Estimate]) -> dict[Source, float]:
    """Return which share of the seconds rests on which source; the shares add up to 1. Sources that have none are left out."""
    parts = list(parts)
    seconds = math.fsum(part.seconds for part in parts)
    return {
        source: math.fsum(part.seconds for part in parts if part.source == source) / seconds
        for source in SOURCES
        if any(part.source == source for part in parts)
    }
