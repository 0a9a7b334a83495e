"""Everything that issue 8 asks of a machine with cards, in an order that fits half an hour of one, and can be cut short at any point.

    python -m benchmarks.card_session --state DIR [--earlier DIR] [--minutes 28] [--again NAMES] [--list]
    python -m benchmarks.gpu --state DIR --render benchmarks/results/h200.md

Each step is a process of its own. What it came to is in DIR as soon as it ends, so a machine that goes away costs the step under way.
Tunings run several at once: on one card they take turns by the machine-wide lock; of several cards each has its own tunings, with its
share of the cores and a lock of its own.
Steps that have a result in DIR, or in `--earlier` (a folder that an earlier machine left), are not run again. A step that is not likely to
end in the time left is left out, and a shorter one after it may still run. Steps for two cards are for a machine that has them: run the
same command there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

TESTS = {
    "tests-cards": ("tests/runtime/test_cards.py", "tests/runtime/test_cuda_copies.py"),
    "tests-measuring": (
        "tests/probes/test_copies.py",
        "tests/probes/test_conditions.py",
        "tests/probes/test_device_memory.py",
        "tests/probes/test_energy.py",
        "tests/tuner/test_joules.py",
    ),
    "tests-runtimes": (
        "tests/runtime/test_strays.py",
        "tests/runtime/test_nvidia.py",
        "tests/runtime/test_tensorrt_cache.py",
        "tests/runtime/test_accelerators.py",
    ),
}
_SECTIONS = {"requests": 60, "overhead": 120, "pixels": 70, "beside": 120, "boundaries": 25, "throughput": 110}
_TWO = {"two_tuned": 400, "two": 150}
_AT_ONCE = 4  # tunings on one card: their races take turns by the machine-wide lock, what they compile does not
_TUNE_S = 80  # of one on a card of its own
_FIRST = ("vit", "resnet50")  # models that were never tuned there, or not as the code is now
_TAIL = 4000
_CORES = "AIVMM_LANE_CORES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Commands, and about how many seconds they take. `makes` are files that show, each, that a command need not run.

    Where `shared`, commands run several at once, as the machine has room, and one after the other until the time is up. Where `in_lane`,
    they run as those do: with one card's environment and on its cores.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    makes: tuple[str, ...] = ()
    cards: int = 1
    shared: bool = False
    in_lane: bool = False


def steps(state: Path, folder: Path, shared: Path, budget: str) -> list[Step]:
    """Return the steps, those that nothing is known of first."""
    from benchmarks.gpu import GOALS, MODELS

    gpu = (sys.executable, "-m", "benchmarks.gpu", "--state", str(state), "--shared", str(shared))
    tests = [
        Step(
            name=name, commands=((sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", *files),), seconds=120
        )
        for name, files in TESTS.items()
    ]
    models = sorted(MODELS, key=lambda each: each not in _FIRST)
    pairs = [(model, goal) for goal in sorted(GOALS, key=lambda goal: goal != "throughput lower") for model in models]
    sections = {
        name: Step(
            name=name,
            commands=((*gpu, "--folder", str(folder), "--only", name),),
            seconds=seconds,
            makes=(f"{name}.json",),
            cards=2 if name in _TWO else 1,
        )
        for name, seconds in {**_SECTIONS, **_TWO}.items()
    }
    worker = "from aivmm.probes.lab import Lab; lab = Lab(); print(*lab.discover(['openvino', 'onnxruntime']), sep='\\n'); lab.close()"
    plain = "import openvino; print(openvino.Core().available_devices)"
    doctor = Step(  # what each process finds: once, workers did not find OpenVINO's GPU that a plain process did
        name="doctor",
        commands=((sys.executable, "-c", plain), (sys.executable, "-c", worker), (sys.executable, "-m", "aivmm", "doctor")),
        seconds=20,
    )
    alone = [
        doctor,
        replace(doctor, name="doctor-lane", cards=2, in_lane=True),
        *tests,
        sections["requests"],
        sections["overhead"],
        _tunes(pairs, gpu, folder, budget),
        *(sections[name] for name in _SECTIONS if name not in ("requests", "overhead")),
    ]
    return [*(sections[name] for name in _TWO), *alone]  # who has two cards has come for these


def _tunes(pairs: Sequence[tuple[str, str]], gpu: tuple[str, ...], folder: Path, budget: str) -> Step:
    """Return the step of the tunings, each with a folder, and so a database, of its own."""
    names = [f"{model}.{goal.replace(' ', '.')}" for model, goal in pairs]
    commands = tuple(
        (*gpu, "--folder", str(folder / name), "--only", "tune", "--models", model, "--goals", goal, "--budget", budget)
        for name, (model, goal) in zip(names, pairs, strict=True)
    )
    return Step(name="tunes", commands=commands, seconds=_TUNE_S, makes=tuple(f"tune.{name}.json" for name in names), shared=True)


def run(
    every: Sequence[Step],
    state: Path,
    *,
    minutes: float,
    cards: int,
    again: Sequence[str] = (),
    together: Sequence[Mapping[str, str]] = ({},),
) -> dict[str, str]:
    """Run what has no result yet while there is time, and return what became of each step. `together`: an environment for each lane."""
    ends = time.monotonic() + 60 * minutes
    became = {}
    for step in every:
        left = ends - time.monotonic()
        commands = [each for index, each in enumerate(step.commands) if not _has(step, index, state)]
        if step.name not in again and (_record(state, step).exists() or not commands):
            became[step.name] = "has a result"
        elif step.cards > cards:
            became[step.name] = f"needs {step.cards} cards, {cards} here"
        elif left < step.seconds:
            became[step.name] = f"no time: about {step.seconds:.0f} s, {max(0, left):.0f} left"
        elif step.shared:
            became[step.name] = _run_shared(step, commands or step.commands, state, lanes=together, limit_s=left)
        else:
            given = together[0] if step.in_lane else {}
            became[step.name] = _run(step, commands or step.commands, state, limit_s=min(2.5 * step.seconds, left), given=given)
        print(f"{step.name}: {became[step.name]}", flush=True)
    return became


def _has(step: Step, index: int, state: Path) -> bool:
    return len(step.makes) > index and (state / step.makes[index]).exists()


def _record(state: Path, step: Step) -> Path:
    return state / f"session.{step.name}.json"


def _started(command: Sequence[str], log: IO[bytes], given: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command with a lane's environment, on its cores."""
    cores = given.get(_CORES)
    return subprocess.Popen(
        ("taskset", "-c", cores, *command) if cores else command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **given},
    )


