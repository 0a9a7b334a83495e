"""Writers that are killed, and writers that meet: what was committed stays."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.probes.records import Measured

Child = Callable[..., subprocess.Popen[str]]

WRITER = """
database = Database.open(sys.argv[1])
database.remember_environment(ENVIRONMENT)
number = int(sys.argv[2])
while True:
    number += 1
    database.add(outcome(number))
    print(number, flush=True)
"""

BATCHES = """
database = Database.open(sys.argv[1])
database.remember_environment(ENVIRONMENT)
first = int(sys.argv[2])
while True:
    database.add_many([outcome(number) for number in range(first + 1, first + 301)])
    first += 300
    print(first, flush=True)
"""


def stored(database: Database) -> list[int]:
    """The numbers that are there, each checked to hold what was written."""
    found = []
    for outcome in database.outcomes(all=True):
        assert isinstance(outcome, Measured)
        number = int(outcome.key.subject)
        assert outcome.samples.timed_s == (1.0 + number,) * 20
        assert outcome.metrics == {"compile_s": float(number)}
        found.append(number)
    return found


@pytest.mark.parametrize(("code", "step"), [(WRITER, 1), (BATCHES, 300)], ids=["one by one", "in batches"])
def test_a_killed_writer_loses_at_most_what_was_in_flight(tmp_path: Path, child: Child, code: str, step: int) -> None:
    file, moments, last = tmp_path / "x.db", random.Random(7), 0
    for _ in range(3):
        process = child(code, file, last)
        assert process.stdout is not None
        said = process.stdout.readline()  # it is writing now
        assert said, process.communicate()[1]
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        said += process.stdout.read()  # a line cut by the kill would only claim less
        committed = int(said.strip().splitlines()[-1])
        with Database.open(file) as database:
            numbers = stored(database)
            assert database.check() == []
        assert numbers == list(range(1, len(numbers) + 1))
        assert committed <= len(numbers) <= committed + step
        last = len(numbers)
    assert last >= 3


def test_two_processes_write_at_once_and_nothing_is_lost(location: str, child: Child) -> None:
    code = """
with Database.open(sys.argv[1]) as database:
    database.remember_environment(ENVIRONMENT)
    for number in range(60):
        database.add(outcome(number, who=sys.argv[2]))
        assert database.find(outcome(number, who=sys.argv[2]).key) == outcome(number, who=sys.argv[2])
"""
    children = [child(code, location, who) for who in ("a", "b")]
    for each in children:
        _, errors = each.communicate()
        assert each.returncode == 0, errors
    with Database.open(location) as database:
        assert sorted(outcome.key.subject for outcome in database.outcomes()) == sorted(
            f"{who}{number}" for who in "ab" for number in range(60)
        )
        assert database.check() == []


def test_a_reader_sees_all_of_a_transaction_or_nothing_of_it(tmp_path: Path, child: Child) -> None:
    file = tmp_path / "x.db"
    process = child(BATCHES, file, 0)
    assert process.stdout is not None
    assert process.stdout.readline()
    with Database.open(file) as database:
        sizes = {len(database.outcomes(subject=[str(number) for number in range(1, 6001)])) for _ in range(5)}
    process.kill()
    assert all(size % 300 == 0 for size in sizes)
