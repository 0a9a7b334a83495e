"""Which targets are worth searching: by what their defaults take, and cards by what their promising settings make of them as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aivmm.planner.choice import rank
from aivmm.runtime.target import Target

HOPELESS = {"latency": 2.0, "throughput": 3.0}  # a target this far behind with its defaults is not searched
LOWERED_GAIN = 4.0  # so many times faster than fp32 int8 has been seen: a target within this is tried with it
# A default session of a card is launched kernel by kernel, by one or two callers, from memory that is not page-locked. Its promising
# settings were seen to make it 2.2 to 3.9 times as fast (six models on an H100), and to tell that takes one measurement.
CARD_GAIN = 4.0
MOST_TRIED = 2  # points of a card's promising settings that are measured before it is judged


@dataclass(slots=True, kw_only=True)
class Standing:
    """The least time that was seen of each target, over the reference's, and what follows for a search."""

    best: dict[Target, float]
    allowed: set[Target]  # those where what took that may be the plan
    drive: str
    prefer: Sequence[str]

    @property
    def hopeless(self) -> float:
        """How far behind is too far."""
        return HOPELESS[self.drive]

    def behind(self, target: Target) -> float:
        """Return how many times as long a target takes as the best one of its rank; 0 where there is no such.

        On hardware that is wanted more than another, being slower than that is no reason to give up.
        """
        rivals = {each: ratio for each, ratio in self.best.items() if each in self.allowed} or self.best
        mine = self._rank(target)
        return self.best[target] / min((ratio for each, ratio in rivals.items() if self._rank(each) == mine), default=math.inf)

    def to_try(self, batches: Sequence[int]) -> list[Target]:
        """Return the cards whose promising settings are measured before anybody is judged: those that these may yet bring into reach.

        With one target there is nothing to decide. A default is measured at the model's own batch, and a card gains with the batch.
        """
        gain = CARD_GAIN * (max(batches) / min(batches) if self.drive == "throughput" else 1.0)
        found = [target for target in self.best if target.device.memory_bytes is not None and len(self.best) > 1]
        return [target for target in found if self.behind(target) <= self.hopeless * gain]

    def learn(self, target: Target, ratio: float) -> None:
        """Take up what a target was seen to take in a way that may be the plan."""
        self.best[target] = min(ratio, self.best[target]) if target in self.allowed else ratio
        self.allowed.add(target)

    def worth_lowering(self) -> list[Target]:
        """Return the targets that a lower precision may bring into reach."""
        return [target for target in self.best if self.behind(target) <= self.hopeless * LOWERED_GAIN]

    def _rank(self, target: Target) -> int:
        return rank([str(target)], self.prefer)
