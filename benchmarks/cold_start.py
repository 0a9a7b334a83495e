"""Fresh processes that load a plan whose compiled form is cached and answer once, beside ones in which the runtime takes it back itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.engine import Report, single
from tests.making import ONNXRUNTIME, OPENVINO, chain_model, make_bundle

OURS = """
import sys, time, json
import numpy as np
t0 = time.perf_counter()
import aivmm, aivmm.face, aivmm.runtime.engine, aivmm.runtime.{module} as module
module.{ready}()
t1 = time.perf_counter()
engine = aivmm.load_plan(sys.argv[1])
engine.run({{"x": np.zeros({shape}, dtype=np.float32)}})
t2 = time.perf_counter()
stats = engine.stats()
assert stats["cache"]["hits"] == 1, stats["cache"]
print(json.dumps({{"imports": t1 - t0, "load": t2 - t1, "hash": stats["hash_s"], "wait": stats["hash_wait_s"]}}))
"""
BARE = {
    OPENVINO: """
import sys, time, json
import numpy as np
t0 = time.perf_counter()
import openvino
t1 = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    compiled = openvino.Core().import_model(file.read(), "CPU", {{"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}})
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


def cold(report: Report, rounds: int) -> None:
    """Fresh processes."""
    report.say("\n## From imported to answered, in a fresh process, with the compiled form cached (ms, median)\n")
    report.say("The engine has a fixed part (the plan, the conditions, buffers) beside what grows with the model; `more` is its median.\n")
    report.say("| model | target | bare | engine | waited for hashes | more | ratio (95 % of rounds) | limit | | imports: bare | engine |")
    report.say("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, (width, rows, layers) in {"8 MB": (512, 1, 8), "80 MB": (1024, 1, 20)}.items():
        for target, module, ready in ((OPENVINO, "openvino", "_import_openvino"), (ONNXRUNTIME, "onnxruntime", "_ort")):
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                bundle = make_bundle(folder / "m.aivmm", chain_model(width=width, rows=rows, layers=layers), [single(target)])
                # Compiled Python is kept, as pip does where something is installed; the first process of each kind leaves it there.
                environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
                environment |= {"AIVMM_CACHE": str(folder / "cache"), "PYTHONPYCACHEPREFIX": str(folder / "python")}
                # NumPy's BLAS spins on all other cores for an eighth of a second after it was loaded. The bare process loads its model
                # meanwhile, ours, which imports for longer, hardly: that would count for us.
                environment["OPENBLAS_NUM_THREADS"] = "1"
                shape = (rows, width)
                first = OURS.format(module=module, ready=ready, shape=shape).replace('["hits"] == 1', '["stored"] == 1')
                fresh(first, environment, str(bundle))
                (kept,) = (folder / "cache").rglob("*.blob")
                blob = folder / "blob"
                blob.write_bytes(kept.read_bytes()[4096:])
                ours: list[dict[str, float]] = []
                theirs: list[dict[str, float]] = []
                fresh(BARE[target].format(shape=shape), environment, str(blob), str(bundle / "segments"))
                for _ in range(rounds):
                    theirs.append(fresh(BARE[target].format(shape=shape), environment, str(blob), str(bundle / "segments")))
                    ours.append(fresh(OURS.format(module=module, ready=ready, shape=shape), environment, str(bundle)))
            ratios = np.array([(mine["load"] - mine["wait"]) / other["load"] for mine, other in zip(ours, theirs, strict=True)])
            held = report.gate(f"cold start, {name} on {target}", float(np.median(ratios)) <= 1.1)
            low, high = np.quantile(ratios, [0.025, 0.975])

            def ms(rows: list[dict[str, float]], key: str) -> str:
                return f"{np.median([each[key] for each in rows]) * 1e3:.1f}"

            shown = f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f}) | 1.1 | {held}"
            more = np.median([mine["load"] - mine["wait"] - other["load"] for mine, other in zip(ours, theirs, strict=True)]) * 1e3
            waited = f"{ms(ours, 'wait')} of {ms(ours, 'hash')} | {more:+.1f}"
            imports = f"{ms(theirs, 'imports')} | {ms(ours, 'imports')}"
            report.say(f"| {name} | {target} | {ms(theirs, 'load')} | {ms(ours, 'load')} | {waited} | {shown} | {imports} |")


def fresh(code: str, environment: dict[str, str], *arguments: str) -> dict[str, float]:
    """Run `code` in a process of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
