"""The script that runs on a lent machine with cards: what it has it does not run again, and what was cut short it does."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from benchmarks.card_session import TESTS, Step, lanes, run, steps, take_over

ROOT = Path(__file__).parent.parent


def writes(path: Path, text: str = "x") -> tuple[str, ...]:
    return sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r}); print('said')"


def test_what_has_a_result_is_not_run_again_unless_it_is_named(tmp_path: Path) -> None:
    step = Step(name="one", commands=(writes(tmp_path / "ran"),), seconds=1)
    for again, count in (((), 1), ((), 1), (("one",), 2)):
        run([step], tmp_path, minutes=1, cards=1, again=again)
        assert (tmp_path / "ran").read_text() == "x" * count
    record = json.loads((tmp_path / "session.one.json").read_text())
    assert record["codes"] == [0] and record["tails"] == ["said\n"]


def test_of_several_commands_those_run_that_made_nothing_yet(tmp_path: Path) -> None:
    made = ("a.json", "b.json")
    step = Step(name="both", commands=tuple(writes(tmp_path / name) for name in made), seconds=1, makes=made)
    (tmp_path / "a.json").write_text("earlier")
    assert run([step], tmp_path, minutes=1, cards=1)["both"].startswith("exit 0 after")
    assert (tmp_path / "a.json").read_text() == "earlier" and (tmp_path / "b.json").read_text() == "x"
    (tmp_path / "session.both.json").unlink()
    assert run([step], tmp_path, minutes=1, cards=1) == {"both": "has a result"}


def test_a_step_that_hangs_is_ended_with_its_children_leaves_no_result_and_the_next_one_runs(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    hangs = (sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    every = [Step(name="hangs", commands=(hangs,), seconds=0.4), Step(name="next", commands=(writes(tmp_path / "ran"),), seconds=0.4)]
    became = run(every, tmp_path, minutes=1, cards=1)
    assert became["hangs"].startswith("did not end") and (tmp_path / "ran").exists()
    assert not (tmp_path / "session.hangs.json").exists()
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_what_does_not_fit_is_left_out_and_what_fails_is_a_result(tmp_path: Path) -> None:
    fails = (sys.executable, "-c", "import sys; print('why'); sys.exit(3)")
    every = [
        Step(name="long", commands=(writes(tmp_path / "long"),), seconds=600),
        Step(name="two", commands=(writes(tmp_path / "two"),), seconds=1, cards=2),
        Step(name="fails", commands=(fails,), seconds=1),
    ]
    became = run(every, tmp_path, minutes=1, cards=1)
    assert became["long"].startswith("no time") and became["two"] == "needs 2 cards, 1 here" and became["fails"].startswith("exit 3")
    assert not (tmp_path / "long").exists() and not (tmp_path / "two").exists()
    assert "why" in json.loads((tmp_path / "session.fails.json").read_text())["tails"][0]
    later = tmp_path / "later"
    later.mkdir()
    assert take_over(tmp_path, later) == 1
    assert run(every[2:], later, minutes=1, cards=1) == {"fails": "has a result"}


def test_shared_commands_take_turns_in_lanes_until_the_time_is_up(tmp_path: Path) -> None:
    code = "import os, sys, time, pathlib; time.sleep(.2); pathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    names = [f"{number}.json" for number in range(4)]
    commands = tuple((sys.executable, "-c", code, str(tmp_path / name)) for name in names)
    step = Step(name="tunes", commands=commands, seconds=0.1, makes=tuple(names), shared=True)
    together = [{"CUDA_VISIBLE_DEVICES": each["CUDA_VISIBLE_DEVICES"]} for each in lanes(4, [2, 3])]
    (tmp_path / names[0]).write_text("earlier")
    assert run([step], tmp_path, minutes=1, cards=4, together=together) == {"tunes": "3 of 3 ended (0 of them not with exit 0)"}
    assert {(tmp_path / name).read_text() for name in names} == {"earlier", "2", "3"}
    (tmp_path / names[1]).unlink()
    hangs = Step(name="tunes", commands=((sys.executable, "-c", "import time; time.sleep(60)"),), seconds=0.1, shared=True)
    assert run([hangs], tmp_path, minutes=0.01, cards=4, together=together) == {"tunes": "0 of 1 ended (0 of them not with exit 0)"}


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset here")
def test_a_step_runs_in_a_lane_as_tunings_do(tmp_path: Path) -> None:
    tell = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), *sorted(os.sched_getaffinity(0)))"
    core = min(os.sched_getaffinity(0))
    (lane,) = lanes(2, [1])
    step = Step(name="seen", commands=((sys.executable, "-c", tell),), seconds=4, cards=2, in_lane=True)
    assert run([step], tmp_path, minutes=1, cards=2, together=[{**lane, "AIVMM_LANE_CORES": str(core)}])["seen"].startswith("exit 0 after")
    assert json.loads((tmp_path / "session.seen.json").read_text())["tails"] == [f"1 {core}\n"]
    every = {each.name: each for each in steps(tmp_path, tmp_path, tmp_path, "6s")}
    assert every["doctor-lane"].in_lane and every["doctor-lane"].commands == every["doctor"].commands and not every["doctor"].in_lane


def test_cards_have_locks_of_their_own() -> None:
    four = lanes(4)
    assert len({each["AIVMM_LOCK"] for each in four}) == 4
    assert lanes(4, [3]) == four[3:] and len(lanes(1)) == 4


def test_every_file_with_tests_of_cards_is_in_a_step() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.gpu" in path.read_text(encoding="utf-8")
    }
    marked -= {"tests/test_card_session.py"}  # it names the marker
    assert marked == {each for files in TESTS.values() for each in files}


def test_one_card_takes_no_longer_than_a_lent_machine_is_held(tmp_path: Path) -> None:
    every = steps(tmp_path, tmp_path, tmp_path, "6s")
    assert len({each.name for each in every}) == len(every)
    assert sum(len(each.commands) for each in every if each.name.startswith("tunes")) == 24
    assert sum(each.seconds for each in every if each.cards == 1) < 28 * 60
    assert sum(each.seconds for each in every if each.cards == 2) < 28 * 60
