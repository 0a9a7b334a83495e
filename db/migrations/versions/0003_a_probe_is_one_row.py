"""A probe is one row with two indices, and a lowering says what it was calibrated on.

Metrics and cautions move into the probe's own row: they were most of all rows, and no question was ever asked of them alone. Keys are
digests, so an index that begins with them is written all over; behind the subject, of which many probes come together, it is not, and it
answers for the subject's index too. That of targets had no question that the environment's does not answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_PROBES = 5000  # that are in memory at a time


def upgrade() -> None:
    """Add the columns, fill those of the probe, drop two tables, and change the indices."""
    op.add_column("lowering", sa.Column("calibration", sa.String(), nullable=True))
    op.add_column("probe", sa.Column("metrics", sa.JSON(), nullable=True))
    op.add_column("probe", sa.Column("cautions", sa.JSON(), nullable=True))
    op.execute("UPDATE probe SET metrics = '{}' WHERE state = 'measured'")  # each has metrics, if none; what has no caution has no list
    said = ("code", "message", "advice")
    _move("metric", "name, value", "name", lambda rows: {name: value for _, name, value in rows})
    _move("caution", ", ".join(said), "position", lambda rows: [dict(zip(said, row[1:], strict=True)) for row in rows])
    op.drop_table("metric")
    op.drop_table("caution")
    for index in ("ix_probe_key_id", "ix_probe_subject_kind", "ix_probe_target_kind"):
        op.drop_index(index, "probe")
    op.create_index("ix_probe_subject_key_id", "probe", ["subject", "key", "id"])


def _move(table: str, columns: str, order: str, gather: Callable[[list[Any]], Any]) -> None:
    """Gather the rows of each probe into one value, in Python: SQLite's own JSON would round numbers to 15 digits."""
    connection = op.get_bind()
    page = sa.text(f"SELECT DISTINCT probe_id FROM {table} WHERE probe_id > :last ORDER BY probe_id LIMIT {_PROBES}")
    query = sa.text(f"SELECT probe_id, {columns} FROM {table} WHERE probe_id > :last AND probe_id <= :end ORDER BY probe_id, {order}")
    change = sa.text(
        f"UPDATE probe SET {table}s = CAST(:value AS {'JSON' if connection.dialect.name == 'postgresql' else 'TEXT'}) WHERE id = :id"
    )
    last = ""
    while probes := connection.scalars(page, {"last": last}).all():
        rows = connection.execute(query, {"last": last, "end": probes[-1]})
        found = [(probe, gather(list(mine))) for probe, mine in groupby(rows, key=lambda row: row[0])]
        texts = [{"id": probe, "value": json.dumps(value, allow_nan=False, separators=(",", ":"))} for probe, value in found]
        connection.execute(change, texts)
        last = probes[-1]
