"""A driver that does everything wrong: each fault is a report with its reason, the process is gone, and the next call works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from aivmm.errors import UsageError
from aivmm.probes import client, watch
from aivmm.probes.arrays import save_arrays
from aivmm.probes.client import Worker, WorkerDied, WorkerLost
from aivmm.probes.lab import Lab

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, forks and numbered pipes are those of POSIX")
Compile = Callable[..., dict[str, Any]]

RUBBISH = "wrote rubbish where its answers go and was stopped"
# What a driver does, while it compiles or while it runs, and what is told of it.
FAULTS = {
    "segfault": r"crashed \(SIGSEGV\)",
    "abort": r"crashed \(SIGABRT\)",
    "exit": "exited with status 7",
    "vanish": "exited with status 9",
    "raise": r"failed in its plug-in \(KeyError: 'a bug of the plug-in'\)",
    "busy": "took longer than 2 s and was stopped",
    "idle": "took longer than 2 s and was stopped",
    "eat": r"used more than 0\.5 GB of memory and was stopped",
    "rubbish": RUBBISH,
    "half": RUBBISH,
    "forge": RUBBISH,
    "deep": RUBBISH,
    "flood": RUBBISH,
    "flood one line": RUBBISH,
    "close": "exited with status",
    "close and hang": "closed the pipe of its answers and was stopped",
    "child and die": r"crashed \(SIGABRT\)",
    "child and hang": "took longer than 2 s and was stopped",
}
QUICK = ("eat", "rubbish", "flood one line", "close and hang", "child and hang")


def works(worker: Worker) -> bool:
    return bool(worker.call("memory", limit_s=60)["peak_bytes"] > 0)


def gone(pid: int, within_s: float = 30.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def check(compile_wild: Compile, worker: Worker, how: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIVMM_WORKER_GB", "0.5")
    assert works(worker)
    pid, before = worker.pid, psutil.Process().memory_info().rss
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=reason) as caught:
        compile_wild(how, limit_s=2.0 if "took longer" in reason else 60.0)
    assert time.monotonic() - started < 40
    assert not isinstance(caught.value, WorkerLost)
    assert len(caught.value.output) <= 8 << 10
    assert how.endswith("raise") or gone(pid)
    for child in re.findall(r"child is (\d+)", caught.value.output):
        assert gone(int(child))
    assert psutil.Process().memory_info().rss - before < 200 << 20
    assert works(worker)
    assert compile_wild("")["first_inference_s"] > 0


@posix
@pytest.mark.parametrize("how", QUICK)
def test_a_fault_is_a_report_and_the_next_call_works(
    compile_wild: Compile, worker: Worker, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(compile_wild, worker, how, FAULTS[how], monkeypatch)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("how", [f"{when}{how}" for when in ("", "run ") for how in FAULTS if when or how not in QUICK])
def test_every_fault_is_a_report_and_the_next_call_works(
    compile_wild: Compile, worker: Worker, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(compile_wild, worker, how, FAULTS[how.removeprefix("run ")], monkeypatch)


@posix
@pytest.mark.parametrize("how", ["close the standard three", "print", "child"])
def test_what_harms_nobody_is_no_failure(compile_wild: Compile, worker: Worker, how: str) -> None:
    assert compile_wild(how)["first_inference_s"] > 0
    assert compile_wild("")["first_inference_s"] > 0
    assert worker.generation == 1


def test_outputs_of_another_shape_are_a_problem(compile_wild: Compile, tmp_path: Path) -> None:
    save_arrays(tmp_path / "reference.npz", {"y": np.ones(4, dtype=np.float32)})
    assert compile_wild("shape", reference=str(tmp_path / "reference.npz"))["problem"] == "output 'y' has shape [3], the reference has [4]"


@posix
@pytest.mark.parametrize("how", ["close and hang", "eat", "flood", "busy"])
@pytest.mark.slow
def test_a_fault_while_looking_for_devices_leaves_the_other_runtimes(wild: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("WILD_DISCOVERY", how)
    monkeypatch.setenv("AIVMM_WORKER_GB", "0.5")
    monkeypatch.setattr("aivmm.probes.lab._DISCOVER_LIMIT_S", 5.0)
    with Lab() as lab:
        targets, absent = lab.discover(["wild", "null"])
    assert targets
    (reason,) = (each.reason for each in absent if each.target == "wild")
    assert re.search(FAULTS[how].replace("2 s", "5 s"), reason)


# --- whose fault it is ---


@posix
@pytest.mark.parametrize("how", ["die later", "rubbish later"])
def test_what_goes_wrong_between_two_questions_is_no_fault_of_the_next(compile_wild: Compile, worker: Worker, how: str) -> None:
    def until_it_went_wrong() -> None:
        end = time.monotonic() + 30
        while worker.pid and worker._answers.empty():
            assert time.monotonic() < end
            time.sleep(0.02)

    compile_wild(how)
    until_it_went_wrong()
    with pytest.raises(WorkerLost):
        worker.call("timed", limit_s=30, name="m", seconds=0.0)
    compile_wild(how)
    until_it_went_wrong()
    assert compile_wild("")["first_inference_s"] > 0  # a fresh worker, since this needs nothing that was loaded


@posix
def test_one_that_died_after_its_answer_says_how(compile_wild: Compile, worker: Worker) -> None:
    compile_wild("die later")
    while worker.pid:
        time.sleep(0.05)
    with pytest.raises(WorkerLost, match=r"crashed \(SIGSEGV\) after its last answer"):
        worker.call("timed", limit_s=30, name="m", seconds=0.0)


@posix
def test_one_that_hangs_says_where(compile_wild: Compile) -> None:
    with pytest.raises(WorkerDied) as caught:
        compile_wild("run idle", limit_s=1.0)
    assert "in misbehave" in caught.value.output and "in run" in caught.value.output


# --- limits ---


def test_compiling_and_running_have_limits_of_their_own(compile_wild: Compile) -> None:
    with pytest.raises(WorkerDied, match="took longer than 2 s and was stopped"):
        compile_wild("idle", limit_s=2.0, run_limit_s=60.0)
    started = time.monotonic()
    with pytest.raises(WorkerDied, match="took longer than 1 s to run and was stopped"):
        compile_wild("run idle", limit_s=60.0, run_limit_s=1.0)
    assert time.monotonic() - started < 30


def test_limits_can_be_set_and_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ask in (("AIVMM_COMPILE_LIMIT", client.compile_limit_s), ("AIVMM_RUN_LIMIT", client.run_limit_s)):
        monkeypatch.delenv(name, raising=False)
        assert ask() >= 60
        monkeypatch.setenv(name, "2.5")
        assert ask() == 2.5
        for nonsense in ("soon", "0", "-1", "nan", "inf"):
            monkeypatch.setenv(name, nonsense)
            with pytest.raises(UsageError, match=name):
                ask()
    for nonsense in ("much", "0", "nan"):
        monkeypatch.setenv("AIVMM_WORKER_GB", nonsense)
        with pytest.raises(UsageError, match="AIVMM_WORKER_GB"):
            watch.memory_limit_bytes(0)


def test_a_worker_may_use_what_is_free_and_leaves_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIVMM_WORKER_GB", raising=False)
    memory = psutil.virtual_memory()
    limit = watch.memory_limit_bytes(0)
    assert 512 << 20 <= limit < memory.total
    assert watch.memory_limit_bytes(1 << 30) - limit > 1 << 29  # what it holds already is its own


def test_mapped_files_are_not_counted_and_touched_memory_is(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * (64 << 20))
    before = watch.own_memory_bytes(os.getpid())
    mapped = np.memmap(tmp_path / "big", dtype=np.uint8, mode="r")
    assert mapped.sum() > 0
    if sys.platform == "linux":
        assert watch.own_memory_bytes(os.getpid()) - before < 32 << 20
    held = np.ones(64 << 20, dtype=np.uint8)
    assert watch.own_memory_bytes(os.getpid()) - before > 48 << 20
    del held
    assert watch.own_memory_bytes(2**30) == 0


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_control_group_limits_the_memory_in_both_versions(tmp_path: Path) -> None:
    two = tmp_path / "two"
    group(two / "a" / "b", memory__max="1000000\n", memory__current="700000\n", memory__stat="anon 1\ninactive_file 200000\n")
    group(two / "a", memory__max="max\n", memory__current="700000\n", memory__stat="inactive_file 0\n")
    (tmp_path / "self2").write_text("0::/a/b\n")
    assert list(watch.group_memory(two, tmp_path / "self2")) == [(1000000, 500000)]
    one = tmp_path / "one"
    group(one / "memory" / "a", memory__limit_in_bytes="5000\n", memory__usage_in_bytes="3000\n", memory__stat="total_inactive_file 1000\n")
    group(one / "memory", memory__limit_in_bytes=f"{2**63 - 4096}\n", memory__usage_in_bytes="9\n", memory__stat="total_inactive_file 0\n")
    (tmp_path / "self1").write_text("4:memory:/a\n1:cpu:/\n")
    assert list(watch.group_memory(one, tmp_path / "self1")) == [(5000, 2000)]
    assert list(watch.group_memory(tmp_path / "none", tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [(3, "exited with status 3"), (0xC0000005, "crashed (access violation)"), (-9, "memory runs out"), (-200, "crashed (signal 200)")],
)
def test_an_end_is_said_in_words(code: int, words: str) -> None:
    if code == -9 and sys.platform == "win32":
        pytest.skip("there is no such signal")
    assert words in watch.ending(code)


# --- the parent ---

WAIT = """
import sys, time
from aivmm.probes.client import Worker
from tests.probes.conftest import TARGET
from aivmm.probes import wire

