"""A model says in which order of its nodes its blocks are runs, where branches were cut into pieces of their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; what is stored already has the usual order."""
    op.add_column("model", sa.Column("pieces", sa.JSON(), nullable=True))
