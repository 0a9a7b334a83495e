"""Can the verdicts be trusted? The same thing compared with itself, and with itself plus 5 %, by the classes that the tuner uses.

    python benchmarks/aa.py [--comparisons 400] [--models NAME ...] [--quick] [--where load,same,workers,runtimes] [--load idle,busy]
                            [--rounds 60] [--copies 6] [--minutes 25] [--out benchmarks/results/aa.md]

Each race has three contestants that load the same model with the same settings: two time 20 calls at once, the third 21. The two are called
different (a false alarm) or not; the third is called slower than the first (found) or not, by the same settings on the same samples.

load      one loaded model takes all three parts: what the timer itself adds
same      each is loaded `--copies` times, all in one worker
workers   each is loaded in `--copies` workers of its own, drawn afresh from a pool that is itself renewed bit by bit
runtimes  as same, in a worker of ONNX Runtime and in one of OpenVINO; all six take turns, and those of one runtime are compared

busy: another process keeps one core busy. Sequential: as many blocks of the same contestants one after the other, compared by the bootstrap
interval of the two medians, with the same confidence and the same indifference zone; taken in every fourth race.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats

from aivmm.probes import wire
from aivmm.probes.client import Worker
from aivmm.probes.compare import round_medians, verdict
from aivmm.probes.lab import Lab
from aivmm.probes.machine import measuring
from aivmm.probes.race import Contestant, race, versus
from aivmm.runtime.config import Config
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.target import Target

MODELS = ("../shared/models/silero_vad_16k_op15.onnx", "demo:recommender", "../shared/models/ultraface_rfb_320.onnx", "demo:squeezenet")
CONFIDENCE = 0.99
CALLS, MORE_CALLS = 20, 21
_LEAST_ROUNDS = 8
_SLOW_S = 1e-3  # a model this slow is dealt one comparison in _SLOW_SHARE: 20 calls of it take long
_SLOW_SHARE = 10
_SLOW_MINUTES = 0.3  # of `--minutes`, for all slow models together
_RACE_S = 60.0  # the cap is on rounds; this only ends what went wrong
_RENEW_EVERY, _RENEW = 5, 2  # of the pool of workers: so many comparisons, so many workers
_SEQUENTIAL_EVERY = 4
_LIMIT_S = 120.0
_RUNTIMES = ("onnxruntime", "openvino")
WHERE = {"load": "same load", "same": "same worker", "workers": "across workers", "runtimes": "across runtimes"}


Load = tuple[Worker, str]  # where something is loaded, and under which name


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its inputs, and how long a call takes."""

    name: str
    path: Path
    inputs: Path
    call_s: float


@dataclass(slots=True)
class Tally:
    """What came out under one condition."""

    same: Counter[str] = field(default_factory=Counter)  # verdicts on two of a kind
    more: Counter[str] = field(default_factory=Counter)  # verdicts on 21 calls against 20
    sequential_same: Counter[str] = field(default_factory=Counter)
    sequential_more: Counter[str] = field(default_factory=Counter)
    ratios: list[float] = field(default_factory=list)  # of two of a kind
    widths: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    raw: list[dict[str, object]] = field(default_factory=list)  # the medians of rounds of each race, to look at a verdict again
    seconds: float = 0.0
    load: tuple[float, float] = (0.0, 0.0)  # the system's load average before and after


def load(worker: Worker, name: str, subject: Subject, target: Target) -> None:
    """Load a model in a worker, as the laboratory does."""
    worker.call(
        "compile",
        limit_s=_LIMIT_S,
        name=name,
        model=str(subject.path),
        target=wire.target_out(target),
        config=wire.config_out(Config(precision="fp32")),
        inputs=str(subject.inputs),
    )


