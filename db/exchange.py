"""Measurements in files: one Parquet file a table and a manifest that vouches for them, as a folder or a zip of it.

Whoever imports does not trust whoever exported: names are known ones, files are hashed before they are read, columns have to have the
types of this schema, rows are looked at one by one (`db/intake.py`), and nothing stays of an import that fails.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import JSON, BigInteger, Boolean, Column, Connection, Double, Integer, LargeBinary, Select, Table, false, or_, select
from sqlalchemy.sql.elements import ColumnElement

from aivmm.db.database import Database
from aivmm.db.insert import large_cache
from aivmm.db.intake import Intake
from aivmm.db.migrate import HEAD, REVISIONS
from aivmm.db.query import Filter, models_named, select_ids
from aivmm.db.rows import ROWS, TABLES, rows_of
from aivmm.db.schema import (
    UtcDateTime,
    config,
    device,
    environment,
    lowering,
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
    study,
    target,
    transfer,
    trial,
)
from aivmm.errors import DatabaseError, UsageError

FORMAT = "aivmm-measurements"
MANIFEST = "manifest.json"
_MANIFEST_BYTES = 1 << 20
_CHUNK_BYTES = 256 << 20  # of one column in one row group, uncompressed; ours are far below
_GET_ANOTHER = "export it again with `aivmm db export`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What the manifest says of one file."""

    rows: int
    bytes: int
    sha256: str


def export(database: Database, place: Path, wanted: Filter | None = None) -> dict[str, Any]:
    """Write what fits `wanted` (everything when it is None) to a new folder, or to a zip when the name ends so; return the manifest.

    Facts that chosen rows refer to come along. With a model, or with a time alone, its runs come too, and every probe they rest on; a
    run is never torn, so other filters leave runs out. The place appears when all of it is written, or not at all.

    Raises:
        UsageError: the place exists, its parent does not, or no model has that name.
    """
    packed = place.suffix.lower() == ".zip"
    if place.suffix and not packed and not place.is_dir():
        raise UsageError(f"cannot export to {place}", advice="give a folder, or a name that ends with .zip")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UsageError(f"{place} exists already", advice="remove it, or export to another place")
    parent = place.absolute().parent
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".aivmm-export-", dir=parent))
    except OSError as error:
        raise UsageError(f"cannot write into {parent}: {error.strerror or error}", advice="export to another place") from error
    try:
        folder = scratch / "export"
        folder.mkdir()
        manifest = _write(database, folder, wanted)
        if packed:
            _pack(folder, scratch / "export.zip")
            (scratch / "export.zip").replace(place)
        else:
            if place.is_dir():
                place.rmdir()  # an empty one; Windows renames onto nothing
            folder.rename(place)
    except OSError as error:
        raise UsageError(f"cannot write {place}: {error.strerror or error}", advice="free space, or export to another place") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def import_from(database: Database, place: Path) -> dict[str, int]:
    """Take an export in, all of it or nothing, and return how many rows of each table are new. A second time, none is.

    Raises:
        DatabaseError: it is not an export, was changed or damaged, is from another schema, or holds what cannot be so.
    """
    with ExitStack() as stack:
        source = stack.enter_context(_opened(place))
        manifest = _manifest(source, place)
        files = {}
        for table in TABLES:
            files[table.name] = stack.enter_context(source(f"{table.name}.parquet"))
            _check_hash(files[table.name], f"{place}: {table.name}.parquet", manifest[table.name])
        with database.writing() as connection, large_cache(connection, sum(each.rows for each in manifest.values())):
            intake = Intake(connection, str(place))
            for table in TABLES:
                for rows in _parquet_rows(files[table.name], table, manifest[table.name], place):
                    intake.take(table, rows)
        return intake.added


# --- what is written


