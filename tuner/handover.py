"""What handing a tensor from one target to the next costs on this machine: recalled, or measured once for all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from aivmm.errors import AivmmError
from aivmm.probes import wire
from aivmm.probes.client import WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import Transfer
from aivmm.probes.transfers import TransferFit, fit_of, points_of
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner.transfers import Ends, Tell, TransferProber

_PAIR = "transfers"  # the worker that holds both runtimes


class HandoverProber(TransferProber[tuple[Target, Target]]):
    """Probes each ordered pair of targets, a target with itself too: a cut may stay on one."""

    WHAT: ClassVar[str] = "transfers"

    def run(self, *, budget_s: float, tell: Tell) -> None:
        """Probe what is not known yet, pairs of different targets first, until done or out of budget."""
        super().run(budget_s=budget_s, tell=tell)
        self.given.lab.worker(_PAIR).close()  # it holds two runtimes, and is not asked again

    def fits(self) -> dict[Ends, TransferFit]:
        """Return the fixed and the proportional cost of each pair that gave numbers, by (source, destination)."""
        fits = {pair: fit_of(transfer) for pair, transfer in self.found.items()}
        return {pair: fit for pair, fit in fits.items() if fit is not None}

    def _ways(self) -> Sequence[tuple[Ends, tuple[Target, Target]]]:
        targets = self.given.targets
        pairs = sorted(((a, b) for a in targets for b in targets), key=lambda pair: pair[0] == pair[1])
        return [((str(source), str(destination)), (source, destination)) for source, destination in pairs]

    def _probe(self, way: tuple[Target, Target]) -> tuple[Transfer, float]:
        source, destination = way
        for pid in self.given.lab.pids():
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
                answer = self.given.lab.worker(_PAIR).call(
                    "boundary",
                    limit_s=compile_limit_s(),
                    run_limit_s=run_limit_s(),
                    source=wire.target_out(source),
                    destination=wire.target_out(destination),
                    sizes_bytes=list(self.given.sizes_bytes),
                    source_config=wire.config_out(_config(source)),
                    destination_config=wire.config_out(_config(destination)),
                )
            except AivmmError as error:
                return Transfer(**ends, state="refused", reason=error.message), waited  # type: ignore[arg-type]
            except WorkerDied as died:
                return Transfer(**ends, state="failed", reason=died.reason, output=died.output), waited  # type: ignore[arg-type]
        return Transfer(**ends, points=points_of(answer["boundaries"])), waited  # type: ignore[arg-type]


def _config(target: Target) -> Config:
    return Config(precision="fp32" if "fp32" in target.precisions else None)