def contestants(loads: Sequence[Sequence[Load]], subject: Subject) -> list[Contestant]:
    """Return the two of a kind and the slower one: 20, 20 and 21 calls to a duration."""
    made = []
    for (first, *others), calls in zip(loads, (CALLS, CALLS, MORE_CALLS), strict=True):
        made.append(
            Contestant(
                first[1],
                first[0],
                others=tuple(worker for worker, _ in others),
                other_names=tuple(name for _, name in others),
                repeat=calls,
                expected_s=calls * subject.call_s,
                keep=True,
            )
        )
    return made


class Field:
    """What takes part under one condition for one model; `draw` gives groups of three contestants that race together."""

    def __init__(self, where: str, subject: Subject, targets: dict[str, Target], copies: int, stack: ExitStack) -> None:
        self._where, self._subject, self._targets, self._copies, self._stack = where, subject, targets, copies, stack
        self._pool: list[Worker] = []
        self._drawn = 0
        runtimes = _RUNTIMES if where == "runtimes" else _RUNTIMES[:1]
        self._workers: dict[str, Worker] = {}
        if where == "workers":
            self._pool = [self._started(runtimes[0], ["m"]) for _ in range(3 * copies)]
        else:
            self._names = [f"m{number}" for number in range(1 if where == "load" else 3 * copies)]
            self._workers = {runtime: self._started(runtime, self._names) for runtime in runtimes}

    def _started(self, runtime: str, names: Sequence[str]) -> Worker:
        worker = self._stack.enter_context(Worker(runtime))
        for name in names:
            load(worker, name, self._subject, self._targets[runtime])
        return worker

    def draw(self, rng: random.Random) -> list[list[Contestant]]:
        """Return the contestants of the next race."""
        self._drawn += 1
        if self._where == "load":
            return [contestants([[(worker, self._names[0])]] * 3, self._subject) for worker in self._workers.values()]
        if self._where != "workers":
            names = rng.sample(self._names, len(self._names))
            return [
                contestants([[(worker, name) for name in names[at::3]] for at in range(3)], self._subject)
                for worker in self._workers.values()
            ]
        if self._drawn % _RENEW_EVERY == 0:
            for _ in range(_RENEW):
                self._pool.pop(0).close()
                self._pool.append(self._started(_RUNTIMES[0], ["m"]))
        drawn = [(worker, "m") for worker in rng.sample(self._pool, 3 * self._copies)]
        return [contestants([drawn[at::3] for at in range(3)], self._subject)]


def compare_once(field_: Field, rng: random.Random, rounds: int, tally: Tally, *, sequential: bool) -> None:
    """Run one race, and as much in sequence where wanted, and count the verdicts."""
    groups = field_.draw(rng)
    everyone = [each for group in groups for each in group]
    seed = rng.randrange(1 << 30)
    race(everyone, budget_s=_RACE_S, least_rounds=_LEAST_ROUNDS, most_rounds=rounds, seed=seed, confidence=CONFIDENCE)
    if any(each.failed for each in everyone):
        raise SystemExit(f"a contestant failed: {[each.failed for each in everyone if each.failed]}")
    for first, second, slower in groups:
        found = versus(second, first, confidence=CONFIDENCE, field=(first, second, slower))
        tally.same[found.verdict] += 1
        tally.ratios.append(found.ratio)
        tally.widths.append(found.high - found.low)
        tally.more[versus(slower, first, confidence=CONFIDENCE, field=(first, second, slower)).verdict] += 1
        tally.rounds.append(len(set(first.rounds)))
        medians = [list(round_medians(each.samples()).items()) for each in (first, second, slower)]  # type: ignore[arg-type]
        tally.raw.append({"verdict": found.verdict, "copies": first.copies, "rounds": medians})
    if sequential:
        in_sequence(groups, tally.rounds[-1], rng, tally)


