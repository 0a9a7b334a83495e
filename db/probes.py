"""Probes: every outcome ever measured, found by its key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, bindparam, func, select
from sqlalchemy.exc import IntegrityError

from aivmm.db.codec import clean, finite, key_digest, new_id, pack_samples, unpack_samples
from aivmm.db.schema import caution, environment, metric, probe, run_probe
from aivmm.db.store import Store, add_missing, chunks, now
from aivmm.errors import DatabaseError
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused
from aivmm.runtime.config import Config

STATES: dict[type[Outcome], str] = {Measured: "measured", Refused: "refused", Failed: "failed"}

Some = str | Collection[str] | None  # one value, any of several, or no matter


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An outcome as it is stored: under which id, and since when."""

    id: str
    measured_at: datetime
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _Queries:
    """The three questions about the probes whose ids a query selects."""

    probes: Select[Any]
    metrics: Select[Any]
    cautions: Select[Any]

    @classmethod
    def of(cls, ids: Select[Any]) -> _Queries:
        return cls(
            probes=select(probe).where(probe.c.id.in_(ids)).order_by(probe.c.id),
            metrics=select(metric).where(metric.c.probe_id.in_(ids)),
            cautions=select(caution).where(caution.c.probe_id.in_(ids)).order_by(caution.c.probe_id, caution.c.position),
        )


# Made once: building these anew would take longer than answering them.
_NEWEST_OF_KEYS = _Queries.of(
    select(func.max(probe.c.id)).where(probe.c.key.in_(bindparam("keys", expanding=True))).group_by(probe.c.key),
)


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
        configs = _Configs()
        stored = [(new_id(), outcome) for outcome in outcomes]
        measured = [(identity, outcome) for identity, outcome in stored if isinstance(outcome, Measured)]
        rows: list[tuple[Table, list[dict[str, Any]]]] = [
            (probe, [_row(identity, outcome, configs) for identity, outcome in stored]),
            (metric, [_metric(identity, *each) for identity, outcome in measured for each in outcome.metrics.items()]),
            (caution, [_caution(identity, *each) for identity, outcome in measured for each in enumerate(outcome.cautions)]),
            (run_probe, [{"run_id": run_id, "probe_id": identity, "reused": False} for identity, _ in stored] if run_id else []),
        ]
        with self._writing() as connection:
            self._store_configs(connection, configs.by_digest)
            try:
                for table, values in rows:
                    if values:
                        connection.execute(table.insert(), values)
            except IntegrityError as error:
                raise self._unknown(connection, [outcome for _, outcome in stored], run_id) from error
        return [identity for identity, _ in stored]

    def find(self, key: ProbeKey) -> Outcome | None:
        """Return the newest outcome of exactly this key, or None."""
        return self.find_many([key]).get(key)

    def find_many(self, keys: Iterable[ProbeKey]) -> dict[ProbeKey, Outcome]:
        """Return the newest outcome of each key that has one, with three queries for every 500 keys."""
        return {key: entry.outcome for key, entry in self.find_entries(keys).items()}

    def find_entries(self, keys: Iterable[ProbeKey]) -> dict[ProbeKey, Entry]:
        """As `find_many`, with the ids that `link` takes."""
        by_digest = {key_digest(key): key for key in keys}
        found: dict[ProbeKey, Entry] = {}
        with self._reading() as connection:
            for some in chunks(list(by_digest)):
                found |= {by_digest[key]: entry for key, entry in self._fetch(connection, _NEWEST_OF_KEYS, {"keys": list(some)})}
        return found

    def outcomes(
        self, *, kind: Some = None, subject: Some = None, target: Some = None, environment: Some = None, all: bool = False
    ) -> list[Outcome]:
        """Return what fits each filter that is given, oldest first: the newest of each key, or with `all` every one ever stored."""
        entries = self.entries(kind=kind, subject=subject, target=target, environment=environment, all=all)
        return [entry.outcome for entry in entries]

    def run_entries(self, run_id: str) -> list[Entry]:
        """As `run_outcomes`, with ids and times instead of the flag."""
        with self._reading() as connection:
            ids = select(run_probe.c.probe_id).where(run_probe.c.run_id == run_id)
            return [entry for _, entry in self._fetch(connection, _Queries.of(ids))]

    def entries(
        self, *, kind: Some = None, subject: Some = None, target: Some = None, environment: Some = None, all: bool = False
    ) -> list[Entry]:
        """As `outcomes`, with ids and times."""
        filters = [_fits(probe.c.kind, kind), _fits(probe.c.target, target), _fits(probe.c.environment, environment)]
        subjects = list(subject) if isinstance(subject, Collection) and not isinstance(subject, str) else None
        found: list[Entry] = []
        with self._reading() as connection:
            for some in [subject] if subjects is None else chunks(subjects):
                conditions = [each for each in [*filters, _fits(probe.c.subject, some)] if each is not None]
                ids = select(probe.c.id) if all else select(func.max(probe.c.id)).group_by(probe.c.key)
                ids = ids.where(*conditions)
                found += [entry for _, entry in self._fetch(connection, _Queries.of(ids))]
        return sorted(found, key=lambda entry: entry.id)

    def run_outcomes(self, run_id: str) -> list[tuple[Outcome, bool]]:
        """Return the outcomes that belong to a run, oldest first, each with whether the run took it from the database."""
        with self._reading() as connection:
            flags = dict(connection.execute(select(run_probe.c.probe_id, run_probe.c.reused).where(run_probe.c.run_id == run_id)).all())
            ids = select(run_probe.c.probe_id).where(run_probe.c.run_id == run_id)
            return [(entry.outcome, flags[entry.id]) for _, entry in self._fetch(connection, _Queries.of(ids))]

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

    def _fetch(self, connection: Connection, queries: _Queries, values: Mapping[str, Any] | None = None) -> list[tuple[str, Entry]]:
        """Return (key digest, entry) of the probes that the queries select, in the order of their ids."""
        rows = connection.execute(queries.probes, values).all()
        metrics: dict[str, dict[str, float]] = defaultdict(dict)
        cautions: dict[str, list[Caution]] = defaultdict(list)
        if any(row.state == "measured" for row in rows):
            for row in connection.execute(queries.metrics, values):
                metrics[row.probe_id][row.name] = row.value
            for row in connection.execute(queries.cautions, values):
                cautions[row.probe_id].append(Caution(code=row.code, message=row.message, advice=row.advice))
        configs = self._load_configs(connection, (digest for row in rows for digest in (row.config_digest, row.effective_digest)))
        return [
            (row.key, Entry(id=row.id, measured_at=row.measured_at, outcome=self._outcome(row, configs, metrics[row.id], cautions[row.id])))
            for row in rows
        ]

    def _outcome(self, row: Row[Any], configs: Mapping[str, Config], metrics: Mapping[str, float], cautions: list[Caution]) -> Outcome:
        key = ProbeKey(
            kind=row.kind,
            subject=row.subject,
            target=row.target,
            environment=row.environment,
            config=configs[row.config_digest],
            batch=row.batch,
            callers=row.callers,
        )
        if row.state == "refused":
            return Refused(key=key, reason=row.reason)
        if row.state == "failed":
            return Failed(key=key, reason=row.reason, output=row.output)
        try:
            samples = unpack_samples(row.samples)
        except (ValueError, TypeError) as error:
            raise DatabaseError(f"the database {self.location} is damaged (probe {row.id}: {error})", advice="restore a copy") from error
        return Measured(
            key=key,
            samples=samples,
            metrics=metrics,
            cautions=tuple(cautions),
            effective_config=configs[row.effective_digest].as_dict(),
            placement=row.placement,
            race=row.race,
        )

    def _unknown(self, connection: Connection, outcomes: Iterable[Outcome], run_id: str | None) -> ValueError:
        """Say what a probe refers to that is not stored."""
        if connection.dialect.name == "postgresql":  # nothing can be asked in a transaction that has failed
            return ValueError(f"an environment (or the run {run_id}) is not stored: remember it first")
        known = set(connection.scalars(select(environment.c.fingerprint)))
        missing = sorted({outcome.key.environment for outcome in outcomes} - known)
        return ValueError(
            f"the environment {missing[0]} is not stored: remember it first" if missing else f"the run {run_id} is not stored"
        )


