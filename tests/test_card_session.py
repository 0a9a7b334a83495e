"""The script that runs on a lent machine with cards: what it has it does not run again, and what was cut short it does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.card_doctor import ways
from benchmarks.card_session import TESTS, Machine, Pretended, Process, Step, lane, run, steps, take_over
from benchmarks.gpu import code_of, main
from benchmarks.gpu_tuned import tune, tuned_bundle

ROOT = Path(__file__).parent.parent


def writes(path: Path, text: str = "x") -> tuple[str, ...]:
    return sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r}); print('said')"


def test_what_has_a_result_is_not_run_again_unless_it_is_named(tmp_path: Path) -> None:
    step = Step(name="one", command=writes(tmp_path / "ran"), seconds=5)
    for again, count in (((), 1), ((), 1), (("one",), 2)):
        run([step], tmp_path, minutes=1, cards=1, again=again)
        assert (tmp_path / "ran").read_text() == "x" * count
    record = json.loads((tmp_path / "session.one.json").read_text())
    assert record["code"] == 0 and record["tail"] == "said\n"


def test_what_a_step_would_make_and_is_there_is_its_result(tmp_path: Path) -> None:
    every = [Step(name=name, command=writes(tmp_path / f"{name}.json"), seconds=5, makes=f"{name}.json") for name in ("a", "b")]
    (tmp_path / "a.json").write_text("earlier")
    became = run(every, tmp_path, minutes=1, cards=1)
    assert became["a"] == "has a result" and became["b"].startswith("exit 0 after")
    assert (tmp_path / "a.json").read_text() == "earlier" and (tmp_path / "b.json").read_text() == "x"


def test_a_step_that_hangs_is_ended_with_its_children_leaves_no_result_and_the_next_one_runs(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    hangs = (sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    every = [Step(name="hangs", command=hangs, seconds=0.4), Step(name="next", command=writes(tmp_path / "ran"), seconds=5)]
    became = run(every, tmp_path, minutes=1, cards=1)
    assert became["hangs"].startswith("did not end") and (tmp_path / "ran").exists()
    assert not (tmp_path / "session.hangs.json").exists()
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_what_does_not_fit_is_left_out_and_what_fails_is_a_result(tmp_path: Path) -> None:
    fails = (sys.executable, "-c", "import sys; print('why'); sys.exit(3)")
    every = [
        Step(name="long", command=writes(tmp_path / "long"), seconds=600),
        Step(name="two", command=writes(tmp_path / "two"), seconds=1, cards=2),
        Step(name="fails", command=fails, seconds=5),
    ]
    became = run(every, tmp_path, minutes=1, cards=1)
    assert became["long"].startswith("no time") and became["two"] == "needs 2 cards, 1 here" and became["fails"].startswith("exit 3")
    assert not (tmp_path / "long").exists() and not (tmp_path / "two").exists()
    assert "why" in json.loads((tmp_path / "session.fails.json").read_text())["tail"]
    later = tmp_path / "later"
    later.mkdir()
    assert take_over(tmp_path, later) == 1
    assert run(every[2:], later, minutes=1, cards=1) == {"fails": "has a result"}


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset here")
def test_steps_beside_each_other_have_cards_cores_and_locks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = min(os.sched_getaffinity(0))
    tell = "import os; e = os.environ; print(e['CUDA_VISIBLE_DEVICES'], e['AIVMM_LOCK'], *sorted(os.sched_getaffinity(0)))"
    every = [Step(name=name, command=(sys.executable, "-c", tell), seconds=9, cards=cards) for name, cards in (("a", 1), ("b", 2))]
    monkeypatch.setattr("benchmarks.card_session.lane", lambda chosen, cards: {**lane(chosen, cards), "AIVMM_LANE_CORES": str(core)})
    assert all(each.startswith("exit 0 after") for each in run(every, tmp_path, minutes=1, cards=3).values())
    a, b = (json.loads((tmp_path / f"session.{each}.json").read_text())["tail"].split() for each in "ab")
    assert (a[0], b[0]) == ("0", "1,2") and a[1] != b[1] and a[2:] == b[2:] == [str(core)]


def test_cards_share_the_cores_out_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32, 96)))  # of a machine with more
    cores = [set(lane([each], 4)["AIVMM_LANE_CORES"].split(",")) for each in range(4)]
    assert [len(each) for each in cores] == [16] * 4 and not any(a & b for a, b in combinations(cores, 2))
    assert set.union(*cores) == {str(each) for each in range(32, 96)}
    assert set(lane([1, 3], 4)["AIVMM_LANE_CORES"].split(",")) == cores[1] | cores[3]
    assert lane([0], 1) == {}  # the only card: the whole machine


class Watched(Pretended):
    """Notes when each step ran, and on which cards."""

    def __init__(self, state: Path, hang: Sequence[str] = ()) -> None:
        super().__init__(state, hang)
        self.ran: dict[str, tuple[float, str]] = {}

    def start(self, step: Step, log: Path, given: dict[str, str]) -> Process:  # type: ignore[override]
        self.ran[step.name] = (self.now(), given.get("CUDA_VISIBLE_DEVICES", "all"))
        return super().start(step, log, given)


def overlap(a: Step, b: Step, machine: Watched) -> bool:
    (first, _), (second, _) = machine.ran[a.name], machine.ran[b.name]
    return first < second + machine.takes(b) and second < first + machine.takes(a)


@pytest.mark.parametrize(("cards", "most_minutes"), [(4, 20), (2, 27), (1, 27)])
def test_the_whole_schedule_loses_no_step_and_nothing_that_is_timed_shares_a_card(tmp_path: Path, cards: int, most_minutes: float) -> None:
    every, machine = steps(tmp_path, tmp_path, tmp_path, "6s", cards=cards), Watched(tmp_path)
    became = run(every, tmp_path, minutes=most_minutes, cards=cards, machine=machine)
    assert {name for name, said in became.items() if not said.startswith("exit 0")} == {each.name for each in every if each.cards > cards}
    ran = [each for each in every if each.name in machine.ran]
    for a, b in combinations(ran, 2):
        if overlap(a, b, machine):
            assert not a.alone and not b.alone
            mine, theirs = (set(machine.ran[each.name][1].split(",")) for each in (a, b))
            assert not mine & theirs


@pytest.mark.parametrize("hang", ["tune-two-cards", "tune.minilm.throughput.fp32", "tests-cards", "overhead", "doctor-lane-0"])
def test_a_step_that_hangs_costs_itself_and_its_time(tmp_path: Path, hang: str) -> None:
    every = steps(tmp_path, tmp_path, tmp_path, "6s", cards=4)
    became = run(every, tmp_path, minutes=27, cards=4, machine=Pretended(tmp_path, [hang]))
    lost = {hang} | ({"two_tuned"} if hang == "tune-two-cards" else set())  # which races what that makes
    assert became.keys() == {each.name for each in every}
    assert {name for name, said in became.items() if not said.startswith("exit 0")} == lost
    resumed = run(every, tmp_path, minutes=27, cards=4, machine=Pretended(tmp_path))
    assert {name for name, said in resumed.items() if said != "has a result"} == lost
    assert all(resumed[each].startswith("exit 0") for each in lost)


@pytest.mark.parametrize("cards", [2, 4])
def test_calls_of_nine_minutes_come_to_the_same(tmp_path: Path, cards: int) -> None:
    every = steps(tmp_path, tmp_path, tmp_path, "6s", cards=cards)
    for _ in range(3):
        became = run(every, tmp_path, minutes=9.2, cards=cards, machine=Pretended(tmp_path))
    assert all((tmp_path / f"session.{each.name}.json").exists() for each in every), became


def test_a_step_that_waits_for_two_cards_is_not_overtaken(tmp_path: Path) -> None:
    every = steps(tmp_path, tmp_path, tmp_path, "6s", cards=2)
    machine = Watched(tmp_path)
    became = run(every, tmp_path, minutes=9.2, cards=2, machine=machine)
    assert became["tune-two-cards"].startswith("exit 0")
    began = [machine.ran[each.name][0] for each in every if each.name in machine.ran]
    assert began == sorted(began)


def test_what_a_machine_took_with_it_is_made_again_for_the_step_that_needs_it(tmp_path: Path) -> None:
    def of(place: Path) -> list[Step]:
        names = ("tune-two-cards", "tune-one-card", "tune-energy", "two_tuned", "energy_tuned")
        return [each for each in steps(place, place / "folder", place, "6s", cards=2) if each.name in names]

    old, new, third = (tmp_path / each for each in ("old", "new", "third"))
    for each in (old, new, third):
        each.mkdir()
    run(of(old)[:3], old, minutes=27, cards=2, machine=Pretended(old))
    assert take_over(old, new) == 3
    assert run(of(new)[3:], new, minutes=27, cards=2, machine=Pretended(new))["two_tuned"].startswith("needs resnet50-1.aivmm")
    assert all(each.startswith("exit 0") for each in run(of(new), new, minutes=27, cards=2, machine=Pretended(new)).values())
    assert take_over(new, third) == 6  # what each step said, and the figures of one
    assert set(run(of(third), third, minutes=27, cards=2, machine=Pretended(third)).values()) == {"has a result"}


def test_what_does_not_make_its_file_has_no_result_and_is_run_again(tmp_path: Path) -> None:
    step = Step(name="a", command=(sys.executable, "-c", ""), seconds=5, makes="a.json")
    for _ in range(2):
        assert run([step], tmp_path, minutes=1, cards=1)["a"].startswith("no result: exit 0")
    assert not (tmp_path / "session.a.json").exists()


@pytest.mark.parametrize("works", [True, False])
def test_what_is_run_again_finds_no_result_in_its_way_and_what_fails_then_costs_none(tmp_path: Path, works: bool) -> None:
    (tmp_path / "a.json").write_text("earlier")
    command = writes(tmp_path / "a.json", "new") if works else (sys.executable, "-c", "")
    run([Step(name="a", command=command, seconds=5, makes="a.json")], tmp_path, minutes=1, cards=1, again=["a"])
    assert (tmp_path / "a.json").read_text() == ("new" if works else "earlier")


def tunings_answer(monkeypatch: pytest.MonkeyPatch, answers: list[tuple[int, str]]) -> None:
    def ran(command: Sequence[str], **given: object) -> subprocess.CompletedProcess[str]:
        code, said = answers.pop(0)
        return subprocess.CompletedProcess(command, code, said, "")

    monkeypatch.setattr("benchmarks.gpu_tuned._targets", lambda *_: ["onnxruntime:CPU"])
    monkeypatch.setattr("benchmarks.gpu_tuned.subprocess.run", ran)


def test_a_tuning_that_fails_says_so_until_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(2, ""), (0, "{}")]
    tunings_answer(monkeypatch, answers)

    def tuned(kind: str) -> bool:
        return tune(tmp_path, tmp_path, models=["silero"], goals=["latency fp32"], budget="1s", state=tmp_path, kind=kind)

    assert not tuned("opencl") and len(answers) == 2
    assert "OpenVINO's GPU" in (tmp_path / "opencl.silero.latency.fp32.failed").read_text()
    assert not tuned("tune") and (tmp_path / "tune.silero.latency.fp32.failed").exists()
    assert tuned("tune") and not (tmp_path / "tune.silero.latency.fp32.failed").exists()


def test_a_tuning_that_fails_exits_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tunings_answer(monkeypatch, [(2, "")])
    monkeypatch.setattr("benchmarks.gpu.environment", dict)
    places = [f"--{each}={tmp_path}" for each in ("state", "folder", "shared")]
    monkeypatch.setattr("sys.argv", ["gpu", *places, "--only=tune", "--models=silero", "--goals=latency fp32"])
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    assert [each.name for each in tmp_path.glob("*.failed")] == ["tune.silero.latency.fp32.failed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_session_that_is_asked_to_end_ends_its_steps(tmp_path: Path, number: signal.Signals) -> None:
    began, late = tmp_path / "began", tmp_path / "late"
    sleeps = f"import time, pathlib as p; p.Path({str(began)!r}).touch(); time.sleep(2); p.Path({str(late)!r}).touch()"
    script = f"""
