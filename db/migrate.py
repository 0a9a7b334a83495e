"""Bring a database to the newest schema: all steps and their marks in one transaction, or none of them.

Alembic is imported when there is something to do, and only then: it is slow, and most runs find the schema as they left it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from aivmm.db.engine import WRITES
from aivmm.errors import DatabaseError

VERSION_TABLE = "aivmm_version"
REVISIONS = ("0001", "0002", "0003", "0004", "0005")  # every one released, oldest first; a test compares them with migrations/versions
HEAD = REVISIONS[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The steps to migrate by: Alembic's folder of them, and their revisions, oldest first."""

    scripts: Path
    revisions: tuple[str, ...]

    @property
    def head(self) -> str:
        """The newest revision."""
        return self.revisions[-1]


RELEASED = History(scripts=Path(__file__).parent / "migrations", revisions=REVISIONS)

_POSTGRES_LOCK = 0x6169766D6D  # "aivmm": any number that others do not take
_alembic_lock = threading.Lock()  # alembic.context is one global per process


def newer(location: str, revision: str) -> DatabaseError:
    """Return the error for a database that a newer aivmm has migrated."""
    return DatabaseError(
        f"the database {location} is from a newer aivmm (schema {revision!r}, this one knows up to {HEAD!r})",
        advice="upgrade aivmm (pip install --upgrade aivmm), or give another file with --db",
    )


def revision_of(connection: Connection) -> str | None:
    """Return the schema revision; None when there is none yet."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()


def upgrade(engine: Engine, *, location: str, history: History = RELEASED) -> None:
    """Migrate to the newest revision. Several processes may do so at once: the first does the work, the others wait and find it done.

    All steps or none: when one fails, or the process is killed, the database is as it was.

    Raises:
        DatabaseError: the database is from a newer aivmm, or a server's schema holds tables of ours that aivmm did not make.
    """
    with engine.connect() as connection:
        connection.detach()  # it is set up differently from the pool's and must not go back there
        if engine.dialect.name == "sqlite":
            # A later step that rebuilds a table drops the old one; with foreign keys on, that would delete the rows which refer to it.
            # The setting does nothing inside a transaction, hence around SQLAlchemy, which would begin one.
            connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
        with connection.execution_options(**{WRITES: True}).begin():
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _POSTGRES_LOCK})
            revision = revision_of(connection)
            if revision is not None and revision not in history.revisions:
                raise newer(location, revision)
            if revision is None:
                _refuse_foreign(connection, location)
            if revision != history.head:
                _run_steps(connection, history)


def _refuse_foreign(connection: Connection, location: str) -> None:
    from aivmm.db.schema import metadata

    theirs = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
    if theirs:
        raise DatabaseError(
            f"the database {location} holds tables that aivmm did not make ({', '.join(theirs[:3])})",
            advice="give a database of its own with --db",
        )


def _run_steps(connection: Connection, history: History) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()  # no alembic.ini: the scripts are part of the installed package
    config.set_main_option("script_location", str(history.scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with _alembic_lock:
        command.upgrade(config, history.head)
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        if broken:
            raise RuntimeError(f"the migration to {history.head} leaves {len(broken)} rows without what they refer to, so it was undone")
