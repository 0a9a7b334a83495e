"""What handing a tensor from one target to the next costs on this machine: recalled, or measured once for all models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from aivmm.db.database import Database
from aivmm.errors import AivmmError
from aivmm.probes import wire
from aivmm.probes.client import WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.lab import Lab
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import Transfer
from aivmm.probes.transfers import SIZES_BYTES, TransferFit, fit_of, points_of
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner.measure import Counts

FEW_SIZES = SIZES_BYTES[::2]  # enough for a fit; a tuning has little time for what is no part of its model
_PAIR = "transfers"  # the worker that holds both runtimes
Tell = Callable[[str, int, int], None]


@dataclass(slots=True, kw_only=True)
class HandoverProber:
    """Probes each ordered pair of targets, a target with itself too: a cut may stay on one. What came out is in `found`."""

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
    skipped: int = 0
    found: dict[tuple[str, str], Transfer] = field(default_factory=dict)  # (source, destination)

    def run(self, *, budget_s: float, tell: Tell) -> None:
        """Probe what is not known yet, pairs of different targets first, until done or out of budget."""
        pairs = sorted(((a, b) for a in self.targets for b in self.targets), key=lambda pair: pair[0] == pair[1])
        self._recall()
        ends = time.perf_counter() + budget_s
        for number, (source, destination) in enumerate(pairs):
            if (str(source), str(destination)) in self.found:
                continue
            if not self.measure_new or self.stop() or time.perf_counter() > ends:
                self.skipped += 1
                continue
            tell("transfers", number, len(pairs))
            transfer, waited = self._probe(source, destination)
            ends += waited
            self.found[str(source), str(destination)] = transfer
            self.database.add_transfers([transfer], run_id=self.run_id)
            count_of(transfer, self.counts, reused=False)
        self.lab.worker(_PAIR).close()  # it holds two runtimes, and is not asked again

    def fits(self) -> dict[tuple[str, str], TransferFit]:
        """Return the fixed and the proportional cost of each pair that gave numbers, by (source, destination)."""
        fits = {pair: fit_of(transfer) for pair, transfer in self.found.items()}
        return {pair: fit for pair, fit in fits.items() if fit is not None}

    def _recall(self) -> None:
        if self.fresh:
            return
        environments = {environment_of(each).fingerprint for each in self.targets}
        names = {str(each) for each in self.targets}
        for transfer in self.database.find_transfers(environments):
            if {transfer.source, transfer.destination} <= names and not (self.retry_failed and transfer.state == "failed"):
                self.found[transfer.source, transfer.destination] = transfer
                count_of(transfer, self.counts, reused=True)
        if self.run_id is not None:
            self.database.link(self.run_id, chain.from_iterable(map(Transfer.keys, self.found.values())))

    def _probe(self, source: Target, destination: Target) -> tuple[Transfer, float]:
        """Measure one pair; return it with the seconds waited for the machine-wide lock."""
        for pid in self.lab.pids():
            wait_until_quiet(pid)
        ends = {
            "source": str(source),
            "source_environment": environment_of(source).fingerprint,
            "source_config": _config(source),
            "destination": str(destination),
            "destination_environment": environment_of(destination).fingerprint,
            "destination_config": _config(destination),
        }
        with measuring() as waited:
            try:
                answer = self.lab.worker(_PAIR).call(
                    "boundary",
                    limit_s=compile_limit_s(),
                    run_limit_s=run_limit_s(),
                    source=wire.target_out(source),
                    destination=wire.target_out(destination),
                    sizes_bytes=list(self.sizes_bytes),
                    source_config=wire.config_out(_config(source)),
                    destination_config=wire.config_out(_config(destination)),
                )
            except AivmmError as error:
                return Transfer(**ends, state="refused", reason=error.message), waited  # type: ignore[arg-type]
            except WorkerDied as died:
                return Transfer(**ends, state="failed", reason=died.reason, output=died.output), waited  # type: ignore[arg-type]
        return Transfer(**ends, points=points_of(answer["boundaries"])), waited  # type: ignore[arg-type]


def count_of(transfer: Transfer, counts: Counts, *, reused: bool) -> None:
    """Count the probes of a transfer by what became of them."""
    if transfer.state == "measured":
        number = len(transfer.points)
        counts.reused += number if reused else 0
        counts.measured += 0 if reused else number
    elif transfer.state == "refused":
        counts.refused += 1
    else:
        counts.failed += 1


def _config(target: Target) -> Config:
    return Config(precision="fp32" if "fp32" in target.precisions else None)
