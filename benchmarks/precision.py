"""What lower precision gives on this machine: the best plan at a cosine of 0.99 against the best fp32 plan, of each model.

    python benchmarks/precision.py [--budget 45s] [--state FILE] [--out benchmarks/results/precision.md] [MODEL ...]

Each model is tuned twice, with `--precisions fp32` and with `--precisions fp32,int8,int4 --constraint "cosine>=0.99"`, and the two
bundles are loaded by the engine in processes of their own and raced, interleaved in random order. What a model gave is kept in the state
file as soon as it is known: the same command again goes on with the others. The results are written after each model, and name what was
asked for and missed. Accuracy is on synthetic inputs for the demo models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
LIMIT = "cosine>=0.99"
LOSS = 0.97  # two processes that run the very same differ by as much
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

    from aivmm.probes.arrays import save_arrays

    plan = json.loads((model_plan / "plan.json").read_text())
    arrays = {each["name"]: np.zeros([extent or 1 for extent in each["shape"]], each["dtype"]) for each in plan["model"]["inputs"]}
    save_arrays(destination, arrays)
    return destination


def stage_bytes(bundle: Path) -> int:
    """Return the bytes on disk of the models that the plan's stages run: a bundle holds fallbacks besides."""
    stages = json.loads((bundle / "plan.json").read_text())["stages"]
    files = {name for each in stages for name in (each["model"], *_weights_of(bundle / each["model"]))}
    return sum((bundle / each).stat().st_size for each in files)


def _weights_of(model: Path) -> set[str]:
    import onnx

    found = onnx.load(model, load_external_data=False)
    places = {entry.value for each in found.graph.initializer for entry in each.external_data if entry.key == "location"}
    return {f"{model.parent.name}/{each}" for each in places}


def measured(model: str, folder: Path, budget: str) -> dict[str, Any]:
    """Return what one model gave."""
    began = time.perf_counter()
    fp32 = tuned(model, folder, "fp32", "--precisions", "fp32", "--budget", budget)
    lower = tuned(model, folder, "lower", "--precisions", "fp32,int8,int4", "--constraint", LIMIT, "--budget", budget)
    told = lower.get("precision") or {}
    plans = [each["plan"]["stages"] for each in (fp32, lower)]
    odd = [stage for stage in plans[0] if stage["precision"] != "fp32" and not stage["target"].startswith("onnxruntime:CPU")]
    if odd:
        raise SystemExit(f"{model}: the fp32 plan is not in fp32: {odd}")
    found = raced(folder, ("fp32", "lower"), inputs_of(folder / "fp32.aivmm", folder / "inputs.npz"))
    lowering = {each["precision"]: each["lowering_s"] for each in told.get("tried", []) if each.get("lowering_s") is not None}
    return {
        **found,
        "plans": plans,
        "verdicts": [fp32["verdict"], lower["verdict"]],
        "cosine": lower["accuracy"]["value"],
        "data": lower["accuracy"]["data"],
        "bytes": [stage_bytes(folder / "fp32.aivmm"), stage_bytes(folder / "lower.aivmm")],
        "memory_bytes": [each["measured"]["peak_memory_bytes"] for each in (fp32, lower)],
        "scouting_s": told.get("seconds", 0.0),
        "lowering_s": lowering,
        "tunes_s": [fp32["wall_s"], lower["wall_s"]],
        "sentence": told.get("sentence", ""),
        "tried": told.get("tried", []),
        "cpu": cpu_device().model,
        "load": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "wall_s": time.perf_counter() - began,
    }


def gates(state: dict[str, Any]) -> list[str]:
    """Return what was asked for of these figures, each with whether it holds."""
    found = []
    resnet = state.get("demo:resnet50")
    if resnet:
        slowest = max(resnet["lowering_s"].values(), default=0.0)
        found += [
            _gate("demo:resnet50 is at least 3 times as fast", resnet["ratio"] >= 3, f"{resnet['ratio']:.2f}"),
            _gate(
                "lowering demo:resnet50 takes less than 30 s",
                slowest < 30,
                f"{slowest:.1f} s, the slowest way of {len(resnet['lowering_s'])}",
            ),
        ]
    slow = max(state, key=lambda each: state[each]["scouting_s"])
    found.append(
        _gate(
            "lower precision adds less than 60 s to a search", state[slow]["scouting_s"] < 60, f"{state[slow]['scouting_s']:.0f} s, {slow}"
        )
    )
    under = [name for name, each in state.items() if each["cosine"] < 0.99]
    found.append(
        _gate(
            "no plan is below a cosine of 0.99",
            not under,
            ", ".join(under) or f"the least is {min(each['cosine'] for each in state.values()):.4f}",
        )
    )
    losers = [name for name, each in state.items() if each["high"] < LOSS]
    found.append(_gate("no plan is slower than the fp32 one beyond noise", not losers, ", ".join(losers) or "none"))
    return found


