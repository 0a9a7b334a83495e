"""A tune that is stopped in the middle: what was measured is kept, nothing is left running, and the next run goes on from there."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.tuner.decide import Decider
from aivmm.tuner.handover import HandoverProber
from aivmm.tuner.memory_copies import CopyProber
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.progress import Silent
from aivmm.tuner.proof import Entrant
from aivmm.tuner.session import Session
from tests.tuner.harness import TINY, Place, living, workers_of

ARGUMENTS = (*TINY, "--targets", "onnxruntime", "--budget", "8s", "--trials", "3", "--top", "1", "--json")


def measured(place: Place) -> int:
    """Return how many things have been measured and are on disk, read as anybody could. The reference runs in each race, and is one."""
    if not place.db.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{place.db}?mode=ro", uri=True, timeout=5)) as connection:
            return int(connection.execute("SELECT count(DISTINCT key) FROM probe WHERE samples IS NOT NULL").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # it is being made


def until_measured(place: Place, process: subprocess.Popen[str], least: int, limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while measured(place) < least:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_tune_keeps_what_it_measured_leaves_no_worker_and_is_continued(place: Place, tiny: Path) -> None:
    with place.started("tune", tiny, *ARGUMENTS) as process:
        until_measured(place, process, 4)
        workers = workers_of(process.pid)
        assert workers
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        assert living(workers) == []
    kept = measured(place)
    assert kept >= 4
    with Database.open(place.db) as database:
        assert database.check() == []
    assert list(place.work.iterdir()) == []

    done = place.aivmm("tune", tiny, *ARGUMENTS)
    assert done.code == 0, done.err
    assert done.json["probes"]["reused"] >= 4
    assert (place.work / "tiny.aivmm" / "plan.json").is_file()
    with Database.open(place.db) as database:
        assert database.check() == []
        assert database.run(None).status == "complete"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_three_times_it_then_completes_with_all_that_was_measured(place: Place, tiny: Path) -> None:
    for least in (2, 6, 10):
        with place.started("tune", tiny, *ARGUMENTS) as process:
            until_measured(place, process, least)
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
    kept = measured(place)
    done = place.aivmm("tune", tiny, *ARGUMENTS)
    assert done.code == 0, done.err
    assert done.json["probes"]["reused"] > 0
    with Database.open(place.db) as database:
        assert database.check() == []
    assert measured(place) >= kept


def test_a_run_is_searched_once_cuts_copies_and_pipelines_were_tried_and_not_if_stopped_among_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeat of a searched run measures none of them: one that is killed or stopped there has to be gone on with."""
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "lock"))
    monkeypatch.setenv("AIVMM_CACHE", str(tmp_path / "cache"))
    options = TuneOptions(
        model=str(tiny), dims={"side": 16}, backends=("null",), targets=("null:CPU",), budget_s=1.0, trials=1, top=1,
        output=tmp_path / "tiny.aivmm", db=str(tmp_path / "p.db"),
    )  # fmt: skip
    session, seen, choose = Session(options, Silent()), [], Decider.entrants

    def entrants(decider: Decider) -> list[Entrant]:
        seen.append(decider.work.database.run(decider.work.run_id).status)
        session.interrupts._count += 1  # as the first Ctrl-C does
        return choose(decider)

    monkeypatch.setattr(Decider, "entrants", entrants)
    order: list[str] = []
    for prober in (CopyProber, HandoverProber):  # plans are made of hand-overs: copies between memories take what they leave
        monkeypatch.setattr(prober, "run", lambda self, *, budget_s, tell: order.append(type(self).__name__))
    session.run()
    assert order == ["HandoverProber", "CopyProber"]
    with Database.open(options.db) as database:
        assert (seen, database.run(None).status) == (["running"], "interrupted")
