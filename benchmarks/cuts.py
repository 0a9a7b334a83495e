"""How far cutting a model moves its answers: every model, every cut point, on every CPU target and across them.

    python benchmarks/cuts.py [--out benchmarks/results/cuts.md] [--state FOLDER] [--most N] [MODEL ...]

Each model (default: those in `../shared/models` and all demo models) is cut in two at each of its cut points and, once, at all of its block
boundaries. The pieces run one after another through our backends, and their outputs are compared with those of the uncut model on the same
target; for pieces on different targets with those of the uncut model on ONNX Runtime. ONNX Runtime runs a second time with its
optimisations off and one thread: then no fusion crosses a cut, and cut and uncut have to agree in every bit. Processes of its own do each
model; with `--state` what is done is kept there as JSON, and the next call goes on. `--most` takes a sample of the cut points.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from aivmm.errors import AivmmError
from aivmm.models.demo import demo_names, write_demo
from aivmm.models.graph import analyse, analyse_graph
from aivmm.models.inputs import make_inputs
from aivmm.models.order import PreparedGraph
from aivmm.models.prepare import prepare
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes.accuracy import judge
from aivmm.probes.operations import ExecutableRunner, load_arrays, save_arrays
from aivmm.runtime.backend import Buffer
from aivmm.runtime.config import Config
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.engine import find_target
from aivmm.runtime.registry import load_backend

ROOT = Path(__file__).parent.parent
SAME = 1e-5  # relative L2 that cut and uncut may differ by on one target whose kernels depend on what is fused
ACROSS = 1e-3  # and across targets
_FP32 = Config(precision="fp32")
_PLAIN = Config.of({"graph_optimization_level": "disabled", "intra_op_num_threads": 1}, precision="fp32")
LANES: Mapping[str, tuple[str, Config]] = {
    "ORT plain": ("onnxruntime:CPU", _PLAIN),
    "ORT": ("onnxruntime:CPU", _FP32),
    "OpenVINO": ("openvino:CPU", _FP32),
}
MIXES = (("ORT", "OpenVINO"), ("OpenVINO", "ORT"))
_ORT = "onnxruntime-gpu" if platform.machine() in ("x86_64", "AMD64") else "onnxruntime"
ALL_BLOCKS = -1  # in the place of a cut point's position: at all block boundaries at once
Arrays = Mapping[str, Buffer]
Comparison = tuple[float | None, bool, str]


@dataclass
class Tally:
    """What came out for one model on one lane or mix of two."""

    cuts: int = 0
    bitwise: int = 0
    worst: float = 0.0  # relative L2 over all outputs
    where: int = 0  # the cut point's position
    over: int = 0  # cuts beyond the limit
    refused: int = 0
    reason: str = ""
    blocks: float | None = None  # cut at all block boundaries at once; None: refused


@dataclass
class Found:
    """All of one model."""

    model: str
    nodes: int = 0
    cut_points: int = 0
    blocks: int = 0
    seconds: float = 0.0
    error: str = ""
    whole: dict[str, str] = field(default_factory=dict)  # lane -> why the uncut model does not run there
    repeatable: dict[str, bool] = field(default_factory=dict)  # lane -> two runs of the uncut model agree in every bit
    across: float | None = None  # uncut OpenVINO against uncut ONNX Runtime
    crashed: list[str] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cuts.md")
    parser.add_argument("--state", type=Path, help="folder of what was done before")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "models")
    parser.add_argument("--most", type=int, help="cut points a model, spread evenly; default all")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cuts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cuts:
        cut(Path(arguments.cuts), [int(each) for each in arguments.models])
        return
    if arguments.one:
        source, destination = arguments.models
        Path(destination).write_text(json.dumps(asdict(one(source, arguments.most))))
        return
    models = arguments.models or [*map(str, sorted(arguments.shared.glob("*.onnx"))), *(f"demo:{name}" for name in demo_names())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.state or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for model in models:
            found.append(recalled(model, folder, arguments.most))
            arguments.out.parent.mkdir(exist_ok=True)
            arguments.out.write_text("\n".join(report(found)) + "\n")  # after each model: a run of hours may be killed
    print("\n".join(report(found)))


def recalled(model: str, folder: Path, most: int | None) -> Found:
    """Return what `folder` has on `model`, or have a process find it out."""
    name = model if model.startswith("demo:") else Path(model).stem
    file = folder / f"{name.replace(':', '_')}.json"
    if not file.exists():
        print(f"{name} ...", file=sys.stderr, flush=True)
        limit = [] if most is None else ["--most", str(most)]
        done = subprocess.run([sys.executable, __file__, "--one", model, str(file), *limit], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            return Found(model=name, error=f"exit {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    fields: dict[str, Any] = json.loads(file.read_text())
    tallies = {lane: Tally(**each) for lane, each in fields.pop("tallies").items()}
    return Found(**fields, tallies=tallies)


def one(model: str, most: int | None) -> Found:
    """Cut one model everywhere, in processes of its own: a runtime that crashes costs the cut it was at, tried a second time alone."""
    found = Found(model=model if model.startswith("demo:") else Path(model).stem)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            source = write_demo(model.removeprefix("demo:"), folder) if model.startswith("demo:") else Path(model)
            facts = prepare(source, folder / "prepared.onnx")
        except AivmmError as error:
            found.error = str(error)
            return found
        save_arrays(
            folder / "feeds.npz", make_inputs(onnx.load(folder / "prepared.onnx", load_external_data=False), facts.inputs, seed=0)[0]
        )
        structure = analyse(folder / "prepared.onnx")
        positions = [cut.position for cut in structure.cut_points]
        found.nodes, found.cut_points, found.blocks = structure.node_count, len(positions), len(structure.blocks)
        step = 1 if most is None else max(1, len(positions) // most)
        _cut_all(folder, [ALL_BLOCKS, *positions[step // 2 :: step]], found)
    found.seconds = time.perf_counter() - started
    return found


def _cut_all(folder: Path, positions: list[int], found: Found) -> None:
    known: dict[int, dict[str, Any]] = {}
    alone = False
    while waiting := [position for position in positions if position not in known]:
        wanted = waiting[:1] if alone else waiting
        log = folder / "answers.jsonl"
        log.unlink(missing_ok=True)
        arguments = [sys.executable, __file__, "--cuts", str(folder), *map(str, wanted)]
        done = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, check=False)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        known |= {line["position"]: line for line in lines}
        if done.returncode > 0:
            raise RuntimeError(done.stderr[-2000:])
        if done.returncode < 0 and alone and not lines:
            found.crashed.append(f"cut at {wanted[0]}, twice: signal {-done.returncode}")
            known[wanted[0]] = {}
        elif done.returncode < 0:
            found.crashed.append(f"cut at {next(each for each in wanted if each not in known)}, after others: signal {-done.returncode}")
        alone = done.returncode < 0 and not (alone and not lines)
    for position in positions:
        _count(found, position, known[position])


def _count(found: Found, position: int, answer: Mapping[str, Any]) -> None:
    found.whole |= answer.get("whole", {})
    found.repeatable |= answer.get("repeatable", {})
    found.across = answer.get("across", found.across)
    for lane, (error, bitwise, reason) in answer.get("lanes", {}).items():
        tally = found.tallies.setdefault(lane, Tally())
        if position == ALL_BLOCKS:
            tally.blocks = error
        elif error is None:
            tally.refused += 1
            tally.reason = tally.reason or reason
        else:
            tally.cuts += 1
            tally.bitwise += bitwise
            tally.over += not error <= (ACROSS if "|" in lane else SAME)
            if not error <= tally.worst:
                tally.worst, tally.where = error, position


def cut(folder: Path, positions: Sequence[int]) -> None:
    """Cut the model in `folder` at `positions` and write a line on each."""
    with Slicer(folder / "prepared.onnx") as slicer, (folder / "answers.jsonl").open("w") as log:
        cutter = Cutter(slicer, folder)
        for position in positions:
            lanes = cutter.in_blocks() if position == ALL_BLOCKS else cutter.in_two(position)
            whole = {"whole": cutter.refused, "repeatable": cutter.repeatable, "across": cutter.across}
            log.write(json.dumps({"position": position, "lanes": lanes, **whole}) + "\n")
            log.flush()


class Cutter:
    """Cuts one prepared model and compares; each comparison is (relative L2 error, equal in every bit, why it was refused)."""

    def __init__(self, slicer: Slicer, folder: Path) -> None:
        self.slicer, self.folder = slicer, folder
        self.feeds: Arrays = load_arrays(str(folder / "feeds.npz"))
        self.prepared: PreparedGraph = slicer.prepared
        self.last = len(self.prepared.nodes) - 1
        self.outputs = [str(value.name) for value in self.prepared.outputs]
        self.store = WeightStore(folder / "weights.bin")
        self.backends = {name: load_backend(name.partition(":")[0]) for name, _ in LANES.values()}
        self.targets = {name: find_target(self.backends[name], name.partition(":")[2]) for name, _ in LANES.values()}
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
        fronts: dict[str, Arrays | AivmmError] = {lane: self._try(lane, front, self.feeds) for lane in LANES}
        found: dict[str, Comparison] = {}
        for first, second in (*((lane, lane) for lane in LANES), *MIXES):
            name = first if first == second else f"{first} | {second}"
            expected = self.wholes.get(first) if first == second else self.wholes.get("ORT")
            before = fronts[first]
            after = before if isinstance(before, AivmmError) else self._try(second, back, {**self.feeds, **before})
            if isinstance(after, AivmmError) or isinstance(before, AivmmError):
                found[name] = (None, False, str(after)[:300])
            elif expected is not None:
                found[name] = self._compared({**before, **after}, expected)
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
            answers = self._try(lane, path, values)
            if isinstance(answers, AivmmError):
                return None, False, str(answers)[:300]
            values |= answers
        return self._compared(values, self.wholes[lane])

    def _run_whole(self) -> None:
        path = self.slicer.write_whole(self.folder / "whole.onnx", weights=self.store).path
        for lane in LANES:
            try:
                self.wholes[lane] = self._answers(lane, path, self.feeds)
                again = self._answers(lane, path, self.feeds)
            except AivmmError as error:
                self.refused[lane] = str(error)[:300]
                continue
            self.repeatable[lane] = _bitwise(again, self.wholes[lane])

    def _try(self, lane: str, path: Path, values: Arrays) -> Arrays | AivmmError:
        try:
            return self._answers(lane, path, values)
        except AivmmError as error:
            return error

    def _answers(self, lane: str, path: Path, values: Arrays) -> Arrays:
        name, config = LANES[lane]
        executable = self.backends[name].compile(path, self.targets[name], config)
        try:
            return ExecutableRunner(executable, values, 1).outputs(values)
        finally:
            executable.close()

    def _compared(self, answers: Arrays, expected: Arrays) -> Comparison:
        return self._error(answers, expected), _bitwise(answers, expected), ""

    def _error(self, answers: Arrays, expected: Arrays) -> float:
        """The worst relative L2 of the model's outputs; infinite where they cannot be compared."""
        found = judge({name: answers[name] for name in self.outputs}, {name: expected[name] for name in self.outputs})
        return float("inf") if found.problem else found.relative_l2


