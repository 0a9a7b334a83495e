"""How much memory a plan may take where: what devices have, and what the user allows."""

from __future__ import annotations

import math

from aivmm.planner.candidates import MOST_REPLICAS
from aivmm.planner.placement import device_of
from aivmm.runtime.target import Target
from aivmm.tuner.work import Work


def memory_of(work: Work) -> dict[str, float]:
    """Return the room on each device: its own memory, and where the user limits that or the process's, no more."""
    limits = {each.metric: each.limit for each in work.constraints if each.metric in ("memory", "device_memory")}
    found: dict[str, float] = {}
    for target in work.targets:
        own = math.inf if target.device.memory_bytes is None else float(target.device.memory_bytes)
        asked = limits.get("memory" if target.device.kind == "cpu" else "device_memory", math.inf)
        found[device_of(target)] = min(own, asked)
    return found


def room_of(work: Work) -> dict[str, float]:
    """Return the room on each target's device."""
    room = memory_of(work)
    return {str(target): room[device_of(target)] for target in work.targets}


def most_replicas(target: Target) -> int:
    """Return how many copies of a model a target may have: on a processor, one for each core at most."""
    cores = target.device.cores if target.device.kind == "cpu" else None
    return min(MOST_REPLICAS, cores or MOST_REPLICAS)
