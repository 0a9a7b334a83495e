"""Which nodes of a model speak against a target, found by trying runs of nodes and halving those that it cannot have.

One odd node among n costs about log2(n) trials, since of two halves of an odd run the second need not be tried when the first is not odd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from aivmm.models.order import PreparedGraph, can_cross
from aivmm.models.records import Structure

GAVE_UP = "it lies in a part that cannot run there; there was no time, or too much is odd, to look further"


@dataclass(frozen=True, slots=True, kw_only=True)
class OddRun:
    """The nodes [first, last], by position and by name, and what speaks against them."""

    first: int
    last: int
    nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    reason: str

    def described(self, more: str) -> str:
        """Return the operators and where they are, in words, and `more`."""
        where = f"node {self.first}" if self.first == self.last else f"nodes {self.first} to {self.last}"
        return f"{', '.join(self.op_types)} ({where}, {more})"


class Halving(ABC):
    """Finds odd runs of a prepared model that is cut as `structure` says.

    Runs are halved between blocks where there are any, else at cut points, else wherever all that is alive can cross. Once `stop` says so,
    or after `most_trials`, nothing more is tried, and what is not known to be good counts as odd.
    """

    def __init__(self, prepared: PreparedGraph, structure: Structure, *, stop: Callable[[], bool], most_trials: int) -> None:
        self.trials = 0
        self._prepared, self._stop, self._most_trials = prepared, stop, most_trials
        crossed = [position for position, live in prepared.live() if all(map(can_cross, live))]
        self._places = ({block.first for block in structure.blocks}, {cut.position for cut in structure.cut_points}, set(crossed))

    @abstractmethod
    def _try(self, start: int, end: int) -> str:
        """Say what speaks against the nodes [start, end), or return ""."""

    def _known(self, start: int, end: int) -> str:
        """Say what is known to speak against the nodes [start, end) without trying, or return ""."""
        return ""

    def odd_runs(self, start: int, end: int, reason: str) -> list[OddRun]:
        """Return the odd runs within [start, end), against which as a whole `reason` speaks, in order."""
        return self._within(start, end, reason, follows=True)

    def _within(self, start: int, end: int, reason: str, *, follows: bool) -> list[OddRun]:
        """Look into an odd run; `follows` tells whether it was tried, or follows from what was."""
        middle = self._middle(start, end)
        if middle is None and not follows:
            reason = self._against(start, end)  # it may be good alone: then nothing but the combination is odd
        if middle is None or reason == GAVE_UP:
            return [self._leaf(start, end, reason)] if reason else []
        before = self._against(start, middle)
        found = self._within(start, middle, before, follows=True) if before else []
        # What is odd as a whole is so in one half at least.
        after = self._against(middle, end) if before else reason
        return found + (self._within(middle, end, after, follows=bool(before)) if after else [])

    def _leaf(self, start: int, end: int, reason: str) -> OddRun:
        nodes = self._prepared.nodes[start:end]
        types = tuple(dict.fromkeys(each.op_type for each in nodes))
        return OddRun(first=start, last=end - 1, nodes=tuple(str(each.name) for each in nodes), op_types=types, reason=reason)

    def _middle(self, start: int, end: int) -> int | None:
        """Return the place to cut a run at: of the best kind that there is, the one nearest its middle."""
        inner = next(filter(None, ([place for place in kind if start < place < end] for kind in self._places)), [])
        return min(inner, key=lambda place: (abs(2 * place - start - end), place), default=None)

    def _against(self, start: int, end: int) -> str:
        known = self._known(start, end)
        if known:
            return known
        if self.trials >= self._most_trials or self._stop():
            return GAVE_UP
        self.trials += 1
        return self._try(start, end)
