"""What copying between memories costs, outside any model: the host's, page-locked or not, and those of devices, by size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from aivmm.errors import Unsupported
from aivmm.probes import phases, wire
from aivmm.probes.records import Samples, TransferPoint
from aivmm.runtime.backend import Copier, CopiesMemory, CopyRoute
from aivmm.runtime.null import SimulatedTime
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target

if TYPE_CHECKING:
    from aivmm.probes.runners import State

_WARM_UP = 3
_LEAST_COPIES, _LEAST_S = 10, 0.03
_SIMULATED_COPIES = 3  # what is arithmetic is the same each time
_HOST, _MEMORY = "host ", " memory"


def is_copy(source: str, destination: str) -> bool:
    """Say whether these are the ends of a copy, as `CopyRoute.ends` names them, and not two targets of a hand-over."""
    return any(each.startswith(_HOST) or each.endswith(_MEMORY) for each in (source, destination))


def route_out(route: CopyRoute) -> dict[str, Any]:
    """Return a route as JSON takes it."""
    ends = {
        name: None if each is None else wire.target_out(each)
        for name, each in (("source", route.source), ("destination", route.destination))
    }
    return {**ends, "pinned": route.pinned}


def route_in(raw: dict[str, Any]) -> CopyRoute:
    """Return the route that `route_out` wrote."""
    ends: list[Target | None] = []
    for name in ("source", "destination"):
        end = None if raw[name] is None else wire.target_in(raw[name])
        assert end is None or isinstance(end, Target)
        ends.append(end)
    return CopyRoute(source=ends[0], destination=ends[1], pinned=raw["pinned"])


def points_of(found: Sequence[dict[str, Any]]) -> tuple[TransferPoint, ...]:
    """Return what `copies` measured as records. Nothing runs on either end: the cost is the median itself."""
    return tuple(
        TransferPoint(
            size_bytes=each["size_bytes"],
            samples=Samples(timed_s=tuple(each["durations"])),
            source_s=0.0,
            destination_s=0.0,
            cost_s=median(each["durations"]),
        )
        for each in sorted(found, key=lambda each: int(each["size_bytes"]))
    )


def copy_routes(state: State, *, runtime: str, targets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """List the routes of a runtime's devices; none where it cannot copy outside a model."""
    backend = load_backend(runtime)
    given = [each for each in map(wire.target_in, targets) if isinstance(each, Target)]
    return {"routes": [route_out(each) for each in backend.routes(given)] if isinstance(backend, CopiesMemory) else []}


def copies(state: State, *, runtime: str, route: dict[str, Any], sizes_bytes: Sequence[int]) -> dict[str, Any]:
    """Time copies along one route, the small sizes first; a size that finds no memory ends it.

    Returns `points`, one for each size that was copied: `size_bytes` and `durations` in seconds, until all has arrived.

    Raises:
        Unsupported: not even the smallest size can be copied.
    """
    backend = load_backend(runtime)
    assert isinstance(backend, CopiesMemory)
    way = route_in(route)
    found: list[dict[str, Any]] = []
    for size in sorted(sizes_bytes):
        try:
            copier = backend.copier(way, size)
        except Unsupported:
            if not found:
                raise
            break
        try:
            phases.enter(phases.RUN)
            found.append({"size_bytes": size, "durations": _durations(copier)})
        finally:
            copier.close()
    return {"points": found}


def _durations(copier: Copier) -> list[float]:
    if isinstance(copier, SimulatedTime):
        durations = []
        for _ in range(_SIMULATED_COPIES):
            copier.run()
            durations.append(copier.last_s)
        return durations
    clock = time.perf_counter
    for _ in range(_WARM_UP):
        copier.run()
    durations = []
    ends = clock() + _LEAST_S
    while len(durations) < _LEAST_COPIES or clock() < ends:
        started = clock()
        copier.run()
        durations.append(clock() - started)
    return durations


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"copy_routes": copy_routes, "copies": copies}
