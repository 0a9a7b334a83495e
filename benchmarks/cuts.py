"""How far cutting a model moves its answers: every model, every cut point, on every CPU target and across them.

    python benchmarks/cuts.py [--out benchmarks/results/cuts.md] [--state FOLDER] [--jobs N] [--most N] [--render] [MODEL ...]

Each model (default: those in `../shared/models` and all demo models) is cut in two at each of its cut points and, once, at all of its block
boundaries. The pieces run one after another through our backends, and their outputs are compared with those of the uncut model on the same
target; for pieces on different targets with those of the uncut model on ONNX Runtime. ONNX Runtime runs a second time with its
optimisations off and one thread: then no fusion crosses a cut, and cut and uncut have to agree in every bit.

Processes of their own do a few cuts each, `--jobs` of them at a time, each on its share of the cores. What is done is kept in `--state`,
one line of JSON a cut, so that a run that was killed goes on; `--render` only writes the table of what the folder has, from any machine.
`--most` takes a sample of the cut points. Nothing is fetched: the demo models are built on the spot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cuts_table import ALL_BLOCKS, MIXES, Comparison, answers, report

from aivmm.errors import AivmmError
from aivmm.models.demo import demo_names, write_demo
from aivmm.models.graph import analyse, analyse_graph
from aivmm.models.inputs import make_inputs
from aivmm.models.order import PreparedGraph
from aivmm.models.prepare import prepare
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes.accuracy import judge
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.runners import ExecutableRunner
from aivmm.runtime.backend import Backend, Buffer
from aivmm.runtime.config import Config
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.finding import find_target
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target

ROOT = Path(__file__).parent.parent
TOGETHER = 12  # cuts a process: few enough that a crash costs little and the last processes end together
HEAVY_BYTES, FEW = 100_000_000, 3  # where a cut takes seconds
_ORT = "onnxruntime-gpu" if platform.machine() in ("x86_64", "AMD64") else "onnxruntime"
Arrays = Mapping[str, Buffer]


def lanes(threads: int) -> Mapping[str, tuple[str, Config]]:
    """Return name -> target and config of what is compared; 0 threads are the runtime's default."""
    ort = {"intra_op_num_threads": threads} if threads else {}
    openvino = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    plain = {"graph_optimization_level": "disabled", "intra_op_num_threads": 1}
    return {
        "ORT plain": ("onnxruntime:CPU", Config.of(plain, precision="fp32")),
        "ORT": ("onnxruntime:CPU", Config.of(ort, precision="fp32")),
        "OpenVINO": ("openvino:CPU", Config.of(openvino, precision="fp32")),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cuts.md")
    parser.add_argument("--state", type=Path, help="folder of what was done before")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "models")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; with more than one, each has its share of the cores")
    parser.add_argument("--most", type=int, help="cut points a model, spread evenly; default all")
    parser.add_argument("--render", action="store_true", help="write the table of what --state has, and run nothing")
    parser.add_argument("--do", choices=["prepare", "cut", "cut apart"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do == "prepare":
        prepare_one(arguments.models[0], Path(arguments.models[1]), Path(arguments.models[2]))
        return
    if arguments.do:
        folder, log, threads, *positions = arguments.models
        cut(Path(folder), Path(log), int(threads), list(map(int, positions)), apart=arguments.do == "cut apart")
        return
    if arguments.render and not arguments.state:
        parser.error("--render needs --state")
    models = arguments.models or [*map(str, sorted(arguments.shared.glob("*.onnx"))), *(f"demo:{name}" for name in demo_names())]
    with tempfile.TemporaryDirectory() as temporary:
        state = arguments.state or Path(temporary) / "state"
        if not arguments.render:
            Run(models, state, Path(temporary), arguments.jobs, arguments.most).everything()
        lines = report(state, list(map(name_of, models)))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def name_of(model: str) -> str:
    """Return how the tables and the state's folders call `model`."""
    return model if model.startswith("demo:") else Path(model).stem


@dataclass(frozen=True, order=True)
class Portion:
    """What one process cuts; the lesser of two takes longer."""

    haste: int
    model: str
    positions: Sequence[int]


@dataclass
class Run:
    """All models, their cuts dealt out to processes. `state` keeps a folder a model: `facts.json`, and lines on cuts in `*.jsonl`."""

    models: Sequence[str]
    state: Path
    work: Path
    jobs: int
    most: int | None
    _portions: queue.PriorityQueue[Portion] = field(default_factory=queue.PriorityQueue)
    _shares: queue.SimpleQueue[frozenset[int]] = field(default_factory=queue.SimpleQueue)

    def everything(self) -> None:
        """Prepare every model, and cut each as soon as it is."""
        with ThreadPoolExecutor(self.jobs) as pool:
            preparing: dict[Future[None], str] = {pool.submit(self._prepare, model): model for model in self.models}
            cutting: list[Future[None]] = []
            for prepared in as_completed(preparing):
                prepared.result()
                for portion in self._waiting(preparing[prepared]):
                    self._portions.put(portion)
                    cutting.append(pool.submit(self._cut_next))
            for number, done in enumerate(as_completed(cutting), 1):
                done.result()
                print(f"{number} of {len(cutting)}", file=sys.stderr, flush=True)

    def _cut_next(self) -> None:
        """Cut the portion that takes longest of those known now, so that the last ones to end are short."""
        portion = self._portions.get_nowait()
        self._cut(portion.model, portion.positions)

    def __post_init__(self) -> None:
        """Deal out the cores of this process to the jobs; empty sets where they cannot be chosen or need not."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and self.jobs > 1 else []
        each = max(1, len(cores) // self.jobs)
        for job in range(self.jobs):
            self._shares.put(frozenset(cores[(job * each + index) % len(cores)] for index in range(each)) if cores else frozenset())

    @contextmanager
    def _share(self) -> Iterator[frozenset[int]]:
        share = self._shares.get()
        try:
            yield share
        finally:
            self._shares.put(share)

    def _folders(self, model: str) -> tuple[Path, Path]:
        name = name_of(model).replace(":", "_")
        for folder in (found := (self.work / name, self.state / name)):
            folder.mkdir(parents=True, exist_ok=True)
        return found

    def _prepare(self, model: str) -> None:
        folder, state = self._folders(model)
        with self._share() as cores:
            done = _process(cores, "prepare", model, folder, state)
        if done.returncode:
            facts = {"error": f"exit {done.returncode}: {' '.join(done.stderr.split())[-300:]}"}
            (state / "facts.json").write_text(json.dumps(facts))

    def _waiting(self, model: str) -> list[Portion]:
        """Return the cuts that are still to be made."""
        folder, state = self._folders(model)
        facts = json.loads((state / "facts.json").read_text())
        if facts.get("error"):
            return []
        positions = facts["cut_points"]
        step = 1 if self.most is None else max(1, len(positions) // self.most)
        known = _known(state)
        waiting = [position for position in [ALL_BLOCKS, *positions[step // 2 :: step]] if position not in known]
        size = sum(file.stat().st_size for file in folder.iterdir())
        most = FEW if size > HEAVY_BYTES else TOGETHER
        portions = [waiting[first : first + most] for first in range(0, len(waiting), most)]
        return [Portion(-size, model, portion) for portion in portions]

    def _cut(self, model: str, positions: Sequence[int]) -> None:
        """Have `positions` cut; a cut that crashes a runtime is made again in a process of its own, then with one for each piece."""
        folder, state = self._folders(model)
        log = state / f"{positions[0]}.{os.getpid()}.jsonl"
        ways = ("after others", "alone")
        tried = 0
        with self._share() as cores:
            while waiting := [each for each in positions if each not in _known(state)]:
                wanted = waiting if not tried else waiting[:1]
                done = _process(cores, "cut apart" if tried == 2 else "cut", folder, log, len(cores), *wanted)
                if done.returncode == 0:
                    tried = 0
                    continue
                if done.returncode > 0 or tried == 2:  # the pieces' own processes are all that may die then
                    raise RuntimeError(f"{model}: {done.returncode}: {done.stderr[-2000:]}")
                at = next(each for each in wanted if each not in _known(state))
                with log.open("a") as file:
                    file.write(json.dumps({"crash": f"cut at {at}: signal {-done.returncode}, {ways[tried]}"}) + "\n")
                tried += 1
                positions = [at, *(each for each in positions if each != at)]


def _known(state: Path) -> set[int]:
    """Return the cuts that `state` has an answer for, be it a crash."""
    return {line["position"] for line in answers(state) if "position" in line}


def _process(cores: frozenset[int], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one step in a process on `cores`; an empty set leaves it all of them."""
    command = [sys.executable, __file__, "--do", *map(str, arguments)]
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, preexec_fn=pin)


def prepare_one(model: str, folder: Path, state: Path) -> None:
    """Write the prepared model and its inputs to `folder`, and what the table says of it to `state`."""
    facts: dict[str, Any] = {}
    try:
        source = write_demo(model.removeprefix("demo:"), folder) if model.startswith("demo:") else Path(model)
        prepared = prepare(source, folder / "prepared.onnx")
        feeds = make_inputs(onnx.load(folder / "prepared.onnx", load_external_data=False), prepared.inputs, seed=0)[0]
        save_arrays(folder / "feeds.npz", feeds)
        structure = analyse(folder / "prepared.onnx")
        facts = {
            "nodes": structure.node_count,
            "cut_points": [each.position for each in structure.cut_points],
            "blocks": len(structure.blocks),
        }
    except AivmmError as error:
        facts = {"error": str(error)}
    (state / "facts.json").write_text(json.dumps(facts))


def cut(folder: Path, log: Path, threads: int, positions: Sequence[int], *, apart: bool) -> None:
    """Cut the model in `folder` at `positions` and append a line on each to `log`; `apart`: each piece runs in a process of its own."""
    where = environment(threads)
    with tempfile.TemporaryDirectory(dir=folder) as pieces, Slicer(folder / "prepared.onnx") as slicer, log.open("a") as file:
        cutter = Cutter(slicer, Path(pieces), load_arrays(str(folder / "feeds.npz")), lanes(threads), apart=apart)
        for position in positions:
            started = time.perf_counter()
            found = cutter.in_blocks() if position == ALL_BLOCKS else cutter.in_two(position)
            whole = {"whole": cutter.refused, "repeatable": cutter.repeatable, "across": cutter.across}
            seconds = round(time.perf_counter() - started, 3)
            file.write(json.dumps({"position": position, "lanes": found, **whole, "seconds": seconds, "where": where}) + "\n")
            file.flush()


class Cutter:
    """Cuts one prepared model and compares; each comparison is (relative L2 error, equal in every bit, why it was refused)."""

    def __init__(self, slicer: Slicer, folder: Path, feeds: Arrays, lanes: Mapping[str, tuple[str, Config]], *, apart: bool) -> None:
        self.slicer, self.folder, self.feeds, self.lanes, self.apart = slicer, folder, feeds, lanes, apart
        self.prepared: PreparedGraph = slicer.prepared
        self.last = len(self.prepared.nodes) - 1
        self.outputs = [str(value.name) for value in self.prepared.outputs]
        self.store = WeightStore(folder / "weights.bin")
        self.wholes: dict[str, Arrays] = {}
        self.refused: dict[str, str] = {}
        self.repeatable: dict[str, bool] = {}
        self._run_whole()
        both = "ORT" in self.wholes and "OpenVINO" in self.wholes
        self.across = self._error(self.wholes["OpenVINO"], self.wholes["ORT"]) if both else None

    def in_two(self, position: int) -> dict[str, Comparison]:
        """Cut before the node `position`."""
        front = self.slicer.write(0, position - 1, self.folder / "front.onnx", weights=self.store).path
        back = self.slicer.write(position, self.last, self.folder / "back.onnx", weights=self.store).path
        fronts = {lane: self._answers(lane, front, [self.feeds])[0] for lane in self.lanes}
        found: dict[str, Comparison] = {}
        for second in self.lanes:
            firsts = [second, *(first for first, then in MIXES if then == second)]
            ready = {first: {**self.feeds, **before} for first in firsts if not isinstance(before := fronts[first], AivmmError)}
            afters = dict(zip(ready, self._answers(second, back, list(ready.values())), strict=True))
            for first in firsts:
                expected = self.wholes.get(first) if first == second else self.wholes.get("ORT")
                name = first if first == second else f"{first} | {second}"
                after = afters.get(first, fronts[first])
                if isinstance(after, AivmmError):
                    found[name] = (None, False, str(after)[:300])
                elif expected is not None:
                    found[name] = self._compared({**ready[first], **after}, expected)
        return found

    def in_blocks(self) -> dict[str, Comparison]:
        """Cut at the edges of all blocks."""
        firsts = [block.first for block in analyse_graph(self.prepared).blocks]
        spans = list(itertools.pairwise([*firsts, self.last + 1]))
        paths = [self.slicer.write(first, end - 1, self.folder / f"block{first}.onnx", weights=self.store).path for first, end in spans]
        return {lane: self._chained(lane, paths) for lane in self.wholes}

    def _chained(self, lane: str, paths: Sequence[Path]) -> Comparison:
        values = dict(self.feeds)
        for path in paths:
            answers = self._answers(lane, path, [values])[0]
            if isinstance(answers, AivmmError):
                return None, False, str(answers)[:300]
            values |= answers
        return self._compared(values, self.wholes[lane])

    def _run_whole(self) -> None:
        path = self.slicer.write_whole(self.folder / "whole.onnx", weights=self.store).path
        for lane in self.lanes:
            once, again = self._answers(lane, path, [self.feeds, self.feeds])
            if isinstance(once, AivmmError) or isinstance(again, AivmmError):
                self.refused[lane] = str(once)[:300]
                continue
            self.wholes[lane] = once
            self.repeatable[lane] = _bitwise(again, once)

    def _answers(self, lane: str, path: Path, inputs: Sequence[Arrays]) -> list[Arrays | AivmmError]:
        """Compile `path` and return its answers to each of `inputs`, or why there are none."""
        if not self.apart:
            return answers_of(*self.lanes[lane], path, inputs)
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(answers_of, *self.lanes[lane], path, inputs).result()
        except BrokenProcessPool:
            return [AivmmError("crashed, alone in a process of its own") for _ in inputs]

    def _compared(self, answers: Arrays, expected: Arrays) -> Comparison:
        return self._error(answers, expected), _bitwise(answers, expected), ""

    def _error(self, answers: Arrays, expected: Arrays) -> float:
        """The worst relative L2 of the model's outputs; infinite where they cannot be compared."""
        found = judge({name: answers[name] for name in self.outputs}, {name: expected[name] for name in self.outputs})
        return float("inf") if found.problem else found.relative_l2


def answers_of(name: str, config: Config, path: Path, inputs: Sequence[Arrays]) -> list[Arrays | AivmmError]:
    """Compile `path` on the target `name` and return its answers to each of `inputs`, or why there are none."""
    backend, target = _loaded(name)
    try:
        executable = backend.compile(path, target, config)
    except AivmmError as error:
        return [AivmmError(error.message) for _ in inputs]
    found: list[Arrays | AivmmError] = []
    try:
        for values in inputs:
            try:
                found.append(ExecutableRunner(executable, values, 1).outputs(values))
            except AivmmError as error:
                found.append(AivmmError(error.message))
    finally:
        executable.close()
    return found


@cache
def _loaded(name: str) -> tuple[Backend, Target]:
    backend = load_backend(name.partition(":")[0])
    return backend, find_target(backend, name.partition(":")[2])


def _bitwise(answers: Arrays, expected: Arrays) -> bool:
    return all(np.asarray(answers[name]).tobytes() == np.asarray(value).tobytes() for name, value in expected.items())


def environment(threads: int) -> str:
    """Return when and where this runs."""
    packages = ", ".join(f"{each} {version(each)}" for each in ("aivmm", "openvino", _ORT, "onnx", "onnx-ir"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d} UTC; {cpu_device().model}, {os.cpu_count()} cores; {platform.platform()}; Python "
        f"{platform.python_version()}; {packages}; threads a model: {threads or 'the default'}"
    )


if __name__ == "__main__":
    main()
