"""Can the verdicts be trusted? The same thing compared with itself, and with itself plus 5 %, by the classes that the tuner uses.

    python benchmarks/aa.py [--comparisons 400] [--models NAME ...] [--quick] [--where load,same,workers,runtimes] [--load idle,busy]
                            [--rounds 160] [--copies 12] [--threads N] [--minutes 25] [--targets onnxruntime:CPU,openvino:CPU]
                            [--raw FILE] [--out benchmarks/results/aa.md]
    python benchmarks/aa.py --merge FILE ... [--out benchmarks/results/aa.md]

Each race has three contestants that load the same model with the same settings: two time 20 calls at once, the third 21. The two are called
different (a false alarm) or not; the third is called slower than the first (found) or not, by the same settings on the same samples.

load      one loaded model takes all three parts: what the timer itself adds
same      each is loaded `--copies` times, all in one worker
workers   each is loaded in `--copies` workers of its own, drawn afresh from a pool that is itself renewed bit by bit
runtimes  as same, in a worker of each of `--targets`; all take turns, and those of one target are compared

The other three run on the first of `--targets`.

busy: another process keeps one core busy. Sequential: as many blocks of the same contestants one after the other, compared by the bootstrap
interval of the two medians, with the same confidence and the same indifference zone; taken in every sixteenth race.

`--raw` appends each comparison, a line of JSON, with what each round stood for; `--merge` makes the table from such files. So several of
these can run at once, each bound to cores of its own (`taskset`), with its own AIVMM_LOCK and AIVMM_CACHE, and with at most as many
`--threads` as it has cores: ONNX Runtime does not look which ones it may use.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scipy import stats

from aivmm.probes import wire
from aivmm.probes.client import Worker
from aivmm.probes.compare import round_figures, verdict
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
_SEQUENTIAL_EVERY = 16
_LIMIT_S = 120.0
TARGETS = "onnxruntime:CPU,openvino:CPU"
WHERE = {"load": "same load", "same": "same worker", "workers": "across workers", "runtimes": "across runtimes"}


Record = dict[str, Any]  # a comparison: a line of the raw file
Load = tuple[Worker, str]  # where something is loaded, and under which name


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its inputs, and how long a call takes."""

    name: str
    path: Path
    inputs: Path
    call_s: float


_THREADS = {"onnxruntime": "intra_op_num_threads", "openvino": "INFERENCE_NUM_THREADS"}


def load(worker: Worker, name: str, subject: Subject, target: Target, threads: int) -> None:
    """Load a model in a worker, as the laboratory does; with the runtime's own number of threads when `threads` is 0."""
    knobs = {_THREADS[target.runtime]: threads} if threads and target.device.kind == "cpu" else {}
    worker.call(
        "compile",
        limit_s=_LIMIT_S,
        name=name,
        model=str(subject.path),
        target=wire.target_out(target),
        config=wire.config_out(Config.of(knobs, precision="fp32")),
        inputs=str(subject.inputs),
    )


def contestants(loads: Sequence[Sequence[Load]], subject: Subject, *, single: bool) -> list[Contestant]:
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
                single=single,
                expected_s=calls * subject.call_s,
                keep=True,
            )
        )
    return made


