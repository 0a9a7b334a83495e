"""The way out for measurements: rows to outcomes, by key or by id.

Plain SQL through the driver: a planner asks for a thousand keys at a time, and SQLAlchemy's own work on a query and on each value took
longer than the database's. Values are always bound, never part of a statement.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection

from aivmm.db.codec import unpack_samples
from aivmm.db.schema import probe
from aivmm.db.store import chunks
from aivmm.errors import DatabaseError
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused
from aivmm.runtime.config import Config

LoadConfigs = Callable[[Connection, Iterable[str | None]], Mapping[str, Config]]

_COLUMNS = ", ".join(f"probe.{column.name}" for column in probe.c)
_CONFIG, _EFFECTIVE, _STATE = (list(probe.c.keys()).index(name) for name in ("config_digest", "effective_digest", "state"))
_NEWEST_OF_KEYS = (
    f"SELECT {_COLUMNS} FROM probe WHERE probe.id IN (SELECT max(probe.id) FROM probe WHERE probe.key IN (?) GROUP BY probe.key)"
)
_BY_ID = f"SELECT {_COLUMNS} FROM probe WHERE probe.id IN (?)"
_METRICS = "SELECT metric.probe_id, name, value FROM metric WHERE probe_id IN (?)"
_CAUTIONS = "SELECT caution.probe_id, code, message, advice FROM caution WHERE probe_id IN (?) ORDER BY probe_id, position"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An outcome as it is stored: under which id, and since when."""

    id: str
    measured_at: datetime
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads within one transaction. `location` is for the message about a damaged row."""

    connection: Connection
    load_configs: LoadConfigs
    location: str

    def newest(self, keys: Sequence[str]) -> Iterator[tuple[str, Entry]]:
        """Yield (key digest, entry) of the newest probe of each key digest that has one."""
        for some in chunks(keys):
            yield from self._entries(self._ask(_NEWEST_OF_KEYS, some))

    def by_id(self, ids: Sequence[str]) -> Iterator[Entry]:
        """Yield the entries of `ids`, in their order; an id that is not stored is left out."""
        for some in chunks(ids):
            found = {entry.id: entry for _, entry in self._entries(self._ask(_BY_ID, some))}
            yield from (found[each] for each in some if each in found)

    def _ask(self, query: str, values: Sequence[str]) -> Sequence[Any]:
        return self.connection.exec_driver_sql(_expanded(query, len(values), self.connection.dialect.paramstyle), tuple(values)).fetchall()

    def _entries(self, rows: Sequence[Any]) -> list[tuple[str, Entry]]:
        measured = [row[0] for row in rows if row[_STATE] == "measured"]
        metrics: dict[str, dict[str, float]] = defaultdict(dict)
        cautions: dict[str, list[Caution]] = defaultdict(list)
        if measured:
            for identity, name, value in self._ask(_METRICS, measured):
                metrics[identity][name] = value
            for identity, code, message, advice in self._ask(_CAUTIONS, measured):
                cautions[identity].append(Caution(code=code, message=message, advice=advice))
        configs = self.load_configs(self.connection, [row[place] for row in rows for place in (_CONFIG, _EFFECTIVE)])
        return [(row[1], self._entry(row, configs, metrics[row[0]], tuple(cautions.get(row[0], ())))) for row in rows]

    def _entry(self, row: Any, configs: Mapping[str, Config], metrics: Mapping[str, float], cautions: tuple[Caution, ...]) -> Entry:
        identity, _, kind, subject, target, environment, config, batch, callers, state, *rest = row
        blob, reason, output, effective, placement, race, stored_at = rest
        key = ProbeKey(
            kind=kind,
            subject=subject,
            target=target,
            environment=environment,
            config=configs[config],
            batch=batch,
            callers=callers,
        )
        outcome: Outcome
        if state == "measured":
            try:
                samples = unpack_samples(blob)
            except (ValueError, TypeError) as error:
                what = f"the database {self.location} is damaged (probe {identity}: {error})"
                raise DatabaseError(what, advice="`aivmm db check` lists all that is; restore a copy") from error
            outcome = Measured(
                key=key,
                samples=samples,
                metrics=metrics,
                cautions=cautions,
                effective_config=configs[effective].as_dict(),
                placement=json.loads(placement) if isinstance(placement, str) else placement,
                race=race,
            )
        elif state == "refused":
            outcome = Refused(key=key, reason=reason)
        else:
            outcome = Failed(key=key, reason=reason, output=output)
        return Entry(id=identity, measured_at=moment(stored_at), outcome=outcome)


def moment(value: str | datetime) -> datetime:
    """Return a stored moment, in UTC, as a driver gives it: SQLite has text without a zone."""
    if isinstance(value, str):
        return datetime.fromisoformat(value).replace(tzinfo=UTC)
    return value.astimezone(UTC)


@lru_cache(maxsize=256)
def _expanded(query: str, count: int, style: str) -> str:
    """Return the query with as many marks in its `(?)` as there are values, in the driver's style."""
    return query.replace("(?)", f"({', '.join(['?' if style == 'qmark' else '%s'] * count)})")
