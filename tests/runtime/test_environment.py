"""The environment that a target's numbers depend on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from aivmm.runtime.environment import Environment, environment_of
from aivmm.runtime.target import Device, Target

TARGET = Target(
    runtime="openvino",
    name="GPU.0",
    device=Device(kind="gpu", model="Arc", uid="abc", driver="31.0", instruction_sets=("x",), cores=None, power_limit_w=225.0),
    runtime_version="2026.4.1",
)
OTHER = {
    "target": "openvino:GPU.1", "device_model": "Iris", "driver": "32.0", "runtime_version": "2027.0", "instruction_sets": ("x", "y"),
    "usable_cores": 4, "power_limit_w": 100.0, "system": "Windows-AMD64",
}  # fmt: skip


def test_equal_conditions_have_equal_fingerprints_in_every_process() -> None:
    here = environment_of(TARGET)
    code = f"from aivmm.runtime.environment import Environment; print({here!r}.fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here.fingerprint == environment_of(TARGET).fingerprint
    assert len(here.fingerprint) == 32 and int(here.fingerprint, 16) >= 0


@pytest.mark.parametrize("field", [each.name for each in fields(Environment)])
def test_each_field_changes_the_fingerprint_and_is_named_as_the_difference(field: str) -> None:
    here = environment_of(TARGET)
    there = replace(here, **{field: OTHER[field]})
    assert there.fingerprint != here.fingerprint
    assert here.differences(there) == {field: (getattr(here, field), OTHER[field])}


def test_two_cards_of_one_model_share_what_they_measured() -> None:
    twin = replace(TARGET, device=replace(TARGET.device, uid="def"))
    assert environment_of(twin).fingerprint == environment_of(TARGET).fingerprint


def test_like_conditions_do_not_differ() -> None:
    assert environment_of(TARGET).differences(environment_of(TARGET)) == {}
