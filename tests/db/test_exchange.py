"""Measurements travel: exported and imported, merged from other machines, and strangers' files are not believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aivmm.db.database import Database
from aivmm.db.exchange import export, import_from
from aivmm.db.merge import merge
from aivmm.db.migrate import HEAD
from aivmm.db.query import Filter
from aivmm.errors import DatabaseError, UsageError
from aivmm.models.records import ModelFacts, Structure
from aivmm.planner.records import RunRecord, TrialRecord
from aivmm.probes.records import Measured
from aivmm.runtime.config import Config
from tests.db.filling import Filled, contents, fill

Make = Callable[..., Measured]


@pytest.fixture
def filled(database: Database, measured: Make, run_record: Callable[..., RunRecord], facts: ModelFacts, structure: Structure) -> Filled:
    return fill(database, measured, run_record, facts, structure)


@pytest.fixture
def empty(tmp_path: Path, filled_file: Path) -> Iterator[Database]:
    """Another machine's database, with nothing in it yet."""
    shutil.copyfile(filled_file, tmp_path / "empty.db")
    with Database.open(tmp_path / "empty.db") as opened:
        yield opened


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_an_export_brings_every_row_of_every_table_and_a_second_import_nothing(
    database: Database, filled: Filled, empty: Database, tmp_path: Path, name: str
) -> None:
    before = contents(database)
    assert all(before.values()), "a table without a row proves nothing"
    manifest = export(database, tmp_path / name)
    assert {table: each["rows"] for table, each in manifest["tables"].items()} == {table: len(rows) for table, rows in before.items()}
    assert import_from(empty, tmp_path / name) == {table: len(rows) for table, rows in before.items()}
    assert contents(empty) == before
    assert empty.check() == []
    assert empty.run_outcomes(filled.run.id) == database.run_outcomes(filled.run.id)
    assert set(import_from(empty, tmp_path / name).values()) == {0}
    assert contents(empty) == before


def test_an_export_goes_back_into_the_kind_of_database_it_came_from(database: Database, filled: Filled, tmp_path: Path) -> None:
    """Also into a server: into itself, after something was forgotten."""
    export(database, tmp_path / "out")
    before = contents(database)
    with database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM run")
        connection.exec_driver_sql("DELETE FROM probe")
    assert contents(database) != before
    import_from(database, tmp_path / "out")
    assert contents(database) == before
    assert database.check() == []


def test_the_manifest_vouches_for_each_file(database: Database, filled: Filled, tmp_path: Path) -> None:
    export(database, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["schema"] == HEAD
    for each in manifest["tables"].values():
        assert hashlib.sha256((tmp_path / "out" / each["file"]).read_bytes()).hexdigest() == each["sha256"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        *(each["file"] for each in manifest["tables"].values()),
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".aivmm")] == []


@pytest.mark.parametrize(
    ("wanted", "probes", "runs"),
    [
        (Filter(target="openvino:GPU"), 1, 0),
        (Filter(model="squeezenet"), 2, 1),
        (Filter(since=datetime.now(UTC) + timedelta(days=1)), 0, 0),
        (Filter(since=datetime(2026, 1, 1, tzinfo=UTC)), 5, 1),
    ],
    ids=["target", "model", "later", "since"],
)
def test_a_part_of_a_database_is_whole_in_itself(
    database: Database, filled: Filled, empty: Database, tmp_path: Path, wanted: Filter, probes: int, runs: int
) -> None:
    manifest = export(database, tmp_path / "out", wanted)
    assert (manifest["tables"]["probe"]["rows"], manifest["tables"]["run"]["rows"]) == (probes, runs)
    import_from(empty, tmp_path / "out")
    assert empty.check() == []
    assert len(contents(empty)["probe"]) == probes


