"""Opening: what is ours opens, what is not is left byte for byte as it is."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.migrate import HEAD
from aivmm.errors import DatabaseError
from aivmm.probes.records import Measured

Child = Callable[..., subprocess.Popen[str]]


def state(folder: Path) -> dict[str, str]:
    """Every file below `folder` by name, with the hash of its bytes; SQLite's shared memory holds locks only, and may change."""
    return {
        str(file.relative_to(folder)): "" if file.name.endswith("-shm") else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def refusal(file: Path, *, timeout_s: float = 5.0) -> DatabaseError:
    """Return how `file` is refused, having checked that it is one line of advice and that nothing at all has changed on disk."""
    before = state(file.parent)
    with pytest.raises(DatabaseError) as raised:
        Database.open(file, timeout_s=timeout_s)
    assert state(file.parent) == before
    assert "\n" not in str(raised.value)
    assert raised.value.advice
    return raised.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound database, closed."""
    path = tmp_path / "performance.db"
    Database.open(path).close()
    return path


def test_a_new_database_is_sound_keeps_its_rows_and_leaves_one_file_behind(
    tmp_path: Path, location: str, database: Database, measured: Callable[..., Measured]
) -> None:
    outcome = measured()
    database.add(outcome)
    database.close()
    assert [each.name for each in tmp_path.iterdir()] == ([] if "://" in location else ["performance.db"])
    with Database.open(location) as again:
        assert again.find(outcome.key) == outcome
        assert again.check() == []


def test_opening_again_changes_nothing(file: Path) -> None:
    before = state(file.parent)
    Database.open(file).close()
    assert state(file.parent) == before


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with Database.open(tmp_path / "empty.db") as database:
        assert database.check() == []


def test_the_settings_that_keep_rows_safe_are_on(file: Path) -> None:
    with Database.open(file, timeout_s=7) as database, database._reading() as connection:
        asked = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert asked == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "busy_timeout": 7000}


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"<!DOCTYPE html><html></html>" * 100,
        b"\x80\x04pickle" * 1000,
        b"SQLite format 2\0" + bytes(4080),
        b"SQLite format 3\0",
        bytes(8192),
    ],
    ids=["one byte", "html", "pickle", "sqlite 2", "magic alone", "zeros"],
)
def test_what_is_not_a_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.db").write_bytes(content)
    assert "database" in refusal(tmp_path / "x.db").message


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_database_is_refused(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert "damaged" in refusal(file).message


@pytest.mark.parametrize("where", [20, 100, 110, 4096 + 3, 8192 + 3])
def test_a_database_with_garbage_in_its_pages_is_refused(file: Path, where: int) -> None:
    content = bytearray(file.read_bytes())
    content[where : where + 60] = b"\xa5" * 60
    file.write_bytes(content)
    refusal(file)


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    for name, mode in (("delete.db", "DELETE"), ("wal.db", "WAL")):
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            connection.execute(f"PRAGMA journal_mode={mode}")
            connection.execute("CREATE TABLE photos (id)")
            connection.commit()
        assert "something else" in refusal(tmp_path / name).message


def test_a_database_of_optuna_or_any_other_alembic_user_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num)")
        connection.execute("CREATE TABLE trial (id)")
        connection.commit()
    assert "something else" in refusal(tmp_path / "x.db").message


def test_a_database_from_a_newer_aivmm_is_refused(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE aivmm_version SET version_num = '9999'")
        connection.commit()
    error = refusal(file)
    assert "newer aivmm" in error.message
    assert "'9999'" in error.message
    assert HEAD in error.message
    assert "upgrade aivmm" in error.advice


def test_a_newer_database_is_left_as_it_is_even_with_a_killed_processs_log_beside_it(file: Path, child: Child) -> None:
    code = """
import sqlite3
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("UPDATE aivmm_version SET version_num = '9999'")
die()
"""
    child(code, file).communicate()
    assert file.with_name(file.name + "-wal").stat().st_size > 0
    assert "newer aivmm" in refusal(file).message


def test_a_version_table_without_a_version_is_refused(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DELETE FROM aivmm_version")
        connection.commit()
    assert "aivmm_version is empty" in refusal(file).message


def test_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "directory" in refusal(tmp_path / "folder").message


def test_a_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="does not exist"):
        Database.open(tmp_path / "typo" / "x.db")
    assert not list(tmp_path.iterdir())


AS_A_USER = """
import importlib, os, sys
import aivmm.db.database
from aivmm.errors import DatabaseError
if os.name == "posix" and os.getuid() == 0:  # root may write anything, so be nobody
    os.setgid(65534)
    os.setuid(65534)
try:
    aivmm.db.database.Database.open(sys.argv[1], timeout_s=1).close()
except DatabaseError as error:
    print(error)
else:
    print("opened")
"""


def opened_by_a_user(file: Path) -> str:
    """Return what somebody without special rights is told."""
    result = subprocess.run([sys.executable, "-c", AS_A_USER, str(file)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def shared(public_folder: Path, filled_file: Path) -> Path:
    """A database that anybody may write, in a folder that anybody may write."""
    file = Path(shutil.copyfile(filled_file, public_folder / "performance.db"))
    file.chmod(0o666)
    return file


def test_a_read_only_file_is_refused(shared: Path) -> None:
    assert opened_by_a_user(shared) == "opened"
    shared.chmod(0o444)
    before = state(shared.parent)
    told = opened_by_a_user(shared)
    assert "not writable" in told
    assert "--db" in told
    assert state(shared.parent) == before
    shared.chmod(0o666)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no read-only folders")
def test_a_read_only_folder_is_refused_with_a_database_in_it_and_without(shared: Path) -> None:
    shared.parent.chmod(0o555)
    try:
        before = state(shared.parent)
        for name in (shared.name, "new.db"):
            told = opened_by_a_user(shared.with_name(name))
            assert f"the folder {shared.parent} is not writable" in told
        assert state(shared.parent) == before
    finally:
        shared.parent.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such folders")
def test_a_folder_that_may_not_be_entered_is_one_line(shared: Path) -> None:
    private = shared.parent / "private"
    private.mkdir()
    shutil.copyfile(shared, private / "x.db")
    private.chmod(0o600)
    try:
        told = opened_by_a_user(private / "x.db")
    finally:
        private.chmod(0o700)
    assert told.startswith(f"the database {private / 'x.db'} cannot be reached by you")
    assert "\n" not in told


def test_a_database_that_another_process_holds_is_refused_after_the_timeout_and_opens_afterwards(file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        with pytest.raises(DatabaseError, match="locked by another process"):
            Database.open(file, timeout_s=0.4)
        assert 0.3 < time.monotonic() - start < 10
        other.execute("ROLLBACK")
        Database.open(file, timeout_s=0.4).close()


def test_a_locked_file_of_another_program_is_one_line_too(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as other:
        other.execute("CREATE TABLE t (x)")
        other.execute("BEGIN EXCLUSIVE")
        assert "locked" in refusal(tmp_path / "x.db", timeout_s=0.3).message


def test_writing_waits_for_another_process_and_then_says_that_it_is_locked(file: Path, child: Child) -> None:
    with Database.open(file, timeout_s=0.3) as database, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="locked"):
            database.save_plan("no run", {}, "")
        assert database.runs() == []  # readers do not wait


@pytest.mark.skipif(os.name != "posix", reason="Windows does not let an open file be removed")
def test_a_file_that_is_removed_or_replaced_while_in_use_is_noticed(file: Path) -> None:
    with Database.open(file) as database:
        file.unlink()
        with pytest.raises(DatabaseError, match="removed or replaced"):
            database.save_plan("no run", {}, "")
        file.write_bytes(b"")
        with pytest.raises(DatabaseError, match="removed or replaced"):
            database.save_plan("no run", {}, "")


def test_a_full_disk_is_one_line_and_costs_only_what_was_being_written(file: Path, child: Child) -> None:
    code = """
import sqlalchemy
from aivmm.errors import DatabaseError
database = Database.open(sys.argv[1])
database.remember_environment(ENVIRONMENT)
database.add(outcome(0))
with database._engine.connect() as connection:
    pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
@sqlalchemy.event.listens_for(database._engine, "begin")
def full(connection):
    connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 1}")
