"""Databases of other machines become part of this one. They are only read, and read as strangers': see `db/intake.py`."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from aivmm.db import migrate
from aivmm.db.database import Database
from aivmm.db.engine import explain, explained, make_engine, transaction
from aivmm.db.insert import large_cache
from aivmm.db.intake import Intake
from aivmm.db.location import Location
from aivmm.db.rows import TABLES, rows_of
from aivmm.errors import DatabaseError, UsageError

_PROBES = 100_000  # a database's size is not known before it is read; a large one gains by the cache, a small one loses nothing


def merge(database: Database, other: str | Path, *, timeout_s: float = 30.0) -> dict[str, int]:
    """Take in what `other` (a file or a URL) knows, all of it or nothing, and return how many rows of each table are new.

    Keys are UUIDs or digests of content, so rows of many machines live side by side, and a second time nothing is new. A run that was
    under way the last time and has ended since is brought up to date. A file is copied first, and an older one migrated as a copy.

    Raises:
        UsageError: it is this database.
        DatabaseError: it is missing, not ours, damaged, newer, or a server's that is older; or it holds what cannot be so.
    """
    place = Location.of(other)
    here = database.path
    if place.shown == database.location or (here and place.path and place.path.exists() and place.path.samefile(here)):
        raise UsageError(f"{place.shown} is the database itself", advice="name another one")
    with _opened(place, timeout_s) as source, source.reading() as theirs, database.writing() as ours:
        intake = Intake(ours, place.shown)
        with large_cache(ours, _PROBES):
            for table in TABLES:
                try:
                    for rows in rows_of(theirs, table):
                        intake.take(table, rows)
                except (ValueError, TypeError) as error:  # SQLite keeps any value in any column
                    what = f"{place.shown} cannot be trusted ({table.name}: {error}), so nothing of it was taken"
                    raise DatabaseError(what, advice="see `aivmm db check` there") from error
    return intake.added


@contextmanager
def _opened(place: Location, timeout_s: float) -> Iterator[Database]:
    if place.path is None:
        engine = make_engine(place, timeout_s=timeout_s)
        try:
            with explained(place.shown), transaction(engine, writes=False) as connection:
                _require_current(migrate.revision_of(connection), place.shown)
            yield Database(place, engine)
        finally:
            engine.dispose()
        return
    with tempfile.TemporaryDirectory(prefix="aivmm-merge-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "copy.db"
        _copy(place.path, copy, timeout_s)
        try:
            source = Database.open(copy, timeout_s=timeout_s)
        except DatabaseError as error:
            raise DatabaseError(error.message.replace(str(copy), place.shown), advice="name a performance database of aivmm") from error
        with source:
            yield source


def _require_current(revision: str | None, shown: str) -> None:
    if revision is None:
        raise DatabaseError(f"{shown} holds no performance database", advice="check its name")
    if revision not in migrate.REVISIONS:
        raise migrate.newer(shown, revision)
    if revision != migrate.HEAD:
        raise DatabaseError(
            f"{shown} has the older schema {revision!r}, and is not changed by reading it",
            advice=f"migrate it with: aivmm db stats --db {shown}",
        )


def _copy(path: Path, to: Path, timeout_s: float) -> None:
    """Copy a SQLite file as it is at this moment, with what its log holds, while others may write to it."""
    if not path.is_file():
        raise DatabaseError(f"there is no database {path}", advice="check its name")
    real = Path(os.path.realpath(path))
    log = real.with_name(real.name + "-wal")
    # Without a log nothing is under way; a medium that cannot be written could not hold the lock file that SQLite wants.
    still = not log.exists() and not os.access(real.parent, os.W_OK)
    text = quote(real.as_posix(), safe="/:")
    uri = f"file://{'' if text.startswith('/') else '/'}{text}?mode=ro{'&immutable=1' if still else ''}"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=timeout_s)) as source, closing(sqlite3.connect(to)) as copy:
            source.backup(copy)
    except sqlite3.Error as error:
        raise explain(error, str(path)) from error