def test_a_place_that_exists_is_not_written_over(database: Database, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(database, tmp_path / "out")
    kept = (tmp_path / "out" / "manifest.json").read_bytes()
    for place in (tmp_path / "out", tmp_path / "no" / "folder", tmp_path / "x.tar"):
        with pytest.raises(UsageError):
            export(database, place)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == kept


# --- what strangers may send


def sign(folder: Path) -> None:
    """Make the manifest fit the files, as whoever changed them would."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for each in manifest["tables"].values():
        data = (folder / each["file"]).read_bytes()
        rows = each["rows"]
        if data[:4] == b"PAR1" == data[-4:]:
            rows = pq.ParquetFile(folder / each["file"]).metadata.num_rows
        each |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def rewrite(folder: Path, table: str, change: Callable[[dict[str, Any]], None], **options: Any) -> None:
    """Change the rows of a table, keeping its columns' types."""
    file = folder / f"{table}.parquet"
    found = pq.read_table(file)
    rows = found.to_pylist()
    for row in rows:
        change(row)
    pq.write_table(pa.Table.from_pylist(rows, schema=found.schema), file, **{"use_dictionary": False, **options})


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        (folder / "manifest.json").write_text(json.dumps({**found, **changes}), encoding="utf-8")

    return edit


def flip(folder: Path) -> None:
    file = folder / "probe.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def column(table: str, name: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        rewrite(folder, table, lambda row: row.update({name: value}))
        sign(folder)

    return edit


def other_types(folder: Path) -> None:
    file = folder / "operator.parquet"
    found = pq.read_table(file)
    index = found.schema.get_field_index("flops")
    pq.write_table(found.set_column(index, "flops", found.column("flops").cast(pa.string())), file, use_dictionary=False)
    sign(folder)


def no_parquet(folder: Path) -> None:
    (folder / "probe.parquet").write_bytes(b"PAR1" + os.urandom(500) + b"PAR1")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    data = (folder / "probe.parquet").read_bytes()
    manifest["tables"]["probe"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def a_bomb(folder: Path) -> None:
    rewrite(folder, "probe", lambda row: row.update(output="x" * 1000), use_dictionary=True)
    sign(folder)


def a_link(folder: Path) -> None:
    (folder / "probe.parquet").rename(folder.parent / "elsewhere.parquet")
    (folder / "probe.parquet").symlink_to(folder.parent / "elsewhere.parquet")


def fewer_rows(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["tables"]["probe"]["rows"] = 10**12
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit flipped": (flip, "not the file that was exported"),
    "a file missing": (lambda folder: (folder / "config.parquet").unlink(), "has no config.parquet"),
    "a file truncated": (lambda folder: os.truncate(folder / "probe.parquet", 100), "not the file"),
    "a link for a file": (a_link, "not a plain file"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest"),
    "a manifest of something else": (edit_manifest(format="holiday"), "not that of an export"),
    "a manifest that is a list": (lambda folder: (folder / "manifest.json").write_text("[]", encoding="utf-8"), "not that of an export"),
    "a manifest nested too deep": (lambda folder: (folder / "manifest.json").write_text("[" * 10**5, encoding="utf-8"), "not that of"),
    "a huge manifest": (lambda folder: (folder / "manifest.json").write_text(" " * (2 << 20), encoding="utf-8"), "larger than"),
    "a newer schema": (edit_manifest(schema="9999"), "newer"),
    "tables of other paths": (edit_manifest(tables={"probe": {"file": "../../x", "rows": 1, "bytes": 1, "sha256": ""}}), "does not list"),
    "a count that is not the file's": (fewer_rows, "the manifest says"),
    "bytes that are no Parquet": (no_parquet, "cannot be read"),
    "a column of another type": (other_types, "other columns"),
    "values that unfold": (a_bomb, "would unfold"),
    "samples that are none": (column("probe", "samples", b"\0" * 16), "probe: row"),
    "a key of something else": (column("probe", "key", "0" * 32), "its key"),
    "another time's kind": (column("probe", "kind", "dream"), "its key"),
    "an environment that lies": (column("environment", "facts", '{"target": "x"}'), "environment: row"),
    "JSON that is none": (column("config", "settings", "{"), "config: settings"),
    "JSON with NaN": (column("config", "settings", '{"a": NaN}'), "NaN"),
    "settings that are not those of the digest": (column("config", "settings", '{"a": 1}'), "its digest"),
    "a metric that is no number": (column("probe", "metrics", '{"compile_s": 9e999}'), "is inf, which is no number"),
    "a metric that is text": (column("probe", "metrics", '{"compile_s": "1"}'), "which is no number"),
    "cautions that are none": (column("probe", "cautions", '[{"code": "spread"}]'), "cannot be read"),
    "text with a NUL": (column("probe", "reason", "a\0b"), "does not belong"),
    "a part of something missing": (lambda folder: (rewrite_without(folder, "config"), sign(folder))[0], "refers to one that is missing"),
    "a run that is no run": (column("run", "id", "../../etc/passwd"), "is not a UUID"),
}


def rewrite_without(folder: Path, table: str) -> None:
    file = folder / f"{table}.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file, use_dictionary=False)


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_stays_of_an_import_that_cannot_be_trusted(
    database: Database, filled: Filled, empty: Database, tmp_path: Path, name: str
) -> None:
    export(database, tmp_path / "out")
    change, words = HOSTILE[name]
    change(tmp_path / "out")
    before = contents(empty)
    with pytest.raises(DatabaseError, match=words) as caught:
        import_from(empty, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert contents(empty) == before
    assert empty.check() == []


def test_a_zip_is_not_unfolded_and_names_in_it_lead_nowhere(database: Database, filled: Filled, empty: Database, tmp_path: Path) -> None:
    export(database, tmp_path / "out")
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for path in (tmp_path / "out").iterdir():
            made.write(path, path.name)
    with pytest.raises(DatabaseError, match="compressed"):
        import_from(empty, packed)
    twice = tmp_path / "twice.zip"
    with zipfile.ZipFile(twice, "w") as made, pytest.warns(UserWarning):
        made.writestr("manifest.json", "{}")
        made.writestr("manifest.json", "{}")
    (tmp_path / "text.zip").write_text("no zip", encoding="utf-8")
    for place, words in ((twice, "more than one"), (tmp_path / "text.zip", "neither"), (tmp_path / "nowhere.zip", "there is no")):
        with pytest.raises(DatabaseError, match=words):
            import_from(empty, place)


def test_parts_of_two_tellings_of_a_model_never_mix(
    database: Database, filled: Filled, empty: Database, facts: ModelFacts, structure: Structure, tmp_path: Path
) -> None:
    fewer = dataclasses.replace(structure, operators=structure.operators[:1])
    empty.remember_model(facts, fewer)
    export(database, tmp_path / "out")
    import_from(empty, tmp_path / "out")
    assert empty.structure(structure.content, facts.batch) == fewer
    assert empty.check() == []


# --- merge


def test_databases_of_two_machines_become_one_and_a_second_time_nothing_is_new(
    database: Database, filled: Filled, empty: Database, measured: Make
) -> None:
    for environment in database.environments():
        empty.remember_environment(environment)
    mine = measured("mine")
    empty.add(mine)
    added = merge(empty, database._location.url.render_as_string(hide_password=False))
    assert added["probe"] == 5
    assert empty.find(mine.key) == mine
    assert {outcome.key for outcome in database.outcomes()} < {outcome.key for outcome in empty.outcomes()}
    assert empty.run(filled.run.id) == filled.run
    before = contents(empty)
    assert set(merge(empty, database._location.url.render_as_string(hide_password=False)).values()) == {0}
    assert contents(empty) == before
    assert empty.check() == []


def test_a_run_that_was_under_way_is_brought_up_to_date(database: Database, filled: Filled, empty: Database, measured: Make) -> None:
    place = database._location.url.render_as_string(hide_password=False)
    merge(empty, place)
    ended = dataclasses.replace(filled.run, status="complete", finished_at=datetime(2026, 5, 4, 4, tzinfo=UTC), summary={"x": 1})
    late = measured("late")
    database.add(late, run_id=ended.id)
    trial = TrialRecord(number=1, target="openvino:CPU", config=Config(), batch=1, callers=1, state="measured", value=0.5, seconds=1.0)
    database.add_trial(ended.id, trial)
    database.save_plan(ended.id, {"schema": 2}, "y.aivmm")
    database.update_run(ended)
    merge(empty, place)
    assert empty.run(ended.id) == ended
    assert empty.run_outcomes(ended.id) == database.run_outcomes(ended.id)
    assert empty.trials(ended.id) == database.trials(ended.id)
    assert empty.plan(ended.id) == {"schema": 2}
    assert set(merge(empty, place).values()) == {0}


def test_what_is_merged_is_only_read(empty: Database, tmp_path: Path, filled_file: Path) -> None:
    other = tmp_path / "deep" / "other ü%41#?.db"
    other.parent.mkdir()
    shutil.copyfile(filled_file, other)
    before = {path.name: path.read_bytes() for path in other.parent.iterdir()}
    merge(empty, other)
    after = {path.name: path.read_bytes() for path in other.parent.iterdir() if not path.name.endswith("-shm")}
    assert {name: data for name, data in after.items() if data or not name.endswith("-wal")} == before


def test_what_cannot_be_merged_is_said_in_one_line(empty: Database, tmp_path: Path, filled_file: Path) -> None:
    assert empty.path is not None
    with pytest.raises(UsageError, match="the database itself"):
        merge(empty, empty.path)
    (tmp_path / "text.db").write_text("not a database" * 1000, encoding="utf-8")
    shutil.copyfile(filled_file, tmp_path / "newer.db")
    with closing(sqlite3.connect(tmp_path / "newer.db")) as newer, newer:
        newer.execute("UPDATE aivmm_version SET version_num = '9999'")
    with closing(sqlite3.connect(tmp_path / "theirs.db")) as theirs, theirs:
        theirs.execute("CREATE TABLE holiday (day)")
    for name, words in (
        ("nowhere.db", "no database"),
        ("text.db", "text.db"),
        ("newer.db", "newer aivmm"),
        ("theirs.db", "something else"),
    ):
        with pytest.raises(DatabaseError, match=words) as caught:
            merge(empty, tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    assert not (tmp_path / "nowhere.db").exists()


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)  # a server keeps its types
@pytest.mark.parametrize(
    "lie",
    [
        "UPDATE probe SET batch = 'many'",
        "UPDATE probe SET samples = 'text'",
        "UPDATE probe SET placement = '{'",
        "UPDATE probe SET measured_at = 'yesterday'",
        "UPDATE config SET settings = '[1]'",
        "UPDATE probe SET metrics = '{\"compile_s\": 9e999}'",
        "UPDATE run SET facts = '{\"name\": 1}'",
    ],
)
def test_a_stranger_s_database_is_not_believed(database: Database, filled: Filled, empty: Database, tmp_path: Path, lie: str) -> None:
    assert database.path is not None
    database.close()
    with closing(sqlite3.connect(database.path)) as connection, connection:
        connection.execute(lie)
    before = contents(empty)
    with pytest.raises(DatabaseError, match="cannot be trusted"):
        merge(empty, database.path)
    assert contents(empty) == before
    assert database.check() != []
