"""Migrations that were never released: what a later version might do to a database, for tests of how migrating ends."""

from __future__ import annotations

import shutil
from pathlib import Path

from aivmm.db.migrate import RELEASED, History

# Rebuilds the widest table row by row, as SQLite has to for most changes, and makes a new one.
REBUILD = """
import sqlalchemy as sa
from alembic import op

revision = "test_rebuild"
down_revision = "{before}"

def upgrade():
    recreate = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("probe", recreate=recreate) as table:
        table.add_column(sa.Column("test_note", sa.String(), nullable=False, server_default="none"))
    op.execute("UPDATE probe SET test_note = subject")
    op.create_table("test_extra", sa.Column("id", sa.String(), primary_key=True))
"""

# Does a lot of harm, and then fails.
FAIL = """
import sqlalchemy as sa
from alembic import op

revision = "test_fail"
down_revision = "{before}"

def upgrade():
    op.drop_table("model_block")
    op.execute("DELETE FROM model_operator")
    op.execute("UPDATE probe SET batch = batch + 1")
    op.execute("SELECT 1 FROM no_such_table")
"""

# Succeeds, and leaves rows that refer to nothing (SQLite only: a server refuses to).
ORPHAN = """
from alembic import op

revision = "test_orphan"
down_revision = "{before}"

def upgrade():
    op.execute("DELETE FROM environment")
"""


def history(folder: Path, *steps: str) -> History:
    """Return the released steps, followed by others, with their scripts in `folder`."""
    scripts = folder / "migrations"
    shutil.copytree(RELEASED.scripts, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    revisions = list(RELEASED.revisions)
    for number, step in enumerate(steps):
        (scripts / "versions" / f"test_{number}.py").write_text(step.format(before=revisions[-1]))
        revisions.append(step.partition('revision = "')[2].partition('"')[0])
    return History(scripts=scripts, revisions=tuple(revisions))
