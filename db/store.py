"""What every part of the database shares: its engine, its transactions, and rows that are made once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import PoolProxiedConnection

from aivmm.db.engine import explained, transaction
from aivmm.db.location import Location
from aivmm.db.schema import config
from aivmm.runtime.config import Config

CHUNK = 400  # in one list: two values each are still below the smallest limit of any SQLite (999)


class Store:
    """An open database. Safe to share between threads; another process opens its own."""

    def __init__(self, location: Location, engine: Engine) -> None:
        self._location = location
        self._engine = engine
        self._configs: dict[str, Config] = {}  # by digest, so an entry can never be stale

    @property
    def location(self) -> str:
        """Where the database is: an absolute path, or a URL without its password."""
        return self._location.shown

    @property
    def path(self) -> Path | None:
        """The file; None for a server."""
        return self._location.path

    def reading(self) -> AbstractContextManager[Connection]:
        """One consistent view for the other modules of `db/`, however many queries it takes."""
        return self._reading()

    def writing(self) -> AbstractContextManager[Connection]:
        """One transaction for the other modules of `db/`: all of it or nothing, on disk when it is left."""
        return self._writing()

    def raw_connection(self) -> PoolProxiedConnection:
        """A connection without a transaction, for what cannot be done within one; close it."""
        return self._engine.raw_connection()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """One consistent view, however many queries it takes."""
        with explained(self.location), transaction(self._engine, writes=False) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """All of it or nothing; on disk when this returns."""
        with explained(self.location), transaction(self._engine, writes=True) as connection:
            yield connection

    def _store_configs(self, connection: Connection, configs: Mapping[str, Config]) -> None:
        """Make the rows that other rows refer to by `Config.digest()`."""
        rows = [{"digest": digest, "precision": each.precision, "settings": each.as_dict()} for digest, each in sorted(configs.items())]
        add_missing(connection, config, rows)

    def _load_configs(self, connection: Connection, digests: Iterable[str | None]) -> Mapping[str, Config]:
        """Return at least the configs of `digests`, most of them without asking."""
        unknown = sorted({digest for digest in digests if digest is not None} - self._configs.keys())
        for some in chunks(unknown):
            for row in connection.execute(select(config).where(config.c.digest.in_(some))):
                self._configs[row.digest] = Config.of(row.settings, precision=row.precision)
        return self._configs


def now() -> datetime:
    """Return this moment, in UTC."""
    return datetime.now(UTC)


def chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split into pieces that fit one IN list."""
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


def add_missing(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert those rows whose key is not there yet. Give them in key order: two writers of a server then cannot wait for each other."""
    if rows:
        connection.execute(_insert(connection, table).on_conflict_do_nothing(), rows)


def put(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, on: Sequence[str], keep: Sequence[str] = ()) -> None:
    """Insert rows, or bring those up to date whose `on` columns exist, except for their `keep` columns. In key order, as `add_missing`."""
    if not rows:
        return
    statement = _insert(connection, table)
    changes = {name: statement.excluded[name] for name in rows[0] if name not in (*on, *keep)}
    connection.execute(statement.on_conflict_do_update(index_elements=list(on), set_=changes), rows)


def _insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)
