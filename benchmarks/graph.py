"""How long our own part takes: preparing and analysing a large graph, cutting one segment out of a large model, and the memory of both.

    python benchmarks/graph.py [--out benchmarks/results/graph.md] [--folder FOLDER] [--gib 1]

Each step runs in a process of its own, several times: the least wall time is given beside the least CPU time, which neighbours on the
machine disturb less. The graphs are of 10,000 nodes: layers that are all alike, and a random one. The large model has weights of random
numbers; the segment is the middle half of it, written beside an empty store of weights, and once more beside the one that has them already.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from aivmm.models.graph import analyse
from aivmm.models.order import PreparedGraph
from aivmm.models.prepare import prepare
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes.machine import peak_memory_bytes
from aivmm.runtime.cpu import cpu_device

ROOT = Path(__file__).parent.parent
NODES = 10_000
LIMITS = {"analyse layers": 5.0, "analyse random": 5.0, "slice half, new": 2.0, "slice half, stored": 2.0}  # wall seconds
_WIDE = 4096


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "graph.md")
    parser.add_argument("--folder", type=Path, help="where the models go; needs three times their size")
    parser.add_argument("--gib", type=float, default=1.0, help="weights of the large model")
    parser.add_argument("--times", type=int, default=3, help="runs of each step")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measured(arguments.step, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        lines = report(Path(temporary), arguments.gib, arguments.times)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def report(folder: Path, gib: float, times: int) -> list[str]:
    """Return the file's lines."""
    write_layers(folder / "layers.onnx")
    write_random(folder / "random.onnx")
    size = write_large(folder / "large.onnx", gib)
    lines = [
        *environment(),
        "",
        f"Graphs of {NODES} nodes; a model of {size / 2**30:.2f} GiB of weights. Least of {times} runs, each in a process of its own. "
        "Limits are on wall time, which neighbours on the machine lengthen; CPU time is what the step itself takes.",
        "",
        "| step | wall s | CPU s | peak memory MiB | over the weights | limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in STEPS:
        runs = [_in_a_process(step, folder) for _ in range(times)]
        wall, cpu, peak = (min(run[key] for run in runs) for key in ("wall_s", "cpu_s", "peak_bytes"))
        limit = LIMITS.get(step)
        verdict = "" if limit is None else "met" if wall <= limit else "missed"
        share = f"{peak / size:.2f} x" if step in _OF_LARGE else ""
        lines.append(f"| {step} | {wall:.2f} | {cpu:.2f} | {peak / 2**20:.0f} | {share} | {f'{limit:g} s' if limit else ''} | {verdict} |")
    return lines


def _in_a_process(step: str, folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--step", step, "--folder", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{step}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(step: str, folder: Path) -> dict[str, float]:
    """Do one step; return its seconds, and the peak memory of this process."""
    make_ready, run = STEPS[step]
    ready = make_ready(folder)
    wall, cpu = time.perf_counter(), time.process_time()
    run(ready)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_bytes": float(peak_memory_bytes() or 0)}


def _same(folder: Path) -> Path:
    return folder


def _opened(folder: Path) -> tuple[Slicer, Path, WeightStore]:
    """A slicer that knows the weights' hashes, as it does once the model was analysed."""
    slicer = Slicer(PreparedGraph(folder / "large.prepared.onnx"))
    slicer._hasher.whole()
    return slicer, folder, WeightStore(folder / "new.weights")


def _stored(folder: Path) -> tuple[Slicer, Path, WeightStore]:
    opened = _opened(folder)
    _slice(opened)
    return opened


def _slice(opened: tuple[Slicer, Path, WeightStore]) -> None:
    slicer, folder, store = opened
    count = len(slicer.prepared.nodes)
    slicer.write(count // 4, 3 * count // 4, folder / "segment.onnx", weights=store)


Step = tuple[Callable[[Path], Any], Callable[[Any], object]]
STEPS: dict[str, Step] = {
    "prepare layers": (_same, lambda folder: prepare(folder / "layers.onnx", folder / "layers.prepared.onnx")),
    "analyse layers": (_same, lambda folder: analyse(folder / "layers.prepared.onnx")),
    "prepare random": (_same, lambda folder: prepare(folder / "random.onnx", folder / "random.prepared.onnx")),
    "analyse random": (_same, lambda folder: analyse(folder / "random.prepared.onnx")),
    "prepare large": (_same, lambda folder: prepare(folder / "large.onnx", folder / "large.prepared.onnx")),
    "analyse large": (_same, lambda folder: analyse(folder / "large.prepared.onnx")),
    "slice half, new": (_opened, _slice),
    "slice half, stored": (_stored, _slice),
}
_OF_LARGE = ("prepare large", "analyse large", "slice half, new", "slice half, stored")


def write_layers(path: Path) -> None:
    """Layers of MatMul, Relu, Add of the layer's input, Sigmoid, all alike but for their weights."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array((rng.standard_normal((64, 64)) / 8).astype(np.float32), f"w{index}") for index in range(8)]
    nodes, last = [], "x"
    for index in range(NODES // 4):
        end = "y" if index == NODES // 4 - 1 else f"d{index}"
        nodes += [
            helper.make_node("MatMul", [last, f"w{index % 8}"], [f"a{index}"]),
            helper.make_node("Relu", [f"a{index}"], [f"b{index}"]),
            helper.make_node("Add", [f"b{index}", last], [f"c{index}"]),
            helper.make_node("Sigmoid", [f"c{index}"], [end]),
        ]
        last = end
    _save(path, nodes, weights, (2, 64))


def write_random(path: Path) -> None:
    """Each node adds two values, mostly recent ones."""
    rng = np.random.default_rng(1)
    values, nodes = ["x"], []
    for index in range(NODES - 1):
        reads = [values[max(0, len(values) - 1 - int(rng.exponential(20)))] for _ in range(2)]
        nodes.append(helper.make_node("Add", reads, [f"v{index}"]))
        values.append(f"v{index}")
    used = {name for node in nodes for name in node.input}
    nodes.append(helper.make_node("Sum", [name for name in values if name not in used], ["y"]))
    _save(path, nodes, [], (2, 64))


def write_large(path: Path, gib: float) -> int:
    """A chain of MatMul and Relu with external weights; return their bytes."""
    rng = np.random.default_rng(2)
    count = max(4, round(gib * 2**30 / (4 * _WIDE * _WIDE)))
    weights, nodes, last = [], [], "x"
    with path.with_name("large.data").open("wb") as file:
        for index in range(count):
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=(_WIDE, _WIDE), data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "large.data"), ("offset", file.tell()), ("length", 4 * _WIDE * _WIDE)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(rng.standard_normal((_WIDE, _WIDE), dtype=np.float32).tobytes())
            weights.append(tensor)
            end = "y" if index == count - 1 else f"r{index}"
            nodes += [helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]), helper.make_node("Relu", [f"m{index}"], [end])]
            last = end
    _save(path, nodes, weights, (1, _WIDE))
    return count * 4 * _WIDE * _WIDE


def _save(path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: tuple[int, int]) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


def environment() -> list[str]:
    """Return where and when this ran."""
    device = cpu_device()
    packages = ", ".join(f"{each} {version(each)}" for each in ("aivmm", "onnx", "onnx-ir"))
    load = ", ".join(f"{each:.1f}" for each in psutil.getloadavg())
    return [
        "# Our own part",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {device.model}, {device.cores} cores; {platform.platform()}; Python "
        f"{platform.python_version()}; {packages}; load average at the start {load}.",
    ]


if __name__ == "__main__":
    main()
