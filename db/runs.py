"""Runs: what each tuning asked, searched, proved and decided."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, Select, null, select, update
from sqlalchemy.exc import IntegrityError

from aivmm.db import codec
from aivmm.db.models import load_structure
from aivmm.db.schema import environment, model, plan, probe, proof, run, run_environment, run_probe, study, trial
from aivmm.db.store import Store, add_missing, now, put
from aivmm.errors import DatabaseError, UsageError
from aivmm.models.records import Structure
from aivmm.planner.records import Importance, ProofRecord, RunRecord, StudyRecord, TrialRecord
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment
from aivmm.runtime.target import Unavailable

_NEWEST = (run.c.started_at.desc(), run.c.id.desc())


class RunStore(Store):
    """What was decided, and why."""

    def start_run(self, record: RunRecord, *, unavailable: Sequence[Unavailable] = (), model_id: str | None = None) -> None:
        """Store a run that begins. Without a `model_id` (of `remember_model`) the newest model of the same file and batch is linked.

        Raises:
            ValueError: the id is not a UUID or is taken, a time has no zone, or an option is not JSON.
        """
        uuid.UUID(record.id)
        with self._writing() as connection:
            row = {
                "id": record.id,
                "request": record.request,
                "started_at": record.started_at,
                "model_id": model_id or _model_of(connection, record),
                "model_name": record.model.name,
                "facts": codec.facts_to_json(record.model),
                "objective": record.objective,
                "constraints": list(record.constraints),
                "options": dict(record.options),
                "command": record.command,
                "seed": record.seed,
                "aivmm_version": record.aivmm_version,
                "unavailable": [asdict(each) for each in unavailable],
                **_progress(record),
            }
            try:
                connection.execute(run.insert(), [row])
            except IntegrityError as error:
                raise ValueError(f"the run {record.id} is stored already, or its model {model_id} is not") from error

    def update_run(self, record: RunRecord) -> None:
        """Store how a run stands (status, end, summary, notes); the rest of it never changes. ValueError when it was not started."""
        with self._writing() as connection:
            if not connection.execute(update(run).where(run.c.id == record.id).values(_progress(record))).rowcount:
                raise ValueError(f"the run {record.id} is not stored")

    def last_run(self, request: str, status: Collection[str], *, begun: str = "") -> RunRecord | None:
        """Return the newest run of this request that stands at one of `status`, or None.

        With `begun` only runs count whose study of that name had begun to ask.
        """
        with self._reading() as connection:
            query = select(run).where(run.c.request == request, run.c.status.in_(list(status)))
            if begun:
                query = query.where(run.c.id.in_(select(study.c.run_id).where(study.c.name == begun, study.c.objectives.is_not(null()))))
            row = connection.execute(query.order_by(*_NEWEST).limit(1)).first()
        return None if row is None else _run(row)

    def runs(self, limit: int | None = None) -> list[RunRecord]:
        """Return the newest runs, newest first; all of them without a limit."""
        with self._reading() as connection:
            return [_run(row) for row in connection.execute(select(run).order_by(*_NEWEST).limit(limit))]

    def run(self, wanted: str | None = None) -> RunRecord:
        """Return one run: the newest (None), the newest of a model (its name), or the one whose id begins so.

        Raises:
            UsageError: no run fits, or several do; it lists what could have been meant.
        """
        newest = select(run).order_by(*_NEWEST)
        with self._reading() as connection:
            if wanted is None:
                found = connection.execute(newest.limit(1)).all()
            else:
                named = connection.execute(newest.where(run.c.model_name == wanted).limit(1)).all()
                found = named or connection.execute(newest.where(run.c.id.startswith(wanted.lower(), autoescape=True))).all()
            if len(found) == 1:
                return _run(found[0])
            candidates = found or connection.execute(newest.limit(5)).all()
        if not candidates:
            raise UsageError(f"no run is stored in {self.location}", advice="run aivmm-tune MODEL first, or give another --db")
        listed = ", ".join(f"{row.id[:8]} ({row.model_name}, {row.started_at:%Y-%m-%d %H:%M}, {row.status})" for row in candidates[:5])
        raise UsageError(f"{'several runs begin' if found else 'no run begins'} with {wanted!r}", advice=f"choose from {listed}")

    def unavailable(self, run_id: str) -> list[Unavailable]:
        """Return the targets that were absent in a run, as `start_run` was told."""
        with self._reading() as connection:
            stored = connection.scalars(select(run.c.unavailable).where(run.c.id == run_id)).first()
        return [codec.unavailable_from_json(each) for each in stored or []]

    def link_environments(self, run_id: str, fingerprints: Iterable[str]) -> None:
        """Say in which environments a run took place, in order; ValueError when the run or one of them is not stored."""
        rows = [{"run_id": run_id, "environment": each, "position": position} for position, each in enumerate(dict.fromkeys(fingerprints))]
        with self._writing() as connection:
            try:
                add_missing(connection, run_environment, sorted(rows, key=lambda row: str(row["environment"])))
            except IntegrityError as error:
                raise ValueError(f"the run {run_id} or one of its environments is not stored") from error

    def run_environments(self, run_id: str) -> list[Environment]:
        """Return the environments linked to a run, in order, then any other that its probes were measured in."""
        linked = select(environment.c.facts).join(run_environment).where(run_environment.c.run_id == run_id)
        probed = (
            select(environment.c.fingerprint, environment.c.facts)
            .where(environment.c.fingerprint.in_(select(probe.c.environment).join(run_probe).where(run_probe.c.run_id == run_id)))
            .order_by(environment.c.target, environment.c.fingerprint)
        )
        with self._reading() as connection:
            found = [*connection.scalars(linked.order_by(run_environment.c.position))]
            found += [facts for _, facts in connection.execute(probed)]
        return list({each.fingerprint: each for each in map(codec.environment_from_json, found)}.values())

    def add_trial(self, run_id: str, record: TrialRecord, *, study_name: str = "search") -> None:
        """Store one point of a search. A run may hold several studies, each with its own numbering.

        Raises:
            ValueError: the number is taken in its study, the run is not stored, or a number is NaN or infinite.
        """
        with self._writing() as connection:
            self._store_configs(connection, {record.config.digest(): record.config})
            try:
                add_missing(connection, study, [{"id": codec.new_id(), "run_id": run_id, "name": study_name}])
                study_id = connection.scalars(select(study.c.id).where(study.c.run_id == run_id, study.c.name == study_name)).one()
                connection.execute(trial.insert(), [_trial_row(study_id, record)])
            except IntegrityError as error:
                raise ValueError(f"trial {record.number} of study {study_name!r} is stored already, or the run {run_id} is not") from error

    def trials(self, run_id: str, *, study_name: str | None = None) -> list[TrialRecord]:
        """Return the trials of a run, study by study as they began, each in order of their numbers."""
        query = select(trial).join(study).where(study.c.run_id == run_id).order_by(study.c.id, trial.c.number)
        if study_name is not None:
            query = query.where(study.c.name == study_name)
        with self._reading() as connection:
            rows, configs = self._with_configs(connection, query)
        return [_trial(row, configs[row.config_digest]) for row in rows]

    def end_study(self, run_id: str, record: StudyRecord) -> None:
        """Store what a search came to; a second time replaces the first. A search without a trial has no study, and nothing is stored."""
        values = {
            "objectives": list(record.objectives),
            "front": list(record.front),
            "importance": [asdict(each) | {"share": codec.finite("share", each.share)} for each in record.importance],
        }
        with self._writing() as connection:
            connection.execute(update(study).where(study.c.run_id == run_id, study.c.name == record.name).values(values))

    def studies(self, run_id: str) -> list[StudyRecord]:
        """Return the studies of a run as they began. One that never ended, or is of before schema 0005, has no objectives."""
        with self._reading() as connection:
            rows = connection.execute(select(study).where(study.c.run_id == run_id).order_by(study.c.id)).all()
        return [
            StudyRecord(
                name=row.name,
                objectives=tuple(row.objectives or ()),
                front=tuple(row.front or ()),
                importance=tuple(Importance(**each) for each in row.importance or ()),
            )
            for row in rows
        ]

    def add_proof(self, run_id: str, record: ProofRecord) -> None:
        """Store one proof of a run; ValueError when the run is not stored, or a number is NaN or infinite."""
        with self._writing() as connection:
            self._store_configs(connection, {record.config.digest(): record.config})
            try:
                connection.execute(proof.insert(), [_proof_row(run_id, record)])
            except IntegrityError as error:
                raise ValueError(f"the run {run_id} is not stored") from error

    def proofs(self, run_id: str) -> list[ProofRecord]:
        """Return the proofs of a run, in the order they were added."""
        with self._reading() as connection:
            rows, configs = self._with_configs(connection, select(proof).where(proof.c.run_id == run_id).order_by(proof.c.id))
        try:
            return [_proof(row, configs[row.config_digest]) for row in rows]
        except ValueError as error:
            raise DatabaseError(
                f"the database {self.location} is damaged (a proof of run {run_id}: {error})", advice="restore a copy"
            ) from error

    def save_plan(self, run_id: str, content: Mapping[str, Any], path: str) -> None:
        """Store the plan of a run (what `plan.json` holds) and where its bundle was written; a second one replaces it."""
        row = {"id": codec.new_id(), "run_id": run_id, "path": path, "content": dict(content), "saved_at": now()}
        with self._writing() as connection:
            try:
                put(connection, plan, [row], on=["run_id"], keep=["id"])
            except IntegrityError as error:
                raise ValueError(f"the run {run_id} is not stored") from error

    def plan(self, run_id: str) -> dict[str, Any] | None:
        """Return the content of a run's plan, or None when it has none."""
        with self._reading() as connection:
            content = connection.scalars(select(plan.c.content).where(plan.c.run_id == run_id)).first()
        return None if content is None else dict(content)

    def run_of_plan(self, content: Mapping[str, Any]) -> RunRecord | None:
        """Return the run that wrote this plan (what `plan.json` holds), known by its moment, its model and its files' names, or None."""
        query = select(run, plan.c.content.label("plan_content")).join(plan, plan.c.run_id == run.c.id)
        with self._reading() as connection:
            rows = connection.execute(query.where(run.c.model_name == content["model"]["name"]).order_by(*_NEWEST))
            return next((_run(row) for row in rows if _mark(row.plan_content) == _mark(content)), None)

    def plan_path(self, run_id: str) -> str | None:
        """Return where a run's bundle was written, or None."""
        with self._reading() as connection:
            return connection.scalars(select(plan.c.path).where(plan.c.run_id == run_id)).first()

    def run_structure(self, run_id: str) -> Structure | None:
        """Return the analysed model that a run tuned, or None when it is not stored."""
        with self._reading() as connection:
            identity = connection.scalars(select(run.c.model_id).where(run.c.id == run_id)).first()
            return None if identity is None else load_structure(connection, identity)

    def _with_configs(self, connection: Connection, query: Select[Any]) -> tuple[Sequence[Row[Any]], Mapping[str, Config]]:
        rows = connection.execute(query).all()
        return rows, self._load_configs(connection, (row.config_digest for row in rows))


