"""Forgetting on purpose: what nobody needs any more goes, and nothing that a kept run rests on."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, func, not_, or_, select, union
from sqlalchemy.sql.elements import ColumnElement

from aivmm.db.database import Database
from aivmm.db.engine import explain
from aivmm.db.query import models_named, of_models
from aivmm.db.schema import (
    config,
    model,
    model_block,
    model_operator,
    operator,
    probe,
    proof,
    run,
    run_environment,
    run_probe,
    segment,
    transfer,
    trial,
)
from aivmm.db.store import chunks
from aivmm.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """What is to go: probes that fit everything that is given.

    `older_than` is a moment. `model` is as in `Filter`. `other_than` are the fingerprints that stay, all other environments' probes go.
    `failed` takes only those that failed. `keep_newest` takes those that are not among the newest N of their key. `runs` takes the runs too
    that fit `older_than`, `model` and `other_than`; without it, and of every run that stays, each probe it rests on stays.
    """

    older_than: datetime | None = None
    model: str | None = None
    other_than: Collection[str] | None = None
    failed: bool = False
    keep_newest: int | None = None
    runs: bool = False

    def __post_init__(self) -> None:
        about_runs = (self.older_than, self.model, self.other_than)
        if not any(each is not None for each in about_runs) and not self.failed and self.keep_newest is None:
            raise UsageError(
                "prune needs to know what may go", advice="give --older-than, --model, --environment other, --failed or --keep-newest"
            )
        if self.keep_newest is not None and self.keep_newest < 1:
            raise UsageError(f"--keep-newest {self.keep_newest} would keep none", advice="give 1 or more")
        if self.runs and all(each is None for each in about_runs):
            raise UsageError("--runs does not say which", advice="give --older-than, --model or --environment other with it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What went, or would go: rows, the probes that fit and stay because a kept run rests on them, and the bytes given back."""

    probes: int
    runs: int
    configs: int
    models: int
    kept_for_runs: int
    freed_bytes: int
    note: str = ""


def prune(database: Database, wanted: Prune, *, dry_run: bool = False) -> Pruned:
    """Remove what `wanted` says, in one transaction, and give its space back; with `dry_run` only say what would go.

    Raises:
        UsageError: no model has that name.
    """
    with database.reading() if dry_run else database.writing() as connection:
        runs = _runs(connection, wanted)
        fits = list(connection.scalars(_fitting(connection, wanted)))
        kept = _resting(connection, fits, set(runs))
        probes = [each for each in fits if each not in kept]
        if dry_run:
            return Pruned(probes=len(probes), runs=len(runs), configs=0, models=0, kept_for_runs=len(kept), freed_bytes=0)
        _remove(connection, run, run.c.id, runs)
        _remove(connection, probe, probe.c.id, probes)
        models = _forget_models(connection, wanted)
        configs = _forget_configs(connection) if probes or runs else 0
    freed, note = _give_back(database) if probes or runs or configs or models else (0, "")
    return Pruned(probes=len(probes), runs=len(runs), configs=configs, models=models, kept_for_runs=len(kept), freed_bytes=freed, note=note)


def _runs(connection: Connection, wanted: Prune) -> list[str]:
    if not wanted.runs:
        return []
    conditions: list[ColumnElement[bool]] = []
    if wanted.older_than is not None:
        conditions.append(run.c.started_at < wanted.older_than)
    if wanted.model is not None:
        conditions.append(or_(run.c.model_name == wanted.model, run.c.model_id.in_(models_named(connection, wanted.model))))
    if wanted.other_than is not None:
        # A run of this machine may have been in environments of before, too: it stays.
        here = select(run_environment.c.run_id).where(run_environment.c.environment.in_(list(wanted.other_than)))
        conditions.append(run.c.id.not_in(here))
    return list(connection.scalars(select(run.c.id).where(*conditions)))


def _fitting(connection: Connection, wanted: Prune) -> Any:
    conditions: list[ColumnElement[bool]] = []
    if wanted.older_than is not None:
        conditions.append(probe.c.measured_at < wanted.older_than)
    if wanted.model is not None:
        conditions.append(of_models(models_named(connection, wanted.model), wanted.model))
    if wanted.other_than is not None:
        stay = list(wanted.other_than)
        from_elsewhere = select(transfer.c.probe_id).where(transfer.c.source_environment.not_in(stay))
        conditions.append(or_(probe.c.environment.not_in(stay), probe.c.id.in_(from_elsewhere)))
    if wanted.failed:
        conditions.append(probe.c.state == "failed")
    if wanted.keep_newest is not None:
        rank = func.row_number().over(partition_by=probe.c.key, order_by=probe.c.id.desc()).label("rank")
        ranked = select(probe.c.id, rank).subquery()
        conditions.append(probe.c.id.in_(select(ranked.c.id).where(ranked.c.rank > wanted.keep_newest)))
    return select(probe.c.id).where(*conditions)


def _resting(connection: Connection, probes: Sequence[str], going: set[str]) -> set[str]:
    """Return those of `probes` that a run rests on which is not `going`."""
    kept: set[str] = set()
    for some in chunks(probes):
        linked = connection.execute(select(run_probe.c.probe_id, run_probe.c.run_id).where(run_probe.c.probe_id.in_(some)))
        kept |= {row.probe_id for row in linked if row.run_id not in going}
    return kept


def _remove(connection: Connection, table: Table, column: ColumnElement[Any], keys: Sequence[str]) -> None:
    """Delete rows, and with them their parts."""
    for some in chunks(keys):
        connection.execute(delete(table).where(column.in_(some)))


def _forget_models(connection: Connection, wanted: Prune) -> int:
    """Forget the models that were named and that no run is about any more, and the parts that no other model has."""
    if wanted.model is None or not wanted.runs:
        return 0
    named = models_named(connection, wanted.model, required=False)
    used = set(connection.scalars(select(run.c.model_id).where(run.c.model_id.in_(named))))
    going = [each for each in named if each not in used]
    _remove(connection, model, model.c.id, going)
    connection.execute(delete(operator).where(operator.c.signature.not_in(select(model_operator.c.signature))))
    connection.execute(delete(segment).where(segment.c.structure.not_in(select(model_block.c.structure))))
    return len(going)


def _forget_configs(connection: Connection) -> int:
    """Forget what nothing was compiled with any more."""
    used = union(
        select(probe.c.config_digest),
        select(probe.c.effective_digest).where(probe.c.effective_digest.is_not(None)),
        select(transfer.c.source_config_digest).where(transfer.c.source_config_digest.is_not(None)),
        select(trial.c.config_digest),
        select(proof.c.config_digest),
    )
    return connection.execute(delete(config).where(not_(config.c.digest.in_(used)))).rowcount


def _give_back(database: Database) -> tuple[int, str]:
    """Give a file's free pages back; return the bytes, and why not when another process is in the way."""
    if database.path is None:
        return 0, "the server gives space back by itself (autovacuum)"
    log = database.path.with_name(database.path.name + "-wal")

    def size() -> int:
        return sum(each.stat().st_size for each in (database.path, log) if each is not None and each.exists())

    before = size()
    try:
        with closing(database.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            cursor.execute("VACUUM")  # outside any transaction, so around SQLAlchemy, which would begin one
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            cursor.fetchall()
    except sqlite3.OperationalError as error:
        return 0, f"what was removed is gone, but its space is not given back yet: {explain(error, database.location).message}"
    return max(0, before - size()), ""
