"""Processes that are killed with SIGKILL at random moments: what they had been told is stored, is stored, and the next one goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aivmm.db.database import Database
from tests.db.killing import ACKNOWLEDGED, COMMITTING, Kills, everything_told, half_written, running, stored_until, wait_for_server, write

PATIENCE_S = 180.0  # with one kill; it takes a second on an idle machine


def kill_writers(location: str, kills: int, *, seed: int) -> Kills:
    """Kill one writer after the other on the same database, and look at it in between."""
    moments, hit, following = random.Random(seed), Kills(), 0
    file = Path(location) if "://" not in location else None
    for _ in range(kills):
        with at_most(PATIENCE_S):
            what, last = killed(location, following, moments)
            hit.torn += file is not None and half_written(file)
            wait_for_server(location)
            with Database.open(location) as database:
                assert database.check() == []  # integrity_check, foreign_key_check, and every sample
                until = stored_until(database, following)
        assert until in (last + 1, last + 2), f"acknowledged up to {last}, stored up to {until - 1}"
        hit.count(what, unacknowledged=until == last + 2)
        following = until
    with Database.open(location) as database:
        assert stored_until(database, 0) == following  # all of it, from the first to the last
    return hit


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when what is done within takes longer: 200 kills take as long as the machine is busy, one that hangs does not."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"one kill, and a look at what it left, took more than {seconds:.0f} s")

    before, armed = signal.signal(signal.SIGALRM, late), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *armed)
        signal.signal(signal.SIGALRM, before)


def killed(location: str, first: int, moments: random.Random) -> tuple[str, int]:
    """Start a writer and kill it; return what it told last, and the last operation that it acknowledged."""
    what, last = "", first - 1
    way = moments.random()
    with running(write, location, first) as (process, told):
        if way > 0.15:  # else at any moment of its start
            assert told.poll(60), "it does not begin"
        for what, number in everything_told(told, until=time.monotonic() + moments.uniform(0, 0.1)):
            last = number if what == ACKNOWLEDGED else last
        if way > 0.6:  # inside a commit, which is too short for a blind hit
            for what, number in everything_told(told):
                last = number if what == ACKNOWLEDGED else last
                if what == COMMITTING:
                    break
            time.sleep(moments.uniform(0, 0.003))
        process.kill()
        for what, number in everything_told(told):
            last = number if what == ACKNOWLEDGED else last
    return what, last


def test_of_a_writer_that_is_killed_at_most_the_row_in_flight_is_lost(location: str, capsys: pytest.CaptureFixture[str]) -> None:
    hit = kill_writers(location, 10, seed=8)
    with capsys.disabled():
        print(f"\n  {hit}")
    assert hit.before_commit + hit.in_commit >= 3


@pytest.mark.slow
@pytest.mark.timeout(0)  # each kill has a limit of its own
def test_of_a_writer_that_is_killed_two_hundred_times_at_most_the_row_in_flight_is_lost(
    location: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hit = kill_writers(location, 200, seed=200)
    with capsys.disabled():
        print(f"\n  {hit}")
    assert hit.before_commit + hit.in_commit >= 50
