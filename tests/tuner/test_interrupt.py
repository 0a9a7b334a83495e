"""Ctrl-C in real processes: the first is a wish, the second an end, and neither disturbs what a worker is doing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from aivmm.probes.arrays import save_arrays
from aivmm.tuner import cli
from aivmm.tuner.interrupt import LINE, Interrupts
from aivmm.tuner.main import main
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle
from tests.probes.conftest import install_wild, python_path
from tests.tuner.harness import ROOT, Place

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")


def wait_for(condition: object, *, within_s: float = 10.0) -> None:
    assert callable(condition)
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@contextmanager
def started(code: str, *arguments: str, **changes: str) -> Iterator[subprocess.Popen[str]]:
    """Run `code`, and end it in any case."""
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **changes},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


LOOP = """
import time
from aivmm.tuner.interrupt import Interrupts
with Interrupts(print) as interrupts:
    print("ready")
    try:
        while True:
            time.sleep(0.01)
            if interrupts.asked:
                print("asked")
                input()
    except KeyboardInterrupt:
        print("stopped")
try:
    print("outside")
    time.sleep(60)
except KeyboardInterrupt:
    print("the old way")
"""


def test_the_first_is_a_wish_the_second_an_end_and_then_all_is_as_before() -> None:
    with started(LOOP) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert {line(process), line(process)} == {LINE, "asked"}
        process.send_signal(signal.SIGINT)
        assert line(process) == "stopped"
        assert line(process) == "outside"
        process.send_signal(signal.SIGINT)
        assert line(process) == "the old way"
        assert process.wait(timeout=20) == 0


ASK = """
import sys, threading, time
from aivmm.probes import wire
from aivmm.probes.client import Worker
from aivmm.tuner.interrupt import Interrupts
from tests.probes.conftest import TARGET

with Worker("wild") as worker, Interrupts(lambda text: print("told")) as interrupts:
    def ask(how, seconds):
        config = {"settings": {"how": how}, "precision": None}
        worker.call("compile", limit_s=60, name="m", model="x", target=wire.target_out(TARGET), config=config, inputs=sys.argv[1])
        return worker.call("timed", limit_s=60, name="m", seconds=seconds)["durations"]
    ask("", 0.0)
    pid = worker.pid
    print("ready")
    durations = ask("run slow", 3.0)
    print("measured", len(durations) > 20, interrupts.asked, worker.pid == pid)
    print("again")
    try:
        ask("run idle", 60.0)
    except KeyboardInterrupt:
        print("stopped", worker.pid)
"""


def test_the_first_disturbs_no_measurement_and_the_second_ends_it(tmp_path: Path) -> None:
    save_arrays(tmp_path / "x.npz", {"x": np.ones(4, dtype=np.float32)})
    with started(ASK, str(tmp_path / "x.npz"), PYTHONPATH=python_path(install_wild(tmp_path / "site"), ROOT)) as process:
        assert line(process) == "ready"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert line(process) == "told"
        assert line(process) == "measured True True True"
        assert line(process) == "again"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert line(process) == "stopped 0"
        assert process.wait(timeout=30) == 0


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def elsewhere() -> None:
        with Interrupts(print) as interrupts:
            seen.extend([signal.getsignal(signal.SIGINT), interrupts.asked])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before, False]


def test_a_program_that_ignores_it_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts(print) as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            assert not interrupts.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handler_takes_no_lock_that_the_main_thread_holds() -> None:
    lock = threading.Lock()
    told: list[str] = []

    def tell(text: str) -> None:
        with lock:
            told.append(text)

    with Interrupts(tell) as interrupts:
        with lock:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: interrupts.asked)
            assert told == []
        wait_for(lambda: told == [LINE])


def test_the_old_handler_comes_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="oops"), Interrupts(print):
        assert signal.getsignal(signal.SIGINT) is not before
        raise ValueError("oops")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def same_handler() -> Iterator[None]:
    """Put back what SIGINT does here."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("same_handler")
@pytest.mark.parametrize("native", [False, True])
def test_while_modules_are_read_it_ends_in_one_line_as_later(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third of a second, which had a traceback of whatever was being imported."""

    def interrupted(_: Sequence[str]) -> int:
        if native:  # as pybind11 has it
            raise ImportError("initialization failed") from KeyboardInterrupt()
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "m.aivmm", "--json"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (130, "aivmm: interrupted\n")
    assert json.loads(out) == {"schema": 1, "error": {"message": "interrupted", "advice": ""}}


ENDING = """
import atexit, sys
from aivmm.tuner import cli, main

class Native:
    def __del__(self):
        print("taken down", flush=True)

native = Native()
sys.stderr = sys.stdout

def run(arguments):
    atexit.register(lambda: print("cleans up", flush=True))
    atexit.register(lambda: (print("ends", flush=True), input()))
    return 130

cli.run = run
entry = sys.argv[1]
sys.argv[1:] = ["run"]
getattr(main, entry)()
"""


@pytest.mark.parametrize("entry", ["main", "main_tune"])
@pytest.mark.parametrize("again", [False, True])
def test_once_more_while_python_ends_has_no_traceback_and_the_same_status(entry: str, again: bool) -> None:
    """The status was that of a process killed by the signal. Native libraries are not waited for: their ends hang at times."""
    with started(ENDING, entry) as process:
        assert line(process) == "ends"
        if again:
            process.send_signal(signal.SIGINT)
        out, _ = process.communicate("\n" if not again else None, timeout=20)
    assert (process.returncode, out) == (130, "" if again else "cleans up\n")


def test_a_command_that_keeps_nothing_says_so_of_nothing(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    make_bundle(place.work / "m.aivmm", chain_model(width=16), [Part(ONNXRUNTIME)])
    with place.started("bench", "m.aivmm", "--duration", "60s") as process:
        assert process.stderr
        assert process.stderr.readline() == "single: 60 s\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "aivmm: interrupted")
