"""What lower precision gives on this machine: the best plan at a cosine of 0.99 against the best fp32 plan, of each model.

    python benchmarks/precision.py [--budget 45s] [--state FILE] [--out benchmarks/results/precision.md] [MODEL ...]

Each model is tuned twice, with `--precisions fp32` and with `--precisions fp32,int8,int4 --constraint "cosine>=0.99"`, and the two bundles
are loaded by the engine in processes of their own and raced, interleaved in random order. What a model gave is kept in the state file as
soon as it is known: the same command again goes on with the others. Accuracy is on synthetic inputs for the demo models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aivmm.probes.client import Worker
from aivmm.probes.compare import compare
from aivmm.probes.race import Contestant, race
from aivmm.runtime.cpu import cpu_device

_SHARED = Path(__file__).parents[2] / "shared" / "models"
MODELS = (
    "demo:resnet50",
    "demo:encoder",
    "demo:lstm",
    "demo:recommender",
    "ultraface_rfb_320.onnx",
    "magika_v3_3.onnx",
    "silero_vad_16k_op15.onnx",
)
_RACE_S = 8.0
_SEED = 11


def tuned(model: str, folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Tune, and return what `--json` gave."""
    given = model if model.startswith("demo:") or Path(model).exists() else str(_SHARED / model)
    command = [sys.executable, "-m", "aivmm", "tune", given, "--json", "-q", "-o", str(folder / f"{name}.aivmm"), *options]
    environment = {**os.environ, "AIVMM_DB": str(folder / "probes.db"), "AIVMM_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def raced(folder: Path, names: tuple[str, str], inputs: Path) -> dict[str, Any]:
    """Race two bundles; return their medians, and the first one's time over the second's with its interval."""
    workers, contestants = [], []
    try:
        for name in names:
            worker = Worker(name)
            workers.append(worker)
            answer = worker.call(
                "load_bundle", limit_s=300, run_limit_s=120, name="engine", bundle=str(folder / f"{name}.aivmm"), inputs=str(inputs)
            )
            contestants.append(Contestant("engine", worker, batch=1, callers=1, expected_s=answer["first_inference_s"], keep=True))
        race(contestants, budget_s=_RACE_S, seed=_SEED)
        first, second = (each.samples() for each in contestants)
        assert first is not None and second is not None
        found = compare(first, second)
        return {"medians_s": [first.median_s, second.median_s], "ratio": found.ratio, "low": found.low, "high": found.high}
    finally:
        for worker in workers:
            worker.close()


def inputs_of(model_plan: Path, destination: Path) -> Path:
    """Write zeros that the plan's inputs take: which values they are does not matter to the time of these models."""
    import numpy as np

    from aivmm.probes.operations import save_arrays

    plan = json.loads((model_plan / "plan.json").read_text())
    arrays = {each["name"]: np.zeros([extent or 1 for extent in each["shape"]], each["dtype"]) for each in plan["model"]["inputs"]}
    save_arrays(destination, arrays)
    return destination


def bundle_bytes(bundle: Path) -> int:
    return sum(each.stat().st_size for each in (bundle / "segments").iterdir())


def measured(model: str, folder: Path, budget: str) -> dict[str, Any]:
    """Return what one model gave."""
    began = time.perf_counter()
    fp32 = tuned(model, folder, "fp32", "--precisions", "fp32", "--budget", budget)
    lower = tuned(model, folder, "lower", "--precisions", "fp32,int8,int4", "--constraint", "cosine>=0.99", "--budget", budget)
    told = lower.get("precision") or {}
    found = raced(folder, ("fp32", "lower"), inputs_of(folder / "fp32.aivmm", folder / "inputs.npz"))
    tried = [each for each in told.get("tried", []) if each.get("lowering_s") is not None]
    return {
        **found,
        "plans": [fp32["plan"]["stages"][0], lower["plan"]["stages"][0]],
        "verdicts": [fp32["verdict"], lower["verdict"]],
        "cosine": lower["accuracy"]["value"],
        "data": lower["accuracy"]["data"],
        "bytes": [bundle_bytes(folder / "fp32.aivmm"), bundle_bytes(folder / "lower.aivmm")],
        "scouting_s": told.get("seconds"),
        "lowering_s": {each["precision"]: each["lowering_s"] for each in tried},
        "sentence": told.get("sentence"),
        "wall_s": time.perf_counter() - began,
    }


def table(state: dict[str, Any], budget: str) -> str:
    """Return the results as Markdown."""
    device = cpu_device()
    lines = [
        "# Lower precision",
        "",
        f"`python benchmarks/precision.py --budget {budget}` on {device.model}, {device.cores} cores"
        f" ({', '.join(each for each in device.instruction_sets if 'vnni' in each or 'amx' in each) or 'no VNNI'}), "
        f"aivmm {version('aivmm')}, OpenVINO {version('openvino')}, NNCF {version('nncf')}.",
        "",
        "The best plan with a cosine of at least 0.99 to fp32 against the best fp32 plan, as bundles in the engine, raced interleaved.",
        "",
        "| model | fp32 plan | best plan | times as fast (95 %) | cosine | data | size | scouting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, each in state.items():
        (fp32_s, lower_s), (fp32_bytes, lower_bytes) = each["medians_s"], each["bytes"]
        fp32, lower = each["plans"]
        cells = [
            model,
            f"{fp32['target']}, {fp32['precision']}: {fp32_s * 1e3:.3g} ms",
            f"{lower['target']}, {lower['precision']}: {lower_s * 1e3:.3g} ms",
            f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})",
            f"{each['cosine']:.5f}",
            each["data"],
            f"{lower_bytes / 1e6:.1f} of {fp32_bytes / 1e6:.1f} MB",
            f"{each['scouting_s'] or 0:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Seconds that lowering took, each way that was tried:", ""]
    for model, each in state.items():
        ways = ", ".join(f"{name} {seconds:.1f}" for name, seconds in each["lowering_s"].items())
        lines.append(f"- {model}: {ways or 'none'}")
    lines += ["", "What the tunings said:", ""]
    lines += [f"- {model}: {each['verdicts'][1]}" for model, each in state.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--budget", default="45s")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "aivmm-precision.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precision.md")
    options = parser.parse_args()
    state: dict[str, Any] = json.loads(options.state.read_text()) if options.state.exists() else {}
    with tempfile.TemporaryDirectory(prefix="precision-") as folder:
        for number, model in enumerate(options.models):
            if model in state:
                continue
            print(f"{model} ...", flush=True)
            place = Path(folder) / str(number)
            place.mkdir()
            state[model] = measured(model, place, options.budget)
            options.state.write_text(json.dumps(state, indent=1))
            print(
                f"  {state[model]['ratio']:.2f} times as fast, cosine {state[model]['cosine']:.5f}, {state[model]['wall_s']:.0f} s",
                flush=True,
            )
    options.out.write_text(table(state, options.budget))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