def _bitwise(answers: Arrays, expected: Arrays) -> bool:
    return all(np.asarray(answers[name]).tobytes() == np.asarray(value).tobytes() for name, value in expected.items())


def report(found: Iterable[Found]) -> list[str]:
    """Return the file's lines."""
    found = list(found)
    columns = [*LANES, *map(" | ".join, MIXES)]
    titles = [title.replace(" | ", " then ") for title in columns]
    lines = [
        *environment(),
        "",
        f"Each cell: worst relative L2 error of all outputs over all cut points (at which position); how many cuts agree in every bit; how "
        f"many are beyond the limit, {SAME:g} on one target and {ACROSS:g} across; how many one of the runtimes refused. `uncut` is "
        "OpenVINO against ONNX Runtime without any cut: what the last two columns have to be read against.",
        "",
        f"| model | nodes | cut points | {' | '.join(titles)} | uncut | seconds |",
        f"|{'---|' * (len(titles) + 5)}",
    ]
    for each in found:
        if each.error:
            lines.append(f"| {each.model} | not cut: {each.error} |{' |' * (len(titles) + 3)}")
            continue
        cells = [_cell(each.tallies.get(column, Tally())) for column in columns]
        uncut = "-" if each.across is None else f"{each.across:.1e}"
        lines.append(f"| {each.model} | {each.nodes} | {each.cut_points} | {' | '.join(cells)} | {uncut} | {each.seconds:.0f} |")
    lines += ["", *_sums(found, columns, titles), "", *_blocks(found), "", *_refusals(found)]
    return lines