def _mark(content: Mapping[str, Any]) -> tuple[Any, ...]:
    return content["created_at"], content["model"]["sha256"], sorted(content["files"])


def _model_of(connection: Connection, record: RunRecord) -> str | None:
    same = select(model.c.id).where(model.c.sha256 == record.model.sha256, model.c.batch == record.model.batch)
    return connection.scalars(same.order_by(model.c.first_seen_at.desc())).first()


def _progress(record: RunRecord) -> dict[str, Any]:
    return {
        "status": record.status,
        "finished_at": record.finished_at,
        "summary": dict(record.summary),
        "notes": list(record.notes),
    }


def _run(row: Row[Any]) -> RunRecord:
    return RunRecord(
        id=row.id,
        request=row.request,
        started_at=row.started_at,
        finished_at=row.finished_at,
        status=row.status,
        model=codec.facts_from_json(row.facts),
        objective=row.objective,
        constraints=tuple(row.constraints),
        options=row.options,
        command=row.command,
        seed=row.seed,
        aivmm_version=row.aivmm_version,
        summary=row.summary,
        notes=tuple(row.notes),
    )


def _trial_row(study_id: str, record: TrialRecord) -> dict[str, Any]:
    return {
        "id": codec.new_id(),
        "study_id": study_id,
        "number": record.number,
        "target": record.target,
        "config_digest": record.config.digest(),
        "batch": record.batch,
        "callers": record.callers,
        "state": record.state,
        **{name: codec.finite_or_none(name, getattr(record, name)) for name in ("value", "low", "high", "median_s")},
        "reused": record.reused,
        "reason": codec.clean(record.reason),
        "duration_s": codec.finite("seconds", record.seconds),
        "asked": record.asked,
        "policy": None if record.policy is None else dict(record.policy),
        "metrics": {name: codec.finite(name, value) for name, value in record.metrics.items()},
    }


