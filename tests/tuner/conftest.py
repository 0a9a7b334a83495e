"""One finished tune that many tests look at, and places for those that tune on their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aivmm.tuner.cli import run
from tests.tuner.harness import SMALL, TINY, Finished, Place, write_tiny


@dataclass(frozen=True)
class Tuned:
    """A finished tune."""

    place: Place
    done: Finished
    summary: Any

    @property
    def plan(self) -> Path:
        return self.place.work / "tiny.aivmm"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, never written to."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.onnx")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty place."""
    return Place.at(tmp_path / "place")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run a command in a place, in this process (its workers are real): half the time of a process each, and a bug raises here."""

    def run_in(place: Place, *arguments: str | Path) -> Finished:
        for name in ("AIVMM_DB", "AIVMM_CACHE", "AIVMM_LOCK", "HOME", "XDG_DATA_HOME", "COLUMNS"):
            monkeypatch.setenv(name, place.env()[name])
        monkeypatch.chdir(place.work)
        code = run([*map(str, arguments)])
        return Finished(code, *capfd.readouterr())

    return run_in


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Tuned:
    """The finished tune. Look, do not touch."""
    place = Place.at(tmp_path_factory.mktemp("tuned"))
    done = place.aivmm("tune", tiny, *TINY, *SMALL, "--json")
    assert done.code == 0, done.err
    return Tuned(place, done, done.json)


@pytest.fixture(scope="session")
def again(tuned: Tuned, tiny: Path) -> Finished:
    """The same command once more, in the same place, silently."""
    return tuned.place.aivmm("tune", tiny, *TINY, *SMALL, "--json", "-q")