def _cell(tally: Tally) -> str:
    text = f"{tally.worst:.1e} (at {tally.where}); {tally.bitwise} of {tally.cuts} bitwise; {tally.over} over" if tally.cuts else "none ran"
    return text + (f"; {tally.refused} refused" if tally.refused else "")


def _sums(found: Sequence[Found], columns: Sequence[str], titles: Sequence[str]) -> list[str]:
    lines = ["| in sum | cuts compared | worst error | bitwise | over the limit | refused |", "|---|---|---|---|---|---|"]
    for column, title in zip(columns, titles, strict=True):
        each = [one.tallies[column] for one in found if column in one.tallies]
        numbers = (sum(tally.cuts for tally in each), f"{max((tally.worst for tally in each), default=0.0):.1e}")
        rest = (sum(tally.bitwise for tally in each), sum(tally.over for tally in each), sum(tally.refused for tally in each))
        lines.append(f"| {title} | {' | '.join(map(str, (*numbers, *rest)))} |")
    return lines


def _blocks(found: Sequence[Found]) -> list[str]:
    lines = [
        "Cut at all block boundaries at once, relative L2 against the uncut model on the same target:",
        "",
        f"| model | blocks | {' | '.join(LANES)} | the uncut model repeats itself bitwise |",
        f"|{'---|' * (len(LANES) + 3)}",
    ]
    for each in found:
        if not each.error:
            errors = [each.tallies.get(lane, Tally()).blocks for lane in LANES]
            cells = " | ".join("-" if error is None else f"{error:.1e}" for error in errors)
            steady = ", ".join(f"{lane} {'yes' if yes else 'no'}" for lane, yes in each.repeatable.items())
            lines.append(f"| {each.model} | {each.blocks} | {cells} | {steady} |")
    return lines


def _refusals(found: Sequence[Found]) -> list[str]:
    lines = [f"- {each.model}: {crash}" for each in found for crash in each.crashed]
    lines += [f"- {each.model}, whole, {lane}: {reason}" for each in found for lane, reason in each.whole.items()]
    lines += [f"- {each.model}, a piece, {lane}: {tally.reason}" for each in found for lane, tally in each.tallies.items() if tally.reason]
    return ["What crashed a process, and what was refused, with the first reason:", "", *(lines or ["- nothing"])]


def environment() -> list[str]:
    """Return where and when this ran."""
    device = cpu_device()
    packages = ", ".join(f"{each} {version(each)}" for each in ("aivmm", "openvino", _ORT, "onnx", "onnx-ir"))
    return [
        "# Cut and uncut",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {device.model}, {os.cpu_count()} cores; {platform.platform()}; Python "
        f"{platform.python_version()}; {packages}.",
    ]


if __name__ == "__main__":
    main()
