"""What copies between the host's memory and the devices' cost on this machine: recalled, or measured once for all models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from aivmm.db.database import Database
from aivmm.errors import AivmmError
from aivmm.probes import wire
from aivmm.probes.client import WorkerDied, run_limit_s
from aivmm.probes.copies import points_of, route_in, route_out
from aivmm.probes.lab import Lab
from aivmm.probes.machine import measuring
from aivmm.probes.records import Transfer
from aivmm.runtime.backend import CopyRoute
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner.handover import FEW_SIZES, Tell, count_of
from aivmm.tuner.measure import Counts


@dataclass(slots=True, kw_only=True)
class CopyProber:
    """Probes each route of the targets that have memory of their own. What came out is in `found`, by the names of both ends."""

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
    found: dict[tuple[str, str], Transfer] = field(default_factory=dict)

    def run(self, *, budget_s: float, tell: Tell) -> None:
        """Probe what is not known yet, until done or out of budget. Where all targets compute in the host's memory nothing is asked."""
        routes = self._routes()
        self._recall(routes)
        ends = time.perf_counter() + budget_s
        for number, (runtime, route) in enumerate(routes):
            if route.ends in self.found:
                continue
            if not self.measure_new or self.stop() or time.perf_counter() > ends:
                self.skipped += 1
                continue
            tell("copies", number, len(routes))
            transfer, waited = self._probe(runtime, route)
            ends += waited
            self.found[route.ends] = transfer
            self.database.add_transfers([transfer], run_id=self.run_id)
            count_of(transfer, self.counts, reused=False)

    def _routes(self) -> list[tuple[str, CopyRoute]]:
        """Return the routes of all runtimes, each with its runtime."""
        found: list[tuple[str, CopyRoute]] = []
        for runtime in dict.fromkeys(each.runtime for each in self.targets if each.device.kind != "cpu"):
            mine = [wire.target_out(each) for each in self.targets if each.runtime == runtime]
            try:
                answer = self.lab.worker(runtime).call("copy_routes", limit_s=run_limit_s(), runtime=runtime, targets=mine)
            except WorkerDied as died:
                self.lab.trouble.append(f"copies from and to the devices of {runtime} were not measured: asked for them, it {died.reason}")
                continue
            found += [(runtime, route_in(each)) for each in answer["routes"]]
        return found

    def _recall(self, routes: Sequence[tuple[str, CopyRoute]]) -> None:
        if self.fresh or not routes:
            return
        wanted = {route.ends for _, route in routes}
        for transfer in self.database.find_transfers({environment_of(each).fingerprint for each in self.targets}):
            ends = (transfer.source, transfer.destination)
            if ends in wanted and not (self.retry_failed and transfer.state == "failed"):
                self.found[ends] = transfer
                count_of(transfer, self.counts, reused=True)
        if self.run_id is not None:
            self.database.link(self.run_id, chain.from_iterable(map(Transfer.keys, self.found.values())))

    def _probe(self, runtime: str, route: CopyRoute) -> tuple[Transfer, float]:
        """Measure one route; return it with the seconds waited for the machine-wide lock. The host is known by the device's environment."""
        card = route.destination or route.source
        assert card is not None
        source, destination = route.ends
        ends: dict[str, Any] = {
            "source": source,
            "source_environment": environment_of(route.source or card).fingerprint,
            "destination": destination,
            "destination_environment": environment_of(route.destination or card).fingerprint,
        }
        with measuring() as waited:
            try:
                answer = self.lab.worker(runtime).call(
                    "copies", limit_s=run_limit_s(), runtime=runtime, route=route_out(route), sizes_bytes=list(self.sizes_bytes)
                )
            except AivmmError as error:
                return Transfer(**ends, state="refused", reason=error.message), waited
            except WorkerDied as died:
                return Transfer(**ends, state="failed", reason=died.reason, output=died.output), waited
        return Transfer(**ends, points=points_of(answer["points"])), waited
