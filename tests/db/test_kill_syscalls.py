"""Writers that are killed at a chosen system call of SQLite's: at each kind of write and flush, of the log, of the file, of a checkpoint.

Random moments rarely hit these: a commit takes half a millisecond.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aivmm.db.database import Database
from tests.db.conftest import CHILD
from tests.db.killing import half_written

CALLS = ("pwrite64", "fdatasync", "ftruncate", "unlink")

# Opens, stores one by one and many, and closes, which moves the log into the file; every acknowledgement comes after its commit.
WORK = """
for turn in range(2):
    with Database.open(sys.argv[1]) as database:
        database.remember_environment(ENVIRONMENT)
        for number in range(turn * 100, turn * 100 + 4):
            database.add(outcome(number))
            print(number, flush=True)
        database.add_many([outcome(number) for number in range(turn * 100 + 4, turn * 100 + 100)])
        print(turn * 100 + 99, flush=True)
"""


def traced(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["strace", "-f", "-qq", *options, "-P", str(file), "-P", f"{file}-wal", sys.executable, "-c", CHILD + WORK, str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often each call happens when nobody kills; skips where processes cannot be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("traced")
    Database.open(folder / "x.db").close()
    done = traced(folder / "x.db", "-o", str(folder / "log"), "-e", f"trace={','.join(CALLS)}")
    if done.returncode:
        pytest.skip(f"processes cannot be traced here: {done.stderr.strip()}")
    lines = (folder / "log").read_text().splitlines()
    return {call: sum(f" {call}(" in line for line in lines) for call in CALLS}


@pytest.mark.slow
@pytest.mark.timeout(0)  # each process has a limit of its own
def test_killed_at_any_write_or_flush_it_keeps_what_was_acknowledged(
    calls: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calls["pwrite64"] > 50 and calls["fdatasync"] > 10
    moments = {call: range(1, count + 1) for call, count in calls.items()}
    writes = random.Random(5).sample(moments.pop("pwrite64"), 20)
    chosen = [("pwrite64", number) for number in writes] + [(call, number) for call, numbers in moments.items() for number in numbers]
    torn, unacknowledged = 0, 0
    for index, (call, number) in enumerate(chosen):
        file = tmp_path / f"{index}.db"
        Database.open(file).close()
        done = traced(file, "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
        assert done.returncode != 0, f"{call} {number} was not reached"
        told = [int(line) for line in done.stdout.splitlines()]
        torn += half_written(file)
        with Database.open(file) as database:
            assert database.check() == []
            found = sorted(int(each.key.subject) for each in database.outcomes())
            assert found == list(range(len(found)))
            following = 0 if not told else told[-1] + 1
            in_flight = 96 if following % 100 == 4 else 1
            assert len(found) in (following, following + in_flight), f"{call} {number}: acknowledged {following}, found {len(found)}"
            unacknowledged += len(found) != following
    with capsys.disabled():
        print(
            f"\n  {len(chosen)} kills at a system call of {calls}: {torn} left half a transaction in the log, "
            f"{unacknowledged} had stored what they had not yet acknowledged"
        )