class _Configs:
    """The configs of many outcomes: most share a few objects, and a digest costs more than the rest of a row.

    Known by object, not by value: Python has 1 == True == 1.0, a runtime's options do not.
    """

    def __init__(self) -> None:
        self.by_digest: dict[str, Config] = {}
        self._digests: dict[int, tuple[str, Config]] = {}  # the config is held, so that its id() stays its own

    def digest(self, config: Config) -> str:
        known = self._digests.get(id(config))
        if known is None:
            known = self._digests[id(config)] = (config.digest(), config)
            self.by_digest[known[0]] = config
        return known[0]


def _row(identity: str, outcome: Outcome, configs: _Configs) -> dict[str, Any]:
    key = outcome.key
    config_digest = configs.digest(key.config)
    row: dict[str, Any] = {
        "id": identity,
        "key": key_digest(key, config_digest),
        "kind": key.kind,
        "subject": key.subject,
        "target": key.target,
        "environment": key.environment,
        "config_digest": config_digest,
        "batch": key.batch,
        "callers": key.callers,
        "state": STATES[type(outcome)],
        "samples": None,
        "reason": "",
        "output": "",
        "effective_digest": None,
        "placement": None,
        "race": "",
        "measured_at": now(),
    }
    match outcome:
        case Measured():
            row["samples"] = pack_samples(outcome.samples)
            row["effective_digest"] = configs.digest(Config.of(outcome.effective_config))
            row["placement"] = dict(outcome.placement)
            row["race"] = outcome.race
        case Refused():
            row["reason"] = clean(outcome.reason)
        case Failed():
            row["reason"] = clean(outcome.reason)
            row["output"] = clean(outcome.output)
    return row


def _metric(identity: str, name: str, value: float) -> dict[str, Any]:
    return {"probe_id": identity, "name": name, "value": finite(name, value)}


def _caution(identity: str, position: int, each: Caution) -> dict[str, Any]:
    return {"probe_id": identity, "position": position, "code": each.code, "message": clean(each.message), "advice": clean(each.advice)}


def _fits(column: ColumnElement[Any], wanted: Some) -> ColumnElement[bool] | None:
    if wanted is None:
        return None
    return column == wanted if isinstance(wanted, str) else column.in_(list(wanted))
