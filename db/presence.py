"""A SQLite file that is removed, moved or replaced while it is open: noticed at the next write, and what it held is saved elsewhere.

SQLite itself goes on writing into a file without a name, which nobody could ever open again.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

from aivmm.errors import DatabaseError
from aivmm.runtime.folders import data_folder


class Presence:
    """Which files an engine has open, and whether they are still those of their names. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = Path(os.path.realpath(path))  # SQLite keeps its log beside the file, not beside a link to it
        self._log = self._file.with_name(self._file.name + "-wal")
        self._known: dict[Path, tuple[int, int]] = {}
        self._open = 0  # connections
        self._lock = threading.Lock()
        self._told: DatabaseError | None = None

    def opened(self) -> None:
        """A connection has been made: the file is the one it has, if it was none before."""
        with self._lock:
            self._open += 1
            self._note(self._file)

    def began(self) -> None:
        """A connection is in a transaction: from now on the log (when there is one) stays until the last connection closes."""
        if self._log not in self._known:
            with self._lock:
                self._note(self._log)

    def closed(self) -> None:
        """A connection is gone; with the last one SQLite removes the log, and the next one makes a new one."""
        with self._lock:
            self._open -= 1
            if not self._open:
                self._known.pop(self._log, None)

    def _note(self, path: Path) -> None:
        if path not in self._known and (found := _identity(path)):
            self._known[path] = found

    def lost(self) -> bool:
        """Say whether a file that was noted has lost its name. Costs two calls of stat."""
        return any(_identity(path) != known for path, known in list(self._known.items()))

    def require(self, connection: sqlite3.Connection) -> None:
        """Raise DatabaseError when the file was lost, having saved everything that `connection`, which has it open, can read.

        It is saved once; who asks again is told the same.
        """
        if not self.lost():
            return
        with self._lock:
            if self._told is None:
                self._told = self._save(connection)
        raise _again(self._told)

    def refuse(self) -> None:
        """Raise DatabaseError when the file was lost: a new connection would make or open another one."""
        if self.lost():
            raise _again(self._told) if self._told else self._error("", "put it back, or run again with another --db")

    def _save(self, connection: sqlite3.Connection) -> DatabaseError:
        why = ""
        for target in self._targets():
            try:
                _copy(connection, target)
            except (OSError, sqlite3.Error) as error:  # the folder is gone too, or full: the next may do
                why = why or f"; what it held could not be saved in {target.parent} ({error})"
            else:
                # Not "move it back": beside the old name may lie the old log, which SQLite would take for that of the new file.
                return self._error(f"; all that it held is saved in {target}", "give that file with --db")
        return self._error(why, "run again with another --db")

    def _error(self, more: str, advice: str) -> DatabaseError:
        return DatabaseError(f"the database {self._path} was removed or replaced while in use{more}", advice=advice)

    def _targets(self) -> Iterator[Path]:
        name = f"{self._file.stem}-saved-{datetime.now().astimezone():%Y%m%d-%H%M%S}-{os.getpid()}.db"
        for folder in (self._file.parent, data_folder(), Path(tempfile.gettempdir())):
            yield folder / name


def _again(error: DatabaseError) -> DatabaseError:
    """Return a copy to raise: one that is raised twice collects the tracebacks of both."""
    return DatabaseError(error.message, advice=error.advice)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _copy(connection: sqlite3.Connection, target: Path) -> None:
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))  # never over something that is there
    try:
        with closing(sqlite3.connect(target)) as copy:
            connection.backup(copy)
    except sqlite3.Error:
        target.unlink(missing_ok=True)
        raise
