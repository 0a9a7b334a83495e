"""Look at a SQLite file before it is opened for good: what is refused is left as it is, byte for byte."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from aivmm.db.engine import busy, explain
from aivmm.db.migrate import HEAD, REVISIONS, VERSION_TABLE, newer
from aivmm.errors import DatabaseError

_MAGIC = b"SQLite format 3\0"
_CHECKED_BYTES = 16 << 20  # `quick_check` reads every page (about 0.3 GB/s): up to here nobody notices, beyond it is for `aivmm db check`
_OTHER = "give another file with --db"


def is_current(path: Path, *, timeout_s: float) -> bool:
    """Say whether the file is a database of ours that needs no migration; False is one that is missing, empty or older.

    Nothing is written, and nothing is left beside a file that is refused.

    Raises:
        DatabaseError: not ours, newer, damaged, not writable, or locked for longer than `timeout_s`.
    """
    try:
        _check_access(path)
    except PermissionError as error:  # from looking at it at all: a folder above may not be entered
        raise DatabaseError(f"the database {path} cannot be reached by you ({error.strerror})", advice=_OTHER) from error
    size = path.stat().st_size if path.exists() else 0
    if size == 0:
        return False
    if size == 1:  # which SQLite takes for empty, since it once wrote such files itself
        raise _foreign(path)
    start = time.monotonic()
    deadline = start + timeout_s
    while True:
        try:
            return _look(path, max(0.0, deadline - time.monotonic()))
        except sqlite3.DatabaseError as error:
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF == sqlite3.SQLITE_NOTADB and not _begins_as_sqlite(path):
                raise _foreign(path) from error
            # Another process that opens or closes the file at this moment makes and removes its side files under us.
            code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
            patience_s = timeout_s if busy(error) else 2.0 if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) else 0.0
            if time.monotonic() >= start + min(timeout_s, patience_s):
                raise explain(error, str(path)) from error
            time.sleep(0.02)


def _begins_as_sqlite(path: Path) -> bool:
    """Read the first bytes. Only of what SQLite cannot open: closing a file takes from this whole process the locks (POSIX) that its other
    connections have on it, and another process, believing itself alone, would then remove the log under them with all that is in it."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _check_access(path: Path) -> None:
    if path.is_dir():
        raise DatabaseError(f"{path} is a directory, not a database", advice="give a file with --db")
    folder = path.parent
    if not folder.is_dir():
        raise DatabaseError(f"the folder {folder} for the database does not exist", advice=f"make it, or {_OTHER}")
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise DatabaseError(f"the database {path} is not writable by you", advice=f"make it writable, or {_OTHER}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DatabaseError(
            f"the folder {folder} is not writable by you, and SQLite keeps its log beside the database",
            advice=f"make it writable, or {_OTHER}",
        )


def _look(path: Path, timeout_s: float) -> bool:
    with closing(sqlite3.connect(_uri(path), uri=True, timeout=timeout_s, isolation_level=None)) as connection:
        connection.execute("PRAGMA query_only=ON")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")}
        if not tables:
            return False  # another process is creating it, or was killed before it could
        revision = _revision(connection, path, tables)
        size = path.stat().st_size
        if size % connection.execute("PRAGMA page_size").fetchone()[0]:  # SQLite takes what is missing of the last page for zeros
            raise _damaged(path, "it ends in the middle of a page")
        if size <= _CHECKED_BYTES:
            problems = [problem for (problem,) in connection.execute("PRAGMA quick_check(1)") if problem != "ok"]
            if problems:
                raise _damaged(path, problems[0])
        return revision == HEAD


def _revision(connection: sqlite3.Connection, path: Path, tables: set[str]) -> str:
    if VERSION_TABLE not in tables:
        raise DatabaseError(f"{path} is a SQLite database of something else than aivmm", advice=f"it was left as it is; {_OTHER}")
    revisions = [str(revision) for (revision,) in connection.execute(f"SELECT version_num FROM {VERSION_TABLE}")]
    if not revisions:
        raise _damaged(path, f"{VERSION_TABLE} is empty")
    if revisions[0] not in REVISIONS:
        raise newer(str(path), revisions[0])
    return revisions[0]


def _uri(path: Path) -> str:
    """Return how to open the file so that closing it again leaves no trace.

    A read-only connection leaves the side files it makes; a writable one removes them, but also moves what a killed process left in the
    log into the file. So: read-only when there is such a log, writable (with query_only) when there is not.
    """
    real = Path(os.path.realpath(path))
    log = real.with_name(real.name + "-wal")
    mode = "ro" if log.exists() and log.stat().st_size else "rw"
    # Not Path.as_uri(): of a Windows network path it makes file://server/share, and SQLite takes no server.
    text = quote(real.as_posix(), safe="/:")
    return f"file://{'' if text.startswith('/') else '/'}{text}?mode={mode}"


def _foreign(path: Path) -> DatabaseError:
    return DatabaseError(f"{path} is not a SQLite database", advice=f"move it away, or {_OTHER}")


def _damaged(path: Path, why: str) -> DatabaseError:
    line = why.strip().splitlines()[-1] if why.strip() else why
    return DatabaseError(f"the database {path} is damaged ({line})", advice=f"restore a copy or move it away, or {_OTHER}")
