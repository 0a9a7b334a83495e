"""Everything that issue 8 still asks of a machine with cards, in an order that fits half an hour of one, and can be cut short at any point.

On a machine with 4 cards, and the same on one with 2, or with 1 (which leaves out what needs two):

    python -m benchmarks.card_session --state DIR --minutes 27        # again after a break: what has a result in DIR is not run again
    python -m benchmarks.gpu --state DIR --render benchmarks/results/h200.md --keep benchmarks/results/h200.md

Where one call may take ten minutes: `--state ~/state --minutes 9.2; tar czf $OUT/state.tgz -C ~ state` in each of three
(the state is many files, and few come back). All of it takes 20 minutes on 4 cards and 26 on 2, the last two of them for what was measured
before.

Each step is a process of its own. What it came to is in DIR as soon as it ends, so a machine that goes away costs the steps under way.
First what may share the machine, beside each other: each step has its cards, their share of the cores, and a lock of its own. Then what is
timed by itself, alone on the machine. They begin in their order: one that waits for two cards is not overtaken by those that need one.
A step that takes more than `_PATIENCE` times as long as it should is ended and leaves no result;
one that is not likely to end in the time left is left out, and a shorter one after it may still run. One that did not make what it was to
make leaves no result either, but its log. SIGINT and SIGTERM end what runs.

`--list` shows what there is to do; `--only NAMES`, `--skip NAMES` and `--again NAMES` choose; `--earlier DIR` takes over what a machine
that is gone left, which is then not run on today's code. `--pretend` shows the schedule without running anything, as if each step took as
long as it should.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

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
_ON_TWO_CARDS = ("tests-cards",)  # some of its tests
# Timed by themselves, in this order: (cards, seconds).
_SECTIONS = {
    "two_tuned": (2, 60),  # what was tuned before is raced
    "energy_tuned": (1, 32),
    "energy": (1, 56),
    "overhead": (1, 80),
    "two": (2, 150),
    "beside": (1, 120),
    "throughput": (1, 110),
    "boundaries": (1, 25),
    "pixels": (1, 70),
    "requests": (1, 60),
}
# Tunings that are still missing, in this order; those of all other models and goals follow where time is left.
_MISSING = tuple((model, "throughput fp32") for model in ("minilm", "ultraface", "silero", "magika"))
_OPENCL = (("ultraface", "latency fp32"), ("resnet50", "latency lower"))  # again, with OpenVINO's GPU among the targets
_TUNE_S, _TUNE_TWO_S, _TUNE_ENERGY_S = 110, 220, 130
_TWO_BUDGET = "30s"  # of the tunings that are to find copies on two cards
_PATIENCE = 3.0
_MARGIN = 1.15  # what is begun should end
_TAIL = 6000
_CORES = "AIVMM_LANE_CORES"
_POLL_S = 0.1
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command, about how many seconds it takes, and how many cards. `makes`: a file that shows that it need not run.

    `leaves`: what it makes outside of the state for the steps it `serves`, which need it. Records outlive a machine, that does not.
    With `alone` nothing else runs, and it has the whole machine; otherwise it has some cards and their share of the cores.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    makes: str = ""
    cards: int = 1
    alone: bool = False
    leaves: Path | None = None
    serves: tuple[str, ...] = ()
    needs: tuple[Path, ...] = ()


def steps(state: Path, folder: Path, shared: Path, budget: str, *, cards: int = 4, every: bool = False) -> list[Step]:
    """Return the steps for a machine with so many cards. `every`: the tunings that are known from before, too."""
    from benchmarks.gpu import GOALS, MODELS
    from benchmarks.gpu_energy import energy_bundle
    from benchmarks.gpu_tuned import bundle_for_cards

    gpu = (sys.executable, "-m", "benchmarks.gpu", "--state", str(state), "--shared", str(shared))
    doctor = Step(name="doctor", command=(sys.executable, "-m", "benchmarks.card_doctor"), seconds=40, alone=True)
    lanes = [replace(doctor, name=f"doctor-lane-{number}", alone=False) for number in range(cards if cards > 1 else 0)]  # in all at once
    pytest = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider")
    tests = [
        Step(name=name, command=(*pytest, *files), seconds=60, cards=min(2 if name in _ON_TWO_CARDS else 1, cards))
        for name, files in TESTS.items()
    ]
    bundles = {count: bundle_for_cards(folder, "resnet50", count) for count in (1, 2)}
    two = (*gpu, "--folder", str(folder), "--models", "resnet50", "--budget", _TWO_BUDGET, "--only")
    serves = ("two_tuned", "energy_tuned") if cards > 1 else ("energy_tuned",)  # those that this machine runs
    one = Step(name="tune-one-card", command=(*two, "tune_one"), seconds=150, leaves=bundles[1], serves=serves)
    least = replace(
        one,
        name="tune-energy",
        command=(*two, "tune_energy"),
        seconds=_TUNE_ENERGY_S,
        leaves=energy_bundle(folder),
        serves=("energy_tuned",),
    )
    needs = {"two_tuned": tuple(bundles.values()), "energy_tuned": (bundles[1], energy_bundle(folder))}
    pairs = [(model, goal) for goal in GOALS for model in MODELS if (model, goal) not in _MISSING] if every else []
    return [
        doctor,
        *lanes,
        Step(name="tune-two-cards", command=(*two, "tune_two"), seconds=_TUNE_TWO_S, cards=2, leaves=bundles[2], serves=("two_tuned",)),
        one,
        least,
        *(_tuning(model, goal, gpu, folder, budget) for model, goal in _MISSING),
        *(_tuning(model, goal, gpu, folder, budget, opencl=True) for model, goal in _OPENCL),
        *tests,
        *(
            Step(
                name=name,
                command=(*two, name),
                seconds=seconds,
                makes="" if name == "two_tuned" else f"{name}.json",  # which holds what was known of another model
                cards=needed,
                alone=True,
                needs=needs.get(name, ()),
            )
            for name, (needed, seconds) in _SECTIONS.items()
        ),
        *(_tuning(model, goal, gpu, folder, budget) for model, goal in pairs),
    ]


def _tuning(model: str, goal: str, gpu: tuple[str, ...], folder: Path, budget: str, *, opencl: bool = False) -> Step:
    """Return the step of a tuning, with a folder, and so a database, of its own."""
    kind = "opencl" if opencl else "tune"
    name = f"{kind}.{model}.{goal.replace(' ', '.')}"
    command = (*gpu, "--folder", str(folder / name), "--only", kind, "--models", model, "--goals", goal, "--budget", budget)
    return Step(name=name, command=command, seconds=_TUNE_S, makes=f"{name}.json")


def lane(chosen: Sequence[int], cards: int) -> dict[str, str]:
    """Return the environment of a step that has some cards of a machine with so many: those alone, their cores, a lock of its own."""
    if cards < 2:
        return {}
    cores = sorted(os.sched_getaffinity(0))  # which may be fewer than the machine has
    size = max(1, len(cores) // cards)
    mine = [core for number in chosen for core in cores[number * size : (number + 1) * size]]
    numbers = [str(each) for each in chosen]
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(numbers),
        "AIVMM_LOCK": f"{tempfile.gettempdir()}/aivmm-measuring-{'-'.join(numbers)}.lock",
        _CORES: ",".join(map(str, mine or cores)),
    }


class Process(Protocol):
    """What is asked of a step that runs."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def end(self) -> None:
        """End it, with all that it started, if it has not ended."""


