"""A transfer has two ends: the probe has the environment and the config of its destination, these are its source's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two columns; what is stored already does not know them."""
    with op.batch_alter_table("transfer") as transfer:  # SQLite cannot add a reference to a table: it is made anew
        for column, table, key in (("source_environment", "environment", "fingerprint"), ("source_config_digest", "config", "digest")):
            transfer.add_column(sa.Column(column, sa.String(), nullable=True))
            transfer.create_foreign_key(op.f(f"fk_transfer_{column}_{table}"), table, [column], [key])