def _write(database: Database, folder: Path, wanted: Filter | None) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    with database.reading() as connection:
        conditions = {} if wanted is None else _conditions(connection, wanted)
        for table in TABLES:
            file = folder / f"{table.name}.parquet"
            rows = _write_table(connection, table, file, conditions.get(table.name))
            digest = hashlib.sha256()
            with file.open("rb") as written:
                while block := written.read(1 << 20):
                    digest.update(block)
            tables[table.name] = {"file": file.name, "rows": rows, "bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    manifest = {
        "format": FORMAT,
        "version": 1,
        "schema": HEAD,
        "aivmm": version("aivmm"),
        "exported_at": datetime.now(UTC).isoformat(),
        "filters": {} if wanted is None else _shown(wanted),
        "tables": tables,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _shown(wanted: Filter) -> dict[str, Any]:
    since = wanted.since.isoformat() if wanted.since else None
    shown = {"model": wanted.model, "target": wanted.target, "since": since}
    return {name: value for name, value in shown.items() if value is not None}


def _write_table(connection: Connection, table: Table, file: Path, condition: ColumnElement[bool] | None) -> int:
    schema = arrow_schema(table)
    written = 0
    # No dictionaries: a reader can then not be made to blow one long value up into a million (zstd finds the repetitions as well).
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
        for rows in rows_of(connection, table, condition):
            columns = [pa.array(values, type=field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            written += len(rows)
    return written


def arrow_schema(table: Table) -> pa.Schema:
    """Return the columns of a table's Parquet file; JSON is text."""
    return pa.schema([pa.field(column.name, _arrow_type(column), nullable=bool(column.nullable)) for column in table.c])


def _arrow_type(column: Column[Any]) -> pa.DataType:
    match column.type:
        case JSON():
            return pa.string()
        case UtcDateTime():
            return pa.timestamp("us", tz="UTC")
        case Boolean():
            return pa.bool_()
        case BigInteger():
            return pa.int64()
        case Integer():
            return pa.int32()
        case Double():
            return pa.float64()
        case LargeBinary():
            return pa.binary()
        case _:
            return pa.string()


def _pack(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:  # Parquet is compressed already
        for each in sorted(folder.iterdir()):
            packed.write(each, each.name)


def _conditions(connection: Connection, wanted: Filter) -> dict[str, ColumnElement[bool]]:
    """Return which rows of each table go along with the probes that fit."""
    runs = select(run.c.id)
    models = select(model.c.id)
    if wanted.model is not None:
        named = models_named(connection, wanted.model)
        runs = runs.where(or_(run.c.model_name == wanted.model, run.c.model_id.in_(named)))
        models = models.where(or_(model.c.id.in_(named), model.c.id.in_(runs.with_only_columns(run.c.model_id))))
    if wanted.since is not None:
        runs = runs.where(run.c.started_at >= wanted.since)
    if wanted.target is not None:
        runs = runs.where(false())
    linked = select(run_probe.c.probe_id).where(run_probe.c.run_id.in_(runs))
    probes = select(probe.c.id).where(or_(probe.c.id.in_(select_ids(connection, wanted).order_by(None)), probe.c.id.in_(linked)))
    # The parts of a run, and else of a probe: what a run rests on is its own.
    parts = {table.name: table.c.run_id.in_(runs) for table in TABLES if "run_id" in table.c}
    parts |= {table.name: table.c.probe_id.in_(probes) for table in TABLES if "probe_id" in table.c and "run_id" not in table.c}
    return parts | {
        "probe": probe.c.id.in_(probes),
        "run": run.c.id.in_(runs),
        "trial": trial.c.study_id.in_(select(study.c.id).where(study.c.run_id.in_(runs))),
        "config": _used_configs(probes, runs),
        **_machines(probes, runs),
        "model": model.c.id.in_(models),
        "model_operator": model_operator.c.model_id.in_(models),
        "model_block": model_block.c.model_id.in_(models),
        "operator": operator.c.signature.in_(select(model_operator.c.signature).where(model_operator.c.model_id.in_(models))),
        "segment": segment.c.structure.in_(select(model_block.c.structure).where(model_block.c.model_id.in_(models))),
        "lowering": lowering.c.content.in_(select(model.c.content).where(model.c.id.in_(models))),
    }


def _used_configs(probes: Select[Any], runs: Select[Any]) -> ColumnElement[bool]:
    studies = select(study.c.id).where(study.c.run_id.in_(runs))
    digest = config.c.digest
    return or_(
        digest.in_(select(probe.c.config_digest).where(probe.c.id.in_(probes))),
        digest.in_(select(probe.c.effective_digest).where(probe.c.id.in_(probes))),
        digest.in_(select(transfer.c.source_config_digest).where(transfer.c.probe_id.in_(probes))),
        digest.in_(select(trial.c.config_digest).where(trial.c.study_id.in_(studies))),
        digest.in_(select(proof.c.config_digest).where(proof.c.run_id.in_(runs))),
    )


def _machines(probes: Select[Any], runs: Select[Any]) -> dict[str, ColumnElement[bool]]:
    fingerprints = select(environment.c.fingerprint).where(
        or_(
            environment.c.fingerprint.in_(select(probe.c.environment).where(probe.c.id.in_(probes))),
            environment.c.fingerprint.in_(select(transfer.c.source_environment).where(transfer.c.probe_id.in_(probes))),
            environment.c.fingerprint.in_(select(run_environment.c.environment).where(run_environment.c.run_id.in_(runs))),
        )
    )
    return {
        "environment": environment.c.fingerprint.in_(fingerprints),
        "target": target.c.environment.in_(fingerprints),
        "device": device.c.id.in_(select(target.c.device_id).where(target.c.environment.in_(fingerprints))),
    }


# --- what is read


@contextmanager
def _opened(place: Path) -> Iterator[Callable[[str], AbstractContextManager[IO[bytes]]]]:
    """Give what opens the file of a name in a folder or a zip. Names are ours, never the manifest's: no path can leave the place."""
    if place.is_dir():
        yield lambda name: _open_in_folder(place, name)
        return
    try:
        with zipfile.ZipFile(place) as packed:
            yield lambda name: _open_in_zip(packed, place, name)
    except FileNotFoundError as error:
        raise DatabaseError(f"there is no {place}", advice="give a folder or a zip that `aivmm db export` wrote") from error
    except zipfile.BadZipFile as error:
        raise DatabaseError(f"{place} is neither a folder nor a zip ({error})", advice=_GET_ANOTHER) from error


@contextmanager
def _open_in_folder(place: Path, name: str) -> Iterator[IO[bytes]]:
    path = place / name
    try:
        # A link could name any file of the one who imports, and a pipe would never end.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DatabaseError(f"{path} is not a plain file", advice=_GET_ANOTHER)
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DatabaseError(f"{place} has no {name}", advice=_GET_ANOTHER) from error


@contextmanager
def _open_in_zip(packed: zipfile.ZipFile, place: Path, name: str) -> Iterator[IO[bytes]]:
    found = [each for each in packed.infolist() if each.filename == name]
    if len(found) != 1:
        raise DatabaseError(f"{place} has {'no' if not found else 'more than one'} {name}", advice=_GET_ANOTHER)
    if found[0].compress_type != zipfile.ZIP_STORED:  # ours never are, and a small one could become anything
        raise DatabaseError(f"{place} holds {name} compressed", advice=_GET_ANOTHER)
    with packed.open(found[0]) as file:
        yield file


def _manifest(source: Callable[[str], AbstractContextManager[IO[bytes]]], place: Path) -> dict[str, Listed]:
    with source(MANIFEST) as file:
        text = file.read(_MANIFEST_BYTES + 1)
    if len(text) > _MANIFEST_BYTES:
        raise DatabaseError(f"{place}: {MANIFEST} is larger than {_MANIFEST_BYTES} bytes", advice=_GET_ANOTHER)
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError("it is of something else")
        schema = str(found["schema"])
        listed = {
            table.name: Listed(rows=int(each["rows"]), bytes=int(each["bytes"]), sha256=str(each["sha256"]))
            for table in TABLES
            if (each := found["tables"].get(table.name)) is not None
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise DatabaseError(f"{place}: {MANIFEST} is not that of an export ({why})", advice=_GET_ANOTHER) from error
    if schema not in REVISIONS or found["version"] != 1:
        raise DatabaseError(
            f"{place} is from a newer aivmm (schema {schema[:20]!r}, this one knows up to {HEAD!r})",
            advice="upgrade aivmm (pip install --upgrade aivmm)",
        )
    if schema != HEAD:
        raise DatabaseError(f"{place} is from an older aivmm (schema {schema!r}, this one has {HEAD!r})", advice=_GET_ANOTHER)
    missing = [table.name for table in TABLES if table.name not in listed]
    if missing:
        raise DatabaseError(f"{place}: {MANIFEST} does not list {missing[0]}", advice=_GET_ANOTHER)
    return listed


def _check_hash(file: IO[bytes], name: str, listed: Listed) -> None:
    digest, size = hashlib.sha256(), 0
    while (block := file.read(1 << 20)) and size <= listed.bytes:
        digest.update(block)
        size += len(block)
    if size != listed.bytes or digest.hexdigest() != listed.sha256:
        raise DatabaseError(f"{name} is not the file that was exported (its size or SHA-256 differs)", advice="copy it again")
    file.seek(0)


def _parquet_rows(file: IO[bytes], table: Table, listed: Listed, place: Path) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the rows of a table's file, some at a time.

    Raises:
        DatabaseError: it is not Parquet, has other columns, another number of rows, or would need more memory than ours ever do.
    """
    name = f"{place}: {table.name}.parquet"
    try:
        parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"))
        if not parquet.schema_arrow.remove_metadata().equals(arrow_schema(table), check_metadata=False):
            raise DatabaseError(f"{name} has other columns than this schema", advice=_GET_ANOTHER)
        if parquet.metadata.num_rows != listed.rows:
            raise DatabaseError(f"{name} has {parquet.metadata.num_rows} rows, the manifest says {listed.rows}", advice=_GET_ANOTHER)
        for group in range(parquet.metadata.num_row_groups):
            _refuse_huge(parquet.metadata.row_group(group), name)
        for batch in parquet.iter_batches(batch_size=ROWS, use_threads=False):
            batch.validate(full=True)
            yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise DatabaseError(f"{name} cannot be read ({line})", advice=_GET_ANOTHER) from error


def _refuse_huge(group: Any, name: str) -> None:
    for index in range(group.num_columns):
        column = group.column(index)
        if column.total_uncompressed_size > _CHUNK_BYTES or column.has_dictionary_page:
            raise DatabaseError(f"{name} would unfold to more than an export of ours does", advice=_GET_ANOTHER)
