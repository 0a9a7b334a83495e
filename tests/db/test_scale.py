"""What keeps a large database fast: the queries' plans and their number, and keys that are made in a quicker way but are the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st

from aivmm.db import codec
from aivmm.db.database import Database
from aivmm.probes.records import Measured, ProbeKey
from aivmm.runtime.config import Config

Make = Callable[..., Measured]
text = st.text(st.characters(codec=None), max_size=12)


@given(kind=text, subject=text, target=text, environment=text, batch=st.integers(), callers=st.integers())
def test_a_key_s_digest_is_that_of_its_canonical_json(
    kind: Any, subject: str, target: str, environment: str, batch: int, callers: int
) -> None:
    config = Config.of({"a": 1})
    key = ProbeKey(kind=kind, subject=subject, target=target, environment=environment, config=config, batch=batch, callers=callers)
    assert codec.key_digest(key) == codec.digest(kind, subject, target, environment, config.digest(), batch, callers)


def test_ids_made_together_are_ordered_with_those_made_one_by_one() -> None:
    made = [codec.new_id(), *codec.new_ids(1000), codec.new_id(), *codec.new_ids(3)]
    assert made == sorted(set(made))
    assert codec.new_ids(0) == []


def test_settings_that_python_holds_equal_are_stored_apart(database: Database, measured: Make) -> None:
    """1 == True == 1.0 and 0.0 == -0.0: what saves making a digest again must not take one for the other."""
    values = (1, True, 1.0, 0, False, 0.0, -0.0, "1")
    made = [dataclasses.replace(measured(str(place)), effective_config={"a": value}) for place, value in enumerate(values)]
    database.add_many(made)
    found = [repr(outcome.effective_config) for outcome in database.outcomes() if isinstance(outcome, Measured)]
    assert found == [repr({"a": value}) for value in values]


def statements(database: Database, ask: Callable[[], object]) -> list[tuple[str, Any]]:
    seen: list[tuple[str, Any]] = []

    def note(*call: Any) -> None:
        seen.append((call[2], call[3]))

    sqlalchemy.event.listen(database._engine, "before_cursor_execute", note)
    ask()
    sqlalchemy.event.remove(database._engine, "before_cursor_execute", note)
    return seen


def test_a_thousand_keys_take_a_handful_of_queries_each_through_an_index(database: Database, measured: Make) -> None:
    made = [measured(str(number)) for number in range(1000)]
    asked = statements(database, lambda: database.add_many(made))
    assert len(asked) < 20
    database.find_many([made[0].key])  # the config is known from here on
    found: list[object] = []
    asked = statements(database, lambda: found.append(database.find_many(outcome.key for outcome in made)))
    assert found == [{outcome.key: outcome for outcome in made}]
    questions = [(query, values) for query, values in asked if query.startswith(("SELECT", "WITH"))]
    assert len(questions) == 3  # in chunks of 400
    if database.path is not None:
        for query, values in questions:
            steps = plan(database, query, values)
            assert "SCAN probe" not in steps
            assert "COVERING INDEX ix_probe_subject_key_id (subject=? AND key=?)" in steps


def test_evidence_for_subjects_goes_by_the_subjects(database: Database, measured: Make) -> None:
    """Without statistics SQLite may prefer the index of the target, which half of all rows share."""
    made = [measured(str(number)) for number in range(50)]
    database.add_many(made)
    subjects = [outcome.key.subject for outcome in made]
    environment = made[0].key.environment
    asked = statements(
        database, lambda: database.outcomes(kind="segment", subject=subjects, target=["openvino:CPU", "x"], environment=environment)
    )
    if database.path is not None:
        plans = [plan(database, query, values) for query, values in asked if query.startswith("SELECT max")]
        assert len(plans) == 1
        assert "ix_probe_subject_key_id" in plans[0]


def plan(database: Database, query: str, values: Any) -> str:
    with database.reading() as connection:
        return " / ".join(row[3] for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + query, values))


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
def test_a_large_batch_leaves_the_connection_as_it_was(database: Database, measured: Make) -> None:
    def cache() -> int:
        with database.reading() as connection:
            return int(connection.exec_driver_sql("PRAGMA cache_size").scalar_one())

    before = cache()
    database.add_many([measured(str(number)) for number in range(1500)])
    assert cache() == before
    with pytest.raises(ValueError, match="not stored"):
        database.add_many([measured(str(number)) for number in range(1500)], run_id="no such run")
    assert cache() == before
    assert len(database.outcomes(all=True)) == 1500


def test_a_key_measured_many_times_is_found_by_its_newest(database: Database, measured: Make) -> None:
    made = [measured("block", median_s=1e-3 + number * 1e-6) for number in range(300)]
    database.add_many(made)
    assert database.find(made[0].key) == made[-1]
    assert database.outcomes(subject="block") == [made[-1]]


def test_a_batch_that_refers_to_nothing_is_refused_whole_however_large(database: Database, measured: Make) -> None:
    """A server takes many rows in another way than few."""
    made = [measured(str(number)) for number in range(250)]
    stray = dataclasses.replace(made[0], key=dataclasses.replace(made[0].key, environment="unknown"))
    with pytest.raises(ValueError, match="not stored"):
        database.add_many([*made, stray])
    assert database.outcomes(all=True) == []
    database.add_many(made)
    assert database.outcomes(all=True) == made


@given(metrics=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)))
def test_metrics_of_any_name_and_number_come_back(metrics: dict[str, float]) -> None:
    assert json.loads(codec.metrics_text(metrics)) == metrics


def test_nothing_to_add_is_added(database: Database) -> None:
    assert database.add_many([]) == []
