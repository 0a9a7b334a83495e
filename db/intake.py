"""Rows from elsewhere, taken in as if they had been measured here: an export, or another machine's database.

Nothing is believed: each value has to have its column's type, and each row has to be what its digests say (`db/audit.py`). What is known
already stays as it is, so taking the same rows in twice changes nothing. Use within one transaction: what raises undoes all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, delete, select, update
from sqlalchemy.exc import IntegrityError

from aivmm.db.audit import problems
from aivmm.db.insert import insert_values
from aivmm.db.rows import TABLES, typed
from aivmm.db.schema import UtcDateTime, plan, run, study
from aivmm.db.store import chunks
from aivmm.errors import DatabaseError

# Table -> the column that says what its row is a part of. A part comes with its whole or not at all: parts of two tellings never mix.
_PART_OF = {
    "model_operator": ("model", "model_id"),
    "model_block": ("model", "model_id"),
    "transfer": ("probe", "probe_id"),
    "run_probe": ("run", "run_id"),
    "run_environment": ("run", "run_id"),
    "study": ("run", "run_id"),
    "trial": ("study", "study_id"),
    "plan": ("run", "run_id"),
    "proof": ("run", "run_id"),
}
_WHOLES = {whole for whole, _ in _PART_OF.values()}


class Intake:
    """Takes rows in, table by table in the order of `TABLES`. `source` is what a message calls the place they come from."""

    def __init__(self, connection: Connection, source: str) -> None:
        self._connection = connection
        self._source = source
        self._new: dict[str, set[Any]] = {name: set() for name in _WHOLES}  # keys of what was not known before
        self.added = dict.fromkeys((table.name for table in TABLES), 0)

    def take(self, table: Table, rows: Iterable[Sequence[Any]]) -> None:
        """Take rows of one table in, each in the order of its columns with JSON as text.

        Raises:
            DatabaseError: a row is not what it says, or refers to one that is missing.
        """
        names = [column.name for column in table.c]
        checked = [self._checked(table, dict(zip(names, row, strict=True))) for row in rows]
        fresh = self._fresh(table, checked)
        if not fresh:
            return
        encode = _encoder(table, self._connection)
        values = [value for row in fresh for value in encode(row)]
        try:
            insert_values(self._connection, table, values, ignore=True)
        except IntegrityError as error:
            raise self._refused(table, "a row of it refers to one that is missing") from error
        self.added[table.name] += len(fresh)

    def _checked(self, table: Table, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row as it is to be stored; raise when it is not what it says."""
        decoded = dict(row)
        for column in table.c:
            try:
                row[column.name], decoded[column.name] = typed(column, row[column.name])
            except (ValueError, RecursionError) as error:
                raise self._refused(table, f"{column.name} {error}") from error
        found = problems(table.name, decoded)
        if found:
            name = ", ".join(str(decoded[column.name])[:64] for column in table.primary_key.columns)
            raise self._refused(table, f"row {name}: {found[0]}")
        return row

    def _fresh(self, table: Table, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows that are to be stored, each once."""
        keys = [column.name for column in table.primary_key.columns]
        rows = list({tuple(row[name] for name in keys): row for row in rows}.values())
        if table.name in _PART_OF:
            whole, column = _PART_OF[table.name]
            rows = [row for row in rows if row[column] in self._new[whole]]
            if table.name not in _WHOLES:
                return rows
        (key,) = keys
        known: set[str] = set()
        for some in chunks([row[key] for row in rows]):
            known |= set(self._connection.scalars(select(table.c[key]).where(table.c[key].in_(some))))
        fresh = [row for row in rows if row[key] not in known]
        if table.name in _WHOLES:
            # The study of a run that goes on is known, and has new trials.
            self._new[table.name] |= {row[key] for row in (rows if table is study else fresh)}
        if table is run:  # they have their rows; only their parts are to come
            self._new[table.name] |= self._continue_runs([row for row in rows if row[key] in known])
        return fresh

    def _continue_runs(self, rows: list[dict[str, Any]]) -> set[str]:
        """Bring those runs up to date that were under way when they came last and have ended since; return their ids."""
        ended = {row["id"]: row for row in rows if row["finished_at"] is not None}
        open_here = select(run.c.id).where(run.c.id.in_(list(ended)), run.c.finished_at.is_(None))
        continued = set(self._connection.scalars(open_here)) if ended else set()
        for identity in continued:
            changes = {name: json.loads(ended[identity][name]) for name in ("summary", "notes")}
            changes |= {name: ended[identity][name] for name in ("status", "finished_at")}
            self._connection.execute(update(run).where(run.c.id == identity).values(changes))
            self._connection.execute(delete(plan).where(plan.c.run_id == identity))  # the newer one comes with the run's other parts
            self.added["run"] += 1
        return continued

    def _refused(self, table: Table, why: str) -> DatabaseError:
        line = " ".join(f"{table.name}: {why}".split())
        return DatabaseError(f"{self._source} cannot be trusted ({line[:300]}), so nothing of it was taken", advice="get it anew")


def _encoder(table: Table, connection: Connection) -> Callable[[Mapping[str, Any]], list[Any]]:
    """Return what turns a row into driver-ready values, in the order of the columns."""
    moments = {
        column.name: column.type.dialect_impl(connection.dialect).bind_processor(connection.dialect)
        for column in table.c
        if isinstance(column.type, UtcDateTime)
    }
    names = [column.name for column in table.c]

    def encode(row: Mapping[str, Any]) -> list[Any]:
        for name, process in moments.items():
            if process is not None and row[name] is not None:
                row = {**row, name: process(row[name])}
        return [row[name] for name in names]

    return encode
