"""Probing what moves bytes between two places of this machine: recalled, or measured once for all models."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Generic, TypeVar

from aivmm.db.database import Database
from aivmm.probes.lab import Lab
from aivmm.probes.records import Transfer
from aivmm.probes.transfers import SIZES_BYTES
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner.measure import Counts

FEW_SIZES = SIZES_BYTES[::2]  # enough for a fit; a tuning has little time for what is no part of its model
Ends = tuple[str, str]  # source, destination
Way = TypeVar("Way")  # what a prober measures at a time
Tell = Callable[[str, int, int], None]


@dataclass(slots=True, kw_only=True)
class Probing:
    """What the probers of one run share."""

    lab: Lab
    database: Database
    run_id: str | None
    targets: Sequence[Target]
    counts: Counts
    fresh: bool = False
    retry_failed: bool = False
    measure_new: bool = True  # False: only recall what the database has
    stop: Callable[[], bool] = lambda: False
    sizes_bytes: Sequence[int] = FEW_SIZES


class TransferProber(ABC, Generic[Way]):
    """Probes each way that bytes can go. What came out is in `found`, by the names of both ends."""

    WHAT: ClassVar[str]  # in progress

    def __init__(self, given: Probing) -> None:
        self.given = given
        self.skipped = 0
        self.found: dict[Ends, Transfer] = {}

    @abstractmethod
    def _ways(self) -> Sequence[tuple[Ends, Way]]:
        """Return the ways in the order in which they are measured."""

    @abstractmethod
    def _probe(self, way: Way) -> tuple[Transfer, float]:
        """Measure one way; return it with the seconds waited for the machine-wide lock."""

    def run(self, *, budget_s: float, tell: Tell) -> None:
        """Probe what is not known yet, until done or out of budget. Where there is no way nothing is asked."""
        given, ways = self.given, self._ways()
        self._recall({ends for ends, _ in ways})
        until = time.perf_counter() + budget_s
        for number, (ends, way) in enumerate(ways):
            if ends in self.found:
                continue
            if not given.measure_new or given.stop() or time.perf_counter() > until:
                self.skipped += 1
                continue
            tell(self.WHAT, number, len(ways))
            transfer, waited = self._probe(way)
            until += waited
            self.found[ends] = transfer
            given.database.add_transfers([transfer], run_id=given.run_id)
            _count(transfer, given.counts, reused=False)

    def _recall(self, wanted: set[Ends]) -> None:
        given = self.given
        if given.fresh or not wanted:
            return
        for transfer in given.database.find_transfers({environment_of(each).fingerprint for each in given.targets}):
            ends = (transfer.source, transfer.destination)
            if ends in wanted and not (given.retry_failed and transfer.state == "failed"):
                self.found[ends] = transfer
                _count(transfer, given.counts, reused=True)
        if given.run_id is not None:
            given.database.link(given.run_id, chain.from_iterable(map(Transfer.keys, self.found.values())))


def _count(transfer: Transfer, counts: Counts, *, reused: bool) -> None:
    """Count the probes of a transfer by what became of them."""
    if transfer.state == "measured":
        number = len(transfer.points)
        counts.reused += number if reused else 0
        counts.measured += 0 if reused else number
    elif transfer.state == "refused":
        counts.refused += 1
    else:
        counts.failed += 1
