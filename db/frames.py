"""Measurements as pandas frames, for people who want to ask their own questions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pandas as pd

from aivmm.db.database import Database
from aivmm.db.probes import STATES, Entry, Some
from aivmm.db.query import Filter, find, names_of
from aivmm.probes.records import Failed, Measured, Refused
from aivmm.runtime.environment import Environment

_KEY = ("kind", "subject", "name", "target", "environment", "precision", "config", "config_digest", "batch", "callers")
_RESULT = ("state", "source", "median_s", "p90_s", "count", "cautions", "reason", "race")
_ORIGIN = ("device", "runtime_version", "measured_at", "id")
COLUMNS = (*_KEY, *_RESULT, *_ORIGIN)


def evidence(
    database: Database,
    *,
    kind: Some = None,
    subject: Some = None,
    target: Some = None,
    environment: Some = None,
    model: str | None = None,
    precision: str | None = None,
    op_type: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    all: bool = False,
    run_id: str | None = None,
) -> pd.DataFrame:
    """Return one row a probe, oldest first: `COLUMNS`, then one column a metric, in alphabetical order.

    The newest of each key, or with `all` every one ever stored; `model`, `precision`, `op_type`, `state` and `since` (aware) are those of
    `aivmm.db.query.Filter`. `name` says what the subject is (a model, a block of one, an operator), `device` and `runtime_version` are the
    environment's. What a refused or failed probe does not have is missing (NaN), and so is a metric that was not taken; `cautions` are
    their codes, joined by commas; `config` is JSON. With `run_id` it is what that run rests on, and the other filters do not apply.

    Raises:
        UsageError: an unknown kind or state, or no model has that name.
    """
    if run_id:
        return frame_of(database, database.run_entries(run_id))
    asked = Filter(model=model, precision=precision, op_type=op_type, state=state, since=since, every=all)
    if asked == Filter(every=all):
        return frame_of(database, database.entries(kind=kind, subject=subject, target=target, environment=environment, all=all))
    entries = find(database, asked).entries
    for field, some in (("kind", kind), ("subject", subject), ("target", target), ("environment", environment)):
        if some is not None:
            wanted = {some} if isinstance(some, str) else set(some)
            entries = [entry for entry in entries if getattr(entry.outcome.key, field) in wanted]
    return frame_of(database, entries)


def frame_of(database: Database, entries: Sequence[Entry]) -> pd.DataFrame:
    """Return entries as a frame, a row each, in their order; its columns are those of `evidence`."""
    environments = {each.fingerprint: each for each in database.environments()}
    with database.reading() as connection:
        names = names_of(connection, {entry.outcome.key.subject for entry in entries})
    rows = [_row(entry, names[entry.outcome.key.subject], environments[entry.outcome.key.environment]) for entry in entries]
    metrics = sorted({name for row in rows for name in row} - set(COLUMNS))
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *metrics])
    numbers = ["median_s", "p90_s", *metrics]
    frame["measured_at"] = pd.to_datetime(frame["measured_at"], utc=True)
    return frame.astype({**dict.fromkeys(numbers, "float64"), "count": "int64", "batch": "int64", "callers": "int64"})


def _row(entry: Entry, name: str, environment: Environment) -> dict[str, Any]:
    outcome = entry.outcome
    key = outcome.key
    row: dict[str, Any] = {
        "kind": key.kind,
        "subject": key.subject,
        "name": name,
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
        "device": environment.device_model,
        "runtime_version": environment.runtime_version,
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