def _gate(what: str, holds: bool, found: str) -> str:
    return f"- {'holds' if holds else '**missed**'}: {what} ({found})"


def table(state: dict[str, Any], budget: str) -> str:
    """Return the results as Markdown."""
    device = cpu_device()
    extensions = ", ".join(each for each in device.instruction_sets if any(kind in each for kind in ("vnni", "amx", "bf16")))
    versions = ", ".join(f"{name} {version(name)}" for name in ("aivmm", "openvino", "nncf", "onnx", "numpy"))
    days, loads = sorted({each["at"] for each in state.values()}), [each["load"] for each in state.values()]
    lines = [
        "# Lower precision",
        "",
        f"`python benchmarks/precision.py --budget {budget}` on {device.model}, {device.cores} cores ({extensions or 'no VNNI'}), "
        f"{platform.platform(terse=True)}, Python {platform.python_version()}; {versions}, ONNX Runtime {_onnxruntime()}; "
        f"{days[0]} to {days[-1]} UTC, load {min(loads):.1f} to {max(loads):.1f}.",
        "",
        "The best plan with a cosine of at least 0.99 to fp32 against the best fp32 plan (asked of OpenVINO as fp32, whatever its default"
        " is), as bundles in the engine, raced interleaved. Both were chosen by a tuning of its own, with the same budget. Accuracy is"
        " judged on inputs that calibrated nothing. On disk: the models that the plan runs. Memory: the peak of a fresh process.",
        "",
        "| model | fp32 plan | best plan | times as fast (95 %) | cosine | data | on disk | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, each in state.items():
        (fp32_s, lower_s), (fp32_bytes, lower_bytes), memory = each["medians_s"], each["bytes"], each["memory_bytes"]
        fp32, lower = (" -> ".join(f"{stage['target']}, {stage['precision']}" for stage in stages) for stages in each["plans"])
        cells = [
            model,
            f"{fp32}: {fp32_s * 1e3:.3g} ms",
            f"{lower}: {lower_s * 1e3:.3g} ms",
            f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})",
            f"{each['cosine']:.5f}",
            each["data"],
            f"{lower_bytes / 1e6:.1f} of {fp32_bytes / 1e6:.1f} MB",
            f"{memory[1] / 1e6:.0f} of {memory[0] / 1e6:.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "What was asked for:",
        "",
        *gates(state),
        "",
        "What lower precision added to each tuning, and each lowering within that:",
        "",
    ]
    for model, each in state.items():
        ways = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in each["lowering_s"].items())
        tunes = " and ".join(f"{seconds:.0f}" for seconds in each["tunes_s"])
        lines.append(f"- {model}: {each['scouting_s']:.0f} s (the tunings took {tunes} s); {ways or 'none'}")
    lines += ["", "What the tunings said:", ""]
    lines += [f"- {model}: {each['verdicts'][1]}" for model, each in state.items()]
    lines += [
        "",
        "Each form that was tried, with its target's default settings:",
        "",
        "| model | form | target | median | cosine | why not |",
        "|---|---|---|---|---|---|",
    ]
    for model, each in state.items():
        for row in sorted(each["tried"], key=lambda row: row.get("median_s") or 1e9):
            median, cosine = row.get("median_s"), row.get("accuracy", {}).get("cosine")
            shown = [f"{median * 1e3:.3g} ms" if median else "", f"{cosine:.5f}" if cosine is not None else "", row.get("problem") or ""]
            lines.append(f"| {model} | {row['precision']} | {row['target']} | {' | '.join(text.replace('|', '/') for text in shown)} |")
    return "\n".join(lines) + "\n"


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def known(path: Path) -> dict[str, Any]:
    """Return what earlier runs of this benchmark on this CPU left: figures of another are measured again."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    here = cpu_device().model
    return {model: each for model, each in found.items() if each.get("cpu") == here and "tunes_s" in each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--budget", default="45s")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "aivmm-precision.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precision.md")
    options = parser.parse_args()
    state = known(options.state)

    def shown() -> dict[str, Any]:
        return {model: state[model] for model in options.models if model in state}

    with tempfile.TemporaryDirectory(prefix="precision-") as folder:
        for number, model in enumerate(options.models):
            if model in state:
                continue
            print(f"{model} ...", flush=True)
            place = Path(folder) / str(number)
            place.mkdir()
            state[model] = measured(model, place, options.budget)
            draft = options.state.with_suffix(".part")
            draft.write_text(json.dumps(state, indent=1))
            draft.replace(options.state)
            print(
                f"  {state[model]['ratio']:.2f} times as fast, cosine {state[model]['cosine']:.5f}, {state[model]['wall_s']:.0f} s",
                flush=True,
            )
            options.out.write_text(table(shown(), options.budget))
    options.out.write_text(table(shown(), options.budget))
    print("\n".join(gates(shown())))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
