"""From the rows of the database to a report on disk."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from aivmm.db.database import Database
from aivmm.errors import UsageError
from aivmm.reports.data import ReportData


def report_data(database: Database, run_id: str | None) -> ReportData:
    """Return all that is stored of a run (its id, a unique beginning of it, or a model's name; None is the newest)."""
    run = database.run(run_id)
    plan = database.plan(run.id)
    outcomes = database.run_outcomes(run.id)
    structure = database.run_structure(run.id)
    return ReportData(
        run=run,
        generated_at=datetime.now(UTC),
        structure=structure,
        environments=tuple(database.run_environments(run.id)),
        unavailable=tuple(database.unavailable(run.id)),
        proofs=tuple(database.proofs(run.id)),
        outcomes=tuple(outcome for outcome, _ in outcomes),
        trials=tuple(database.trials(run.id)),
        plan=plan,
        reused=frozenset(outcome.key for outcome, reused in outcomes if reused),
    )


def write_report(database: Database, run_id: str | None, path: Path) -> Path:
    """Render a run's report to `path`.

    Raises:
        UsageError: the file cannot be written, or there is no such run.
    """
    from aivmm.reports.render import render

    text = render(report_data(database, run_id))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write the report to {path}: {error.strerror or error}", advice="choose another file with -o FILE"
        ) from error
    return path