try:
    database.add_many([outcome(number) for number in range(1, 500)])
except DatabaseError as error:
    print(error)
"""
    told, errors = child(code, file).communicate()
    assert "no space is left" in told, errors
    with Database.open(file) as database:
        assert len(database.outcomes()) == 1
        assert database.check() == []


def test_damage_found_while_reading_is_one_line(file: Path, child: Child) -> None:
    code = """
with Database.open(sys.argv[1]) as database:
    database.remember_environment(ENVIRONMENT)
    database.add_many([outcome(number) for number in range(200)])
"""
    assert child(code, file).wait() == 0
    with Database.open(file) as database:
        with database._writing() as connection:
            connection.execute(sqlalchemy.text("UPDATE probe SET samples = substr(samples, 1, 30) WHERE subject = '7'"))
        with pytest.raises(DatabaseError, match="damaged"):
            database.outcomes(subject="7")
        assert len(database.outcomes(subject="8")) == 1
        (problem,) = database.check()
        assert problem.startswith("probe ")


def test_check_names_rows_whose_parent_is_gone(file: Path, child: Child) -> None:
    code = """
with Database.open(sys.argv[1]) as database:
    database.remember_environment(ENVIRONMENT)
    database.add(outcome(1))
"""
    assert child(code, file).wait() == 0
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DELETE FROM environment")
        connection.commit()
    with Database.open(file) as database:
        assert ["environment" in problem for problem in database.check()] == [True]
