"""`python -m aivmm.planner`, in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aivmm.planner.__main__ import main
from aivmm.planner.problem_files import problem_to_json
from tests.planner.placing import chain, published


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "aivmm.planner", *map(str, words)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "problem.json"
    path.write_text(problem_to_json(chain({"a": 1, "b": 9}, {"a": 9, "b": 1}, {"a": 1, "b": 9}, boundary=2.0)))
    return path


def test_json_is_one_object_with_the_plan(file: Path) -> None:
    done = run("solve", file, "--objective", "latency", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found.pop("seconds") > 0
    assert found == {
        "objective": 7.0,
        "bound": 7.0,
        "gap": 0.0,
        "contiguous": False,
        "assignment": {"0": "a:0", "1": "b:0", "2": "a:0"},
    }


def test_text_says_the_same_to_people(file: Path) -> None:
    done = run("solve", file, "--objective", "latency", "--contiguous")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["objective", "11", "s"]
    assert lines[2] == ["gap", "0.000%"]
    assert lines[4] == ["contiguous", "yes"]
    assert [words[0] for words in lines[-3:]] == ["0", "1", "2"]


def test_a_published_instance_is_solved_and_nothing_else_is_printed() -> None:
    done = run("solve", published("bert24_layer"), "--objective", "throughput", "--time-limit", "1.5", "--json")
    found = json.loads(done.stdout)
    assert found["bound"] <= found["objective"] < 17.7905
    assert len(found["assignment"]) == 32
    assert {place.partition(":")[0] for place in found["assignment"].values()} <= {"acc", "cpu"}


def test_names_that_no_terminal_shows_keep_to_their_line(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    text = problem_to_json(chain({"a": 1.0}, {"a": 1.0}))
    path.write_text(text.replace('"0"', r'"\ud800"').replace('"1"', r'"b\n\u001b[31m"'))
    done = run("solve", path, "--objective", "latency")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == [r"  \ud800  a:0", r"  b\n\x1b[31m  a:0"]


def test_what_the_user_can_fix_is_one_line_and_exit_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"schema": 1}')
    done = run("solve", bad, "--objective", "latency")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"aivmm.planner: {bad}: ")


def test_options_that_make_no_sense_are_refused_alike(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--objective", "speed"], [], ["--objective", "latency", "--time-limit", "0"]):
        assert main(["solve", str(file), *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1


def test_no_plan_is_exit_3_and_with_json_the_error_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "full.json"
    path.write_text(problem_to_json(chain({"a": 1}, {"a": 1}, a=1.5)))
    done = run("solve", path, "--objective", "throughput", "--json")
    assert done.returncode == 3
    error = json.loads(done.stdout)
    assert error["schema"] == 1
    assert error["error"]["message"] == "no plan keeps the limits on memory"
    assert "raise memory_bytes" in error["error"]["advice"]
