"""Runs, their trials, proofs and plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.schema import run as run_table
from aivmm.errors import UsageError
from aivmm.models.records import ModelFacts, Structure
from aivmm.planner.records import ProofRecord, RunRecord, StudyRecord, TrialRecord
from aivmm.probes.records import Caution, Measured, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment
from aivmm.runtime.target import Unavailable

Runs = Callable[..., RunRecord]

TRIAL = TrialRecord(
    number=3,
    target="openvino:CPU",
    config=Config.of({"n": 2}),
    batch=4,
    callers=2,
    state="complete",
    value=0.91,
    low=0.9,
    high=0.92,
    median_s=1e-3,
)
PROOF = ProofRecord(
    name="plan",
    role="plan",
    target="openvino:CPU + onnxruntime:CPU",
    config=Config.of({"n": 2}, precision="bf16"),
    batch=4,
    callers=1,
    eligible=True,
    samples=Samples(timed_s=(1.0, 2.0), rounds=(0, 1)),
    metrics={"throughput_per_s": 12.5},
    cautions=(Caution(code="spread", message="m", advice="a"),),
)
BASELINE = ProofRecord(
    name="ORT default",
    role="baseline",
    target="onnxruntime:CPU",
    config=Config(),
    batch=1,
    callers=1,
    eligible=False,
    why_not="over the accuracy limit",
    ratio=1.9,
    ratio_low=1.8,
    ratio_high=2.0,
    verdict="faster",
)


def test_a_run_comes_back_as_it_was_also_after_it_went_on(database: Database, run_record: Runs) -> None:
    record = run_record()
    database.start_run(record)
    assert database.run(record.id) == record
    ended = dataclasses.replace(
        record,
        status="complete",
        finished_at=record.started_at + timedelta(seconds=61),
        summary={"schema": 1, "plan": None},
        notes=("a", "b"),
    )
    database.update_run(ended)
    assert database.run(record.id) == ended
    assert database.runs() == [ended]


def test_a_time_keeps_its_moment_whatever_zone_it_was_given_in(database: Database, run_record: Runs) -> None:
    record = run_record()
    tokyo = dataclasses.replace(record, started_at=record.started_at.astimezone(timezone(timedelta(hours=9))))
    database.start_run(tokyo)
    assert database.run().started_at == record.started_at
    assert database.run().started_at.tzinfo is UTC


@pytest.mark.parametrize(
    "change",
    [{"id": "not a uuid"}, {"started_at": datetime(2026, 1, 1)}, {"options": {"x": float("nan")}}],
    ids=["id", "naive time", "nan"],
)
def test_a_run_that_could_not_come_back_is_refused(database: Database, run_record: Runs, change: dict[str, object]) -> None:
    with pytest.raises((ValueError, sqlalchemy.exc.StatementError)):
        database.start_run(dataclasses.replace(run_record(), **change))
    assert database.runs() == []


def test_a_run_starts_once_and_only_a_started_one_goes_on(database: Database, run_record: Runs) -> None:
    record = run_record()
    with pytest.raises(ValueError, match="not stored"):
        database.update_run(record)
    database.start_run(record)
    with pytest.raises(ValueError, match="already"):
        database.start_run(record)


def test_the_last_run_of_a_request_is_the_newest_that_stands_so(database: Database, run_record: Runs) -> None:
    early, middle, late, other = run_record(1), run_record(2), run_record(3), run_record(4, request="other")
    for record in (middle, late, early, other):
        database.start_run(record)
    for record in (early, middle):
        database.update_run(dataclasses.replace(record, status="complete"))
    assert (found := database.last_run("request", {"complete", "searched"})) is not None
    assert found.id == middle.id
    assert (found := database.last_run("request", ["running"])) is not None
    assert found.id == late.id
    assert database.last_run("request", []) is None
    assert database.last_run("unknown", ["running"]) is None
    assert [record.id for record in database.runs(limit=2)] == [other.id, late.id]


def test_a_run_is_named_by_the_beginning_of_its_id_or_by_its_model(database: Database, run_record: Runs, facts: ModelFacts) -> None:
    ids = ["aaaa1111-0000-4000-8000-000000000000", "aaaa2222-0000-4000-8000-000000000000", "b_%0-0"]
    ids[2] = "bbbb0000-0000-4000-8000-000000000000"
    for minute, run_id in enumerate(ids):
        database.start_run(run_record(minute, run_id=run_id))
    other = dataclasses.replace(run_record(9), model=dataclasses.replace(facts, name="aaaa"))
    database.start_run(other)
    assert database.run().id == other.id
    assert database.run("aaaa1").id == ids[0]
    assert database.run("AAAA2222").id == ids[1]
    assert database.run("squeezenet").id == ids[2]
    assert database.run("aaaa").id == other.id  # a model's name comes first
    with pytest.raises(UsageError, match="several runs begin with 'aaa'") as raised:
        database.run("aaa")
    assert all(each in raised.value.advice for each in ("aaaa1111", "aaaa2222", "squeezenet"))
    assert "bbbb" not in raised.value.advice
    for wanted in ("cccc", "%", "_", "' OR 1=1 --"):
        with pytest.raises(UsageError, match="no run begins with") as raised:
            database.run(wanted)
        assert "bbbb0000" in raised.value.advice


def test_without_any_run_the_way_to_the_first_is_told(database: Database) -> None:
    for wanted in (None, "x"):
        with pytest.raises(UsageError, match=r"no run is stored.*aivmm-tune MODEL"):
            database.run(wanted)


def test_a_run_remembers_what_was_absent_and_where_it_took_place(
    database: Database, environment: Environment, run_record: Runs, measured: Callable[..., Measured]
) -> None:
    record, absent = run_record(), Unavailable(target="openvino:GPU", reason="no driver", advice="install it")
    second, third = (dataclasses.replace(environment, target=name) for name in ("x:1", "x:2"))
    database.remember_environment(second)
    database.remember_environment(third)
    database.start_run(record, unavailable=[absent])
    assert database.unavailable(record.id) == [absent]
    assert database.run_environments(record.id) == []
    database.add(measured(), run_id=record.id)
    assert database.run_environments(record.id) == [environment]
    database.link_environments(record.id, [third.fingerprint, second.fingerprint])
    database.link_environments(record.id, [third.fingerprint])
    assert database.run_environments(record.id) == [third, second, environment]
    with pytest.raises(ValueError, match="not stored"):
        database.link_environments(record.id, ["unknown"])


def test_a_run_is_linked_to_the_model_it_was_about(database: Database, run_record: Runs, facts: ModelFacts, structure: Structure) -> None:
    early = run_record(1)
    database.start_run(early)
    identity = database.remember_model(facts, structure)
    late, told = run_record(2), run_record(3)
    database.start_run(late)
    database.start_run(told, model_id=identity)
    with database._reading() as connection:
        links = dict(connection.execute(sqlalchemy.select(run_table.c.id, run_table.c.model_id)).all())
    assert links == {early.id: None, late.id: identity, told.id: identity}


def test_trials_come_back_in_order_study_by_study(database: Database, run_record: Runs) -> None:
    record = run_record()
    database.start_run(record)
    refused = dataclasses.replace(
        TRIAL, number=1, state="refused", value=None, low=None, high=None, median_s=None, reason="no", reused=True, seconds=0.5
    )
    batch = dataclasses.replace(TRIAL, number=1, batch=8)
    for trial in (TRIAL, refused):
        database.add_trial(record.id, trial)
    database.add_trial(record.id, batch, study_name="batch")
    assert database.trials(record.id) == [refused, TRIAL, batch]
    assert database.trials(record.id, study_name="batch") == [batch]
    assert database.trials("unknown") == []
    with pytest.raises(ValueError, match=r"trial 3 .*already"):
        database.add_trial(record.id, TRIAL)
    with pytest.raises(ValueError, match="not"):
        database.add_trial("unknown", TRIAL)
    with pytest.raises(ValueError, match="value"):
        database.add_trial(record.id, dataclasses.replace(TRIAL, number=9, value=float("inf")))
    assert database.trials(record.id) == [refused, TRIAL, batch]


def test_proofs_come_back_in_the_order_they_were_added(database: Database, run_record: Runs) -> None:
    record = run_record()
    database.start_run(record)
    for proof in (PROOF, BASELINE):
        database.add_proof(record.id, proof)
    assert database.proofs(record.id) == [PROOF, BASELINE]
    assert database.proofs("unknown") == []
    with pytest.raises(ValueError, match="not stored"):
        database.add_proof("unknown", PROOF)
    with pytest.raises(ValueError, match="cosine"):
        database.add_proof(record.id, dataclasses.replace(PROOF, metrics={"cosine": float("nan")}))


def test_a_run_has_one_plan_and_the_last_one_saved_counts(database: Database, run_record: Runs) -> None:
    record = run_record()
    database.start_run(record)
    assert database.plan(record.id) is None
    assert database.plan_path(record.id) is None
    database.save_plan(record.id, {"schema": 1, "stages": []}, "old.aivmm")
    content = {"schema": 1, "stages": [{"config": {"a": True, "b": 1, "c": 1.5}, "blocks": [0, 3]}], "ünïcödé": None}
    database.save_plan(record.id, content, "new.aivmm")
    assert database.plan(record.id) == content
    assert database.plan_path(record.id) == "new.aivmm"
    with pytest.raises(ValueError, match="not stored"):
        database.save_plan("unknown", {}, "x")


def test_the_last_run_that_had_begun_to_ask_goes_before_newer_ones_that_had_not(database: Database, run_record: Runs) -> None:
    begun, told, nothing = run_record(1), run_record(2), run_record(3)
    for record in (begun, told, nothing):
        database.start_run(record)
    assert database.last_run("request", ["running"], begun="search") is None
    trial = TrialRecord(number=0, target="toy:CPU", config=Config(), batch=1, callers=1, state="refused", value=None)
    for record in (begun, told):
        database.add_trial(record.id, trial)
    assert database.last_run("request", ["running"], begun="search") is None  # being told is not asking
    database.end_study(begun.id, StudyRecord(objectives=("latency",)))
    assert (found := database.last_run("request", ["running"], begun="search")) is not None and found.id == begun.id
    assert database.last_run("request", ["running"], begun="pipeline") is None
    assert (found := database.last_run("request", ["running"])) is not None and found.id == nothing.id