class Field:
    """What takes part under one condition for one model; `draw` gives groups of three contestants that race together."""

    def __init__(self, where: str, subject: Subject, targets: dict[str, Target], options: argparse.Namespace, stack: ExitStack) -> None:
        self._where, self._subject, self._targets, self._stack = where, subject, targets, stack
        self._copies = copies = options.copies
        self._threads = options.threads
        self._single = {name: options.threads == 1 and target.device.kind == "cpu" for name, target in targets.items()}
        self._pool: list[Worker] = []
        self._drawn = 0
        names = list(targets) if where == "runtimes" else list(targets)[:1]
        self._workers: dict[str, Worker] = {}
        if where == "workers":
            self._pool = [self._started(names[0], ["m"]) for _ in range(3 * copies)]
        else:
            self._names = [f"m{number}" for number in range(1 if where == "load" else 3 * copies)]
            self._workers = {target: self._started(target, self._names) for target in names}

    def _started(self, target: str, names: Sequence[str]) -> Worker:
        worker = self._stack.enter_context(Worker(target))
        for name in names:
            load(worker, name, self._subject, self._targets[target], self._threads)
        return worker

    def draw(self, rng: random.Random) -> list[list[Contestant]]:
        """Return the contestants of the next race."""
        self._drawn += 1
        if self._where == "load":
            return [self._of(target, [[(worker, self._names[0])]] * 3) for target, worker in self._workers.items()]
        if self._where != "workers":
            names = rng.sample(self._names, len(self._names))
            return [
                self._of(target, [[(worker, name) for name in names[at::3]] for at in range(3)]) for target, worker in self._workers.items()
            ]
        first = next(iter(self._targets))
        if self._drawn % _RENEW_EVERY == 0:
            for _ in range(_RENEW):
                self._pool.pop(0).close()
                self._pool.append(self._started(first, ["m"]))
        drawn = [(worker, "m") for worker in rng.sample(self._pool, 3 * self._copies)]
        return [self._of(first, [drawn[at::3] for at in range(3)])]

    def _of(self, target: str, loads: Sequence[Sequence[Load]]) -> list[Contestant]:
        return contestants(loads, self._subject, single=self._single[target])


def compare_once(field_: Field, rng: random.Random, rounds: int, *, sequential: bool) -> list[Record]:
    """Run one race, and as much in sequence where wanted, and return what came out, for each runtime that took part."""
    began, load_before = time.perf_counter(), system_load()
    groups = field_.draw(rng)
    everyone = [each for group in groups for each in group]
    seed = rng.randrange(1 << 30)
    race(everyone, budget_s=_RACE_S, least_rounds=_LEAST_ROUNDS, most_rounds=rounds, seed=seed, confidence=CONFIDENCE)
    if any(each.failed for each in everyone):
        raise SystemExit(f"a contestant failed: {[each.failed for each in everyone if each.failed]}")
    records = []
    for group in groups:
        first, second, slower = group
        found = versus(second, first, confidence=CONFIDENCE, field=group)
        more = versus(slower, first, confidence=CONFIDENCE, field=group)
        record: Record = {
            "same": found.verdict,
            "more": more.verdict,
            "ratio": found.ratio,
            "width": found.high - found.low,
            "by": found.by,
            "copies": first.copies,
            "rounds": found.pairs,
            "figures": figures(group),
        }
        if sequential:
            record |= in_sequence(group, found.pairs, rng)
        records.append(record)
    seconds = (time.perf_counter() - began) / len(records)
    return [{**each, "seconds": seconds, "load_average": load_before} for each in records]


def figures(group: Sequence[Contestant]) -> dict[str, Any]:
    """Return what each round stood for each contestant by, in microseconds, either way."""
    runs = [each.samples() for each in group]
    present = [each for each in runs if each is not None]
    return {
        by: [[[number, round(1e6 * figure, 1)] for number, figure in each.items()] for each in round_figures(present, by)]  # type: ignore[arg-type]
        for by in ("median", "least")
    }


def system_load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


def in_sequence(group: Sequence[Contestant], rounds: int, rng: random.Random) -> Record:
    """Measure the same contestants one after the other, and compare their medians."""
    again = [
        Contestant(
            each.name,
            each.worker,
            others=each.others,
            other_names=each.other_names,
            repeat=each.repeat,
            single=each.single,
            expected_s=each.expected_s,
        )
        for each in group
    ]
    with measuring():
        for each in rng.sample(again, len(again)):
            for number in range(rounds):
                each.block(number)
    first, second, slower = again
    return {
        "sequential_same": of_medians(second.durations, first.durations),
        "sequential_more": of_medians(slower.durations, first.durations),
    }


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


def subjects(names: Sequence[str], folder: Path, targets: dict[str, Target], threads: int) -> list[Subject]:
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
                load(worker, "m", Subject(name, path, inputs, 0.0), next(iter(targets.values())), threads)
                answer = worker.call("timed", limit_s=_LIMIT_S, name="m", seconds=0.05, steady_s=0.5)
            found.append(Subject(name, path, inputs, min(answer["durations"])))
    return found


