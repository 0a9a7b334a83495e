"""Which batches and numbers of callers a device's memory has room for, by what is known of smaller and larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.runtime.no_room import is_no_room
from aivmm.runtime.target import Target

_Place = tuple[str, str | None]  # a target and a precision: weights and activations are of its size


@dataclass(slots=True)
class Room:
    """Learns what fits where, so that what does not is never asked for again.

    Two rules. What was refused for its size is refused with a larger batch or more callers too. And memory grows in proportion to batch x
    callers beyond what it takes anyhow: a straight line through the smallest and the largest that were measured says what others need.
    """

    _refused: dict[_Place, list[tuple[int, int]]] = field(default_factory=dict)  # batch, callers
    _held: dict[_Place, dict[int, float]] = field(default_factory=dict)  # batch x callers -> bytes

    def learn(self, candidate: Candidate, outcome: Score | Rejection) -> None:
        """Take in how a candidate came out."""
        place = _place(candidate)
        if isinstance(outcome, Score):
            held = outcome.metrics.get("device_memory")
            if held:
                sizes, size = self._held.setdefault(place, {}), candidate.batch * candidate.callers
                sizes[size] = max(held, sizes.get(size, 0.0))
        elif is_no_room(outcome.reason):
            self._refused.setdefault(place, []).append((candidate.batch, candidate.callers))

    def why_not(self, candidate: Candidate) -> Rejection | None:
        """Return why a candidate cannot fit; None when it may."""
        place, target = _place(candidate), candidate.target
        for batch, callers in self._refused.get(place, ()):
            if candidate.batch >= batch and candidate.callers >= callers:
                less = f"batch {batch} with {callers} {'caller' if callers == 1 else 'callers'}"
                return Rejection(state="refused", reason=f"{less} had no room in the memory of {target} already")
        needed, has = self.expected_bytes(candidate), target.device.memory_bytes
        if needed is not None and has is not None and needed > has:
            return Rejection(state="refused", reason=f"it would need {needed / 1e9:.1f} GB, and {target} has {has / 1e9:.1f} GB")
        return None

    def expected_bytes(self, candidate: Candidate) -> float | None:
        """Return the device memory that a candidate will need by the line through what was measured; None while there is no line."""
        sizes = self._held.get(_place(candidate), {})
        if len(sizes) < 2:
            return None
        low, high = min(sizes), max(sizes)
        slope = max(0.0, (sizes[high] - sizes[low]) / (high - low))
        return sizes[low] + slope * (candidate.batch * candidate.callers - low)


def possible(batches: Sequence[int], targets: Sequence[Target], *, weight_bytes: int, sample_bytes: int) -> tuple[int, ...]:
    """Return the batches of which weights, inputs and outputs alone fit some target; the smallest in any case.

    `weight_bytes` and `sample_bytes` (inputs and outputs of one sample) are as they are in the least precision that may be searched.
    """
    most = max((float("inf") if each.device.memory_bytes is None else each.device.memory_bytes for each in targets), default=0.0)
    return tuple(each for each in batches if each == min(batches) or weight_bytes + each * sample_bytes <= most)


def _place(candidate: Candidate) -> _Place:
    return str(candidate.target), candidate.config.precision
