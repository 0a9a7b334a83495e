"""A trial keeps its metrics and its policy, and whether the search asked for it; a study its objectives, its front and what mattered.

Of searches before this nothing of it was kept, so their rows have none.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("trial", sa.Column("asked", sa.Boolean(), nullable=True))
    for table, names in {"trial": ("policy", "metrics"), "study": ("objectives", "front", "importance")}.items():
        for name in names:
            op.add_column(table, sa.Column(name, sa.JSON(), nullable=True))
