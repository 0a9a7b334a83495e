"""What copies between the host's memory and the devices' cost on this machine: recalled, or measured once for all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from aivmm.errors import AivmmError
from aivmm.probes import wire
from aivmm.probes.client import WorkerDied, run_limit_s
from aivmm.probes.copies import points_of, route_in, route_out
from aivmm.probes.machine import measuring
from aivmm.probes.records import Transfer
from aivmm.runtime.backend import CopyRoute
from aivmm.runtime.environment import environment_of
from aivmm.tuner.transfers import Ends, TransferProber


class CopyProber(TransferProber[tuple[str, CopyRoute]]):
    """Probes each route of the targets that have memory of their own."""

    WHAT: ClassVar[str] = "copies"

    def _ways(self) -> Sequence[tuple[Ends, tuple[str, CopyRoute]]]:
        """Return the routes of all runtimes, each with its runtime; none where all targets compute in the host's memory."""
        found: list[tuple[str, CopyRoute]] = []
        for runtime in dict.fromkeys(each.runtime for each in self.given.targets if each.device.kind != "cpu"):
            mine = [wire.target_out(each) for each in self.given.targets if each.runtime == runtime]
            try:
                answer = self.given.lab.worker(runtime).call("copy_routes", limit_s=run_limit_s(), runtime=runtime, targets=mine)
            except WorkerDied as died:
                said = f"copies from and to the devices of {runtime} were not measured: asked for them, it {died.reason}"
                self.given.lab.trouble.append(said)
                continue
            found += [(runtime, route_in(each)) for each in answer["routes"]]
        return [(each.ends, (runtime, each)) for runtime, each in found]

    def _probe(self, way: tuple[str, CopyRoute]) -> tuple[Transfer, float]:
        """Measure one route. The host is known by the device's environment."""
        runtime, route = way
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
                answer = self.given.lab.worker(runtime).call(
                    "copies", limit_s=run_limit_s(), runtime=runtime, route=route_out(route), sizes_bytes=list(self.given.sizes_bytes)
                )
            except AivmmError as error:
                return Transfer(**ends, state="refused", reason=error.message), waited
            except WorkerDied as died:
                return Transfer(**ends, state="failed", reason=died.reason, output=died.output), waited
        return Transfer(**ends, points=points_of(answer["points"])), waited
