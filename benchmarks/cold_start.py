"""Fresh processes that load a plan whose compiled form is cached and answer once, beside ones in which the runtime takes it back itself."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import Report, single
from benchmarks.medians import median_shown
from tests.making import ONNXRUNTIME, OPENVINO, chain_model, make_bundle

OURS = """
import sys, time, json
import numpy as np
t0 = time.perf_counter()
import aivmm, aivmm.face, aivmm.runtime.engine
from aivmm.runtime.{module} import {ready} as ready
ready()
if "not hashed" in sys.argv:
    from aivmm.runtime import reading
    reading.check_content = reading.refuse_compiled = lambda *arguments: None
t1 = time.perf_counter()
engine = aivmm.load_plan(sys.argv[1])
engine.run({{"x": np.zeros({shape}, dtype=np.float32)}})
t2 = time.perf_counter()
stats = engine.stats()
assert stats["cache"]["hits"] == 1, stats["cache"]
print(json.dumps({{"imports": t1 - t0, "load": t2 - t1, "hash": stats["hash_s"], "wait": stats["hash_wait_s"]}}))
"""
BARE = {
    # As the engine does it: mapped and not read, which takes half as long, and without OpenVINO's reports of itself, whose thread takes as
    # long from a load as the load takes.
    OPENVINO: """
import sys, time, json, mmap
import numpy as np
t0 = time.perf_counter()
sys.modules["openvino_telemetry"] = None
import openvino
t1 = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
settings = {{"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}}
compiled = openvino.Core().import_model(openvino.Tensor(mapped, shared_memory=True), "CPU", settings)
compiled.create_infer_request().infer([np.zeros({shape}, dtype=np.float32)])
t2 = time.perf_counter()
print(json.dumps({{"imports": t1 - t0, "load": t2 - t1}}))
""",
    ONNXRUNTIME: """
import sys, time, json
import numpy as np
t0 = time.perf_counter()
import onnxruntime
t1 = time.perf_counter()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
options.add_session_config_entry("session.model_external_initializers_file_folder_path", sys.argv[2])
with open(sys.argv[1], "rb") as file:
    session = onnxruntime.InferenceSession(file.read(), options, providers=["CPUExecutionProvider"])
session.run(None, {{"x": np.zeros({shape}, dtype=np.float32)}})
t2 = time.perf_counter()
print(json.dumps({{"imports": t1 - t0, "load": t2 - t1}}))
""",
}


_SIZES = {"8 MB": (512, 1, 8), "80 MB": (1024, 1, 20)}  # name -> width, rows, layers of a chain
# The backend itself, and what imports its runtime.
_READY = {OPENVINO: ("openvino", "_import_openvino"), ONNXRUNTIME: ("onnxruntime", "library")}
_BOTH = 0.9  # of what one core does alone, which each of two does at once where both are this machine's own
_Times = dict[str, float]


def cold(report: Report, rounds: int) -> None:
    """Fresh processes."""
    report.say("\n## From imported to answered, in a fresh process, with the compiled form cached (ms, median)\n")
    report.say("The engine has a fixed part (the plan, the conditions, buffers) beside what grows with the model; `more` is its median.")
    report.say("The ratio is the median over rounds, a bare process and one of ours each, with the interval of that median (95 %).")
    report.say("Hashing needs a second core. `both`: the same in the rounds in which there was one, beside how many these were.")
    report.say("`not hashed`: processes in which the files are not looked into, which tells what the load takes apart from that.\n")
    report.say(
        "| model | target | bare | engine | waited for hashes | more | ratio | limit | | not hashed | both | imports: bare | engine |"
    )
    report.say("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in _SIZES:
        for target in (OPENVINO, ONNXRUNTIME):
            if report.wants(name, target):
                found, alone = _processes(name, target, rounds)
                _row(report, name, target, found, np.array(alone) >= _BOTH)


def _processes(name: str, target: str, rounds: int) -> tuple[dict[str, list[_Times]], list[float]]:
    """Return what bare processes, ours, and ours that hash nothing took, and what each of two cores did at once before them, as a share of
    what one does alone."""
    width, rows, layers = _SIZES[name]
    module, ready = _READY[target]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        bundle = make_bundle(folder / "m.aivmm", chain_model(width=width, rows=rows, layers=layers), [single(target)])
        # Compiled Python is kept, as pip does where something is installed; the first process of each kind leaves it there.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"AIVMM_CACHE": str(folder / "cache"), "PYTHONPYCACHEPREFIX": str(folder / "python")}
        # NumPy's BLAS spins on all other cores for an eighth of a second after it was loaded. The bare process loads its model
        # meanwhile, ours, which imports for longer, hardly: that would count for us.
        environment["OPENBLAS_NUM_THREADS"] = "1"
        code = OURS.format(module=module, ready=ready, shape=(rows, width))
        fresh(code.replace('["hits"] == 1', '["stored"] == 1'), environment, str(bundle))
        (kept,) = (folder / "cache").rglob("*.blob")
        blob = folder / "blob"
        blob.write_bytes(kept.read_bytes()[4096:])
        bare = BARE[target].format(shape=(rows, width))
        kinds = {
            "bare": (bare, str(blob), str(bundle / "segments")),
            "ours": (code, str(bundle)),
            "not hashed": (code, str(bundle), "not hashed"),
        }
        found: dict[str, list[_Times]] = {each: [] for each in kinds}
        alone: list[float] = []
        order = list(kinds)
        for _ in range(1 + rounds):  # the first one warms up
            alone.append(two_cores())
            random.Random(len(alone)).shuffle(order)
            for each in order:
                script, *arguments = kinds[each]
                found[each].append(fresh(script, environment, *arguments))
    return {each: times[1:] for each, times in found.items()}, alone[1:]


def _row(report: Report, name: str, target: str, found: dict[str, list[_Times]], both: Any) -> None:
    theirs, ours = found["bare"], found["ours"]

    def ms(rows: list[_Times], key: str) -> str:
        return f"{np.median([each[key] for each in rows]) * 1e3:.1f}"

    needed = np.array([each["load"] for each in theirs])
    took = np.array([each["load"] - each["wait"] for each in ours])
    held = report.gate(f"cold start, {name} on {target}", float(np.median(took / needed)) <= 1.1)
    waited = f"{ms(ours, 'wait')} of {ms(ours, 'hash')} | {np.median(took - needed) * 1e3:+.1f}"
    there = f"{median_shown((took / needed)[both])}, {int(both.sum())} of {len(both)}"
    apart = median_shown(np.array([each["load"] for each in found["not hashed"]]) / needed)
    shown = f"{median_shown(took / needed)} | 1.1 | {held} | {apart} | {there}"
    imports = f"{ms(theirs, 'imports')} | {ms(ours, 'imports')}"
    report.say(f"| {name} | {target} | {ms(theirs, 'load')} | {ms(ours, 'load')} | {waited} | {shown} | {imports} |")


def two_cores(seconds: float = 0.03) -> float:
    """Return what each of two threads hashes when both do, as a share of what one does alone: 1 on two cores, a half on one."""
    block = bytes(1 << 20)
    counts: list[int] = []

    def work() -> None:
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            hashlib.sha256(block).digest()
            count += 1
        counts.append(count)

    work()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return sum(counts[1:]) / 2 / counts[0]


def fresh(code: str, environment: dict[str, str], *arguments: str) -> dict[str, float]:
    """Run `code` in a process of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
