"""Disks that fill up, folders that turn read-only and files that go away while a run is writing: what was acknowledged is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.engine import make_engine, transaction, use_wal
from aivmm.db.location import Location
from aivmm.errors import DatabaseError
from tests.db.conftest import CHILD

Child = Callable[..., subprocess.Popen[str]]

# Adds until it cannot, then tells how it ended; argv[2] is a number of bytes.
FILL = """
import signal
from aivmm.errors import DatabaseError
def fill(database):
    database.remember_environment(ENVIRONMENT)
    number = 0
    try:
        while number < 100_000:
            database.add_many([outcome(number + each) for each in range(100)])
            number += 100
            print(number, flush=True)
    except DatabaseError as error:
        print(error, flush=True)
"""
LIMITED = """
import resource
database = Database.open(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
fill(database)
"""


def acknowledged(told: str) -> tuple[int, str]:
    """Return how many rows a child had stored, and how it ended."""
    lines = told.strip().splitlines()
    return (int(lines[-2]) if len(lines) > 1 else 0), lines[-1]


REMOVABLE = pytest.mark.skipif(os.name != "posix", reason="Windows does not let an open file be removed")


def subjects(database: Database) -> list[int]:
    return sorted(int(each.key.subject) for each in database.outcomes())


@pytest.mark.skipif(os.name != "posix", reason="Windows has no limit on the size of a process's files")
def test_a_write_that_fails_halfway_is_one_line_and_costs_only_what_was_in_flight(tmp_path: Path, child: Child) -> None:
    file = tmp_path / "x.db"
    Database.open(file).close()
    told, errors = child(FILL + LIMITED, file, 1_500_000).communicate()
    stored, ending = acknowledged(told)
    assert stored >= 100, errors
    assert ending.startswith(("no space is left", "cannot use the database")) and "--db" in ending, errors
    with Database.open(file) as database:
        assert database.check() == []
        assert subjects(database) == list(range(stored))


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[str, str], str]:
    """Run code on a file of a disk of its own (in a mount namespace, so that nobody else sees it); return what it told."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("a small disk needs Linux's mount namespaces (unshare)")
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [*unshare, "sh", "-c", 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"', "sh"]
    tried = subprocess.run([*mount, "1m", disk, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.strip()}")

    def run(size: str, code: str) -> str:
        command = [*mount, size, str(disk), sys.executable, "-c", code, str(disk / "x.db")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_disk_that_is_full_is_one_line_and_what_was_stored_is_kept_and_goes_on_when_there_is_space(
    small_disk: Callable[[str, str], str],
) -> None:
    code = """
from pathlib import Path
disk = Path(sys.argv[1]).parent
ballast = disk / "ballast"
ballast.write_bytes(bytes(300_000))
database = Database.open(sys.argv[1])
fill(database)
ballast.unlink()
database.add(outcome(999_999))  # the same run goes on
database.close()
with Database.open(sys.argv[1]) as database:
    print(sorted(int(each.key.subject) for each in database.outcomes()) == [*range(STORED), 999_999], database.check())
"""
    # The child counts what was acknowledged itself: its disk is gone when it ends.
    filling = FILL.replace("print(number, flush=True)", "global STORED; STORED = number; print(number, flush=True)")
    lines = small_disk("2m", CHILD + filling + code).splitlines()
    assert int(lines[-3]) >= 100
    assert lines[-2].startswith("no space is left for the database")
    assert lines[-1] == "True []"


def test_a_disk_that_is_full_from_the_start_is_one_line(small_disk: Callable[[str, str], str]) -> None:
    code = """
from pathlib import Path
from aivmm.errors import DatabaseError
file = Path(sys.argv[1])
free = os.statvfs(file.parent)
(file.parent / "ballast").write_bytes(bytes((free.f_bavail - 4) * free.f_frsize))
try:
    Database.open(file)
except DatabaseError as error:
    print(error)
(file.parent / "ballast").unlink()
Database.open(file).close()
"""
    assert small_disk("2m", CHILD + code).startswith("no space is left for the database")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no read-only folders")
def test_a_folder_that_turns_read_only_while_a_run_writes_costs_nothing(public_folder: Path, child: Child) -> None:
    code = """
from aivmm.errors import DatabaseError
if os.getuid() == 0:  # root may write anything, so be nobody
    for each in sys.argv[1:]:
        os.chown(each, 65534, 65534)
    os.setgid(65534)
    os.setuid(65534)
database = Database.open(sys.argv[1])
database.remember_environment(ENVIRONMENT)
database.add(outcome(0))
os.chmod(sys.argv[2], 0o555)
try:
    for number in range(1, 50):
        database.add(outcome(number))
        print(number, flush=True)
except DatabaseError as error:
    print(error, file=sys.stderr)
database.close()
try:
    Database.open(sys.argv[1])
except DatabaseError as error:
    print(error)
os.chmod(sys.argv[2], 0o755)
Database.open(sys.argv[1]).close()
"""
    folder = public_folder / "folder"
    folder.mkdir()
    Database.open(folder / "x.db").close()
    told, errors = child(code, folder / "x.db", folder).communicate()
    stored, ending = acknowledged(told)
    assert errors == ""
    assert stored == 49
    assert f"the folder {folder} is not writable" in ending
    with Database.open(folder / "x.db") as database:
        assert subjects(database) == list(range(50))
        assert database.check() == []


def saved_in(error: DatabaseError) -> Path:
    """Return the file that an error says everything was saved in."""
    return Path(error.message.partition("is saved in ")[2])


@REMOVABLE
@pytest.mark.parametrize("what", ["file", "file and log", "log", "moved", "replaced", "folder"])
def test_what_goes_away_in_the_middle_of_a_write_is_saved_with_that_write_in_it(
    tmp_path: Path, child: Child, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "aivmm").mkdir(parents=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "x.db"
    with Database.open(file) as database:
        with transaction(database._engine, writes=True) as connection:
            connection.exec_driver_sql("CREATE TABLE t (x)")
            connection.exec_driver_sql("INSERT INTO t VALUES (1)")
        with pytest.raises(DatabaseError, match="removed or replaced while in use; all that it held is saved in") as raised:  # noqa: SIM117
            with transaction(database._engine, writes=True) as connection:
                connection.exec_driver_sql("INSERT INTO t VALUES (2)")
                if what in ("file", "file and log", "replaced"):
                    file.unlink()
                if what in ("log", "file and log"):
                    Path(f"{file}-wal").unlink()
                if what == "moved":
                    file.rename(folder / "elsewhere.db")
                if what == "replaced":
                    file.write_bytes(b"something else")
                if what == "folder":
                    shutil.rmtree(folder)
        saved = saved_in(raised.value)
        assert saved.parent == (tmp_path / "home" / "aivmm" if what == "folder" else folder)
        with pytest.raises(DatabaseError, match="removed or replaced"):
            database.save_plan("no run", {}, "")
    if what == "replaced":
        assert file.read_bytes() == b"something else"
    with Database.open(saved) as again:
        assert again.check() == []
        with again._reading() as connection:
            assert connection.exec_driver_sql("SELECT x FROM t ORDER BY x").all() == [(1,), (2,)]
    assert len(list(saved.parent.glob("*saved*"))) == 1  # once, however often it was asked


@REMOVABLE
def test_a_file_that_is_gone_before_a_write_begins_is_saved_and_nothing_is_made_in_its_place(tmp_path: Path) -> None:
    file = tmp_path / "x.db"
    Database.open(file).close()
    engine = make_engine(Location.of(file), timeout_s=5)
    with transaction(engine, writes=True) as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    file.unlink()
    for _ in range(2):
        with pytest.raises(DatabaseError, match="all that it held is saved in") as raised, transaction(engine, writes=True):
            raise AssertionError("it began")
    with closing(engine.raw_connection()), pytest.raises(DatabaseError, match="saved in"):
        engine.raw_connection()  # a second connection would make a new, empty file
    engine.dispose()
    assert not file.exists()
    other = sqlalchemy.create_engine(f"sqlite:///{saved_in(raised.value)}")
    assert sqlalchemy.inspect(other).has_table("t")
    other.dispose()


@REMOVABLE
def test_a_link_that_is_used_all_the_time_is_no_removal(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    Database.open(tmp_path / "there" / "x.db").close()
    (tmp_path / "link.db").symlink_to(tmp_path / "there" / "x.db")
    with Database.open(tmp_path / "link.db") as one, Database.open(tmp_path / "there" / "x.db") as two:
        for each in (one, two, one):
            with transaction(each._engine, writes=True) as connection:
                connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS t (x)")
    with Database.open(tmp_path / "link.db") as one, transaction(one._engine, writes=True):
        pass


@REMOVABLE
def test_a_database_whose_connections_all_closed_may_be_used_again(tmp_path: Path) -> None:
    """SQLite removes its log with the last connection; that is no loss."""
    engine = make_engine(Location.of(tmp_path / "x.db"), timeout_s=5)
    for number in range(3):
        use_wal(engine, timeout_s=5)
        with transaction(engine, writes=True) as connection:
            connection.exec_driver_sql(f"CREATE TABLE t{number} (x)")
        engine.dispose()
        assert not Path(f"{tmp_path / 'x.db'}-wal").exists()
        (tmp_path / f"{number}-wal").touch()  # so that the next log gets another inode


def test_opening_a_file_twice_in_one_process_leaves_both_their_locks(tmp_path: Path, child: Child) -> None:
    """Closing a plain file takes a process's locks from it (POSIX); the next process would take itself for the last and remove the log."""
    code = """
database = Database.open(sys.argv[1])
database.remember_environment(ENVIRONMENT)
database.add(outcome(1))
Database.open(sys.argv[1]).close()
print("ready", flush=True)
sys.stdin.readline()
database.add(outcome(2))
print("added", flush=True)
die()
"""
    file = tmp_path / "x.db"
    process = child(code, file)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    Database.open(file).close()
    assert Path(f"{file}-wal").exists()
    told, errors = process.communicate("go\n")
    assert told == "added\n", errors
    with Database.open(file) as database:
        assert subjects(database) == [1, 2]