worker = Worker("wild")
config = {"settings": {"how": "run slow"}, "precision": None}
worker.call("compile", limit_s=60, name="m", model="x", target=wire.target_out(TARGET), config=config, inputs=sys.argv[1])
burnt, started = time.process_time(), time.monotonic()
worker.call("timed", limit_s=60, name="m", seconds=2.0)
print((time.process_time() - burnt) / (time.monotonic() - started))
"""


def test_the_parent_sleeps_while_a_child_is_timed(wild: Path, tmp_path: Path) -> None:
    save_arrays(tmp_path / "x.npz", {"x": np.ones(4, dtype=np.float32)})
    done = subprocess.run([sys.executable, "-c", WAIT, str(tmp_path / "x.npz")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.02


KILLED = """
import sys, time
from aivmm.probes.client import Worker
from tests.probes.conftest import TARGET
from aivmm.probes import wire

worker = Worker("wild")
config = {"settings": {"how": "child"}, "precision": None}
worker.call("compile", limit_s=60, name="m", model="x", target=wire.target_out(TARGET), config=config, inputs=sys.argv[1])
print(worker.pid, flush=True)
time.sleep(120)
"""


@posix
def test_a_parent_that_is_killed_leaves_nothing_that_its_workers_started(wild: Path, tmp_path: Path) -> None:
    save_arrays(tmp_path / "x.npz", {"x": np.ones(4, dtype=np.float32)})
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "x.npz")], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout
            worker = int(parent.stdout.readline())
            everyone = psutil.Process(parent.pid).children(recursive=True)
            assert worker in [each.pid for each in everyone]
            assert psutil.Process(worker).children()
            assert len(everyone) > 2  # the guard as well
        finally:
            parent.kill()
    assert all(gone(each.pid) for each in everyone)