import pathlib, signal, sys
from benchmarks.card_session import Step, run
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for what a shell starts in the background
run([Step(name="sleeps", command=(sys.executable, "-c", {sleeps!r}), seconds=50)], pathlib.Path({str(tmp_path)!r}), minutes=1, cards=1)
"""
    session = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not began.exists():
        assert session.poll() is None
        time.sleep(0.02)
    session.send_signal(number)
    assert session.wait(20) == 128 + number
    time.sleep(2)
    assert not late.exists() and not (tmp_path / "session.sleeps.json").exists()


def render(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_page_of_new_results_stands_above_the_one_before_and_never_in_its_place(tmp_path: Path) -> None:
    state, page = tmp_path / "state", tmp_path / "page.md"
    state.mkdir()
    card = "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB, 700.00 W"
    (state / "environment.json").write_text(json.dumps({"cards": [card, card], "at": "2031-02-03 10:00", "code": "abc1234"}))
    (state / "pixels.json").write_text(json.dumps({"rates": {"float32": [1.0]}, "cosine": {}}))
    earlier = (ROOT / "benchmarks" / "results" / "h200.md").read_text(encoding="utf-8")
    page.write_text(earlier, encoding="utf-8")
    refused = render("--state", str(state), "--render", str(page))
    assert refused.returncode == 2 and "--keep" in refused.stderr and page.read_text(encoding="utf-8") == earlier
    assert render("--state", str(state), "--render", str(page), "--keep", str(page)).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# A machine with NVIDIA cards: 2031-02-03, 2 x NVIDIA H100 80GB HBM3, code of abc1234\n")
    new, _, old = text.partition("\n# Earlier (")
    assert old.startswith("20") and old.endswith(f")\n\n{earlier}")
    assert "Not run, or lost with the state that held it: throughput, two, overhead" in new and "24 of 24 tunings" in new


def test_a_page_that_is_kept_is_named_by_its_commit() -> None:
    if not code_of():
        pytest.skip("no repository here")
    assert code_of("--", str(ROOT / "benchmarks" / "results" / "h200.md"))


def test_what_is_interrupted_is_ended(tmp_path: Path) -> None:
    class Interrupted(Machine):
        def rest(self) -> None:
            raise KeyboardInterrupt

    late = tmp_path / "late"
    sleeps = (sys.executable, "-c", f"import time, pathlib; time.sleep(1); pathlib.Path({str(late)!r}).touch()")
    with pytest.raises(KeyboardInterrupt):
        run([Step(name="sleeps", command=sleeps, seconds=5)], tmp_path, minutes=1, cards=1, machine=Interrupted())
    time.sleep(1.2)
    assert not late.exists()


def test_every_file_with_tests_of_cards_is_in_a_step() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.gpu" in path.read_text(encoding="utf-8")
    }
    marked -= {"tests/test_card_session.py"}  # it names the marker
    assert marked == {each for files in TESTS.values() for each in files}


def test_every_step_has_a_name_of_its_own_and_every_goal_of_every_model_is_tuned(tmp_path: Path) -> None:
    every = steps(tmp_path, tmp_path, tmp_path, "6s", every=True)
    assert len({each.name for each in every}) == len(every)
    assert sum(each.name.startswith("tune.") for each in every) == 24


def test_each_way_to_be_a_process_is_looked_at_inside_a_lane_and_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    outside = {name for name, _, _ in ways()}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert {name for name, _, _ in ways()} - outside == {"with all cards"}
    assert {"plain", "a worker", "started as a worker"} <= outside


def test_what_a_tuning_had_said_when_its_time_ended_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ran(command: Sequence[str], *, timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, timeout, output=b"phase 2", stderr=b"why")  # bytes on POSIX, also where text is asked for

    monkeypatch.setattr("benchmarks.gpu_tuned.subprocess.run", ran)
    found = tuned_bundle(tmp_path / "m.onnx", tmp_path / "m.aivmm", targets="", options=(), budget="1s")
    assert isinstance(found, str) and found.startswith("no end within ")
    assert capsys.readouterr().out == "phase 2 why\n"