def in_sequence(groups: Sequence[Sequence[Contestant]], rounds: int, rng: random.Random, tally: Tally) -> None:
    """Measure the same contestants one after the other, and compare their medians."""
    for group in groups:
        again = [
            Contestant(
                each.name,
                each.worker,
                others=each.others,
                other_names=each.other_names,
                repeat=each.repeat,
                expected_s=each.expected_s,
            )
            for each in group
        ]
        with measuring():
            for each in rng.sample(again, len(again)):
                for number in range(rounds):
                    each.block(number)
        first, second, slower = again
        tally.sequential_same[of_medians(second.durations, first.durations)] += 1
        tally.sequential_more[of_medians(slower.durations, first.durations)] += 1


def of_medians(a: Sequence[float], b: Sequence[float]) -> str:
    """Return the verdict on a against b from the bootstrap interval of the ratio of their medians, each sample drawn alone."""
    rng = np.random.default_rng(0)
    drawn = [np.log(np.median(rng.choice(np.asarray(each), size=(500, len(each))), axis=1)) for each in (a, b)]
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return verdict(math.exp(low), math.exp(high))


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Keep one core busy with another process."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def subjects(names: Sequence[str], folder: Path, targets: dict[str, Target]) -> list[Subject]:
    """Prepare the models that are there, with inputs, and see how long a call of each takes."""
    found = []
    with Lab() as lab:
        for spec in names:
            if not spec.startswith("demo:") and not Path(spec).exists():
                print(f"{spec} is not there: left out", file=sys.stderr)
                continue
            name = Path(spec.removeprefix("demo:")).stem
            source = lab.write_demo(name, folder) if spec.startswith("demo:") else Path(spec)
            path, inputs = folder / f"{name}.prepared.onnx", folder / f"{name}.npz"
            facts = lab.prepare(source, path, shapes={}, dims={}, batch=1)
            lab.make_samples(path, facts.inputs, [inputs], seed=0)
            with Worker("trial") as worker:
                load(worker, "m", Subject(name, path, inputs, 0.0), targets[_RUNTIMES[0]])
                answer = worker.call("timed", limit_s=_LIMIT_S, name="m", seconds=0.05, steady_s=0.5)
            found.append(Subject(name, path, inputs, min(answer["durations"])))
    return found


def deal(models: Sequence[Subject], comparisons: int) -> dict[str, int]:
    """Say how many comparisons each model gets."""
    weights = {each.name: 1 / _SLOW_SHARE if each.call_s > _SLOW_S else 1.0 for each in models}
    total = sum(weights.values())
    return {name: max(1, round(comparisons * weight / total)) for name, weight in weights.items()}


