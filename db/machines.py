"""Environments, devices and targets: facts about machines, each stored once."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import select

from aivmm.db.codec import device_from_json, digest, environment_from_json
from aivmm.db.schema import device as device_table
from aivmm.db.schema import environment as environment_table
from aivmm.db.schema import target as target_table
from aivmm.db.store import Store, add_missing, now
from aivmm.runtime.environment import Environment, environment_of
from aivmm.runtime.target import Device, Target


class MachineStore(Store):
    """Who measured. A probe's environment has to be remembered before the probe is added."""

    def remember_environment(self, environment: Environment) -> None:
        """Store it under its fingerprint, once."""
        row = {
            "fingerprint": environment.fingerprint,
            "target": environment.target,
            "device_model": environment.device_model,
            "driver": environment.driver,
            "runtime_version": environment.runtime_version,
            "system": environment.system,
            "facts": asdict(environment),
            "first_seen_at": now(),
        }
        with self._writing() as connection:
            add_missing(connection, environment_table, [row])

    def remember_device(self, device: Device) -> str:
        """Store it once; return its id, the digest of all that is known of it."""
        facts = asdict(device)
        identity = digest("device", facts)
        row = {"id": identity, "kind": device.kind, "model": device.model, "driver": device.driver, "facts": facts, "first_seen_at": now()}
        with self._writing() as connection:
            add_missing(connection, device_table, [row])
        return identity

    def remember_target(self, target: Target) -> str:
        """Store a target of this machine once, with its device and its environment as of now; return its id."""
        environment = environment_of(target)
        self.remember_environment(environment)
        device_id = self.remember_device(target.device)
        row = {
            "runtime": target.runtime,
            "name": target.name,
            "runtime_version": target.runtime_version,
            "precisions": list(target.precisions),
            "device_id": device_id,
            "environment": environment.fingerprint,
        }
        identity = digest("target", row)
        with self._writing() as connection:
            add_missing(connection, target_table, [{"id": identity, **row, "first_seen_at": now()}])
        return identity

    def environments(self) -> list[Environment]:
        """Return all environments, the first seen first."""
        with self._reading() as connection:
            query = select(environment_table.c.facts).order_by(environment_table.c.first_seen_at, environment_table.c.fingerprint)
            return [environment_from_json(facts) for facts in connection.scalars(query)]

    def environment(self, fingerprint: str) -> Environment | None:
        """Return the environment with this fingerprint, or None."""
        with self._reading() as connection:
            query = select(environment_table.c.facts).where(environment_table.c.fingerprint == fingerprint)
            facts = connection.scalars(query).first()
            return None if facts is None else environment_from_json(facts)

    def targets(self) -> list[Target]:
        """Return all targets of all machines, the first seen first."""
        with self._reading() as connection:
            query = select(target_table, device_table.c.facts).join(device_table)
            rows = connection.execute(query.order_by(target_table.c.first_seen_at, target_table.c.id)).all()
        return [
            Target(
                runtime=row.runtime,
                name=row.name,
                device=device_from_json(row.facts),
                runtime_version=row.runtime_version,
                precisions=tuple(row.precisions),
            )
            for row in rows
        ]
