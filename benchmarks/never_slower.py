"""Is the plan ever slower than what a user would have run? A fresh, interleaved measurement that chose nothing.

    python benchmarks/never_slower.py [--budget 60s] [--repeats 3] [--out benchmarks/results/main_job.md] MODEL ...

Tunes each model, then `--repeats` times measures the plan, through `engine.run`, against each eligible baseline, called as a user calls
the runtime itself: `InferenceSession(path).run(None, feed)` and OpenVINO's `infer` of a model compiled with default settings, each in a
process of its own. Rounds are interleaved in random order. Also compares `engine.run` with ONNX Runtime in fp32 on inputs that the tuning
never saw.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from aivmm.probes.arrays import load_arrays
from aivmm.probes.compare import APART, compare
from aivmm.probes.lab import Lab
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import Samples
from aivmm.runtime.cpu import cpu_device

ROUNDS = 16
COPIES = 2  # processes of each contestant
BLOCK_S = 0.04
_ORT = "onnxruntime-gpu" if platform.machine() in ("x86_64", "AMD64") else "onnxruntime"


def child(kind: str, path: str, inputs: str) -> None:
    """Load one contestant and answer `time` and `outputs` requests, a line each."""
    arrays = load_arrays(inputs)
    step: Any
    if kind == "plan":
        import aivmm

        engine = aivmm.load_plan(path)
        step = lambda: engine.run(arrays)  # noqa: E731
    elif kind == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = {each.name: arrays[each.name] for each in session.get_inputs()}
        step = lambda: session.run(None, feed)  # noqa: E731
    else:
        import openvino

        hints = {"PERFORMANCE_HINT": "LATENCY"} if kind == "openvino LATENCY" else {}
        compiled = openvino.Core().compile_model(path, "AUTO" if kind == "openvino AUTO" else "CPU", hints)
        request = compiled.create_infer_request()
        feed = {index: arrays[next(iter(port.get_names() & arrays.keys()))] for index, port in enumerate(compiled.inputs)}
        step = lambda: request.infer(feed, share_inputs=True)  # noqa: E731
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = float(line)
        for _ in range(2):
            step()
        durations = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(durations) < 2:
            started = time.perf_counter()
            step()
            durations.append(time.perf_counter() - started)
        print(json.dumps(durations), flush=True)


class Contestant:
    """What is compared: child processes that take turns, and their durations.

    Several, since two processes that run the very same differ by percents for as long as they live (docs/decisions/0009).
    """

    def __init__(self, kind: str, path: str, inputs: str) -> None:
        self.kind = kind
        command = [sys.executable, str(Path(__file__)), "--child", kind, path, inputs]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for _ in range(COPIES)
        ]
        self.durations: list[float] = []
        self.rounds: list[int] = []
        self.ready = all(each.stdout is not None and each.stdout.readline().strip() == "ready" for each in self.processes)

    def block(self, number: int) -> None:
        """Time one block."""
        process = self.processes[number % COPIES]
        assert process.stdin and process.stdout
        process.stdin.write(f"{BLOCK_S}\n")
        process.stdin.flush()
        durations = json.loads(process.stdout.readline())
        if number >= 0:
            self.durations += durations
            self.rounds += [number] * len(durations)

    def samples(self) -> Samples:
        """Return what was measured."""
        return Samples(timed_s=tuple(self.durations), rounds=tuple(self.rounds))

    def close(self) -> None:
        """End the processes."""
        for each in self.processes:
            each.kill()
            each.wait()


def measure(plan: str, model: str, inputs: str, kinds: list[str], seed: int) -> dict[str, Any]:
    """Race the plan against the raw runtimes once; return per baseline the ratio plan / baseline with its interval and verdict."""
    contestants = [Contestant("plan", plan, inputs), *(Contestant(kind, model, inputs) for kind in kinds)]
    try:
        racing = [each for each in contestants if each.ready]
        order = random.Random(seed)
        before: subprocess.Popen[str] | None = None
        for number in range(-COPIES, ROUNDS):
            with measuring():
                for each in order.sample(racing, len(racing)):
                    if before is not None and before is not each.processes[number % COPIES]:
                        wait_until_quiet(before.pid)
                    each.block(number)
                    before = each.processes[number % COPIES]
        mine = racing[0].samples()
        found = {each.kind: compare(mine, each.samples(), copies=(COPIES, COPIES), apart=APART) for each in racing[1:]}
        by_rounds = sum(compare(mine, each.samples()).verdict == "slower" for each in racing[1:])
        best = min(racing[1:], key=lambda each: each.samples().median_s).kind
        return {"median_s": mine.median_s, "best": best, "against": found, "by_rounds": by_rounds}
    finally:
        for each in contestants:
            each.close()


def agree(plan: str, model: Path, specs: Any, folder: Path, lab: Lab) -> float:
    """Return the worst relative L2 error of `engine.run` against ONNX Runtime in fp32 on fresh inputs."""
    import onnxruntime

    import aivmm

    paths = [folder / f"fresh-{index}.npz" for index in range(3)]
    lab.make_samples(model, specs, paths, seed=987654)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    worst = 0.0
    with aivmm.load_plan(plan) as engine:
        for path in paths:
            arrays = load_arrays(str(path))
            names = [each.name for each in session.get_outputs()]
            expected = dict(zip(names, session.run(names, {each.name: arrays[each.name] for each in session.get_inputs()}), strict=True))
            actual = engine.run(arrays)
            for name, reference in expected.items():
                norm = float(np.linalg.norm(np.asarray(reference, dtype=np.float64))) or 1.0
                difference = np.asarray(actual[name], dtype=np.float64) - np.asarray(reference, dtype=np.float64)
                worst = max(worst, float(np.linalg.norm(difference)) / norm)
    return worst


def one(model: str, budget: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Tune one model and look at its plan."""
    plan = folder / "plan.aivmm"
    command = [
        sys.executable,
        "-m",
        "aivmm",
        "tune",
        model,
        "-o",
        str(plan),
        "--db",
        str(folder / "p.db"),
        "--budget",
        budget,
        "--json",
        "-q",
    ]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - started
    if done.returncode:
        return {"model": model, "exit": done.returncode, "error": done.stderr.strip().splitlines()[-1:], "wall_s": wall}
    summary = json.loads(done.stdout)
    with Lab() as lab:
        source = Path(model)
        if model.startswith("demo:"):
            source = lab.write_demo(model.removeprefix("demo:"), folder)
        prepared = folder / "prepared.onnx"
        facts = lab.prepare(source, prepared, shapes={}, dims={}, batch=1)
        inputs = folder / "inputs.npz"
        lab.make_samples(prepared, facts.inputs, [inputs], seed=123456)
        error = agree(str(plan), prepared, facts.inputs, folder, lab)
    names = {
        "onnxruntime:CPU default": "onnxruntime",
        "openvino:CPU default": "openvino",
        "openvino:CPU LATENCY hint": "openvino LATENCY",
        "openvino:AUTO": "openvino AUTO",
    }
    kinds = [names[each["name"]] for each in summary["baselines"] if each["eligible"] and each["name"] in names]
    runs = [measure(str(plan), str(prepared), str(inputs), kinds, seed) for seed in range(repeats)]
    return {"model": model, "exit": 0, "wall_s": wall, "summary": summary, "runs": runs, "relative_l2": error}


