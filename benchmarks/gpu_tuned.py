"""Sections of `benchmarks.gpu` on what a tune finds: two cards, the CPU beside a card, pixels as input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import FAST, Step, calls_of, engine, feed_of, fixed, model_file, race

_CARD = "onnxruntime:CUDA:0"
_TUNE_LIMIT_S = 400
_PIXELS = "input=123.7,116.3,103.5/58.4,57.1,57.4"


def tuned_bundle(path: Path, output: Path, *, targets: str, options: tuple[str, ...], budget: str = "20s") -> Path | str:
    """Tune a model for throughput on some targets; return the bundle, or why there is none. One that is there already is kept."""
    if output.exists():
        return output
    command = [sys.executable, "-m", "aivmm", "tune", str(path), "--objective", "throughput", "--targets", targets, "--budget", budget]
    command += [*options, "--json", "-q", "-o", str(output), "--db", str(output.with_suffix(".db"))]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TUNE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no end within {_TUNE_LIMIT_S} s"
    output.with_suffix(".json").write_text(ran.stdout)
    return output if ran.returncode == 0 else (ran.stderr.strip() or ran.stdout)[-400:]


def _steps_of(bundle: Path, feed: Mapping[str, Any]) -> tuple[Any, int, list[Step]]:
    """Load a bundle; return its engine, its batch, and a step for each caller that its numbers hold for."""
    from aivmm.runtime.engine import Engine

    running = Engine.load(bundle, cache=False)
    rows = running.plan.batch
    feeds = [{name: np.resize(value, (rows, *value.shape[1:])) for name, value in feed.items()} for _ in range(running.plan.callers)]
    return running, rows, [partial(running.run, each) for each in feeds]


def two_tuned(folder: Path, shared: Path) -> dict[str, Any]:
    """Race the plan that a tune finds on two cards against the one that the same tune finds on one, each with its own callers."""
    found: dict[str, Any] = {}
    for name in ("bert", "resnet50"):
        path, options = model_file(name, folder, shared), ("--precisions", "fp32,fp16", *(("--dim", "seq=128") if name == "bert" else ()))
        feed, steps, plans, running = feed_of(fixed(path, 1)), {}, {}, []
        for label, targets in (("one card, as tuned", _CARD), ("two cards, as tuned", "onnxruntime:CUDA:0,onnxruntime:CUDA:1")):
            bundle = tuned_bundle(path, folder / f"{name}-{label[:3]}.aivmm", targets=targets, options=options)
            if isinstance(bundle, str):
                plans[label] = f"no plan: {bundle}"
                continue
            made, rows, calls = _steps_of(bundle, feed)
            running.append(made)
            steps[label] = (rows, calls)
            plans[label] = made.plan.verdict
        found[name] = {"rates": race(steps, rounds=5, seconds=0.6) if len(steps) == 2 else {}, "plans": plans}
        for each in running:
            each.close()
    return found


def beside(folder: Path, shared: Path) -> dict[str, Any]:
    """Race a card alone against the same card with the CPU beside it, which takes its part of the requests by its speed."""
    from aivmm.runtime.plan import Copy
    from tests.making import Part

    found: dict[str, Any] = {}
    for name, batch, weight in (("resnet50", 1, 0.2), ("resnet50", 32, 0.05), ("ultraface", 1, 0.5), ("magika", 1, 0.3)):
        model, setting = fixed(model_file(name, folder, shared), batch), (("host_memory", "pinned"),)
        steps, running = {}, []
        for callers in (4, 8):
            alone = engine(folder, name, model, [Part(_CARD, settings=setting)], batch=batch, callers=callers)
            cpu = Copy(model="x.onnx", target="openvino:CPU", precision="fp32", config={}, weight=weight)
            both = engine(folder, name, model, [Part(_CARD, settings=setting, copies=(cpu,))], batch=batch, callers=callers)
            running += [alone, both]
            steps[f"the card alone, {callers} callers"] = (batch, calls_of(alone, model, callers))
            steps[f"the CPU beside it, {callers} callers"] = (batch, calls_of(both, model, callers))
        found[f"{name}, batch {batch}"] = race(steps, rounds=5, seconds=0.4)
        for each in running:
            each.close()
    return found


def pixels(folder: Path, shared: Path) -> dict[str, Any]:
    """Race ResNet-50 in fp16 that takes float32, float16 and uint8 from the callers' own arrays, and say how close the answers are."""
    import onnx

    from aivmm.models.input_contract import InputContract, parse_normalise
    from aivmm.models.prepare import prepare
    from tests.making import Part

    batch, callers = 64, 4
    source = folder / "resnet50-half.onnx"
    onnx.save(fixed(model_file("resnet50", folder, shared), batch, half=True), source)
    name = onnx.load(source).graph.input[0].name
    contracts = {
        "float32": InputContract(),
        "float16": InputContract(kind="narrow"),
        "uint8": InputContract(kind="narrow:uint8", normalise=parse_normalise([_PIXELS.replace("input", name)])),
    }
    given = np.random.default_rng(0).integers(0, 256, (batch, 3, 224, 224)).astype(np.uint8)
    mean, scale = (np.float32(each).reshape(3, 1, 1) for each in ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)))
    floats = (given.astype(np.float32) - mean) / scale
    arrays = {"float32": floats, "float16": floats.astype(np.float16), "uint8": given}
    steps, running, answers = {}, [], {}
    for kind, contract in contracts.items():
        path = folder / f"resnet50-{kind}.onnx"
        prepare(source, path, contract=contract)
        made = engine(
            folder, f"resnet50-{kind}", onnx.load(path), [Part(_CARD, settings=tuple(FAST.items()))], batch=batch, callers=callers
        )
        running.append(made)
        answers[kind] = next(iter(made.run({name: arrays[kind]}).values())).astype(np.float64).ravel()
        steps[f"{kind} input, {callers} callers"] = (batch, [partial(made.run, {name: arrays[kind].copy()}) for _ in range(callers)])
    wide = answers["float32"]
    cosine = {kind: float(each @ wide / (np.linalg.norm(each) * np.linalg.norm(wide))) for kind, each in answers.items()}
    found = {"rates": race(steps), "cosine": cosine}
    for each in running:
        each.close()
    return found


