"""Are stored rows what they say? One rule a table, for `aivmm db check` and for rows that come from elsewhere.

A row is a mapping of its columns, with JSON decoded. What a rule finds is said in words; a rule that meets a value it cannot read says
that, and never raises.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Table

from aivmm.db import codec
from aivmm.db.models import model_id
from aivmm.db.rows import TABLES, rows_of, typed
from aivmm.probes.records import ProbeKey
from aivmm.runtime.config import Config

Row = Mapping[str, Any]
_KINDS = ("model", "segment", "operator", "transfer")
_STATES = ("measured", "refused", "failed")
_SETTINGS = (str, int, float, bool)


def problems(table: str, row: Row) -> list[str]:
    """Return what is wrong with a row of `table`, in words; an empty list means nothing is."""
    rule = _RULES.get(table)
    if rule is None:
        return []
    try:
        return list(rule(row))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        # Whatever a stranger's JSON may hold instead of what belongs there.
        return [f"cannot be read ({type(error).__name__}: {error})"]


def check(connection: Connection) -> list[str]:
    """Return what is wrong with a database, one line each: pages, references, types, samples and digests. Reads everything."""
    found: list[str] = []
    if connection.dialect.name == "sqlite":
        found += [str(line) for (line,) in connection.exec_driver_sql("PRAGMA integrity_check") if line != "ok"]
        for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            found.append(f"{table}: {'a row' if row is None else f'row {row}'} refers to a missing {parent}")
    for each in TABLES:
        found += _check_table(connection, each)
    return found


def _check_table(connection: Connection, table: Table) -> Iterator[str]:
    keys = [column.name for column in table.primary_key.columns]
    try:
        for rows in rows_of(connection, table):
            for values in rows:
                row = dict(zip(table.c.keys(), values, strict=True))
                name = f"{table.name} {', '.join(str(row[key])[:64] for key in keys)}"
                try:
                    for column in table.c:
                        row[column.name] = typed(column, row[column.name])[1]
                except (ValueError, RecursionError) as error:
                    yield f"{name}: {column.name} {error}"
                    continue
                for problem in problems(table.name, row):
                    yield f"{name}: {problem}"
    except (ValueError, TypeError) as error:  # a moment that is none: raised while rows are fetched, so the rest stays unread
        yield f"{table.name}: cannot be read to its end ({error})"


def _environment(row: Row) -> Iterator[str]:
    found = codec.environment_from_json(row["facts"])
    if found.fingerprint != row["fingerprint"]:
        yield "its fingerprint is not that of its facts"
    if found.target != row["target"]:
        yield "its target is not that of its facts"


def _device(row: Row) -> Iterator[str]:
    codec.device_from_json(row["facts"])
    if codec.digest("device", row["facts"]) != row["id"]:
        yield "its id is not the digest of its facts"


def _target(row: Row) -> Iterator[str]:
    names = ("runtime", "name", "runtime_version", "precisions", "device_id", "environment")
    if codec.digest("target", {name: row[name] for name in names}) != row["id"]:
        yield "its id is not the digest of its facts"


def _config(row: Row) -> Iterator[str]:
    if not all(isinstance(value, _SETTINGS) for value in row["settings"].values()):
        yield "a setting is neither text nor a number"
    elif Config.of(row["settings"], precision=row["precision"]).digest() != row["digest"]:
        yield "its digest is not that of its settings"


def _model(row: Row) -> Iterator[str]:
    codec.facts_from_json(row["facts"])
    list(map(codec.cut_point_from_json, row["cut_points"]))
    if not all(isinstance(node, str) for piece in row["pieces"] or () for node in piece):
        yield "a node's name is not text"
    if model_id(row["content"], row["batch"]) != row["id"]:
        yield "its id is not the digest of its content and batch"


def _model_operator(row: Row) -> Iterator[str]:
    if not all(isinstance(node, str) for node in row["nodes"]):
        yield "a node's name is not text"


def _model_block(row: Row) -> Iterator[str]:
    for side in ("inputs", "outputs"):
        list(map(codec.spec_from_json, row[side]))
    yield from ()


def _probe(row: Row) -> Iterator[str]:
    key = ProbeKey(
        kind=row["kind"],
        subject=row["subject"],
        target=row["target"],
        environment=row["environment"],
        config=Config(),
        batch=row["batch"],
        callers=row["callers"],
    )
    if codec.key_digest(key, row["config_digest"]) != row["key"]:
        yield "its key is not the digest of what it is about"
    if row["kind"] not in _KINDS:
        yield f"unknown kind {row['kind']!r}"
    if row["state"] not in _STATES:
        yield f"unknown state {row['state']!r}"
    yield from _uuid(row["id"])
    if row["state"] == "measured":
        codec.unpack_samples(row["samples"])
        if row["effective_digest"] is None:
            yield "it was measured and has no effective config"
        if not all(isinstance(count, int) for count in (row["placement"] or {}).values()):
            yield "its placement does not count nodes"
        for name, value in row["metrics"].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                yield f"{name} is {str(value)[:40]}, which is no number"
    list(map(codec.caution_from_json, row["cautions"] or ()))


def _run(row: Row) -> Iterator[str]:
    yield from _uuid(row["id"])
    codec.facts_from_json(row["facts"])
    list(map(codec.unavailable_from_json, row["unavailable"]))


def _proof(row: Row) -> Iterator[str]:
    if row["samples"] is not None:
        codec.unpack_samples(row["samples"])
    list(map(codec.caution_from_json, row["cautions"]))
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in row["metrics"].values()):
        yield "a metric is not a finite number"


def _plan(row: Row) -> Iterator[str]:
    if not isinstance(row["content"], dict):
        yield "its content is not a plan"


def _uuid(text: str) -> Iterator[str]:
    try:
        uuid.UUID(text)
    except ValueError:
        yield f"its id {text!r} is not a UUID"


_RULES: dict[str, Callable[[Row], Iterator[str]]] = {
    "environment": _environment,
    "device": _device,
    "target": _target,
    "config": _config,
    "model": _model,
    "model_operator": _model_operator,
    "model_block": _model_block,
    "probe": _probe,
    "run": _run,
    "proof": _proof,
    "plan": _plan,
}
