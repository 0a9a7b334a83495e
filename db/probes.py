"""Probes: every outcome ever measured, found by its key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select
from sqlalchemy.exc import IntegrityError

from aivmm.db.codec import key_digest
from aivmm.db.fetch import Entry, Reader
from aivmm.db.insert import STATES, Batch, Configs
from aivmm.db.schema import environment, probe, run_probe
from aivmm.db.store import Store, add_missing, chunks
from aivmm.probes.records import Outcome, ProbeKey

__all__ = ["STATES", "Entry", "ProbeStore", "Some"]

Some = str | Collection[str] | None  # one value, any of several, or no matter


class ProbeStore(Store):
    """What was measured. Nothing here is ever changed: measuring again adds a row, and the newest of a key counts."""

    def add(self, outcome: Outcome, *, run_id: str | None = None) -> str:
        """Store one outcome and return its id; when this returns it survives a kill. `run_id` links it to that run, as measured there.

        Raises:
            ValueError: a metric is NaN or infinite, or the environment (or the run) was not remembered before.
        """
        return self.add_many([outcome], run_id=run_id)[0]

    def add_many(self, outcomes: Iterable[Outcome], *, run_id: str | None = None) -> list[str]:
        """Store outcomes in one transaction, all or none, and return their ids in order. Raises as `add`."""
        given = list(outcomes)
        if not given:
            return []
        batch = Batch.of(given, self._engine.dialect)  # before the transaction: nobody has to wait for it
        with self._writing() as connection:
            self._store_configs(connection, batch.configs.by_digest)
            try:
                batch.insert(connection, run_id)
            except IntegrityError as error:
                raise self._unknown(connection, given, run_id) from error
        return batch.ids

    def find(self, key: ProbeKey) -> Outcome | None:
        """Return the newest outcome of exactly this key, or None."""
        return self.find_many([key]).get(key)

    def find_many(self, keys: Iterable[ProbeKey]) -> dict[ProbeKey, Outcome]:
        """Return the newest outcome of each key that has one, with one query for every 400 keys."""
        return {key: entry.outcome for key, entry in self.find_entries(keys).items()}

    def find_entries(self, keys: Iterable[ProbeKey]) -> dict[ProbeKey, Entry]:
        """As `find_many`, with the ids that `link` takes."""
        configs = Configs()
        by_digest = {key_digest(key, configs.digest(key.config)): key for key in keys}
        with self._reading() as connection:
            return dict(self._reader(connection).newest(by_digest))

    def outcomes(
        self, *, kind: Some = None, subject: Some = None, target: Some = None, environment: Some = None, all: bool = False
    ) -> list[Outcome]:
        """Return what fits each filter that is given, oldest first: the newest of each key, or with `all` every one ever stored."""
        entries = self.entries(kind=kind, subject=subject, target=target, environment=environment, all=all)
        return [entry.outcome for entry in entries]

    def run_entries(self, run_id: str) -> list[Entry]:
        """As `run_outcomes`, with ids and times instead of the flag."""
        with self._reading() as connection:
            return list(self._reader(connection).by_id(list(_linked(connection, run_id))))

    def entries(
        self, *, kind: Some = None, subject: Some = None, target: Some = None, environment: Some = None, all: bool = False
    ) -> list[Entry]:
        """As `outcomes`, with ids and times."""
        # A subject has a handful of rows, an environment may have most of them: without statistics SQLite may take the wrong one's index,
        # and an expression has none.
        filters = [_fits(probe.c.kind, kind), _fits(probe.c.target, target)]
        filters.append(_fits(probe.c.environment if subject is None else func.coalesce(probe.c.environment, ""), environment))
        subjects = list(subject) if isinstance(subject, Collection) and not isinstance(subject, str) else None
        ids: list[str] = []
        with self._reading() as connection:
            for some in [subject] if subjects is None else chunks(subjects):
                conditions = [each for each in [*filters, _fits(probe.c.subject, some)] if each is not None]
                query = select(probe.c.id) if all else select(func.max(probe.c.id)).group_by(probe.c.subject, probe.c.key)
                ids += connection.scalars(query.where(*conditions))
            return list(self._reader(connection).by_id(sorted(ids)))

    def run_outcomes(self, run_id: str) -> list[tuple[Outcome, bool]]:
        """Return the outcomes that belong to a run, oldest first, each with whether the run took it from the database."""
        with self._reading() as connection:
            reused = _linked(connection, run_id)
            return [(entry.outcome, reused[entry.id]) for entry in self._reader(connection).by_id(list(reused))]

    def link(self, run_id: str, used: Iterable[str | ProbeKey], *, reused: bool = True) -> None:
        """Say which stored outcomes a run rests on, by id or by key (then its newest one); what is linked already stays as it was.

        Raises:
            ValueError: an id, a key or the run is not stored.
        """
        asked = list(used)
        ids = {each for each in asked if isinstance(each, str)}
        keys = [each for each in asked if isinstance(each, ProbeKey)]
        entries = self.find_entries(keys) if keys else {}
        missing = [key for key in keys if key not in entries]
        if missing:
            raise ValueError(f"nothing is stored for {missing[0]}")
        ids |= {entry.id for entry in entries.values()}
        with self._writing() as connection:
            try:
                add_missing(connection, run_probe, [{"run_id": run_id, "probe_id": each, "reused": reused} for each in sorted(ids)])
            except IntegrityError as error:
                raise ValueError(f"run {run_id} or a probe linked to it is not stored") from error

    def entries_by_id(self, connection: Connection, ids: Sequence[str]) -> list[Entry]:
        """Return the entries of `ids`, in their order, as the view that `connection` is in sees them."""
        return list(self._reader(connection).by_id(ids))

    def _reader(self, connection: Connection) -> Reader:
        return Reader(connection, self._load_configs, self.location)

    def _unknown(self, connection: Connection, outcomes: Iterable[Outcome], run_id: str | None) -> ValueError:
        """Say what a probe refers to that is not stored."""
        if connection.dialect.name == "postgresql":  # nothing can be asked in a transaction that has failed
            return ValueError(f"an environment (or the run {run_id}) is not stored: remember it first")
        known = set(connection.scalars(select(environment.c.fingerprint)))
        missing = sorted({outcome.key.environment for outcome in outcomes} - known)
        return ValueError(
            f"the environment {missing[0]} is not stored: remember it first" if missing else f"the run {run_id} is not stored"
        )


def _linked(connection: Connection, run_id: str) -> dict[str, bool]:
    """Return the ids of a run's probes, oldest first, each with whether the run took it from the database."""
    query = select(run_probe.c.probe_id, run_probe.c.reused).where(run_probe.c.run_id == run_id)
    return {row.probe_id: row.reused for row in connection.execute(query.order_by(run_probe.c.probe_id))}


def _fits(column: ColumnElement[Any], wanted: Some) -> ColumnElement[bool] | None:
    if wanted is None:
        return None
    return column == wanted if isinstance(wanted, str) else column.in_(list(wanted))
