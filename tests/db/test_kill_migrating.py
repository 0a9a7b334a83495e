"""Processes that are killed while they migrate, and migrations that fail: the database is as it was, or as it should become."""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.engine import make_engine, use_wal
from aivmm.db.location import Location
from aivmm.db.migrate import HEAD, History, revision_of, upgrade
from aivmm.db.schema import metadata
from tests.db import old_rows
from tests.db.killing import ENVIRONMENT, bulk, everything_told, half_written, outcome, running, wait_for_server
from tests.db.postgres import Server
from tests.db.steps import FAIL, ORPHAN, REBUILD, history


@contextmanager
def engine_of(location: str) -> Iterator[sqlalchemy.Engine]:
    engine = make_engine(Location.of(location), timeout_s=30)
    try:
        yield engine
    finally:
        engine.dispose()


def migrate(location: str, steps: History) -> None:
    """What `Database.open` does with an older database, by other steps than those released."""
    with engine_of(location) as engine:
        if "://" not in location:
            use_wal(engine, timeout_s=30)
        upgrade(engine, location=location, history=steps)


def migrate_telling(location: str, steps: History, told: Connection) -> None:
    told.send("started")
    sqlalchemy.event.listen(sqlalchemy.Engine, "before_execute", lambda *_: told.send("inside"))
    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", lambda _: told.send("committing"))
    migrate(location, steps)
    told.send("done")


def open_telling(location: str, told: Connection) -> None:
    told.send("started")
    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", lambda *_: told.send("inside"))
    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", lambda _: told.send("committing"))
    Database.open(location).close()
    told.send("done")


def contents(location: str) -> tuple[str | None, str]:
    """Return the revision, and a digest of every row of every released table and column."""
    digest = hashlib.sha256()
    with engine_of(location) as engine, engine.connect() as connection:
        revision = revision_of(connection)
        for table in metadata.sorted_tables if revision else ():
            for row in connection.execute(sqlalchemy.select(table).order_by(*table.primary_key.columns)):
                digest.update(repr(tuple(row)).encode())
    return revision, digest.hexdigest()


def sound(location: str) -> bool:
    """Ask SQLite itself."""
    if "://" in location:
        return True
    with closing(sqlite3.connect(location)) as connection:
        whole = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return whole and connection.execute("PRAGMA foreign_key_check").fetchall() == []


def fill(location: str, rows: int) -> None:
    with Database.open(location) as database:
        database.remember_environment(ENVIRONMENT)
        for number in range(0, rows, 150):
            database.add_many(bulk(number))


