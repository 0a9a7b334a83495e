"""The way out for measurements: rows to outcomes, by key or by id.

Plain SQL through the driver: a planner asks for a thousand keys at a time, and SQLAlchemy's own work on a query and on each value took
longer than the database's. Values are always bound, never part of a statement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection

from aivmm.db.codec import caution_from_json, unpack_samples
from aivmm.db.schema import probe
from aivmm.db.store import chunks
from aivmm.errors import DatabaseError
from aivmm.probes.records import Failed, Measured, Outcome, ProbeKey, Refused
from aivmm.runtime.config import Config

_decode = json.JSONDecoder().raw_decode  # `loads` looks for white space twice, which takes as long as a small object

LoadConfigs = Callable[[Connection, Iterable[str | None]], Mapping[str, Config]]

_KEY = ("kind", "subject", "target", "environment", "config_digest", "batch", "callers")  # of the probe's columns, those that its key is of
_OUTCOME = [f"probe.{column.name}" for column in probe.c if column.name not in _KEY]
_EFFECTIVE = _OUTCOME.index("probe.effective_digest")
# The newest of a key is one step in the index, however often it was measured.
_NEWEST = "(SELECT max(probe.id) FROM probe WHERE probe.subject = wanted.subject AND probe.key = wanted.key)"
_NEWEST_OF_KEYS = (
    f"WITH wanted(subject, key) AS (VALUES (?)) SELECT {', '.join(_OUTCOME)} FROM probe WHERE probe.id IN (SELECT {_NEWEST} FROM wanted)"
)
_BY_ID = f"SELECT {', '.join([*_OUTCOME, *_KEY])} FROM probe WHERE probe.id IN (?)"


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

    def newest(self, keys: Mapping[str, ProbeKey]) -> Iterator[tuple[ProbeKey, Entry]]:
        """Yield the newest probe of each key that has one; `keys` are by their digests."""
        for some in chunks(list(keys)):
            pairs = [value for digest in some for value in (keys[digest].subject, digest)]
            rows = self._ask(_NEWEST_OF_KEYS, pairs, width=2)
            found = [keys[row[1]] for row in rows]
            yield from zip(found, self._entries(rows, found), strict=True)

    def by_id(self, ids: Sequence[str]) -> Iterator[Entry]:
        """Yield the entries of `ids`, in their order; an id that is not stored is left out."""
        for some in chunks(ids):
            rows = self._ask(_BY_ID, some)
            width = len(_OUTCOME)
            configs = self.load_configs(self.connection, {row[width + _KEY.index("config_digest")] for row in rows})
            keys = [_key(row[width:], configs) for row in rows]
            found = {entry.id: entry for entry in self._entries(rows, keys)}
            yield from (found[each] for each in some if each in found)

    def _ask(self, query: str, values: Sequence[str], *, width: int = 1) -> Sequence[Any]:
        asked = _expanded(query, len(values), width, self.connection.dialect.paramstyle)
        return self.connection.exec_driver_sql(asked, tuple(values)).fetchall()

    def _entries(self, rows: Sequence[Any], keys: Sequence[ProbeKey]) -> list[Entry]:
        """Return what rows say, each of its key."""
        configs = self.load_configs(self.connection, {row[_EFFECTIVE] for row in rows})
        return [self._entry(row, configs, key) for row, key in zip(rows, keys, strict=True)]

    def _entry(self, row: Any, configs: Mapping[str, Config], key: ProbeKey) -> Entry:
        identity, _, state, blob, reason, output, effective, placement, race, stored_at, metrics, cautions, *_ = row
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
                metrics=_json(metrics),
                cautions=tuple(map(caution_from_json, _json(cautions))) if cautions else (),
                effective_config=configs[effective].as_dict(),
                placement=dict(_shared(placement)) if isinstance(placement, str) else placement,
                race=race,
            )
        elif state == "refused":
            outcome = Refused(key=key, reason=reason)
        else:
            outcome = Failed(key=key, reason=reason, output=output)
        return Entry(id=identity, measured_at=moment(stored_at), outcome=outcome)


def _key(values: Sequence[Any], configs: Mapping[str, Config]) -> ProbeKey:
    kind, subject, target, environment, config, batch, callers = values
    return ProbeKey(
        kind=kind, subject=subject, target=target, environment=environment, config=configs[config], batch=batch, callers=callers
    )


def _json(value: Any) -> Any:
    """Return a stored JSON value as a driver gives it: SQLite has text."""
    return _decode(value.lstrip())[0] if isinstance(value, str) else value


@lru_cache(maxsize=4096)
def _shared(text: str) -> Any:
    """As `_json`, for what thousands of probes share: to be copied."""
    return _json(text)


def moment(value: str | datetime) -> datetime:
    """Return a stored moment, in UTC, as a driver gives it: SQLite has text without a zone."""
    if isinstance(value, str):
        return datetime.fromisoformat(value + "+00:00")
    return value.astimezone(UTC)


@lru_cache(maxsize=256)
def _expanded(query: str, count: int, width: int, style: str) -> str:
    """Return the query with as many marks in its `(?)` as there are values, in the driver's style; of `width` 2 and more, in groups."""
    mark = "?" if style == "qmark" else "%s"
    groups = [f"({', '.join([mark] * width)})"] * (count // width) if width > 1 else [f"({', '.join([mark] * count)})"]
    return query.replace("(?)", ", ".join(groups))
