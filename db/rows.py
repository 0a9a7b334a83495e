"""Rows of any table as they are stored, and whether each value belongs into its column: SQLite keeps any value anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Column, Connection, Double, Integer, LargeBinary, Table, Text, cast, select
from sqlalchemy.sql.elements import ColumnElement

from aivmm.db.schema import UtcDateTime, metadata

ROWS = 5000  # that are in memory at a time
TABLES: tuple[Table, ...] = tuple(metadata.sorted_tables)  # what is referred to comes first


def columns_of(table: Table) -> list[ColumnElement[Any]]:
    """Return what to select so that JSON comes as the text that is stored."""
    return [cast(column, Text).label(column.name) if is_json(column) else column for column in table.c]


def is_json(column: Column[Any]) -> bool:
    """Say whether a column holds JSON."""
    return isinstance(column.type, JSON)


def rows_of(connection: Connection, table: Table, condition: ColumnElement[bool] | None = None) -> Iterable[Sequence[Any]]:
    """Yield the rows of a table, `ROWS` at a time, in the order of its primary key; JSON is text."""
    query = select(*columns_of(table)).order_by(*table.primary_key.columns)
    query = query if condition is None else query.where(condition)
    return connection.execute(query, execution_options={"yield_per": ROWS}).partitions()


def typed(column: Column[Any], value: Any) -> tuple[Any, Any]:
    """Return the value to store and the value to look at (JSON decoded); raise ValueError when it does not belong into the column."""
    if value is None:
        if not column.nullable:
            raise ValueError("is missing")
        return None, None
    match column.type:
        case JSON():
            return value, decoded(value)
        case UtcDateTime():
            fits = isinstance(value, datetime) and value.tzinfo is not None
        case Boolean():
            fits = isinstance(value, bool)
        case BigInteger():
            fits = type(value) is int and -(2**63) <= value < 2**63
        case Integer():
            fits = type(value) is int and -(2**31) <= value < 2**31
        case Double():
            fits = type(value) in (float, int)
        case LargeBinary():
            fits = isinstance(value, bytes)
        case _:
            fits = isinstance(value, str) and "\0" not in value
    if not fits:
        raise ValueError(f"is {str(value)[:40]!r}, which does not belong there")
    return value, value


def decoded(text: Any) -> Any:
    """Return what JSON says; raise ValueError when it is none, or holds NaN or infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"holds {name}, which is not JSON")

    if not isinstance(text, str):
        raise ValueError("is not JSON")
    return json.loads(text, parse_constant=refuse)
