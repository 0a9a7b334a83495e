"""Questions about what is stored: filters that a person gives, what a subject is called, and how much there is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Connection, Select, false, func, or_, select, union

from aivmm.db.database import Database
from aivmm.db.fetch import Entry
from aivmm.db.migrate import revision_of
from aivmm.db.schema import config, lowering, metadata, model, model_block, model_operator, operator, probe, run, run_probe
from aivmm.db.store import chunks
from aivmm.errors import UsageError
from aivmm.probes.records import ProbeKind, replicas_of
from aivmm.runtime.target import matches

KINDS: tuple[str, ...] = ("model", "segment", "operator", "transfer")
STATES = ("measured", "refused", "failed")
HASH_DIGITS = 64  # of a structure, a content and a signature (models/hashing.py)
DEFAULT_PRECISION = "default"  # what a config without a precision is asked for by


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which probes are meant. What is not given does not matter.

    `model` is a model's name or the beginning of its content hash or SHA-256 (8 digits at least): its whole, blocks and operators, and
    everything its runs rest on. `target` is a pattern (`openvino`, `*:CPU`). `precision` may be `default`: none was asked for.
    `environments` are fingerprints. `every` takes older measurements of a key too, not only its newest.
    """

    kind: ProbeKind | str | None = None
    model: str | None = None
    target: str | None = None
    op_type: str | None = None
    precision: str | None = None
    state: str | None = None
    since: datetime | None = None
    environments: Collection[str] | None = None
    every: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("state", self.state, STATES)):
            if value is not None and value not in known:
                raise UsageError(f"unknown {name} {value!r}", advice=f"choose from {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What fits a filter: the newest `limit` entries, oldest first, and how many fit in all."""

    entries: list[Entry]
    total: int


def find(database: Database, wanted: Filter, *, limit: int | None = None) -> Found:
    """Return the probes that fit.

    Raises:
        UsageError: no model is stored under that name.
    """
    with database.reading() as connection:
        ids = list(connection.scalars(select_ids(connection, wanted)))
        chosen = ids if limit is None else ids[max(0, len(ids) - limit) :]
        return Found(entries=database.entries_by_id(connection, chosen), total=len(ids))


def select_ids(connection: Connection, wanted: Filter) -> Select[Any]:
    """Return the query for the ids of the probes that fit, oldest first."""
    query = select(probe.c.id) if wanted.every else select(func.max(probe.c.id)).group_by(probe.c.subject, probe.c.key)
    conditions = [column == value for column, value in ((probe.c.kind, wanted.kind), (probe.c.state, wanted.state)) if value is not None]
    if wanted.model is not None:
        conditions.append(of_models(models_named(connection, wanted.model), wanted.model))
    if wanted.op_type is not None:
        named = select(operator.c.signature).where(func.lower(operator.c.op_type) == wanted.op_type.lower())
        conditions += [probe.c.kind == "operator", _about(named)]
    if wanted.target is not None:
        stored = connection.scalars(select(probe.c.target).distinct())
        conditions.append(probe.c.target.in_([each for each in stored if matches(wanted.target, each)]))
    if wanted.precision is not None:
        none = wanted.precision == DEFAULT_PRECISION
        asked = config.c.precision.is_(None) if none else config.c.precision == wanted.precision
        conditions.append(probe.c.config_digest.in_(select(config.c.digest).where(asked)))
    if wanted.since is not None:
        conditions.append(probe.c.measured_at >= wanted.since)
    if wanted.environments is not None:
        conditions.append(probe.c.environment.in_(list(wanted.environments)))
    return query.where(*conditions).order_by(func.max(probe.c.id) if not wanted.every else probe.c.id)


def _about(hashes: Select[Any] | CompoundSelect[Any]) -> ColumnElement[bool]:
    """Probes whose subject is one of `hashes`, also where it says more than the hash (`hash@input`, `hash~recipe`)."""
    stored = probe.alias("stored")
    # Those are rare. They are found by their mark, in the index of subjects alone, and cut back to the hash.
    marked = or_(stored.c.subject.contains("@"), stored.c.subject.contains("~"))
    longer = select(stored.c.subject).where(marked, func.substr(stored.c.subject, 1, HASH_DIGITS).in_(hashes))
    return or_(probe.c.subject.in_(hashes), probe.c.subject.in_(longer))


def models_named(connection: Connection, name: str, *, required: bool = True) -> list[str]:
    """Return the ids of the models that a `Filter.model` means; raise UsageError when neither a model nor a run has that name."""
    conditions = [model.c.name == name]
    if re.fullmatch(r"[0-9a-fA-F]{8,64}", name):
        conditions += [model.c.content.startswith(name.lower()), model.c.sha256.startswith(name.lower())]
    found = list(connection.scalars(select(model.c.id).where(or_(*conditions))))
    if required and not found and connection.scalars(select(run.c.id).where(run.c.model_name == name).limit(1)).first() is None:
        known = list(connection.scalars(select(model.c.name).distinct().order_by(model.c.name).limit(6)))
        listed = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise UsageError(f"no model {name!r} is stored", advice=f"choose from {listed}" if known else "the database holds no model yet")
    return found


def of_models(ids: list[str], name: str) -> ColumnElement[bool]:
    """Return the condition for the probes of these models, or that their runs rest on."""
    mine = select(model.c.content).where(model.c.id.in_(ids))
    hashes = union(
        mine,
        select(model.c.structure).where(model.c.id.in_(ids)),
        select(model_block.c.structure).where(model_block.c.model_id.in_(ids)),
        select(model_block.c.content).where(model_block.c.model_id.in_(ids)),
        select(model_operator.c.signature).where(model_operator.c.model_id.in_(ids)),
        select(lowering.c.lowered_content).where(lowering.c.content.in_(mine), lowering.c.lowered_content.is_not(None)),
    )
    runs = select(run.c.id).where(or_(run.c.model_name == name, run.c.model_id.in_(ids) if ids else false()))
    linked = select(run_probe.c.probe_id).where(run_probe.c.run_id.in_(runs))
    return or_(_about(hashes), probe.c.id.in_(linked))


def names_of(connection: Connection, subjects: Iterable[str]) -> Mapping[str, str]:
    """Return what each subject is called by people: a model's name, a model and its block, an operator's description, a transfer's size and
    source; else its own text."""
    bases = {subject: re.split("[@~]", subject, maxsplit=1)[0] for subject in subjects}
    known: dict[str, str] = {}
    for some in chunks(sorted(set(bases.values()))):
        blocks = select(model_block.c.structure, model_block.c.content, model.c.name, model_block.c.position).join(model)
        wanted = blocks.where(or_(model_block.c.structure.in_(some), model_block.c.content.in_(some)))
        for block in connection.execute(wanted.order_by(model.c.first_seen_at.desc(), model_block.c.position.desc())):
            known[block.structure] = known[block.content] = f"{block.name} block {block.position}"
        wholes = select(model.c.structure, model.c.content, model.c.name)
        for whole in connection.execute(wholes.where(or_(model.c.structure.in_(some), model.c.content.in_(some)))):
            known[whole.structure] = known[whole.content] = whole.name
        for single in connection.execute(select(operator.c.signature, operator.c.description).where(operator.c.signature.in_(some))):
            known[single.signature] = single.description
    known |= {base: base for base in bases.values() if " from " in base}  # a transfer's is for people already (`Transfer.key`)
    names = {subject: known.get(base, subject) for subject, base in bases.items()}
    return {subject: f"{name} in {count} replicas" if (count := replicas_of(subject)) > 1 else name for subject, name in names.items()}


def statistics(database: Database) -> dict[str, Any]:
    """Return how much is stored, as JSON values.

    `path` (a URL for a server), `schema`, `size_bytes` (with SQLite's log), `tables` (rows of each), `models` (distinct contents),
    `model_names`, `environments`, `probes` by state and by kind, and the `oldest` and `newest` measurement (ISO 8601, UTC; None).
    """
    with database.reading() as connection:
        tables = {name: connection.scalar(select(func.count()).select_from(table)) for name, table in sorted(metadata.tables.items())}

        def counted(column: Any) -> dict[str, int]:
            found = connection.execute(select(column, func.count()).group_by(column).order_by(column)).all()
            return {row[0]: row[1] for row in found}

        # The first and the last id are the oldest and the newest: they grow with time, and an index has them.
        ends = [connection.scalar(select(edge(probe.c.id))) for edge in (func.min, func.max)]
        moments = dict(
            connection.execute(select(probe.c.id, probe.c.measured_at).where(probe.c.id.in_([each for each in ends if each]))).all()
        )
        return {
            "path": database.location,
            "schema": revision_of(connection),
            "size_bytes": _size(connection, database.path),
            "tables": tables,
            "models": connection.scalar(select(func.count(model.c.content.distinct()))),
            "model_names": connection.scalar(select(func.count(model.c.name.distinct()))),
            "environments": tables["environment"],
            "probes": {"state": counted(probe.c.state), "kind": counted(probe.c.kind)},
            "oldest": moments[ends[0]].isoformat() if ends[0] else None,
            "newest": moments[ends[1]].isoformat() if ends[1] else None,
        }


def _size(connection: Connection, path: Path | None) -> int:
    if path is None:
        return int(connection.scalar(select(func.pg_database_size(func.current_database()))) or 0)
    return sum(each.stat().st_size for each in (path, path.with_name(path.name + "-wal")) if each.exists())
