"""Processes that write to one database at once, open it, close it and die while others write: nothing is lost, and nobody is told that
the database is locked."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import pytest
import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.engine import transaction
from aivmm.errors import DatabaseError
from aivmm.probes.records import Outcome
from tests.db.killing import CONTEXT, ENVIRONMENT, everything_told, outcome, proof, run_of, running, trial
from tests.db.postgres import Server


def write_some(location: str, who: int, rounds: int, told: Connection) -> None:
    """Open, store a bit of everything, close, again and again; tell each round that is stored."""
    for number in range(rounds):
        try:
            with Database.open(location) as database:
                database.remember_environment(ENVIRONMENT)
                run = run_of(10 * (who * 1000 + number))
                database.start_run(run)
                for outcomes in made(who, number):
                    database.add_many(outcomes, run_id=run.id)
                database.add_trial(run.id, trial(number + 1))
                database.add_proof(run.id, proof(number))
                database.save_plan(run.id, {"who": who}, "x")
        except BaseException as error:
            told.send(("error", f"{type(error).__name__}: {error}"))
            raise
        told.send(("stored", number))


def made(who: int, number: int) -> list[list[Outcome]]:
    """What one round stores: two rows alone, and sixty together. All writers share their configs."""
    name = f"{who}-{number}"
    return [[outcome(f"{name}-a", number)], [outcome(f"{name}-{each}", each) for each in range(60)], [outcome(f"{name}-b", number)]]


@pytest.mark.parametrize(("writers", "rounds"), [(2, 6), (8, 3)])
def test_processes_write_at_once_and_nothing_is_lost(location: str, writers: int, rounds: int) -> None:
    with ExitStack() as stack:
        tellers = [stack.enter_context(running(write_some, location, who, rounds))[1] for who in range(writers)]
        told = [list(everything_told(each)) for each in tellers]
    assert told == [[("stored", number) for number in range(rounds)]] * writers
    with Database.open(location) as database:
        assert database.check() == []
        for who in range(writers):
            for number in range(rounds):
                run = run_of(10 * (who * 1000 + number))
                expected = [(each, False) for some in made(who, number) for each in some]
                assert database.run_outcomes(run.id) == expected
                assert database.trials(run.id) == [trial(number + 1)]
                assert database.proofs(run.id) == [proof(number)]
                assert database.plan(run.id) == {"who": who}
        assert len(database.runs()) == writers * rounds


def come_and_go(location: str, who: int, told: Connection) -> None:
    """Open, store one row and close, without end: the last to close removes SQLite's log while others open it."""
    number = 0
    while True:
        with Database.open(location) as database:
            database.remember_environment(ENVIRONMENT)
            database.add(outcome(f"{who}-{number}", number))
        told.send(number)
        number += 1


def test_some_come_and_go_and_are_killed_while_others_write(location: str) -> None:
    moments = random.Random(3)
    acknowledged: dict[int, int] = {}
    with ExitStack() as stack:
        steady: list[tuple[int, Any, Connection]] = [(who, *stack.enter_context(running(come_and_go, location, who))) for who in range(2)]
        for _, _, told in steady:
            assert told.poll(60)
        for who in range(100, 108):
            with running(come_and_go, location, who) as (process, told):
                numbers = list(everything_told(told, until=time.monotonic() + moments.uniform(0, 0.4)))
                process.kill()
                numbers += everything_told(told)
            acknowledged[who] = len(numbers)
        for who, process, told in steady:
            assert process.is_alive(), f"writer {who} was told something"
            process.kill()
            acknowledged[who] = len(list(everything_told(told)))
    with Database.open(location) as database:
        assert database.check() == []
        subjects = {each.key.subject for each in database.outcomes()}
    lost = {f"{who}-{number}" for who, count in acknowledged.items() for number in range(count)} - subjects
    assert lost == set()
    assert len(subjects) <= sum(acknowledged.values()) + len(acknowledged)
    assert min(acknowledged[0], acknowledged[1]) > 3


def test_a_reader_sees_one_moment_however_many_queries_it_asks(database: Database, location: str) -> None:
    """On a server, by default, each query sees a moment of its own: an outcome could be read without its metrics."""
    database.remember_environment(ENVIRONMENT)
    count = sqlalchemy.text("SELECT count(*) FROM probe")
    with Database.open(location) as other, database._reading() as connection:
        assert connection.scalar(count) == 0
        other.add(outcome("x", 1))
        assert connection.scalar(count) == 0
    with database._reading() as connection:
        assert connection.scalar(count) == 1


def test_a_reader_cannot_write_by_mistake_on_a_server(server: Server, request: pytest.FixtureRequest) -> None:
    name = request.getfixturevalue("filled_on_server")
    with (
        Database.open(server.location(name)) as database,
        pytest.raises(sqlalchemy.exc.DBAPIError, match="read-only"),
        database._reading() as connection,
    ):
        connection.exec_driver_sql("DELETE FROM probe")


@pytest.fixture
def on_server(server: Server, request: pytest.FixtureRequest) -> Any:
    name = server.create(template=request.getfixturevalue("filled_on_server"))
    yield name
    server.drop(name)


def test_a_server_that_restarts_between_two_calls_is_not_noticed(server: Server, on_server: str) -> None:
    with Database.open(server.location(on_server)) as database:
        database.remember_environment(ENVIRONMENT)
        database.add(outcome("before", 1))
        assert server.disconnect(on_server) == 1
        database.add(outcome("after", 2))
        assert [each.key.subject for each in database.outcomes()] == ["before", "after"]


def test_a_server_that_goes_away_in_a_call_is_one_line_and_nothing_half_is_stored(server: Server, on_server: str) -> None:
    with Database.open(server.location(on_server)) as database:
        database.remember_environment(ENVIRONMENT)
        sqlalchemy.event.listen(database._engine, "commit", lambda _: server.disconnect(on_server), once=True)
        with pytest.raises(DatabaseError, match="cannot use the database") as raised:
            database.add_many([outcome(str(number), number) for number in range(10)])
        assert "\n" not in str(raised.value)
        assert database.outcomes() == []
        database.add(outcome("x", 1))
        assert len(database.outcomes()) == 1


def test_what_another_process_holds_on_a_server_is_waited_for_and_then_told(server: Server, on_server: str) -> None:
    location = server.location(on_server)
    with Database.open(location, timeout_s=0.3) as database, Database.open(location) as other:
        with transaction(other._engine, writes=True) as connection:
            connection.exec_driver_sql("LOCK TABLE run IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(DatabaseError, match="locked by another process"):
                database.start_run(run_of(0))
        database.start_run(run_of(0))
    assert CONTEXT.active_children() == []
