"""A service level stands for what it prints, and for nothing else."""

from __future__ import annotations

import pytest

from aivmm.errors import UsageError
from aivmm.planner.constraints import KNOWN, parse
from aivmm.planner.levels import SERVICE_LEVELS, goal, told


def test_without_a_level_what_was_asked_is_the_goal() -> None:
    assert goal(None, None, ()) == ("latency", ())
    assert goal(None, "throughput", ["memory<4GB"]) == ("throughput", ("memory<4GB",))


@pytest.mark.parametrize("name", ["interactive", "batch", "low-power", "production"])
def test_a_level_is_its_objective_and_its_limits(name: str) -> None:
    level = SERVICE_LEVELS[name]
    assert goal(name, None, ()) == (level.objective, level.constraints)
    assert all(parse(each, measured=KNOWN) for each in level.constraints)
    assert all(each in str(level) for each in (level.objective, *level.constraints))


def test_what_is_said_beside_a_level_adds_to_it_and_another_objective_replaces_its_own() -> None:
    assert goal("interactive", "throughput", ["size<50MB"]) == ("throughput", ("p99<=100ms", "size<50MB"))


def test_what_gave_way_to_an_objective_beside_it_is_said() -> None:
    assert told("interactive", "latency") == "service level interactive: objective latency, p99<=100ms"
    said = "service level interactive: objective latency, p99<=100ms; objective throughput was asked for instead of latency"
    assert told("interactive", "throughput") == said


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown service level 'fast'") as caught:
        goal("fast", None, ())
    assert all(f"{name} ({level})" in caught.value.advice for name, level in SERVICE_LEVELS.items())