def _run(step: Step, commands: Sequence[Sequence[str]], state: Path, *, limit_s: float, given: Mapping[str, str]) -> str:
    """Run the commands at once; keep what they said last. What did not end is no result: it leaves no record, and is run again."""
    began = time.monotonic()
    logs = [state / f"session.{step.name}.{number}.log" for number in range(len(commands))]
    running = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("wb") as file:
            running.append(_started(command, file, given))
    try:
        codes = [each.wait(max(0.1, limit_s - (time.monotonic() - began))) for each in running]
    except subprocess.TimeoutExpired:
        return f"did not end within {limit_s:.0f} s"
    finally:
        for each in running:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()
    seconds = time.monotonic() - began
    tails = [log.read_bytes()[-_TAIL:].decode(errors="replace") for log in logs]
    found = {"codes": codes, "seconds": seconds, "at": time.strftime("%Y-%m-%d %H:%M"), "tails": tails}
    draft = _record(state, step).with_suffix(".part")
    draft.write_text(json.dumps(found))
    draft.replace(_record(state, step))
    return f"exit {', '.join(map(str, codes))} after {seconds:.0f} s"


def lanes(cards: int, chosen: Sequence[int] = ()) -> list[dict[str, str]]:
    """Return the environment of each command that runs at once: each of several cards (or of `chosen`) has its cores and lock."""
    if cards < 2:
        return [{}] * _AT_ONCE
    cores = range(os.cpu_count() or 1)
    size = max(1, len(cores) // cards)
    return [
        {
            "CUDA_VISIBLE_DEVICES": str(number),
            "AIVMM_LOCK": f"{tempfile.gettempdir()}/aivmm-measuring-{number}.lock",
            _CORES: ",".join(map(str, cores[number * size : (number + 1) * size])),
        }
        for number in chosen or range(cards)
    ]


def _run_shared(step: Step, commands: Sequence[Sequence[str]], state: Path, *, lanes: Sequence[Mapping[str, str]], limit_s: float) -> str:
    """Give each lane the next command until the time is up, and keep what each said."""
    ends, waiting, ended = time.monotonic() + limit_s, deque(enumerate(commands)), []

    def lane(given: Mapping[str, str]) -> None:
        while ends - time.monotonic() > step.seconds:
            try:
                number, command = waiting.popleft()
            except IndexError:
                return
            with (state / f"session.{step.name}.{number}.log").open("wb") as log:
                one = _started(command, log, given)
                try:
                    ended.append(one.wait(max(0.1, ends - time.monotonic())))
                except subprocess.TimeoutExpired:
                    os.killpg(one.pid, signal.SIGKILL)
                    one.wait()

    threads = [threading.Thread(target=lane, args=(each,)) for each in lanes]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return f"{len(ended)} of {len(commands)} ended ({sum(map(bool, ended))} of them not with exit 0)"


def take_over(earlier: Path, state: Path) -> int:
    """Copy the results that an earlier machine left, where there are none yet; return how many."""
    taken = 0
    for path in sorted(earlier.glob("*.json")):
        if not (state / path.name).exists():
            shutil.copy(path, state / path.name)
            taken += 1
    return taken


def main() -> None:
    """Run the steps, or list them."""
    from benchmarks.gpu import cards

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/aivmm-gpu"))
    parser.add_argument("--shared", type=Path, default=Path("../shared/models"))
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--budget", default="6s")
    parser.add_argument("--again", default="", help="names of steps, with commas, to run though they have a result")
    parser.add_argument("--only", default="", help="names of steps, with commas: no others")
    parser.add_argument("--cards", default="", help="numbers of the cards that tunings run on, with commas; all by default")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    asked.state.mkdir(parents=True, exist_ok=True)
    if asked.earlier:
        print(f"{take_over(asked.earlier, asked.state)} results taken over", flush=True)
    every = steps(asked.state, asked.folder, asked.shared, asked.budget)
    if asked.list:
        for step in every:
            print(f"{step.name}: about {step.seconds:.0f} s{', has a result' if _record(asked.state, step).exists() else ''}")
        return
    only, count = set(filter(None, asked.only.split(","))), len(cards())
    every = [each for each in every if not only or each.name in only]
    chosen = [int(each) for each in asked.cards.split(",") if each]
    run(every, asked.state, minutes=asked.minutes, cards=count, again=asked.again.split(","), together=lanes(count, chosen))


if __name__ == "__main__":
    main()