class _Real:
    """A step as a process, in a session of its own. Tunings and tests start others in sessions of theirs, which end with their parent."""

    def __init__(self, step: Step, log: Path, given: Mapping[str, str]) -> None:
        cores = given.get(_CORES)
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                ("taskset", "-c", cores, *step.command) if cores else step.command,
                stdout=said,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **given},
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Machine:
    """Where steps run, and its clock."""

    def now(self) -> float:
        """Return seconds since whenever."""
        return time.monotonic()

    def rest(self) -> None:
        """Wait for a moment."""
        time.sleep(_POLL_S)

    def start(self, step: Step, log: Path, given: Mapping[str, str]) -> Process:
        """Start a step in the environment of its lane, on its cores."""
        return _Real(step, log, given)


class Pretended(Machine):
    """Runs nothing: each step takes about the time that it should, by a clock that is turned on; those in `hang` never end.

    None takes quite that time, so that cards are freed one by one, as they are. Steps make what they are to make in `state`.
    """

    def __init__(self, state: Path, hang: Sequence[str] = ()) -> None:
        self.state = state
        self.seconds = 0.0
        self.hang = hang

    def now(self) -> float:
        return self.seconds

    def rest(self) -> None:
        self.seconds += 1.0

    def start(self, step: Step, log: Path, given: Mapping[str, str]) -> Process:
        log.write_text(f"{given.get('CUDA_VISIBLE_DEVICES', 'all')} cards")
        return _Imagined(self, step, self.seconds + (math.inf if step.name in self.hang else self.takes(step)))

    def takes(self, step: Step) -> float:
        """Return how long a step takes, the same each time."""
        return step.seconds * random.Random(step.name).uniform(0.8, 1.05)


