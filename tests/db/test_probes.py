"""Outcomes: stored, found by their key, never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aivmm.db.database import Database
from aivmm.planner.records import RunRecord
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment

Make = Callable[..., Measured]
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
setting_values = st.one_of(text, st.integers(-(2**53), 2**53), numbers, st.booleans())
mappings = st.dictionaries(text, setting_values, max_size=5)
cautions = st.lists(st.builds(Caution, code=text, message=text, advice=text), max_size=3).map(tuple)


@st.composite
def outcomes(draw: st.DrawFn) -> Callable[[str], Outcome]:
    key = {
        "kind": draw(st.sampled_from(["model", "segment", "operator", "transfer"])),
        "subject": draw(text),
        "target": draw(text),
        "config": Config.of(draw(mappings), precision=draw(st.one_of(st.none(), text))),
        "batch": draw(st.integers(1, 2**31 - 1)),
        "callers": draw(st.integers(1, 2**31 - 1)),
    }
    made: Mapping[str, Any] = draw(
        st.one_of(
            st.fixed_dictionaries({"reason": text}),
            st.fixed_dictionaries({"reason": text, "output": text}),
            st.fixed_dictionaries(
                {
                    "samples": st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20).map(lambda each: Samples(timed_s=tuple(each))),
                    "metrics": st.dictionaries(text, numbers, max_size=4),
                    "cautions": cautions,
                    "effective_config": mappings,
                    "placement": st.dictionaries(text, st.integers(0, 10**6), max_size=3),
                    "race": text,
                }
            ),
        )
    )
    kind = Measured if "samples" in made else Failed if "output" in made else Refused
    return lambda environment: kind(key=ProbeKey(environment=environment, **key), **made)


def exactly(outcome: Outcome) -> tuple[Outcome, str, str]:
    """The outcome, and what tells 1, 1.0 and True apart."""
    return outcome, repr(outcome.key), repr(sorted(getattr(outcome, "effective_config", {}).items()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=st.lists(outcomes(), min_size=1, max_size=4))
def test_any_outcome_comes_back_as_it_was(database: Database, environment: Environment, made: list[Callable[[str], Outcome]]) -> None:
    stored = [make(environment.fingerprint) for make in made]
    ids = database.add_many(stored)
    assert len(set(ids)) == len(stored)
    newest = {(repr(outcome.key)): outcome for outcome in stored}
    for outcome in newest.values():
        found = database.find(outcome.key)
        assert found is not None
        assert exactly(found) == exactly(outcome)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "operator"},
        {"subject": "other"},
        {"target": "openvino:GPU.0"},
        {"config": Config.of({"INFERENCE_NUM_THREADS": 1}, precision="fp32")},
        {"config": Config.of({"INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": True}, precision="bf16")},
        {"config": Config.of({"INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": 1}, precision="fp32")},
        {"batch": 2},
        {"callers": 2},
    ],
    ids=str,
)
def test_a_key_that_differs_in_anything_is_another_key(database: Database, measured: Make, change: Mapping[str, Any]) -> None:
    outcome = measured()
    database.add(outcome)
    assert database.find(outcome.key) == outcome
    assert database.find(dataclasses.replace(outcome.key, **change)) is None


def test_another_environment_does_not_see_the_rows_of_this_one(database: Database, environment: Environment, measured: Make) -> None:
    outcome = measured()
    upgraded = dataclasses.replace(environment, runtime_version="2026.5")
    database.remember_environment(upgraded)
    database.add(outcome)
    key = dataclasses.replace(outcome.key, environment=upgraded.fingerprint)
    assert database.find(key) is None
    database.add(dataclasses.replace(outcome, key=key, race="upgraded"))
    assert database.find(outcome.key) == outcome
    assert [each.key.environment for each in database.outcomes(environment=upgraded.fingerprint)] == [upgraded.fingerprint]


def test_the_newest_of_a_key_counts_and_the_older_ones_stay(database: Database, measured: Make) -> None:
    first, second, other = measured(median_s=1.0), measured(median_s=2.0), measured("other")
    third = Failed(key=first.key, reason="segfault", output="last words")
    for outcome in (first, second, other, third):
        database.add(outcome)
    assert database.find(first.key) == third
    assert database.outcomes() == [other, third]
    assert database.outcomes(all=True) == [first, second, other, third]
    assert database.find_many([first.key, other.key, dataclasses.replace(first.key, batch=9)]) == {first.key: third, other.key: other}


def test_outcomes_are_found_by_what_they_are_about(database: Database, measured: Make) -> None:
    made = [measured(f"s{number}", batch=number + 1) for number in range(4)]
    refused = Refused(key=dataclasses.replace(made[0].key, kind="operator", target="onnxruntime:CPU"), reason="not implemented: Loop")
    database.add_many([*made, refused])
    assert database.outcomes(kind="operator") == [refused]
    assert database.outcomes(kind="segment", subject="s0") == [made[0]]
    assert database.outcomes(subject=["s3", "s1", "nothing"]) == [made[1], made[3]]
    assert database.outcomes(subject=[]) == []
    assert database.outcomes(target="openvino:CPU", kind=("segment", "model")) == made
    assert database.outcomes(target="openvino:GPU") == []
    assert database.find_many([]) == {}


def test_more_keys_than_one_query_takes_are_all_found(database: Database, measured: Make) -> None:
    made = [measured(str(number)) for number in range(1201)]
    database.add_many(made)
    assert database.find_many(outcome.key for outcome in made) == {outcome.key: outcome for outcome in made}
    assert len(database.outcomes(subject=[str(number) for number in range(1201)])) == 1201


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_no_number_is_refused_and_nothing_is_stored(database: Database, measured: Make, value: float) -> None:
    with pytest.raises(ValueError, match="cosine"):
        database.add_many([measured(), dataclasses.replace(measured("other"), metrics={"cosine": value})])
    assert database.outcomes() == []


def test_an_environment_that_was_never_remembered_is_named(database: Database, measured: Make) -> None:
    outcome = measured()
    stranger = dataclasses.replace(outcome, key=dataclasses.replace(outcome.key, environment="f" * 32))
    with pytest.raises(ValueError, match=r"environment.*is not stored"):
        database.add_many([outcome, stranger])
    assert database.outcomes() == []


def test_what_a_crashed_driver_printed_is_kept_whatever_bytes_it_had(database: Database, measured: Make) -> None:
    failed = Failed(key=measured().key, reason="died\0of", output="half \ud83d a smile")
    database.add(failed)
    assert database.find(failed.key) == dataclasses.replace(failed, reason="died\ufffdof", output="half \ufffd a smile")


def test_an_entry_says_when_it_was_stored_and_under_which_id(database: Database, measured: Make) -> None:
    outcome = measured()
    identity = database.add(outcome)
    (entry,) = database.find_entries([outcome.key]).values()
    assert entry.id == identity
    assert entry.outcome == outcome
    assert abs(entry.measured_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert database.entries() == [entry]


def test_a_run_knows_its_outcomes_and_which_of_them_it_did_not_measure(
    database: Database, measured: Make, run_record: Callable[..., RunRecord]
) -> None:
    run, other = run_record(), run_record()
    database.start_run(run)
    database.start_run(other)
    old, named, new = measured("old"), measured("named"), measured("new")
    old_id = database.add(old, run_id=other.id)
    database.add(named)
    database.add(new, run_id=run.id)
    database.link(run.id, [old_id, named.key, new.key])
    database.link(run.id, [old_id])
    assert database.run_outcomes(run.id) == [(old, True), (named, True), (new, False)]
    assert database.run_outcomes(other.id) == [(old, False)]
    assert database.run_outcomes("unknown") == []
    database.link(run.id, [])


def test_links_to_what_is_not_stored_are_refused(database: Database, measured: Make, run_record: Callable[..., RunRecord]) -> None:
    run = run_record()
    database.start_run(run)
    identity = database.add(measured())
    for run_id, used in ((run.id, ["no such probe"]), (run.id, [measured("never").key]), ("no such run", [identity])):
        with pytest.raises(ValueError, match="stored"):
            database.link(run_id, used)
    with pytest.raises(ValueError, match="stored"):
        database.add(measured("x"), run_id="no such run")
    assert database.find(measured("x").key) is None


def test_threads_share_one_database(database: Database, measured: Make) -> None:
    made = [[measured(f"{who}-{number}") for number in range(20)] for who in range(4)]

    def work(mine: list[Measured]) -> None:
        for outcome in mine:
            database.add(outcome)
            assert database.find(outcome.key) == outcome

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, made))
    assert len(database.outcomes()) == 80
