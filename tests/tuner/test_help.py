"""What the command line says of itself: every command teaches by example, fits a terminal, and prints on any."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from aivmm.tuner.cli import app
from tests.tuner.harness import Shell

ROOT: Any = typer.main.get_command(app)


def commands(command: Any = ROOT, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command with its words."""
    for name, each in getattr(command, "commands", {}).items():
        if hasattr(each, "commands"):
            yield from commands(each, (*names, name))
        else:
            yield (*names, name), each


ALL = [pytest.param(names, each, id=" ".join(names)) for names, each in commands()]


@pytest.mark.parametrize(("names", "command"), ALL)
def test_every_command_has_an_example_that_it_would_take(names: tuple[str, ...], command: Any) -> None:
    examples = re.findall(r"^\s*(?:Example: )?`(aivmm [^`]*)`", command.help, re.MULTILINE)
    own = [shlex.split(each) for each in examples if shlex.split(each)[1 : 1 + len(names)] == list(names)]
    assert own, f"{' '.join(names)} has no example"
    flags = {flag for each in command.params for flag in each.opts}
    for words in own:
        assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= flags, words


@pytest.mark.parametrize(("names", "command"), [*ALL, pytest.param((), ROOT, id="aivmm")])
def test_help_fits_eighty_columns(names: tuple[str, ...], command: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = Shell(tmp_path, capsys).aivmm(*names, "--help")
    lines = found.out.splitlines()
    assert found.code == 0 and lines and max(map(len, lines)) <= 80
    assert "…" not in found.out, "something does not fit"
    assert re.findall(r"<(?:bool|str|int|float|path|list\[\w+\])>", found.out) == [], "a type of Python's is no word for a value"


def test_the_way_from_a_model_to_production_comes_first() -> None:
    assert list(ROOT.commands)[:5] == ["doctor", "devices", "tune", "report", "run"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_prints_on_a_terminal_of_any_encoding(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", "aivmm", "tune", "--help"], capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and b"--constraint" in done.stdout, done.stderr
    done.stdout.decode(encoding)


def test_a_model_that_is_not_there_is_told_before_anything_is_measured(tmp_path: Path, capsys: Any) -> None:
    found = Shell(tmp_path, capsys).aivmm("tune", "missing.onnx")
    assert found.code == 2 and "no such model file: missing.onnx" in found.err and "reading the model" not in found.err


def test_completion_offers_the_commands() -> None:
    environment = {**os.environ, "_AIVMM_COMPLETE": "complete_bash", "COMP_WORDS": "aivmm d", "COMP_CWORD": "1"}
    code = "from aivmm.tuner.cli import app; app(prog_name='aivmm')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert set(done.stdout.split()) == {"doctor", "devices", "db"}, done.stderr
