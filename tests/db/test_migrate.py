"""The schema: what the migrations make is what the code expects, whole or not at all."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import aivmm.db.migrate
from aivmm.db.database import Database
from aivmm.db.migrate import HEAD, REVISIONS, VERSION_TABLE
from aivmm.db.schema import metadata
from aivmm.errors import DatabaseError
from tests.db.postgres import Server

Child = Callable[..., subprocess.Popen[str]]


def test_the_migrations_make_the_tables_that_the_code_uses(database: Database) -> None:
    with database._reading() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []
        assert context.get_current_heads() == (HEAD,)
        if connection.dialect.name == "sqlite":
            made = dict(connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'table'").all())
            clustered = {table.name for table in metadata.tables.values() if not table.dialect_options["sqlite"]["with_rowid"]}
            assert {name for name, sql in made.items() if "WITHOUT ROWID" in sql} == clustered


def test_the_known_revisions_are_the_released_files_in_one_line() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(aivmm.db.migrate.__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    assert [each.revision for each in reversed(list(script.walk_revisions()))] == list(REVISIONS)
    assert script.get_heads() == [HEAD]


def test_every_time_and_size_says_its_unit_in_its_name() -> None:
    doubtful = re.compile(r"(time|duration|latency|seconds|memory|size|bytes_|milli|micro)")
    fine = re.compile(r"(_s|_bytes|_at)$")
    names = {f"{table.name}.{column.name}" for table in metadata.tables.values() for column in table.columns}
    assert not {name for name in names if doubtful.search(name.partition(".")[2]) and not fine.search(name)} - {
        "environment.runtime_version",
        "target.runtime_version",
        "target.runtime",
    }


@pytest.mark.parametrize("statement", [1, 8, 30, 47])  # the version table, some tables and indices, the mark itself
def test_killed_inside_its_migration_it_opens_the_next_time(tmp_path: Path, child: Child, statement: int) -> None:
    code = """
import sqlalchemy
seen = 0
@sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    global seen
    seen += statement.lstrip().startswith(("CREATE", "INSERT"))
    if seen == int(sys.argv[2]):
        die()
Database.open(sys.argv[1])
print("survived", seen)
"""
    file = tmp_path / "x.db"
    told, _ = child(code, file, statement).communicate()
    assert told == ""
    with Database.open(file) as database:
        assert database.check() == []
        assert database.runs() == []


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path, child: Child) -> None:
    code = """
import sqlalchemy
@sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
def fail(connection, cursor, statement, *_):
    if "CREATE TABLE proof" in statement:
        raise RuntimeError("no")
try:
    Database.open(sys.argv[1])
except RuntimeError:
    print("failed")
"""
    file = tmp_path / "x.db"
    told, errors = child(code, file).communicate()
    assert told == "failed\n", errors
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    assert sqlalchemy.inspect(engine).get_table_names() == []
    engine.dispose()
    Database.open(file).close()


def test_several_processes_may_open_one_new_database_at_once(location: str, child: Child) -> None:
    code = """
print("ready", flush=True)
sys.stdin.readline()
with Database.open(sys.argv[1]) as database:
    database.remember_environment(ENVIRONMENT)
    database.add(outcome(1, who=sys.argv[2]))
"""
    children = [child(code, location, who) for who in range(4)]
    for each in children:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in children:  # all at the same moment, as near as it gets
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in children:
        _, errors = each.communicate()
        assert each.returncode == 0, errors
    with Database.open(location) as database:
        assert len(database.outcomes()) == 4
        assert database.check() == []


def test_migrations_do_not_ask_where_they_were_started(tmp_path: Path, child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """No alembic.ini and no current folder: the scripts are found beside the installed code, and standard output stays the user's."""
    monkeypatch.chdir(tmp_path)
    process = child("Database.open('x.db').close()")
    assert process.communicate() == ("", "")
    assert (tmp_path / "x.db").stat().st_size > 0


def test_opening_a_database_that_is_ready_does_not_load_alembic(database: Database, location: str, child: Child) -> None:
    told, errors = child(
        "Database.open(sys.argv[1]).close(); print(sorted({'alembic', 'pandas', 'onnx', 'optuna'} & set(sys.modules)))", location
    ).communicate()
    assert told == "[]\n", errors


def test_a_server_database_that_holds_other_tables_of_our_names_is_refused(server: Server) -> None:
    name = server.create()
    engine = sqlalchemy.create_engine(server.location(name))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE run (id int)")
    with pytest.raises(DatabaseError, match="did not make"):
        Database.open(server.location(name))
    assert sqlalchemy.inspect(engine).get_table_names() == ["run"]
    engine.dispose()
    server.drop(name)