def deal(models: Sequence[Subject], comparisons: int) -> dict[str, int]:
    """Say how many comparisons each model gets."""
    weights = {each.name: 1 / _SLOW_SHARE if each.call_s > _SLOW_S else 1.0 for each in models}
    total = sum(weights.values())
    return {name: max(1, round(comparisons * weight / total)) for name, weight in weights.items()}


def conditions(where: str, models: Sequence[Subject], targets: dict[str, Target], options: argparse.Namespace) -> Iterator[Record]:
    """Take all comparisons in one place, idle and busy in turn, so that what is loaded serves both."""
    rng = random.Random(f"{where} {options.seed}")
    machines = options.load.split(",")
    started = time.perf_counter()
    slow = [each for each in models if each.call_s > _SLOW_S]
    fast = [each for each in models if each.call_s <= _SLOW_S]
    minutes = options.minutes * len(machines)
    for subject in (*slow, *fast):  # what slow models do not need of their time is left to the fast ones
        races = deal(models, options.comparisons)[subject.name]
        if where == "runtimes":
            races = -(-races // len(targets))
        left_s = 60 * minutes - (time.perf_counter() - started)
        share_s = 60 * len(machines) * _SLOW_MINUTES / len(slow) if subject in slow else left_s / (len(fast) - fast.index(subject))
        end = time.perf_counter() + share_s
        with ExitStack() as stack:
            field_ = Field(where, subject, targets, options, stack)
            for number in range(races):
                for machine in machines:
                    if time.perf_counter() > end:
                        break
                    with busy(machine == "busy"):
                        found = compare_once(field_, rng, options.rounds, sequential=number % _SEQUENTIAL_EVERY == 0)
                    for each in found:
                        settings = {"rounds": options.rounds, "threads": options.threads, "targets": options.targets}
                        about = {"machine": this_machine(), "options": settings}
                        yield {"where": where, "load": machine, "model": subject.name, "call_s": subject.call_s, **about, **each}


def rate(counts: Counter[str], *words: str) -> str:
    """Return how often the verdict was one of `words`, with Wilson's 95 % interval."""
    total = counts.total()
    if not total:
        return "-"
    hits = sum(counts[word] for word in words)
    interval = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return f"{hits / total:.1%} ({hits} of {total}; {interval.low:.1%} to {interval.high:.1%})"


def row(where: str, machine: str, records: Sequence[Record]) -> str:
    """Return a line of the table."""

    def counted(name: str) -> Counter[str]:
        return Counter(each[name] for each in records if name in each)

    off = np.abs(np.log([each["ratio"] for each in records]))
    cells = [
        WHERE[where],
        "one core busy" if machine == "busy" else "idle",
        rate(counted("same"), "faster", "slower"),
        rate(counted("more"), "slower"),
        rate(counted("sequential_same"), "faster", "slower"),
        rate(counted("sequential_more"), "slower"),
        f"{np.median(off):.2%}, {np.quantile(off, 0.95):.2%}",
        f"{np.median([each['width'] for each in records]) / 2:.1%}",
        f"{np.median([each['rounds'] for each in records]):.0f}",
        f"{sum(each['by'] == 'least' for each in records) / len(records):.0%}",
        f"{np.median([each['load_average'] for each in records]):.1f}",
        f"{np.mean([each['seconds'] for each in records]):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def tables(records: Sequence[Record]) -> list[str]:
    """Return a table for each choice of targets, a line for each condition, and the sums of the idle and of the busy machine."""
    lines = []
    for targets in dict.fromkeys(each["options"]["targets"] for each in records):
        of_them = [each for each in records if each["options"]["targets"] == targets]
        lines += [f"## {' and '.join(targets.split(','))}", "", *table(of_them), "", *sums(of_them), ""]
    return lines


def sums(records: Sequence[Record]) -> list[str]:
    """Return what came out in all conditions together, by what the machine did."""
    lines = []
    for machine in ("idle", "busy"):
        counts = Counter(each["same"] for each in records if each["load"] == machine)
        if counts:
            lines.append(f"- {machine}, all conditions: false alarms {rate(counts, 'faster', 'slower')}.")
    return lines


def table(records: Sequence[Record]) -> list[str]:
    """Return the table, a line for each condition."""
    lines = [
        "| where | machine | false alarms | 5 % found | sequential: false alarms | sequential: found | error of an A/A ratio: median, p95 "
        "| half width | rounds | by least | load average | s each |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for machine in ("idle", "busy"):
        for where in WHERE:
            of_it = [each for each in records if each["where"] == where and each["load"] == machine]
            if of_it:
                lines.append(row(where, machine, of_it))
    return lines


def this_machine() -> str:
    """Return what the figures hold for."""
    device = cpu_device()
    return (
        f"{device.model}, {device.cores} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"openvino {version('openvino')}, onnxruntime {onnxruntime.__version__}"
    )


def heading(records: Sequence[Record]) -> list[str]:
    """Return what stands above the table."""
    dealt = Counter(each["model"] for each in records)
    call_s = {name: np.median([each["call_s"] for each in records if each["model"] == name]) for name in dealt}

    def listed(values: Iterable[Any]) -> str:
        return " and ".join(str(each) for each in sorted(set(values)))

    return [
        "# Verdicts on the same thing, and on 5 % more of it",
        "",
        f"`python benchmarks/aa.py {shlex.join(sys.argv[1:])}`",
        f"on {listed(each['machine'] for each in records)}.",
        "",
        f"Interval {CONFIDENCE:.0%}; at most {listed(each['options']['rounds'] for each in records)} rounds, the cap on samples; "
        f"{listed(each['copies'] for each in records if each['copies'] > 1)} loads each but for `same load`; threads of each: "
        f"{listed(each['options']['threads'] or 'as many as its runtime takes' for each in records)}.",
        "Models: " + ", ".join(f"{name} ({call_s[name] * 1e3:.3f} ms, {count} comparisons)" for name, count in dealt.items()) + ".",
        "False alarm: two of a kind called faster or slower (to reach: at most 2 %). Found: 21 calls called slower than 20 (to reach:",
        "at least 90 % idle, 75 % busy). Sequential: the same blocks one contestant after the other, medians compared. Rates with Wilson's",
        "95 % interval. By least: how many races found the machine busy, and compared rounds by their least durations.",
        "",
    ]


def measured(options: argparse.Namespace) -> Iterator[Record]:
    """Take all comparisons."""
    with tempfile.TemporaryDirectory() as name:
        with Lab() as lab:
            wanted = options.targets.split(",")
            listed, _ = lab.discover(sorted({each.split(":")[0] for each in wanted}))
        targets = {name: next(each for each in listed if str(each) == name) for name in wanted}
        models = subjects(options.models, Path(name), targets, options.threads)
        for where in options.where.split(","):
            yield from conditions(where, models, targets, options)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=400)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--quick", action="store_true", help="12 comparisons per condition, of the first model only")
    parser.add_argument("--where", default=",".join(WHERE))
    parser.add_argument("--load", default="idle,busy")
    parser.add_argument("--rounds", type=int, default=160)
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="of each loaded model; 0: as many as its runtime takes")
    parser.add_argument("--targets", default=TARGETS, help="two that take turns across runtimes; the first runs alone elsewhere")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="the most that one condition may take; comparisons beyond are left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--raw", type=Path, help="append each comparison, a line of JSON")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing: make the table from raw files")
    options = parser.parse_args()
    if options.quick:
        options.comparisons, options.models = min(options.comparisons, 12), options.models[:1]
    records: list[Record] = []
    if options.merge:
        records.extend(json.loads(line) for path in options.merge for line in path.read_text().splitlines())
    else:
        for each in measured(options):
            records.append(each)
            if options.raw:
                with options.raw.open("a") as file:
                    file.write(json.dumps(each) + "\n")
            told = {key: each[key] for key in ("where", "load", "model", "same", "more", "by", "rounds")}
            print(*told.values(), f"{each['ratio']:.4f} ± {each['width'] / 2:.1%} {each['seconds']:.1f} s", file=sys.stderr, flush=True)
    lines = [*heading(records), *tables(records)]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
