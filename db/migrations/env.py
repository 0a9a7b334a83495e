"""Run by Alembic. The connection comes from `aivmm.db.migrate`, inside the one transaction that holds all steps and their marks."""

from __future__ import annotations

from alembic import context

from aivmm.db.migrate import VERSION_TABLE
from aivmm.db.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