def one_condition(where: str, busy_: bool, models: Sequence[Subject], targets: dict[str, Target], options: argparse.Namespace) -> Tally:
    """Take all comparisons of one condition."""
    tally = Tally()
    rng = random.Random(f"{where} {busy_}")
    before, started = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan, time.perf_counter()
    slow = [each for each in models if each.call_s > _SLOW_S]
    fast = [each for each in models if each.call_s <= _SLOW_S]
    shares = {each.name: _SLOW_MINUTES / len(slow) for each in slow}
    for subject in (*slow, *fast):  # what slow models do not need of their time is left to the fast ones
        races = deal(models, options.comparisons)[subject.name]
        if where == "runtimes":
            races = -(-races // len(_RUNTIMES))
        left_s = 60 * options.minutes - (time.perf_counter() - started)
        share_s = 60 * options.minutes * shares[subject.name] if subject in slow else left_s / (len(fast) - fast.index(subject))
        end = time.perf_counter() + share_s
        with ExitStack() as stack:
            drawn = Field(where, subject, targets, options.copies, stack)
            stack.enter_context(busy(busy_))
            for number in range(races):
                if time.perf_counter() > end:
                    break
                compare_once(drawn, rng, options.rounds, tally, sequential=number % _SEQUENTIAL_EVERY == 0)
                for each in tally.raw:
                    each.setdefault("model", subject.name)
    tally.seconds = time.perf_counter() - started
    tally.load = (before, os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan)
    return tally


def rate(counts: Counter[str], *words: str) -> str:
    """Return how often the verdict was one of `words`, with Wilson's 95 % interval."""
    total = counts.total()
    if not total:
        return "-"
    hits = sum(counts[word] for word in words)
    interval = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return f"{hits / total:.1%} ({hits} of {total}; {interval.low:.1%} to {interval.high:.1%})"


def row(where: str, busy_: bool, tally: Tally) -> str:
    """Return a line of the table."""
    off = np.abs(np.log(tally.ratios))
    cells = [
        WHERE[where],
        "one core busy" if busy_ else "idle",
        rate(tally.same, "faster", "slower"),
        rate(tally.more, "slower"),
        rate(tally.sequential_same, "faster", "slower"),
        rate(tally.sequential_more, "slower"),
        f"{np.median(off):.2%}, {np.quantile(off, 0.95):.2%}",
        f"{np.median(tally.widths) / 2:.1%}",
        f"{tally.load[0]:.1f} to {tally.load[1]:.1f}",
        f"{tally.seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def heading(models: Sequence[Subject], options: argparse.Namespace) -> list[str]:
    """Return what stands above the table."""
    device = cpu_device()
    ort = "onnxruntime-gpu" if platform.machine() in ("x86_64", "AMD64") else "onnxruntime"
    dealt = deal(models, options.comparisons)
    return [
        "# Verdicts on the same thing, and on 5 % more of it",
        "",
        f"`python benchmarks/aa.py --comparisons {options.comparisons} --minutes {options.minutes:g} --rounds {options.rounds} "
        f"--copies {options.copies}`",
        f"on {device.model}, {device.cores} cores, {platform.system()} {platform.release()}, Python {platform.python_version()},",
        f"openvino {version('openvino')}, onnxruntime {version(ort)}.",
        "",
        f"Interval {CONFIDENCE:.0%}; {options.rounds} rounds each, the cap on samples; {options.copies} loads each but for `same load`.",
        "Models: " + ", ".join(f"{each.name} ({each.call_s * 1e3:.3f} ms, {dealt[each.name]} comparisons)" for each in models) + ".",
        "False alarm: two of a kind called faster or slower (to reach: at most 2 %). Found: 21 calls called slower than 20 (to reach:",
        "at least 90 % idle, 75 % busy). Sequential: the same blocks one contestant after the other, medians compared. Rates with Wilson's",
        "95 % interval.",
        "",
        "| where | machine | false alarms | 5 % found | sequential: false alarms | sequential: found | error of an A/A ratio: median, p95 "
        "| half width | load average | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=400)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--quick", action="store_true", help="12 comparisons per condition, of the first model only")
    parser.add_argument("--where", default=",".join(WHERE))
    parser.add_argument("--load", default="idle,busy")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=1e6, help="the most that one condition may take; comparisons beyond are left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--raw", type=Path, help="append the medians of rounds of each race, a line of JSON each")
    options = parser.parse_args()
    if options.quick:
        options.comparisons, options.models = min(options.comparisons, 12), options.models[:1]
    with tempfile.TemporaryDirectory() as name:
        with Lab() as lab:
            listed, _ = lab.discover(_RUNTIMES)
        targets = {runtime: next(each for each in listed if str(each) == f"{runtime}:CPU") for runtime in _RUNTIMES}
        models = subjects(options.models, Path(name), targets)
        lines = heading(models, options)
        print("\n".join(lines), flush=True)
        for machine in options.load.split(","):
            for where in options.where.split(","):
                tally = one_condition(where, machine == "busy", models, targets, options)
                lines.append(row(where, machine == "busy", tally))
                if options.raw:
                    with options.raw.open("a") as file:
                        file.writelines(json.dumps({"where": where, "load": machine, **each}) + "\n" for each in tally.raw)
                print(lines[-1], flush=True)
                if options.out:
                    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
