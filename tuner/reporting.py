"""From the rows of the database to a report on disk."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aivmm.db.database import Database
from aivmm.errors import UsageError
from aivmm.planner.records import ProofRecord, RunRecord, TrialRecord
from aivmm.reports.data import ReportData

if TYPE_CHECKING:
    import pandas as pd


def find_run(database: Database, wanted: str | None) -> RunRecord:
    """Return the run that a user names: by id or the beginning of one, by a model (its name, its file, `demo:NAME`), or by a
    plan bundle; None is the newest.

    Raises:
        UsageError: nothing fits, or several do.
        BundleError: it is a bundle, and a broken one.
    """
    if wanted is not None and Path(wanted).exists() and ((Path(wanted) / "plan.json").is_file() or Path(wanted).suffix == ".aivmm"):
        from aivmm.runtime.bundle import Bundle

        with Bundle.open(wanted) as bundle:
            found = database.run_of_plan(bundle.plan.as_json())
        if found is None:
            raise UsageError(
                f"the run that wrote {wanted} is not stored in {database.location}", advice="give the --db that it was tuned with"
            )
        return found
    return database.run(wanted and _name(wanted))


def _name(wanted: str) -> str:
    """Return the name that a run calls its model by, given what `tune` was given for it: a file or a demo."""
    return Path(wanted).stem if wanted.endswith(".onnx") else wanted.removeprefix("demo:")


def report_data(database: Database, run_id: str | None, *, parts: bool = True) -> ReportData:
    """Return all that is stored of a run (its id, a unique beginning of it, or a model's name; None is the newest).

    Without `parts` neither probes nor the analysed model, which are most of it.
    """
    run = database.run(run_id)
    plan = database.plan(run.id)
    outcomes = database.run_outcomes(run.id) if parts else []
    structure = database.run_structure(run.id) if parts else None
    return ReportData(
        run=run,
        generated_at=datetime.now(UTC),
        structure=structure,
        environments=tuple(database.run_environments(run.id)),
        unavailable=tuple(database.unavailable(run.id)),
        proofs=tuple(database.proofs(run.id)),
        outcomes=tuple(outcome for outcome, _ in outcomes),
        trials=tuple(database.trials(run.id, study_name="search")),
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


def run_tables(database: Database, run_id: str) -> dict[str, pd.DataFrame]:
    """Return a run's tables by name: probes, trials, proofs, samples of the proofs, blocks, operators, environments. Seconds and bytes."""
    import pandas as pd

    from aivmm.db.frames import evidence

    data = report_data(database, run_id)
    found = {
        "probes": evidence(database, run_id=run_id),
        "trials": pd.DataFrame([_trial(each) for each in data.trials]),
        "proofs": pd.DataFrame([_proof(each) for each in data.proofs]),
        "samples": pd.DataFrame(
            [
                {"proof": proof.name, "role": proof.role, "round": number, "timed_s": timed}
                for proof in data.proofs
                if proof.samples is not None
                for timed, number in zip(proof.samples.timed_s, proof.samples.rounds or (0,) * len(proof.samples.timed_s), strict=True)
            ]
        ),
        "environments": pd.DataFrame([{**asdict(each), "instruction_sets": ",".join(each.instruction_sets)} for each in data.environments]),
    }
    if data.structure is not None:
        found["blocks"] = pd.DataFrame(
            [
                {
                    "index": each.index,
                    "first": each.first,
                    "last": each.last,
                    "structure": each.structure,
                    "content": each.content,
                    "flops": each.flops,
                    "weight_bytes": each.weight_bytes,
                    "op_types": ",".join(f"{name}:{count}" for name, count in each.op_types.items()),
                }
                for each in data.structure.blocks
            ]
        )
        found["operators"] = pd.DataFrame(
            [
                {"signature": each.signature, "op_type": each.op_type, "count": each.count, "flops": each.flops, "bytes": each.bytes}
                for each in data.structure.operators
            ]
        )
    return found


def _trial(each: TrialRecord) -> dict[str, Any]:
    return {
        "number": each.number,
        "target": each.target,
        "precision": each.config.precision,
        "config": each.config.key(),
        "batch": each.batch,
        "callers": each.callers,
        "replicas": each.replicas,
        "state": each.state,
        "ratio": each.value,
        "ratio_low": each.low,
        "ratio_high": each.high,
        "median_s": each.median_s,
        "reused": each.reused,
        "reason": each.reason,
    }


def _proof(each: ProofRecord) -> dict[str, Any]:
    return {
        "name": each.name,
        "role": each.role,
        "target": each.target,
        "precision": each.config.precision,
        "config": each.config.key(),
        "batch": each.batch,
        "callers": each.callers,
        "eligible": each.eligible,
        "why_not": each.why_not,
        "median_s": each.samples.median_s if each.samples else None,
        "ratio": each.ratio,
        "ratio_low": each.ratio_low,
        "ratio_high": each.ratio_high,
        "verdict": each.verdict,
        "cautions": ",".join(caution.code for caution in each.cautions),
        **{f"metric_{name}": value for name, value in each.metrics.items()},
    }