@pytest.fixture(scope="module")
def old_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old file which takes a moment to migrate."""
    file = tmp_path_factory.mktemp("old") / "old.db"
    fill(str(file), 3000)
    return file


@dataclass(frozen=True)
class Course:
    """How a work went that nobody killed: how often it told something, and how long it took."""

    marks: int
    took_s: float

    @classmethod
    def of(cls, work: Callable[..., None], *arguments: object) -> Course:
        with running(work, *arguments) as (_, told):
            assert told.poll(60)
            start, marks = time.monotonic(), list(everything_told(told))
        assert marks[-1] == "done"
        return cls(marks=len(marks), took_s=time.monotonic() - start)

    def kill(self, work: Callable[..., None], *arguments: object, moments: random.Random) -> str:
        """Kill it after some of what it tells and a bit; return what it told last."""
        with running(work, *arguments) as (process, told):
            last = [told.recv() for _ in range(moments.randint(1, self.marks - 1))][-1]
            time.sleep(moments.uniform(0, self.took_s / 5))
            process.kill()
            return str([last, *everything_told(told)][-1])


def kill_migrations(make: Iterator[str], steps: History, kills: int, *, seed: int) -> str:
    """Kill one migration after the other, each of a new copy of the same old database; return where the kills have hit."""
    moments, hit = random.Random(seed), dict.fromkeys(("started", "inside", "committing", "done", "torn", "new"), 0)
    course = Course.of(migrate_telling, next(make), steps)
    for _ in range(kills):
        location = next(make)
        before = contents(location)
        hit[course.kill(migrate_telling, location, steps, moments=moments)] += 1
        hit["torn"] += "://" not in location and half_written(Path(location))
        wait_for_server(location)
        assert sound(location)
        after = contents(location)
        assert after in (before, (steps.head, before[1])), "neither old nor new"
        hit["new"] += after != before
        migrate(location, steps)  # the next one goes on
        assert contents(location) == (steps.head, before[1])
        assert sound(location)
    assert hit["inside"] + hit["committing"] > 0
    return (
        f"{kills} kills of a migration that takes {course.took_s:.2f} s: {hit['inside']} inside it, {hit['committing']} inside its commit, "
        f"{hit['started'] + hit['done']} before or after; {hit['new']} were new already, {hit['torn']} left half a transaction in the log"
    )


def copies(file: Path, folder: Path) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        target = folder / f"{number}.db"
        shutil.copyfile(file, target)
        yield str(target)
        target.unlink()


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_while_it_migrates_a_file_it_is_old_or_new_and_the_next_one_goes_on(
    old_file: Path, tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = kill_migrations(copies(old_file, tmp_path), history(tmp_path, REBUILD), kills, seed=kills)
    with capsys.disabled():
        print(f"\n  {told}")


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_it_takes_the_released_steps_a_file_of_the_first_schema_is_old_or_new(
    tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    moments, hit = random.Random(kills), dict.fromkeys(("started", "inside", "committing", "done", "new"), 0)
    dump = (old_rows.FOLDER / "0001.sql").read_text(encoding="utf-8")

    def first(file: Path) -> Path:
        with closing(sqlite3.connect(file)) as connection:
            connection.executescript(dump)
        return file

    course = Course.of(open_telling, str(first(tmp_path / "timed.db")))
    for number in range(kills):
        file = first(tmp_path / f"{number}.db")
        hit[course.kill(open_telling, str(file), moments=moments)] += 1
        assert sound(str(file))
        with closing(sqlite3.connect(file)) as connection:
            now = "".join(f"{line}\n" for line in connection.iterdump())
            (revision,) = connection.execute("SELECT version_num FROM aivmm_version").fetchone()
        assert now == dump if revision == "0001" else revision == HEAD, "neither old nor new"
        hit["new"] += revision == HEAD
        with Database.open(file) as database:
            assert old_rows.read(database) == old_rows.expected("0001")
            assert database.check() == []
    with capsys.disabled():
        print(f"\n  {kills} kills while a file of schema 0001 takes the released steps: {hit}")


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_while_it_migrates_a_servers_database_it_is_old_or_new(
    server: Server, tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    old = server.create()
    fill(server.location(old), 3000)

    def make() -> Generator[str, None, None]:
        while True:
            name = server.create(template=old)
            yield server.location(name)
            server.drop(name)

    made = make()
    told = kill_migrations(made, history(tmp_path, REBUILD), kills, seed=kills)
    made.close()
    server.drop(old)
    with capsys.disabled():
        print(f"\n  {told}")


@pytest.mark.parametrize("kills", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_it_makes_its_first_tables_it_has_all_of_them_or_none(
    tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    moments, hit = random.Random(kills), dict.fromkeys(("started", "inside", "committing", "done"), 0)
    course = Course.of(open_telling, str(tmp_path / "timed.db"))
    for number in range(kills):
        file = tmp_path / f"{number}.db"
        hit[course.kill(open_telling, str(file), moments=moments)] += 1
        assert sound(str(file))
        assert contents(str(file))[0] in (None, HEAD)
        with Database.open(file) as database:
            database.remember_environment(ENVIRONMENT)
            database.add(outcome("x", 1))
            assert database.check() == []
    with capsys.disabled():
        print(f"\n  {kills} kills while a new file gets its tables: {hit}")


def test_a_step_that_fails_leaves_the_old_state(database: Database, location: str, tmp_path: Path) -> None:
    database.remember_environment(ENVIRONMENT)
    database.add_many(bulk(0))
    expected = database.outcomes()
    before = contents(location)
    for steps in (history(tmp_path / "at once", FAIL), history(tmp_path / "after another", REBUILD, FAIL)):
        with pytest.raises(sqlalchemy.exc.DBAPIError, match="no_such_table"):
            migrate(location, steps)
        assert contents(location) == before
        assert sound(location)
    assert database.outcomes() == expected  # also for those who had it open all the time
    with Database.open(location) as again:
        assert again.outcomes() == expected
        again.add(outcome("one more", 1))
    migrate(location, history(tmp_path / "mended", REBUILD))
    assert contents(location)[0] == "test_rebuild"


def test_a_step_that_leaves_rows_without_what_they_refer_to_is_undone(tmp_path: Path) -> None:
    """SQLite would not notice: its foreign keys are off while tables are rebuilt."""
    location = str(tmp_path / "x.db")
    fill(location, 150)
    before = contents(location)
    with pytest.raises(RuntimeError, match="150 rows without what they refer to, so it was undone"):
        migrate(location, history(tmp_path, ORPHAN))
    assert contents(location) == before
    assert sound(location)


def test_a_database_that_was_migrated_further_is_refused_and_left_as_it_is(database: Database, location: str, tmp_path: Path) -> None:
    database.remember_environment(ENVIRONMENT)
    database.add_many(bulk(0))
    database.close()
    migrate(location, history(tmp_path, REBUILD))
    before = contents(location)
    with pytest.raises(Exception, match=r"newer aivmm \(schema 'test_rebuild'"):
        Database.open(location)
    assert contents(location) == before
    with engine_of(location) as engine:
        assert sqlalchemy.inspect(engine).has_table("test_extra")
