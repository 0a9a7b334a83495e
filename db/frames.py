"""Measurements as pandas frames, for people who want to ask their own questions."""

from __future__ import annotations

from typing import Any

import pandas as pd

from aivmm.db.database import Database
from aivmm.db.probes import STATES, Entry, Some
from aivmm.probes.records import Failed, Measured, Refused

_KEY = ("kind", "subject", "target", "environment", "precision", "config", "config_digest", "batch", "callers")
COLUMNS = (*_KEY, "state", "source", "median_s", "p90_s", "count", "cautions", "reason", "race", "measured_at", "id")


def evidence(
    database: Database,
    *,
    kind: Some = None,
    subject: Some = None,
    target: Some = None,
    environment: Some = None,
    all: bool = False,
    run_id: str | None = None,
) -> pd.DataFrame:
    """Return one row a probe, oldest first: `COLUMNS`, then one column a metric, in alphabetical order.

    The newest of each key, or with `all` every one ever stored. What a refused or failed probe does not have is missing (NaN), and so
    is a metric that was not taken; `cautions` are their codes, joined by commas; `config` is JSON. With `run_id` it is what that run
    rests on, and the other filters do not apply.
    """
    entries = (
        database.run_entries(run_id)
        if run_id
        else database.entries(kind=kind, subject=subject, target=target, environment=environment, all=all)
    )
    rows = [_row(entry) for entry in entries]
    metrics = sorted({name for row in rows for name in row} - set(COLUMNS))
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *metrics])
    numbers = ["median_s", "p90_s", *metrics]
    return frame.astype({**dict.fromkeys(numbers, "float64"), "count": "int64", "batch": "int64", "callers": "int64"})


def _row(entry: Entry) -> dict[str, Any]:
    outcome = entry.outcome
    key = outcome.key
    row: dict[str, Any] = {
        "kind": key.kind,
        "subject": key.subject,
        "target": key.target,
        "environment": key.environment,
        "precision": key.config.precision,
        "config": key.config.key(),
        "config_digest": key.config.digest(),
        "batch": key.batch,
        "callers": key.callers,
        "state": STATES[type(outcome)],
        "source": "measured",
        "count": 0,
        "cautions": "",
        "reason": "",
        "race": "",
        "measured_at": entry.measured_at,
        "id": entry.id,
    }
    match outcome:
        case Measured():
            # A metric that is called like a column keeps out of its way.
            row |= {f"metric_{name}" if name in COLUMNS else name: value for name, value in outcome.metrics.items()}
            row["median_s"] = outcome.samples.median_s
            row["p90_s"] = outcome.samples.quantile_s(0.9)
            row["count"] = len(outcome.samples.timed_s)
            row["cautions"] = ",".join(each.code for each in outcome.cautions)
            row["race"] = outcome.race
        case Refused() | Failed():
            row["reason"] = outcome.reason
    return row
