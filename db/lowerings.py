"""Lowerings: the precision variants that were made of models, and how near each stays to fp32 on each target."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from aivmm.db import codec
from aivmm.db.schema import lowering
from aivmm.db.store import Store, now, put
from aivmm.models.records import Lowering


class LoweringStore(Store):
    """What was lowered. A variant is known by content, recipe and calibration, so each has one row, on every machine the same."""

    def remember_lowering(self, record: Lowering) -> str:
        """Store a variant, or what is known of it now: accuracy on a target is added to, or replaces, what was known; return its id.

        Raises:
            ValueError: an accuracy is NaN or infinite.
        """
        identity = codec.digest("lowering", record.content, record.precision, record.recipe_digest, record.calibration)
        accuracy = {
            target: {name: codec.finite(name, value) for name, value in metrics.items()} for target, metrics in record.accuracy.items()
        }
        with self._writing() as connection:
            known = connection.scalars(select(lowering.c.accuracy).where(lowering.c.id == identity)).first()
            row = {
                "id": identity,
                "content": record.content,
                "precision": record.precision,
                "recipe": {"name": record.recipe, "digest": record.recipe_digest, "options": dict(record.options)},
                "calibration": record.calibration,
                "lowered_content": record.lowered_content,
                "reason": codec.clean(record.reason),
                "data": record.data,
                "accuracy": {**(known or {}), **accuracy},
                "weight_bytes": record.weight_bytes,
                "duration_s": codec.finite("duration_s", record.duration_s),
                "made_at": now(),
            }
            put(connection, lowering, [row], on=["id"], keep=["made_at"])
        return identity

    def lowerings(self, content: str | None = None) -> list[Lowering]:
        """Return the variants of the model with this content hash (of all models when it is None), the first made first."""
        query = select(lowering).where(lowering.c.calibration.is_not(None))  # rows of schema 0001 do not say what they were calibrated on
        query = query if content is None else query.where(lowering.c.content == content)
        with self._reading() as connection:
            return [_record(row) for row in connection.execute(query.order_by(lowering.c.made_at, lowering.c.id))]


def _record(row: Any) -> Lowering:
    return Lowering(
        content=row.content,
        precision=row.precision,
        recipe=row.recipe["name"],
        recipe_digest=row.recipe["digest"],
        options=row.recipe["options"],
        calibration=row.calibration,
        data=row.data,
        lowered_content=row.lowered_content,
        reason=row.reason,
        weight_bytes=row.weight_bytes,
        duration_s=row.duration_s,
        accuracy=row.accuracy,
    )
