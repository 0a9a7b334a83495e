"""Databases of every schema that was ever released: opened, migrated, and read back whole.

`old_files/REVISION.sql` is what SQLite's dump gave of a file which `old_rows.py` filled with the code of that release.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.engine import make_engine
from aivmm.db.location import Location
from aivmm.db.migrate import HEAD, RELEASED, REVISIONS, VERSION_TABLE, History, revision_of, upgrade
from tests.db import old_rows

FILES = {each.stem: each for each in old_rows.FOLDER.glob("*.sql")}


def load(dump: Path, file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(dump.read_text(encoding="utf-8"))


def copy_to_server(file: Path, location: str, revision: str) -> None:
    """Fill a server's database of that revision with the rows of an old file; what tables there were, the two say themselves."""
    server = make_engine(Location.of(location), timeout_s=30)
    released = REVISIONS[: REVISIONS.index(revision) + 1]
    upgrade(server, location=location, history=History(scripts=RELEASED.scripts, revisions=released))
    old = sqlalchemy.create_engine(f"sqlite:///{file}")
    theirs = sqlalchemy.MetaData()
    theirs.reflect(server)
    ours = sqlalchemy.MetaData()
    ours.reflect(old)
    with old.connect() as source, server.begin() as target:
        for table in theirs.sorted_tables:
            rows = [dict(row) for row in source.execute(sqlalchemy.select(ours.tables[table.name])).mappings()]
            if rows and table.name != VERSION_TABLE:
                target.execute(table.insert(), rows)
    old.dispose()
    server.dispose()


def test_there_is_a_file_of_every_released_schema() -> None:
    assert sorted(FILES) == sorted(REVISIONS)


@pytest.mark.parametrize("revision", sorted(FILES))
def test_a_database_of_an_old_schema_is_migrated_with_all_its_rows(revision: str, location: str, tmp_path: Path) -> None:
    file = tmp_path / "performance.db"
    load(FILES[revision], file)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall() == [(revision,)]
    if "://" in location:
        copy_to_server(file, location, revision)
    with Database.open(location) as database:
        assert database.check() == []
        assert old_rows.read(database) == old_rows.expected(revision)
        with database._reading() as connection:
            assert revision_of(connection) == HEAD
    with Database.open(location) as database:  # and it is used as any other
        identity = database.add(old_rows.MOVED, run_id=old_rows.RUN.id)
        assert database.entries()[-1].id == identity


@pytest.mark.parametrize("revision", sorted(FILES))
def test_an_old_file_holds_a_row_of_every_table_that_its_schema_has(revision: str, tmp_path: Path) -> None:
    load(FILES[revision], tmp_path / "x.db")
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        empty = [name for name in tables if connection.execute(f"SELECT count(*) FROM {name}").fetchone() == (0,)]
    assert len(tables) > 15
    assert empty == []


def test_what_is_stored_today_is_read_back_as_the_old_files_are(database: Database) -> None:
    old_rows.write(database)
    assert old_rows.read(database) == old_rows.expected()
    assert database.check() == []
