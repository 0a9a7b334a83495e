"""The connections: how SQLite is set up, where a transaction begins, and what a user is told when a database does not do as asked."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError

from aivmm.db.codec import dump_json
from aivmm.db.location import Location
from aivmm.db.presence import Presence
from aivmm.errors import DatabaseError

WRITES = "aivmm_writes"  # execution option of a connection: its next transaction will write
_LOCK_TIMEOUT, _DISK_FULL = "55P03", "53100"  # https://www.postgresql.org/docs/current/errcodes-appendix.html
_PRESENCE = "aivmm_presence"  # execution option of an engine: the file it has open


def make_engine(location: Location, *, timeout_s: float) -> Engine:
    """Return an engine for `location`; nothing is opened yet.

    Raises:
        DatabaseError: the driver that the URL needs is not installed.
    """
    arguments: dict[str, Any] = (
        {"timeout": timeout_s, "check_same_thread": False} if location.path else {"connect_timeout": max(1, round(timeout_s))}
    )
    try:
        engine = create_engine(location.url, connect_args=arguments, json_serializer=dump_json, pool_pre_ping=location.path is None)
    except ModuleNotFoundError as error:
        raise DatabaseError(
            f"the database {location.shown} needs the Python package {error.name}",
            advice="pip install 'psycopg[binary]', or give a path with --db",
        ) from error
    if location.path:
        presence = Presence(location.path)
        event.listen(engine, "do_connect", lambda *_: presence.refuse())
        event.listen(engine, "connect", lambda *_: presence.opened())
        event.listen(engine, "close", lambda *_: presence.closed())
        event.listen(engine, "close_detached", lambda *_: presence.closed())
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        engine.update_execution_options(**{_PRESENCE: presence})
    else:
        event.listen(engine, "connect", lambda connection, _: _set_up_postgres(connection, timeout_s))
    return engine


def _set_up_postgres(connection: Any, timeout_s: float) -> None:
    # Without it a row or a migration that another process holds would be waited for without end; 0 would mean that.
    connection.execute(f"SET lock_timeout = {max(1, round(timeout_s * 1000))}")
    connection.commit()


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # Python's sqlite3 would begin transactions by its own lights, and none before DDL, so that half a migration stays behind.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys=ON")
    # With NORMAL the last commits are lost when the machine goes down, and drivers that we drive hard take machines down.
    # It costs 0.4 ms a commit, and a probe is a commit.
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes cannot wait for its turn (SQLITE_BUSY_SNAPSHOT comes at once),
    # so a writer says so at the start.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES) else "BEGIN")


def use_wal(engine: Engine, *, timeout_s: float) -> None:
    """Switch a SQLite file to write-ahead logging for good, where its file system can; readers then never wait for a writer.

    The switch needs the file alone and does not wait for it, so it is tried again until `timeout_s` is over.
    """
    deadline = time.monotonic() + timeout_s
    with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
        while True:
            try:
                cursor.execute("PRAGMA journal_mode=WAL")
                cursor.fetchall()
                return
            except sqlite3.OperationalError as error:
                if not busy(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)


@contextmanager
def transaction(engine: Engine, *, writes: bool) -> Iterator[Connection]:
    """Give a connection in a transaction that commits at the end, or is undone when the body raises.

    A reader sees one moment, however many queries it asks. What a writer wrote is stored, in the file of that name, when this returns.

    Raises:
        DatabaseError: a SQLite file was removed or replaced while it was open; what it held is saved (`Presence`).
    """
    presence: Presence | None = engine.get_execution_options().get(_PRESENCE)
    with engine.connect() as connection:
        if writes:
            connection = connection.execution_options(**{WRITES: True})
        elif engine.dialect.name == "postgresql":  # by default each query of a transaction there sees a moment of its own
            connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        if presence and writes:
            presence.require(_driver(connection))
        with connection.begin():
            if presence and writes:
                presence.began()
            yield connection
        if presence and writes:
            presence.require(_driver(connection))  # again: it may have gone while the body ran


def _driver(connection: Connection) -> sqlite3.Connection:
    return cast(sqlite3.Connection, connection.connection.driver_connection)


@contextmanager
def explained(location: str) -> Iterator[None]:
    """Turn what a database says into one line for its user; a violated constraint is our bug and keeps its traceback."""
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        if error.orig is None or not _user_can_fix(error.orig):
            raise
        raise explain(error.orig, location) from error
    except sqlite3.DatabaseError as error:
        raise explain(error, location) from error


def busy(error: sqlite3.Error) -> bool:
    """Say whether another process holds the file."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def explain(error: BaseException, location: str) -> DatabaseError:
    """Return the one-line error for what a driver raised."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    state = getattr(error, "sqlstate", None)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or state == _LOCK_TIMEOUT:
        return DatabaseError(
            f"the database {location} is locked by another process", advice="wait for it to end, or give another with --db"
        )
    if state == _DISK_FULL:
        return DatabaseError(f"no space is left for the database {location}", advice="free some and run again: what was stored is kept")
    if not isinstance(error, sqlite3.Error):
        return DatabaseError(f"cannot use the database {location}: {line}", advice="check the server and the URL, or give a path with --db")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DatabaseError(
            f"the database {location} is damaged ({line})", advice="restore a copy or move it away, or give another file with --db"
        )
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(location)):
        return DatabaseError(f"no space is left for the database {location}", advice="free some and run again: what was stored is kept")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_AUTH):
        return DatabaseError(
            f"the database {location} cannot be opened and written ({line})",
            advice="make the file and its folder writable, or give another file with --db",
        )
    return DatabaseError(f"cannot use the database {location}: {line}", advice="check its disk, or give another file with --db")


def _is_full(location: str) -> bool:
    """Say whether a disk is full; the file that SQLite shares its locks in cannot grow then, and SQLite calls that an I/O error."""
    try:
        return shutil.disk_usage(Path(location).parent).free < 1 << 20
    except OSError:
        return False


def _user_can_fix(error: BaseException) -> bool:
    if isinstance(error, sqlite3.Error):
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        return code not in (
            0,
            sqlite3.SQLITE_ERROR,
            sqlite3.SQLITE_MISUSE,
            sqlite3.SQLITE_RANGE,
            sqlite3.SQLITE_CONSTRAINT,
            sqlite3.SQLITE_MISMATCH,
        )
    # A server's: connections, rights, disk and limits (SQLSTATE classes 08, 28, 3D, 53, 57, 58, 42501); the rest of 22, 23 and 42 is ours.
    state = getattr(error, "sqlstate", None)
    return state is None or state[:2] in ("08", "28", "3D", "53", "55", "57", "58") or state == "42501"