def row(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    name = Path(found["model"]).stem
    if found["exit"]:
        return f"| {name} | exit {found['exit']}: {' '.join(found['error'])} | | | | | | {found['wall_s']:.0f} |"
    stages = " + ".join(
        f"{each['target']} {json.dumps(each['config']) if each['config'] else 'default'}" for each in found["summary"]["plan"]["stages"]
    )
    runs = found["runs"]
    ratios = [run["against"][run["best"]].ratio for run in runs]
    verdicts = [run["against"][run["best"]].verdict for run in runs]
    slower = sum(each.verdict == "slower" for run in runs for each in run["against"].values())
    medians = {kind: statistics.median(run["against"][kind].ratio for run in runs) for kind in runs[0]["against"]}
    cells = [
        name,
        stages,
        f"{statistics.median(run['median_s'] for run in runs) * 1e3:.3f}",
        runs[0]["best"],
        f"{statistics.median(ratios):.3f} ({', '.join(f'{each:.3f}' for each in ratios)})",
        f"{', '.join(verdicts)}; slower than any: {slower} (by rounds alone: {sum(run['by_rounds'] for run in runs)})",
        f"{1 / min(medians.values()):.2f}x",
        f"{found['relative_l2']:.1e}",
        f"{found['wall_s']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run."""
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        child(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--budget", default="60s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = cpu_device()
    lines = [
        "# The main job: the plan against what a user would have run",
        "",
        f"`python benchmarks/never_slower.py --budget {options.budget} --repeats {options.repeats} MODEL ...`",
        f"on {device.model}, {device.cores} cores, {platform.system()}, Python {platform.python_version()},",
        f"openvino {version('openvino')}, onnxruntime {version(_ORT)}.",
        "",
        "Ratios are the plan's time, through `engine.run`, over the raw runtime call with default settings, in one interleaved run:",
        "below 1 the plan is faster. Three runs each, none of which chose anything. The best baseline is the one with the least median.",
        f"Each contestant runs in {COPIES} processes that take turns. Verdicts take in what processes differ by (docs/decisions/0009);",
        "`by rounds alone` counts those that are slower without that.",
        "",
        "| model | plan | ms | best baseline | plan / best: median (runs) | verdicts on the plan | vs the slowest | L2 error | tune s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            found = one(model, options.budget, options.repeats, Path(folder))
        lines.append(row(found))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")
    if not options.out:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
