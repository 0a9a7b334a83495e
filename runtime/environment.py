"""Under what conditions a number on a target holds: the environment, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass

from aivmm.runtime.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a target's numbers depend on, and nothing else: an upgrade of one runtime does not void another's rows."""

    target: str
    device_model: str
    driver: str
    runtime_version: str
    instruction_sets: tuple[str, ...]
    usable_cores: int | None
    power_limit_w: float | None
    system: str  # "Linux-x86_64"

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of the SHA-256 of the canonical JSON of all fields."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def as_dict(self) -> dict[str, object]:
        """Return all fields. Not by `dataclasses.asdict`, whose deep copies a plan that is loaded would wait for."""
        return {each: getattr(self, each) for each in self.__slots__}

    def differences(self, other: Environment) -> dict[str, tuple[object, object]]:
        """Return each field that differs, as (here, there)."""
        mine, theirs = self.as_dict(), other.as_dict()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def environment_of(target: Target) -> Environment:
    """Return the environment of `target` on this machine, now."""
    device = target.device
    return Environment(
        target=str(target),
        device_model=device.model,
        driver=device.driver,
        runtime_version=target.runtime_version,
        instruction_sets=device.instruction_sets,
        usable_cores=device.cores,
        power_limit_w=device.power_limit_w,
        system=f"{platform.system()}-{platform.machine()}",
    )
