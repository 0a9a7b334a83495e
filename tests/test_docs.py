"""The documentation is built without a warning, names only options that exist, and its tutorial is followed by its own text."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from aivmm.tuner.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "decisions" not in path.parts)
_NOT_RUN = "<!-- not run"


def commands(page: Path) -> list[str]:
    """Return the shell commands of a page, in order, without those that it says are not run."""
    found = []
    for before, block in re.findall(r"([^\n]*)\n```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if not before.startswith(_NOT_RUN):
            found += [line.partition("  #")[0].strip() for line in block.splitlines() if line.strip()]
    return found


def ours(page: Path) -> list[list[str]]:
    """Return the words of each command of a page that is one of aivmm's."""
    words = [shlex.split(re.split(r"\s(?:\||>|\|\|)\s", line)[0]) for line in commands(page)]
    return [["aivmm", "tune", *each[1:]] if each[0] == "aivmm-tune" else each for each in words if each[0] in ("aivmm", "aivmm-tune")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_command_and_option_in_the_documentation_exists(page: Path) -> None:
    for words in ours(page):
        command = typer.main.get_command(app)
        rest = words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        known = {flag for each in command.params for flag in each.opts}
        assert not hasattr(command, "commands"), words
        for word in rest:
            assert not word.startswith("-") or word == "-" or word.partition("=")[0] in known, words


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site/reference/command-line.html").read_text(encoding="utf-8")
    assert "--service-level" in reference and "aivmm db export" in reference
    assert "load_plan" in (tmp_path / "site/reference/python.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it tunes twice
def test_the_tutorial_is_followed_by_its_own_text(tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "AIVMM_DB": str(tmp_path / "performance.db")}
    environment |= {"AIVMM_CACHE": str(tmp_path / "cache"), "AIVMM_LOCK": str(tmp_path / "lock"), "AIVMM_CONFIG": ""}
    page = DOCS / "tutorial.md"
    assert len(commands(page)) >= 7
    for line in commands(page):
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)  # noqa: S602 - our own page
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 1000")
