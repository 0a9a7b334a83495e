"""Forgetting on purpose, and finding what is wrong."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from aivmm.db.database import Database
from aivmm.db.query import Filter, find
from aivmm.db.upkeep import Prune, prune
from aivmm.errors import UsageError
from aivmm.models.records import ModelFacts, Structure
from aivmm.planner.records import RunRecord
from aivmm.probes.records import Measured
from aivmm.runtime.config import Config
from tests.db.filling import Filled, contents, fill

Make = Callable[..., Measured]
LATER = datetime.now(UTC) + timedelta(days=1)


@pytest.fixture
def filled(database: Database, measured: Make, run_record: Callable[..., RunRecord], facts: ModelFacts, structure: Structure) -> Filled:
    return fill(database, measured, run_record, facts, structure)


def ids(database: Database) -> list[str]:
    return [entry.id for entry in find(database, Filter(every=True)).entries]


def test_what_a_run_rests_on_stays(database: Database, filled: Filled) -> None:
    pruned = prune(database, Prune(older_than=LATER))
    assert (pruned.probes, pruned.runs, pruned.kept_for_runs) == (3, 0, 2)
    assert ids(database) == list(filled.in_run)
    assert database.plan(filled.run.id) is not None
    assert len(database.trials(filled.run.id)) == len(database.proofs(filled.run.id)) == 1
    assert database.check() == []


def test_with_runs_the_runs_go_too_and_everything_of_them(database: Database, filled: Filled) -> None:
    pruned = prune(database, Prune(older_than=LATER, model="squeezenet", runs=True))
    assert (pruned.probes, pruned.runs, pruned.models) == (2, 1, 1)
    left = contents(database)
    gone = ("run", "run_probe", "run_environment", "study", "trial", "plan", "proof", "model", "model_block", "model_operator", "operator")
    assert {name for name in gone if left[name]} == set()
    assert ids(database) == list(filled.loose)
    assert database.check() == []


def test_a_run_that_stays_keeps_its_probes_when_another_that_shares_them_goes(
    database: Database, filled: Filled, run_record: Callable[..., RunRecord]
) -> None:
    later = run_record(30)
    database.start_run(later)
    database.link(later.id, filled.in_run[:1])
    pruned = prune(database, Prune(older_than=later.started_at, runs=True))
    assert pruned.runs == 1
    assert [run.id for run in database.runs()] == [later.id]
    assert filled.in_run[0] in ids(database)
    assert database.check() == []


@pytest.mark.parametrize(
    ("wanted", "gone"),
    [
        (Prune(failed=True), "0"),
        (Prune(other_than=("elsewhere",)), "012"),
        (Prune(older_than=datetime(2020, 1, 1, tzinfo=UTC)), ""),
        (Prune(keep_newest=1), ""),
        (Prune(model="squeezenet"), ""),
        (Prune(failed=True, older_than=datetime(2020, 1, 1, tzinfo=UTC)), ""),
    ],
    ids=str,
)
def test_only_what_fits_everything_that_is_said_goes(database: Database, filled: Filled, wanted: Prune, gone: str) -> None:
    before = contents(database)
    told = prune(database, wanted, dry_run=True)
    assert contents(database) == before
    pruned = prune(database, wanted)
    assert (told.probes, told.kept_for_runs) == (pruned.probes, pruned.kept_for_runs)
    left = [each for place, each in enumerate(filled.loose) if str(place) not in gone]
    assert ids(database) == [*filled.in_run, *left]


def test_the_environment_of_this_machine_stays(database: Database, filled: Filled) -> None:
    here = [each.fingerprint for each in database.environments()]
    assert prune(database, Prune(other_than=here)).probes == 0
    assert prune(database, Prune(other_than=here, runs=True)).runs == 0


def test_the_newest_of_each_key_stay(database: Database, measured: Make) -> None:
    made = [database.add(measured(name, median_s=1.0 + number)) for number in range(4) for name in ("one", "two")]
    assert prune(database, Prune(keep_newest=2)).probes == 4
    assert ids(database) == made[4:]


def test_space_and_configs_that_nothing_needs_any_more_are_given_back(database: Database, measured: Make) -> None:
    config = Config.of({"X": 1})
    database.add_many([measured(str(number), config=config) for number in range(3000)])
    pruned = prune(database, Prune(older_than=LATER))
    assert (pruned.probes, pruned.configs) == (3000, len({config.digest(), *[measured().key.config.digest()]}))
    assert contents(database)["config"] == []
    if database.path is not None:
        assert pruned.freed_bytes > 1_000_000
        assert database.path.stat().st_size < 1_000_000
    assert database.check() == []


def test_prune_wants_to_be_told_what() -> None:
    for wanted in ({}, {"runs": True}, {"keep_newest": 0}, {"failed": True, "runs": True}):
        with pytest.raises(UsageError):
            Prune(**wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)  # a server is not changed behind its back
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("UPDATE probe SET key = 'x' WHERE id = (SELECT min(id) FROM probe)", "its key"),
        ("UPDATE config SET settings = '{\"a\": 1}'", "its digest"),
        ("UPDATE environment SET facts = '{}'", "environment"),
        ("UPDATE probe SET samples = x'00' WHERE state = 'measured'", "samples"),
        ("PRAGMA foreign_keys=OFF; DELETE FROM environment", "missing environment"),
        ("UPDATE probe SET measured_at = 'never'", "probe"),
        ("UPDATE proof SET metrics = '[]'", "proof"),
    ],
)
def test_check_finds_what_is_wrong(database: Database, filled: Filled, harm: str, words: str) -> None:
    assert database.path is not None
    assert database.check() == []
    with closing(sqlite3.connect(database.path)) as connection, connection:
        connection.executescript(harm)
    problems = database.check()
    assert problems
    assert any(words in problem for problem in problems), problems
