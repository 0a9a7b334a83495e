"""README says what is so: its commands, and the code it shows for production."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block_after(mark: str) -> str:
    """Return the code block that follows a marker comment."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert found, mark
    return found[1].strip()


def test_ci_runs_the_two_commands_of_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for mark in ("demo", "test"):
        assert f"command_of {mark}" in ci
        assert block_after(f"ci:{mark}")


def test_the_options_that_readme_names_exist() -> None:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    helps = (["aivmm", "tune", "--help"], ["aivmm", "bench", "--help"], ["aivmm", "report", "--help"], ["aivmm.planner", "solve", "--help"])
    commands = [[sys.executable, "-m", *each] for each in helps]
    shown = "".join(subprocess.run(each, capture_output=True, text=True, check=True, env=environment).stdout for each in commands)
    for option in set(re.findall(r"--[a-z][a-z-]+", README)) - {"--group", "--no-deps", "--dist"}:
        assert option in shown, option


def test_the_files_that_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_production_code_of_readme_runs_on_the_demo_plan(tmp_path: Path) -> None:
    tuned = subprocess.run(
        [sys.executable, "-m", "aivmm", "tune", "demo:squeezenet", "--budget", "8s", "--trials", "3", "--db", str(tmp_path / "p.db"), "-q"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert tuned.returncode == 0, tuned.stderr
    code = re.search(r"## In production\n\n```python\n(.*?)```", README, re.DOTALL)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 1000")
