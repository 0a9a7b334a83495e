"""Ctrl-C in a whole tune: once it finishes with what there is and writes a plan, twice it stops now; nothing measured is lost."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aivmm.db.database import Database
from aivmm.tuner.interrupt import LINE
from tests.tuner.harness import TINY, Finished, Place, living, workers_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")

# A search that would go on for ten minutes: what ends it is Ctrl-C.
LONG = (*TINY, "--targets", "onnxruntime", "--budget", "600s", "--trials", "500", "--top", "1", "--json")


def count(place: Place, what: str) -> int:
    """Return how many rows a table has, read as anybody could."""
    if not place.db.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{place.db}?mode=ro", uri=True, timeout=5)) as connection:
            return int(connection.execute(f"SELECT count(*) FROM {what}").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # it is being made


def until(place: Place, process: subprocess.Popen[str], what: str, least: int, *, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while count(place, what) < least:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def check_kept(place: Place, status: str) -> None:
    with Database.open(place.db) as database:
        assert database.check() == []
        assert database.run(None).status == status


def test_once_finishes_with_a_plan_at_any_time_and_the_same_request_goes_on(place: Place, tiny: Path) -> None:
    with place.started("tune", tiny, *LONG) as process:  # once before anything was measured
        assert process.stderr
        while "reading the model" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["plan"]
    check_kept(place, "interrupted")
    # A search that was cut short is no search that was done: the same request goes on with it.
    trials, probes = count(place, "trial"), count(place, "probe")
    with place.started("tune", tiny, *LONG) as process:  # once in the search
        until(place, process, "trial", 2 * trials + 1)
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count(LINE) == 1
    summary: Any = json.loads(out)
    assert summary["plan"] and summary["baselines"]
    assert summary["probes"]["reused"] > 0
    assert count(place, "probe") > probes
    assert (place.work / "tiny.aivmm" / "plan.json").is_file()
    assert (place.work / "tiny.aivmm" / "report.html").is_file()
    assert living(workers) == []
    check_kept(place, "interrupted")


def test_twice_stops_now_and_keeps_what_was_measured(place: Place, tiny: Path) -> None:
    with place.started("tune", tiny, *LONG) as process:
        until(place, process, "trial", 2)
        kept = count(place, "probe")
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        while LINE not in process.stderr.readline():  # two of them at once would be one for the kernel
            assert process.poll() is None
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        code = process.returncode
    assert code == 130, err
    assert time.monotonic() - started < 30
    assert json.loads(out)["error"]["message"].startswith("interrupted")
    (said,) = Finished(code, out, err).error_lines
    assert "interrupted" in said and "kept" in said
    assert living(workers) == []
    assert list(place.work.iterdir()) == []
    assert count(place, "probe") >= kept
    check_kept(place, "interrupted")


@pytest.mark.slow
def test_twice_is_twice_over_all_shapes(place: Place, tiny: Path) -> None:
    """The second shape took the second Ctrl-C for its first, and went on."""
    several = ("--dim", "side=8,16", "--targets", "onnxruntime", "--budget", "1200s", "--trials", "500", "--top", "1")
    with place.started("tune", tiny, *several) as process:
        until(place, process, "trial", 2)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        while "side=16: reading the model" not in process.stderr.readline():
            assert process.poll() is None
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert Finished(130, out, err).error_lines == ["aivmm: interrupted; what was measured is kept; run the same command again to continue"]
    assert living(workers) == []
    assert list(place.work.iterdir()) == []
    with Database.open(place.db) as database:
        assert database.check() == []
