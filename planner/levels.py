"""Service levels: names for an objective and the limits that go with it, spelled out so that nobody has to guess what a name means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aivmm.errors import UsageError

DEFAULT_OBJECTIVE = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """A named goal. `constraints` are in the grammar of `aivmm.planner.constraints`."""

    objective: str
    constraints: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return ", ".join([f"objective {self.objective}", *self.constraints])


SERVICE_LEVELS: Mapping[str, ServiceLevel] = {
    "interactive": ServiceLevel(
        objective="latency",
        constraints=("p99<=100ms",),
        why="somebody waits: beyond a tenth of a second an answer no longer feels immediate (Miller 1968)",
    ),
    "batch": ServiceLevel(objective="throughput", constraints=(), why="nobody waits for a single answer, only for all of them"),
    "low-power": ServiceLevel(objective="energy", constraints=(), why="energy for each answer counts, not how soon it comes"),
    "production": ServiceLevel(
        objective="latency",
        constraints=("cosine>=0.999", "memory<=8GB", "first_inference<=10s"),
        why="answers like the original's, a process that fits beside others, and one that is back soon after a restart",
    ),
}


def goal(level: str | None, objective: str | None, constraints: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the objective and the constraints that a service level and what was asked beside it amount to.

    An objective given beside the level replaces the level's own; constraints add to those of the level.

    Raises:
        UsageError: the level is unknown.
    """
    if level is None:
        return objective or DEFAULT_OBJECTIVE, tuple(constraints)
    known = SERVICE_LEVELS.get(level)
    if known is None:
        raise unknown_level(level)
    return objective or known.objective, (*known.constraints, *constraints)


def told(level: str, objective: str) -> str:
    """Say what a service level stands for, and what of it gave way to the objective that was asked for beside it."""
    known = SERVICE_LEVELS[level]
    instead = "" if objective == known.objective else f"; objective {objective} was asked for instead of {known.objective}"
    return f"service level {level}: {known}{instead}"


def unknown_level(level: str) -> UsageError:
    """Return the error for a level that there is none of; it lists what each stands for."""
    known = "; ".join(f"{name} ({each})" for name, each in SERVICE_LEVELS.items())
    return UsageError(f"unknown service level {level!r}", advice=f"choose from {known}")
