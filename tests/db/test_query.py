"""Filters that people give, what subjects are called, and how much there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aivmm.db.database import Database
from aivmm.db.frames import evidence
from aivmm.db.migrate import HEAD
from aivmm.db.query import Filter, find, statistics
from aivmm.errors import UsageError
from aivmm.models.records import ModelFacts, Structure
from aivmm.planner.records import RunRecord
from aivmm.probes.records import Measured, in_replicas
from tests.db.filling import Filled, contents, fill

Make = Callable[..., Measured]


@pytest.fixture
def filled(database: Database, measured: Make, run_record: Callable[..., RunRecord], facts: ModelFacts, structure: Structure) -> Filled:
    return fill(database, measured, run_record, facts, structure)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "01234"),
        ({"kind": "operator"}, "1"),
        ({"state": "failed"}, "2"),
        ({"state": "refused"}, "3"),
        ({"target": "openvino"}, "01234"),
        ({"target": "*:GPU"}, "3"),
        ({"target": "onnxruntime"}, ""),
        ({"op_type": "relu"}, "1"),
        ({"op_type": "Loop"}, ""),
        ({"precision": "fp32"}, "01234"),
        ({"precision": "default"}, ""),
        ({"model": "squeezenet"}, "01"),
        ({"model": "ab" * 6}, "01"),
        ({"model": "squeezenet", "kind": "segment"}, "0"),
        ({"since": datetime.now(UTC) - timedelta(hours=1)}, "01234"),
        ({"since": datetime.now(UTC) + timedelta(hours=1)}, ""),
        ({"environments": ["nowhere"]}, ""),
        ({"environments": []}, ""),
    ],
    ids=lambda each: ", ".join(each) if isinstance(each, dict) else each,  # no times in names: processes have to agree on them
)
def test_each_filter_finds_what_it_says(database: Database, filled: Filled, asked: dict[str, Any], expected: str) -> None:
    stored = (*filled.in_run, *filled.loose)
    found = find(database, Filter(**asked))
    assert [entry.id for entry in found.entries] == [stored[int(place)] for place in expected]
    assert found.total == len(expected)


def test_the_newest_of_a_key_counts_and_a_limit_takes_the_newest(database: Database, filled: Filled, measured: Make) -> None:
    again = database.add(measured("a", median_s=2.0))
    assert again in {entry.id for entry in find(database, Filter(model="squeezenet")).entries}
    assert filled.in_run[0] not in {entry.id for entry in find(database, Filter()).entries}
    everything = find(database, Filter(every=True))
    assert [entry.id for entry in everything.entries] == [*filled.in_run, *filled.loose, again]
    newest = find(database, Filter(every=True), limit=2)
    assert ([entry.id for entry in newest.entries], newest.total) == ([filled.loose[-1], again], 6)


def test_a_subject_with_more_behind_its_hash_is_still_of_its_model(database: Database, filled: Filled, measured: Make) -> None:
    """An operator that was measured on values, or lowered, is found by its type all the same."""
    operator = find(database, Filter(kind="operator")).entries[0].outcome
    for more in ("@input", "~int8"):
        key = dataclasses.replace(operator.key, subject=operator.key.subject + more)
        database.add(dataclasses.replace(measured(), key=key))
    assert find(database, Filter(op_type="Relu")).total == 3
    assert find(database, Filter(model="squeezenet")).total == 4
    assert set(evidence(database, op_type="Relu")["name"]) == {"Relu 1x8"}


def test_replicas_of_a_model_are_its_own_and_told_apart(database: Database, filled: Filled, measured: Make, structure: Structure) -> None:
    one = dataclasses.replace(measured().key, kind="model", subject=structure.structure, callers=2)
    two = dataclasses.replace(one, subject=in_replicas(one.subject, 2))
    database.add_many([dataclasses.replace(measured(), key=key) for key in (one, two)])
    assert (one.replicas, two.replicas) == (1, 2)
    assert {"squeezenet", "squeezenet in 2 replicas"} <= set(evidence(database, kind="model")["name"])


def test_what_is_unknown_is_said_with_what_is_known(database: Database, filled: Filled) -> None:
    with pytest.raises(UsageError, match="squeezenet"):
        find(database, Filter(model="resnet"))
    with pytest.raises(UsageError, match="segment"):
        Filter(kind="block")
    with pytest.raises(UsageError, match="refused"):
        Filter(state="great")
    assert find(database, Filter(op_type="'; DROP TABLE probe; --")).total == 0
    assert find(database, Filter()).total == 5


def test_statistics_count_every_table(database: Database, filled: Filled) -> None:
    found = statistics(database)
    assert found["tables"] == {table: len(rows) for table, rows in contents(database).items()}
    assert found["probes"] == {
        "state": {"failed": 1, "measured": 3, "refused": 1},
        "kind": {"operator": 1, "segment": 4},
    }
    assert (found["models"], found["model_names"], found["environments"], found["schema"]) == (1, 1, 2, HEAD)
    assert found["size_bytes"] > 10_000
    assert found["oldest"] <= found["newest"] <= datetime.now(UTC).isoformat()


def test_statistics_of_nothing(database: Database) -> None:
    found = statistics(database)
    assert (found["oldest"], found["newest"], found["models"]) == (None, None, 0)


def test_frames_take_the_same_filters_and_name_what_they_are_about(database: Database, filled: Filled) -> None:
    frame = evidence(database, model="squeezenet")
    assert list(frame["name"]) == ["squeezenet block 0", "Relu 1x8"]
    assert set(frame["device"]) == {"A CPU with ünïcödé"}
    assert list(evidence(database, state="failed")["reason"]) == ["segfault"]
    assert list(evidence(database, model="squeezenet", kind="operator")["kind"]) == ["operator"]
    assert list(evidence(database, precision="fp32", target=["openvino:GPU.0"])["state"]) == ["refused"]
    assert str(frame["measured_at"].dtype).endswith("UTC]")