def _trial(row: Row[Any], config: Config) -> TrialRecord:
    return TrialRecord(
        number=row.number,
        target=row.target,
        config=config,
        batch=row.batch,
        callers=row.callers,
        state=row.state,
        value=row.value,
        low=row.low,
        high=row.high,
        median_s=row.median_s,
        reused=row.reused,
        reason=row.reason,
        seconds=row.duration_s,
        asked=bool(row.asked),
        policy=row.policy,
        metrics=row.metrics or {},
    )


def _proof_row(run_id: str, record: ProofRecord) -> dict[str, Any]:
    return {
        "id": codec.new_id(),
        "run_id": run_id,
        "name": record.name,
        "role": record.role,
        "target": record.target,
        "config_digest": record.config.digest(),
        "batch": record.batch,
        "callers": record.callers,
        "eligible": record.eligible,
        "why_not": codec.clean(record.why_not),
        "samples": None if record.samples is None else codec.pack_samples(record.samples),
        **{name: codec.finite_or_none(name, getattr(record, name)) for name in ("ratio", "ratio_low", "ratio_high")},
        "verdict": record.verdict,
        "metrics": {name: codec.finite(name, value) for name, value in record.metrics.items()},
        "cautions": [asdict(each) for each in record.cautions],
        "proved_at": now(),
    }


def _proof(row: Row[Any], config: Config) -> ProofRecord:
    return ProofRecord(
        name=row.name,
        role=row.role,
        target=row.target,
        config=config,
        batch=row.batch,
        callers=row.callers,
        eligible=row.eligible,
        why_not=row.why_not,
        samples=None if row.samples is None else codec.unpack_samples(row.samples),
        ratio=row.ratio,
        ratio_low=row.ratio_low,
        ratio_high=row.ratio_high,
        verdict=row.verdict,
        metrics=row.metrics,
        cautions=tuple(map(codec.caution_from_json, row.cautions)),
    )
