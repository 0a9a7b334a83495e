"""Where a database is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.db.location import Location
from aivmm.errors import DatabaseError


def test_without_a_location_it_is_the_file_that_aivmm_db_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIVMM_DB", str(tmp_path / "named.db"))
    with Database.open() as database:
        assert database.location == str(tmp_path / "named.db")
    assert (tmp_path / "named.db").stat().st_size > 0


@pytest.mark.parametrize("variable", ["", None])
def test_without_any_word_it_is_in_the_users_data_folder_which_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    monkeypatch.setattr("aivmm.db.location.data_folder", lambda: tmp_path / "not" / "yet")
    monkeypatch.delenv("AIVMM_DB", raising=False)
    if variable is not None:
        monkeypatch.setenv("AIVMM_DB", variable)
    with Database.open() as database:
        assert database.location == str(tmp_path / "not" / "yet" / "performance.db")


def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("aivmm.db.location.data_folder", lambda: tmp_path / "file" / "aivmm")
    monkeypatch.delenv("AIVMM_DB", raising=False)
    with pytest.raises(DatabaseError, match=r"cannot make the folder.*--db"):
        Database.open()


def test_a_path_and_its_url_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "with space & 100%#?ü.db"
    with Database.open(file) as database, Database.open(str(file)) as again:
        assert database.location == again.location == str(file)
    assert Location.of(f"sqlite:///{tmp_path / 'x.db'}").path == tmp_path / "x.db"
    monkeypatch.chdir(tmp_path)
    assert Location.of("x.db").path == tmp_path / "x.db"
    assert Location.of("sqlite:///x.db").path == tmp_path / "x.db"


@pytest.mark.parametrize(
    "location", ["mysql://h/n", "sqlite+aiosqlite:///x", "file:///x.db", "s3://bucket/x", "://", "postgresql://h:port/n"]
)
def test_another_scheme_is_refused_with_those_there_are(location: str) -> None:
    with pytest.raises(DatabaseError) as raised:
        Location.of(location)
    assert "postgresql+psycopg://" in raised.value.advice
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("location", ["sqlite://", "sqlite:///:memory:", ":memory:"])
def test_a_database_that_forgets_is_refused(location: str) -> None:
    with pytest.raises(DatabaseError, match="forget"):
        Location.of(location)


def test_parameters_of_a_sqlite_url_are_refused_and_not_ignored() -> None:
    with pytest.raises(DatabaseError, match="no parameters"):
        Location.of("sqlite:///x.db?mode=ro")


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_password_is_used_and_never_shown(scheme: str) -> None:
    place = Location.of(f"{scheme}://me:secret@host/name?password=secret&sslmode=require")
    assert place.url.drivername == "postgresql+psycopg"
    assert place.url.password == "secret"
    assert "secret" not in place.shown
    assert "host/name" in place.shown


def test_a_missing_driver_is_one_line_that_says_what_to_install() -> None:
    code = """
import sys
sys.modules["psycopg"] = None  # as if it were not installed
from aivmm.db.database import Database
from aivmm.errors import DatabaseError
try:
    Database.open("postgresql://me:secret@localhost/name")
except DatabaseError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "needs the Python package psycopg" in told
    assert "pip install 'psycopg[binary]'" in told
    assert "secret" not in told
    assert told.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="psycopg is not installed")
def test_a_server_that_does_not_answer_is_one_line_without_the_password() -> None:
    with pytest.raises(DatabaseError, match="cannot use the database") as raised:
        Database.open("postgresql://me:secret@127.0.0.1:1/name", timeout_s=2)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
