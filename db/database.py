"""The performance database: opened, migrated and checked here; what it holds is in the other stores."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine

from aivmm.db import audit, migrate, preflight
from aivmm.db.engine import explained, make_engine, transaction, use_wal
from aivmm.db.location import Location
from aivmm.db.lowerings import LoweringStore
from aivmm.db.machines import MachineStore
from aivmm.db.models import ModelStore
from aivmm.db.probes import Entry
from aivmm.db.similar import SimilarStore
from aivmm.db.transfers import TransferStore
from aivmm.errors import DatabaseError

__all__ = ["Database", "Entry"]


class Database(MachineStore, ModelStore, LoweringStore, TransferStore, SimilarStore):
    """All that was ever measured, in one file or on one server. Whatever a method stores is on disk when it returns.

    Every method raises DatabaseError when the file or the server does not do as asked (locked, full, gone, damaged).
    """

    @classmethod
    def open(cls, location: str | Path | None = None, *, timeout_s: float = 30.0, make: bool = True) -> Self:
        """Open a database for reading and writing; make it when it is missing (with `make`), migrate it when it is older.

        `location` is a path or a URL; None is `AIVMM_DB`, or else the user's data folder. `timeout_s` is how long to wait for other
        processes, here and in every later call. Several processes may open the same new file at once.

        Raises:
            DatabaseError: it cannot be opened, is damaged, not ours, or from a newer aivmm; the file is left as it is. Or it is missing,
                and not to be made.
        """
        if not 0 <= timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s}")
        place = Location.of(location)
        if not make:
            _require_there(place)
        current = place.path is not None and preflight.is_current(place.path, timeout_s=timeout_s)
        engine = make_engine(place, timeout_s=timeout_s)
        try:
            with explained(place.shown):
                _make_ready(engine, place, current=current, timeout_s=timeout_s)
            return cls(place, engine)
        except BaseException:  # not handled, only cleaned up: an engine left open would hold the file
            engine.dispose()
            raise

    def close(self) -> None:
        """Let go of the file or the server. The last process to do so folds SQLite's log into the file."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def check(self) -> list[str]:
        """Return what is wrong, one line each; an empty list means that pages, references, types, samples and digests are sound.

        Reads everything."""
        with self._reading() as connection:
            return audit.check(connection)


def _require_there(place: Location) -> None:
    """Raise for a file that is missing: whoever only asks has mistyped its name, and would be told of an empty one."""
    if place.path is not None and not place.path.exists():
        raise DatabaseError(f"there is no database {place.shown}", advice="check its name, or let aivmm-tune make one")


def _make_ready(engine: Engine, place: Location, *, current: bool, timeout_s: float) -> None:
    if place.path is None:
        with transaction(engine, writes=False) as connection:
            current = migrate.revision_of(connection) == migrate.HEAD
    else:
        use_wal(engine, timeout_s=timeout_s)
    if not current:
        migrate.upgrade(engine, location=place.shown)
    elif place.path is not None:
        # Whoever opens is going to write: find out now, and not after an hour of measuring, that the file is locked or unwritable.
        with transaction(engine, writes=True):
            pass
