"""`aivmm db` as its users type it, some in processes of their own; what the verbs do is tested in `tests/db`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from aivmm.db.database import Database
from aivmm.probes.records import Failed, Measured, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment
from aivmm.tuner.cli import run
from tests.tuner.harness import Finished, Place

ENVIRONMENT = Environment(
    target="null:0",
    device_model="a device",
    driver="",
    runtime_version="1",
    instruction_sets=(),
    usable_cores=1,
    power_limit_w=None,
    system="test",
)


InProcess = Callable[..., Finished]


def key(subject: str) -> ProbeKey:
    return ProbeKey(kind="segment", subject=subject, target="null:0", environment=ENVIRONMENT.fingerprint, config=Config(precision="fp32"))


@pytest.fixture
def db(tmp_path: Path) -> Place:
    """A place whose database holds three measurements, one of a name that would steer a terminal, and a failure."""
    made = Place.at(tmp_path / "place")
    with Database.open(made.db) as database:
        database.remember_environment(ENVIRONMENT)
        outcomes = [
            Measured(key=key(name), samples=Samples(timed_s=(1 / 3, 0.5)), metrics={"cosine": 0.1})
            for name in ("one", "two", "\x1b[2Jthree")
        ]
        database.add_many([*outcomes, Failed(key=key("four"), reason="segfault")])
    return made


def ok(finished: Finished) -> Finished:
    assert finished.code == 0, finished.err
    return finished


def test_path_opens_nothing(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    assert ok(place.aivmm("db", "path")).out.strip() == str(place.db)
    assert ok(place.aivmm("db", "path", "--db", "x.db", "--json")).json == {"schema": 1, "path": str(place.work / "x.db"), "exists": False}
    assert not place.db.exists()
    assert not (place.work / "x.db").exists()


def test_stats_query_and_check_say_what_is_there(db: Place) -> None:
    stats = ok(db.aivmm("db", "stats", "--json")).json
    assert (stats["tables"]["probe"], stats["tables"]["config"], stats["environments"]) == (4, 2, 1)
    assert "4 (1 failed, 3 measured; 4 segment)" in ok(db.aivmm("db", "stats")).out
    shown = ok(db.aivmm("db", "query", "--limit", "3"))
    assert "\x1b" not in shown.out
    assert "two" in shown.out
    assert "segfault" in shown.out
    assert len(shown.out.splitlines()) == 4  # a heading and a line each, however long
    assert "nan" not in shown.out
    assert "3 of 4" in shown.err
    found = ok(db.aivmm("db", "query", "--state", "measured", "--json")).json
    assert [each["subject"] for each in found["probes"]] == ["one", "two", "\x1b[2Jthree"]
    assert found["probes"][0]["median_s"] == (1 / 3 + 0.5) / 2
    assert ok(db.aivmm("db", "check", "--json")).json["problems"] == []


def test_a_database_that_is_not_there_is_not_made_by_asking(tmp_path: Path, in_process: InProcess) -> None:
    place = Place.at(tmp_path)
    for arguments in (("stats",), ("query",), ("check",), ("export", "out"), ("prune", "--failed")):
        done = in_process(place, "db", *arguments)
        assert done.code == 2
        assert f"there is no database {place.db}" in done.err
        assert len(done.error_lines) == 1
    assert not place.db.exists()


def test_what_no_runtime_was_asked_for_is_called_default(db: Place, in_process: InProcess) -> None:
    with Database.open(db.db) as database:
        plain = Measured(key=replace(key("plain"), config=Config.of({"THREADS": 2})), samples=Samples(timed_s=(0.1,)))
        database.add(plain)
    lines = ok(in_process(db, "db", "query")).out.splitlines()
    assert "default" in lines[-1] and "THREADS=2" in lines[-1] and "100 ms" in lines[-1]
    nothing = ok(in_process(db, "db", "query", "--state", "refused"))
    assert (nothing.out, "nothing that is stored fits" in nothing.err) == ("", True)


def test_query_writes_the_formats_that_others_read(db: Place, in_process: InProcess) -> None:
    csv = ok(in_process(db, "db", "query", "--format", "csv", "--state", "failed")).out
    assert csv.splitlines()[0].startswith("kind,subject,name,target")
    assert "segfault" in csv
    ok(in_process(db, "db", "query", "-o", "all.parquet"))
    frame = pd.read_parquet(db.work / "all.parquet")
    assert list(frame["state"]) == ["measured"] * 3 + ["failed"]
    assert frame["median_s"][0] == (1 / 3 + 0.5) / 2
    ok(in_process(db, "db", "query", "-o", "all.json"))
    assert len(json.loads((db.work / "all.json").read_text(encoding="utf-8"))["probes"]) == 4


def test_measurements_travel_and_arrive_once(db: Place, in_process: InProcess) -> None:
    assert ok(in_process(db, "db", "export", "out", "--json")).json["rows"]["probe"] == 4
    told = ok(in_process(db, "db", "import", "out", "--db", "other.db", "--json")).json
    assert told["sources"][0]["added"]["probe"] == 4
    assert "nothing is new" in ok(in_process(db, "db", "import", "out", "--db", "other.db")).out
    assert "nothing is new" in ok(in_process(db, "db", "merge", "other.db")).out
    assert "new: 4 probes, 1 environment" in ok(in_process(db, "db", "merge", "other.db", "--db", "third.db")).out


def test_prune_says_first_and_then_does(db: Place, in_process: InProcess) -> None:
    assert ok(in_process(db, "db", "prune", "--failed", "--dry-run", "--json")).json["probes"] == 1
    assert "1 probe and 0 runs would go" in ok(in_process(db, "db", "prune", "--failed", "--dry-run")).out
    assert "1 probe and 0 runs removed" in ok(in_process(db, "db", "prune", "--failed")).out
    assert ok(in_process(db, "db", "stats", "--json")).json["tables"]["probe"] == 3


def test_check_ends_with_1_and_the_list(db: Place, in_process: InProcess) -> None:
    with closing(sqlite3.connect(db.db)) as connection, connection:
        connection.execute("UPDATE probe SET key = 'x'")
    done = in_process(db, "db", "check")
    assert done.code == 1
    assert done.out.count("its key is not the digest") == 4
    as_json = in_process(db, "db", "check", "--json")
    assert (as_json.code, len(as_json.json["problems"])) == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("query", "--kind", "block"), "choose from model, segment"),
        (("query", "--since", "yesterday"), "not a time"),
        (("query", "--format", "xml"), "csv"),
        (("query", "--format", "parquet"), "-o FILE.parquet"),
        (("query", "-o", "x.xml"), "--format"),
        (("query", "--model", "nothing"), "no model 'nothing'"),
        (("query", "--environment", "zzz"), ENVIRONMENT.fingerprint[:8]),
        (("prune",), "--older-than"),
        (("prune", "--environment", "this"), "other"),
        (("import", "nowhere"), "there is no nowhere"),
        (("merge", "nowhere.db"), "no database"),
        (("export", "x.tar"), ".zip"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_what_cannot_be_done_is_one_line(
    db: Place, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a dozen of them would be a dozen starts."""
    monkeypatch.chdir(db.work)
    assert run(["db", *arguments, "--db", str(db.db)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert words in said.err