def requests(folder: Path, shared: Path) -> dict[str, Any]:
    """Time the kinds of requests that there are for a card against bare I/O binding: where the engine's overhead comes from."""
    from aivmm.runtime.config import Config
    from aivmm.runtime.finding import find_named
    from aivmm.runtime.ort_requests import RebindingRequest
    from aivmm.runtime.registry import load_backend
    from benchmarks.gpu import _alternate, _bare, session

    found: dict[str, Any] = {}
    for name in ("resnet50", "minilm", "ultraface"):
        model = fixed(model_file(name, folder, shared), 1)
        feed, raw = feed_of(model), session(model, {})
        target: Any = find_named(_CARD)
        executable: Any = load_backend("onnxruntime").compile(model.SerializeToString(), target, Config())
        staged, rebinding = executable.new_request(), RebindingRequest(raw, executable.inputs, executable.outputs)
        outputs = {each.name: np.empty(each.shape, each.dtype) for each in executable.outputs}
        for request in (staged, rebinding):
            for key, array in (*feed.items(), *outputs.items()):
                request.bind(key, array)
        steps = {"bare": _bare(raw, feed, graph=False), "staged": staged.run, "rebinding": rebinding.run}
        found[name] = _alternate(steps)
        executable.close()
    return found


def page_two_tuned(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of the page."""
    lines = []
    for model, each in found.items():
        rates = {label: sorted(values)[len(values) // 2] for label, values in each["rates"].items()}
        one = rates.get("one card, as tuned")
        for label, rate in rates.items():
            lines.append(f"- {model}, {label}: {rate:,.0f} samples/s" + (f", {rate / one:.2f} x" if one else ""))
        lines += [f"  - {label}: {said}" for label, said in each["plans"].items()]
    return lines


def page_rates(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of the page for sections of rates."""
    groups = {"": found["rates"]} if "rates" in found else found
    lines = []
    for group, rates in groups.items():
        for how, values in rates.items():
            spread = f"{sorted(values)[len(values) // 2]:,.0f} samples/s ({min(values):,.0f} to {max(values):,.0f})"
            lines.append(f"- {', '.join(filter(None, (group, how)))}: {spread}")
    return lines + ([f"- cosine to float32 input: {json.dumps(found['cosine'])}"] if "cosine" in found else [])


def page_requests(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of the page: p50 and p99 of each way, in µs."""
    return [
        f"- {model}: " + "; ".join(f"{how} {1e6 * numbers[0]:.0f} (p99 {1e6 * numbers[1]:.0f})" for how, numbers in ways.items())
        for model, ways in found.items()
    ]