@dataclass(slots=True)
class _Imagined:
    machine: Pretended
    step: Step
    ends: float

    def poll(self) -> int | None:
        if self.machine.seconds < self.ends:
            return None
        for path in _made(self.step, self.machine.state):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return 0

    def end(self) -> None:
        self.ends = self.machine.seconds


@dataclass(slots=True)
class _Running:
    step: Step
    process: Process
    cards: tuple[int, ...]
    began: float
    limit_s: float


def run(
    every: Sequence[Step], state: Path, *, minutes: float, cards: int, again: Iterable[str] = (), machine: Machine | None = None
) -> dict[str, str]:
    """Run what has no result yet while there is time, and return what became of each step.

    What may share the machine starts as soon as its cards are free, in order; a step that is to be alone waits for all before it, and all
    after it wait for it. Signals that ask for an end end what runs.
    """
    machine = machine or Machine()
    began, free, again = machine.now(), list(range(max(1, cards))), set(again)
    ends = began + 60 * minutes
    became: dict[str, str] = {}
    waiting, running = list(every), list[_Running]()

    def told(step: Step, what: str) -> None:
        became[step.name] = what
        print(f"[{machine.now() - began:6.0f} s] {step.name}: {what}", flush=True)

    with _signals() as stopped, _ending(running):
        while (waiting or running) and not stopped:
            now = machine.now()
            for one in [each for each in running if each.process.poll() is not None or now - each.began > each.limit_s]:
                running.remove(one)
                free = sorted((*free, *one.cards))
                told(one.step, _ended(one, state, now - one.began))
            for step in list(waiting):
                left = ends - now
                why_not = _why_not(step, state, cards=cards, left=left, again=again)
                if not why_not and step.alone and running:
                    break  # which may be making what it needs
                why_not = why_not or _lacking(step)
                if why_not:
                    told(step, why_not)
                elif step.cards <= len(free):
                    taken = tuple(free) if step.alone else tuple(free[: step.cards])
                    free = [each for each in free if each not in taken]
                    given = {} if step.alone else lane(taken, cards)
                    if step.name in again:
                        _set_aside(step, state)
                    process = machine.start(step, _log(state, step), given)
                    running.append(_Running(step, process, taken, now, min(_PATIENCE * step.seconds, left)))
                else:
                    break  # until cards are free: one by one, those after it would take them for as long as there are any
                waiting.remove(step)
                if step.alone and not why_not:
                    break
            machine.rest()
    if stopped:
        raise SystemExit(128 + stopped[0])
    return became


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note the signals that ask for an end, until the block ends.

    Between two looks at the steps, so that none is just being started. A shell's background jobs ignore SIGINT unless told otherwise.
    """
    found: list[int] = []
    before = {number: signal.signal(number, lambda given, _: found.append(given)) for number in _ENDS}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ending(running: Sequence[_Running]) -> Iterator[None]:
    """End what runs when the block ends, however it does: steps have sessions of their own, which no terminal ends."""
    try:
        yield
    finally:
        for one in running:
            one.process.end()


def _why_not(step: Step, state: Path, *, cards: int, left: float, again: set[str]) -> str:
    if step.name not in again and _known(step, state, again):
        return "has a result"
    if step.cards > cards:
        return f"needs {step.cards} cards, {cards} here"
    return f"no time: about {step.seconds:.0f} s, {max(0, left):.0f} left" if left < _MARGIN * step.seconds else ""


def _known(step: Step, state: Path, again: Iterable[str] = ()) -> bool:
    """Return whether a step has a result, which is still there where another step needs it."""
    if step.leaves and not step.leaves.exists():
        return all(each not in again and _record(state, each).exists() for each in step.serves)
    return _record(state, step.name).exists() or bool(step.makes and (state / step.makes).exists())


def _lacking(step: Step) -> str:
    missing = [each.name for each in step.needs if not each.exists()]
    return f"needs {', '.join(missing)}" if missing else ""


def _made(step: Step, state: Path) -> list[Path]:
    """Return what shows that a step did what it was to do."""
    return [*([state / step.makes] if step.makes else []), *([step.leaves] if step.leaves else [])]


def _set_aside(step: Step, state: Path) -> None:
    """Move what a step made earlier out of its way: a tuning that finds its result there does nothing."""
    for path in _made(step, state):
        if path.exists():
            shutil.rmtree(_aside(path), ignore_errors=True)
            path.replace(_aside(path))


def _put_back(step: Step, state: Path) -> None:
    """Put back what was moved away and not made anew."""
    for path in _made(step, state):
        if _aside(path).exists() and not path.exists():
            _aside(path).replace(path)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


def _record(state: Path, name: str) -> Path:
    return state / f"session.{name}.json"


def _log(state: Path, step: Step) -> Path:
    return state / f"session.{step.name}.log"


def _ended(one: _Running, state: Path, seconds: float) -> str:
    """Keep what a step said last. What did not end, or not make what it was to, is no result: it leaves no record, and is run again."""
    code = one.process.poll()
    one.process.end()
    if code is None:
        _put_back(one.step, state)
        return f"did not end within {one.limit_s:.0f} s"
    missing = [each.name for each in _made(one.step, state) if not each.exists()]
    _put_back(one.step, state)
    if missing or (code and one.step.needs):
        return f"no result: exit {code} after {seconds:.0f} s" + (f" without {', '.join(missing)}" if missing else "")
    tail = _log(state, one.step).read_bytes()[-_TAIL:].decode(errors="replace")
    found = {"code": code, "seconds": seconds, "at": time.strftime("%Y-%m-%d %H:%M"), "cards": list(one.cards), "tail": tail}
    record = _record(state, one.step.name)
    draft = record.with_suffix(".part")
    draft.write_text(json.dumps(found))
    draft.replace(record)
    return f"exit {code} after {seconds:.0f} s"


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
    parser.add_argument("--minutes", type=float, default=27.0)
    parser.add_argument("--budget", default="6s")
    parser.add_argument("--cards", type=int, help="use so many of the machine's cards; all by default")
    parser.add_argument("--again", default="", help="names of steps, with commas, to run though they have a result")
    parser.add_argument("--only", default="", help="names of steps, with commas: no others")
    parser.add_argument("--skip", default="", help="names of steps, with commas, to leave out")
    parser.add_argument("--every", action="store_true", help="at the end also the tunings that are known from before")
    parser.add_argument("--pretend", action="store_true", help="run nothing, and show when what would run")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    asked.state.mkdir(parents=True, exist_ok=True)
    if asked.earlier:
        print(f"{take_over(asked.earlier, asked.state)} results taken over", flush=True)
    count = len(cards()) if asked.cards is None else asked.cards
    nowhere = tempfile.TemporaryDirectory()
    state, folder = (Path(nowhere.name), Path(nowhere.name) / "folder") if asked.pretend else (asked.state, asked.folder)
    every = steps(state, folder, asked.shared, asked.budget, cards=count, every=asked.every)
    only, skip = (set(filter(None, each.split(","))) for each in (asked.only, asked.skip))
    if unknown := (only | skip | set(filter(None, asked.again.split(",")))) - {each.name for each in every}:
        parser.error(f"there is no step {', '.join(sorted(unknown))}: see --list")
    every = [each for each in every if (not only or each.name in only) and each.name not in skip]
    if asked.list:
        for step in every:
            known = ", has a result" if _known(step, state) else ""
            print(f"{step.name}: about {step.seconds:.0f} s, {'alone' if step.alone else f'{step.cards} cards'}{known}")
        return
    machine = Pretended(state) if asked.pretend else Machine()
    run(every, state, minutes=asked.minutes, cards=count, again=asked.again.split(","), machine=machine)


if __name__ == "__main__":
    main()
