"""Facts about machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aivmm.db.database import Database
from aivmm.db.frames import evidence
from aivmm.probes.records import Measured
from aivmm.runtime.environment import Environment, environment_of
from aivmm.runtime.target import Device, Target

CPU = Device(kind="cpu", model="A CPU", instruction_sets=("avx2", "amx"), cores=2, memory_bytes=None, power_limit_w=15)


def fields(target: Target) -> dict[str, object]:
    """All fields; a target compares by its name alone."""
    return dataclasses.asdict(target)


def test_an_environment_is_stored_once_and_keeps_its_fingerprint(database: Database, environment: Environment) -> None:
    whole = dataclasses.replace(environment, power_limit_w=350)  # a whole number: 350.0 would have another fingerprint
    for each in (environment, whole, environment, whole):
        database.remember_environment(each)
    assert database.environments() == [environment, whole]
    assert [each.fingerprint for each in database.environments()] == [environment.fingerprint, whole.fingerprint]
    assert database.environment(whole.fingerprint) == whole
    assert database.environment("unknown") is None


def test_a_target_is_stored_once_with_its_device_and_environment(database: Database) -> None:
    one = Target(runtime="openvino", name="CPU", device=CPU, runtime_version="2026.4", precisions=("fp32", "bf16"))
    upgraded = dataclasses.replace(one, runtime_version="2026.5")
    assert database.remember_target(one) == database.remember_target(one) != database.remember_target(upgraded)
    assert [fields(each) for each in database.targets()] == [fields(one), fields(upgraded)]
    assert database.environments() == [environment_of(one), environment_of(upgraded)]
    assert database.remember_device(CPU) == database.remember_device(dataclasses.replace(CPU))


@pytest.mark.parametrize(
    "change",
    [{"driver": "581"}, {"runtime_version": "2027.0"}, {"usable_cores": 1}, {"instruction_sets": ("avx2",)}],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_on_one_target_hides_its_rows_from_planning_and_no_other_s_and_none_from_reports(
    database: Database, environment: Environment, measured: Callable[..., Measured], change: dict[str, Any]
) -> None:
    other = replace(environment, target="onnxruntime:CUDA:0", device_model="A GPU", runtime_version="1.31")
    changed = replace(environment, **change)
    for each in (other, changed):
        database.remember_environment(each)
    mine = measured()
    theirs = replace(mine, key=replace(mine.key, target=other.target, environment=other.fingerprint))
    database.add_many([mine, theirs])
    now = [replace(mine.key, environment=changed.fingerprint), theirs.key]  # what a planner asks for after the change
    assert database.find_many(now) == {theirs.key: theirs}
    assert database.outcomes(subject="block", environment=[changed.fingerprint, other.fingerprint]) == [theirs]
    frame = evidence(database)
    assert frame["environment"].tolist() == [environment.fingerprint, other.fingerprint]
    again = replace(mine, key=now[0])
    database.add(again)
    assert database.find_many(now) == {now[0]: again, theirs.key: theirs}
    assert database.find(mine.key) == mine  # and back, when the change is undone
    assert len(evidence(database)) == 3
