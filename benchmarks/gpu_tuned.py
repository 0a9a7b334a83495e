"""Sections of `benchmarks.gpu` on what a tune finds: two cards, the CPU beside a card, pixels as input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import FAST, Step, calls_of, engine, feed_of, fixed, model_file, race

_CARD = "onnxruntime:CUDA:0"
_TWO_CARDS = ("onnxruntime:CUDA:0", "onnxruntime:CUDA:1")
_LABELS = {1: "one card, as tuned", 2: "two cards, as tuned"}
_LOWER = "fp32,bf16,fp16"
_TUNE_LIMIT_S, _LOOK_LIMIT_S = 400, 60
# Printed by a process of its own, as its workers find them: what this one loaded would be passed on to what it starts.
_TARGETS = "from aivmm.tuner.inventory import find_devices; print(*find_devices()[0])"
_WIDE = "import os, sys; os.sched_setaffinity(0, range(os.cpu_count())); os.execv(sys.argv[1], sys.argv[1:])"
_PIXELS = "input=123.7,116.3,103.5/58.4,57.1,57.4"


def tune(folder: Path, shared: Path, *, models: Sequence[str], goals: Sequence[str], budget: str, state: Path, kind: str = "tune") -> bool:
    """Tune each model for each goal; what `--json` says is kept as `KIND.MODEL.GOAL.json`, and the reports.

    Where `kind` is "opencl", OpenVINO's GPU has to be among the targets, and what stands in its way is left out: the lane's cores, then
    its card. What was left out is printed. What comes to nothing leaves its reason as `.failed` until it does; return whether all did.
    """
    succeeded = True
    for goal in goals:
        for name in models:
            path = model_file(name, folder, shared)
            objective, precision = goal.split()
            place = state / f"{kind}.{name}.{objective}.{precision}.json"
            if place.exists():
                continue
            output = folder / f"{name}-{objective}-{precision}.aivmm"
            command = [sys.executable, "-m", "aivmm", "tune", str(path), "--objective", objective, "--budget", budget, "--json"]
            command += ["--precisions", "fp32" if precision == "fp32" else _LOWER, "-o", str(output), "--db", str(folder / "gpu.db")]
            command += ["--dim", "seq=128"] if name == "minilm" else []
            start, environment, targets, found = _lane(opencl=kind == "opencl")
            if kind == "opencl" and not any(each.startswith("openvino:GPU") for each in found):
                succeeded = _failed(place, f"no worker finds OpenVINO's GPU, only {', '.join(found)}")
                continue
            command = [*start, *command, *targets]
            began = time.monotonic()
            said = place.with_suffix(".log")
            try:
                with said.open("w") as log:
                    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=_TUNE_LIMIT_S, env=environment)
            except subprocess.TimeoutExpired:
                succeeded = _failed(place, f"no end within {_TUNE_LIMIT_S} s\n{said.read_text()[-3000:]}")
                continue
            print(f"{name} {goal}: {time.monotonic() - began:.0f} s, exit {ran.returncode}", flush=True)
            print(said.read_text()[-3000:], flush=True)  # with the seconds that each phase began at
            if ran.returncode in (0, 3) and ran.stdout.strip():
                place.write_text(ran.stdout)
                place.with_suffix(".failed").unlink(missing_ok=True)
            else:
                succeeded = _failed(place, said.read_text()[-3000:])
            report = output / "report.html"
            if report.exists():
                (state / f"{kind}-{name}-{objective}-{precision}.html").write_bytes(report.read_bytes())
    return succeeded


def _failed(place: Path, why: str) -> bool:
    place.with_suffix(".failed").write_text(why)
    print(why, flush=True)
    return False


def _lane(*, opencl: bool) -> tuple[list[str], dict[str, str], list[str], list[str]]:
    """Return how a tuning starts, its environment, the option that leaves it one card where CUDA_VISIBLE_DEVICES does, and all targets.

    OpenCL may show all cards where CUDA shows one.
    """
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    for what, start, environment in _wider(dict(os.environ)):
        found = _targets(start, environment)
        shown = [name for name in found if name.startswith("openvino:GPU")]
        if shown or not opencl:
            print(f"in {what} a worker finds {', '.join(found)}", flush=True)
            break
        print(f"in {what} no worker finds OpenVINO's GPU: {', '.join(found)}", flush=True)
    cuda = f"onnxruntime:CUDA:{mine}" if mine.isdigit() and "CUDA_VISIBLE_DEVICES" not in environment else "onnxruntime:CUDA:0"
    graphics = f"openvino:GPU.{mine}" if len(shown) > 1 and mine.isdigit() else "openvino:GPU.0"
    wanted = ["openvino:CPU", "onnxruntime:CPU", cuda, *([graphics] if shown else [])]
    return start, environment, ["--targets", ",".join(wanted)] if mine.isdigit() and set(wanted) <= set(found) else [], found


def _wider(given: dict[str, str]) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yield ways to start a command: in its lane, on all cores, with all cards, with both."""
    all_cards = {name: value for name, value in given.items() if name != "CUDA_VISIBLE_DEVICES"}
    wide = [sys.executable, "-c", _WIDE]
    yield from (("its lane", [], given), ("its lane on all cores", wide, given))
    yield from (("its lane with all cards", [], all_cards), ("no lane", wide, all_cards))


def _targets(start: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    command = [*start, sys.executable, "-c", _TARGETS]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_LOOK_LIMIT_S, env=environment).stdout.split()
    except subprocess.TimeoutExpired:
        return []


def tuned_bundle(
    path: Path, output: Path, *, targets: str, options: tuple[str, ...], budget: str, objective: str = "throughput"
) -> Path | str:
    """Tune a model on some targets; return the bundle, or why there is none. One that is there already is kept."""
    if output.exists():
        return output
    command = [sys.executable, "-m", "aivmm", "tune", str(path), "--objective", objective, "--targets", targets, "--budget", budget]
    command += [*options, "--json", "-o", str(output), "--db", str(output.with_suffix(".db"))]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TUNE_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        print(*map(_text, (error.stdout, error.stderr)), flush=True)  # how far it came
        return f"no end within {_TUNE_LIMIT_S} s"
    output.with_suffix(".json").write_text(ran.stdout)
    print(ran.stdout, ran.stderr, flush=True)  # what outlives the machine: why this is the plan, and when each phase began
    return output if ran.returncode == 0 else (ran.stderr.strip() or ran.stdout)[-400:]


def _text(said: str | bytes | None) -> str:
    """Return what a process had said when its time ended: bytes on POSIX, whatever was asked for."""
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def bundle_for_cards(folder: Path, name: str, count: int) -> Path:
    """Return where a model tuned for so many cards is."""
    return folder / f"{name}-{count}.aivmm"


def tune_for_cards(folder: Path, shared: Path, *, models: Sequence[str], budget: str, count: int) -> dict[str, Path | str]:
    """Tune each model for throughput on one card or on two, so that the two bundles can be raced later; return them by model."""
    found = {}
    for name in models:
        place = folder / f"models-for-{count}"  # another step may be writing the same model for as many
        place.mkdir(parents=True, exist_ok=True)
        options = ("--precisions", "fp32,fp16", *(("--dim", "seq=128") if name == "bert" else ()))
        output, targets = bundle_for_cards(folder, name, count), ",".join(_TWO_CARDS[:count])
        found[name] = tuned_bundle(model_file(name, place, shared), output, targets=targets, options=options, budget=budget)
        print(f"{name} on {count}: {found[name]}", flush=True)
    return found


def engine_steps(bundle: Path, feed: Mapping[str, Any]) -> tuple[Any, int, list[Step]]:
    """Load a bundle; return its engine, its batch, and a step for each caller that its numbers hold for."""
    from aivmm.runtime.engine import Engine

    running = Engine.load(bundle, cache=False)
    rows = running.plan.batch
    feeds = [{name: np.resize(value, (rows, *value.shape[1:])) for name, value in feed.items()} for _ in range(running.plan.callers)]
    return running, rows, [partial(running.run, each) for each in feeds]


def feed_for(name: str, folder: Path, shared: Path) -> dict[str, Any]:
    """Return inputs of batch 1 for a model."""
    return feed_of(fixed(model_file(name, folder, shared), 1))


def two_tuned(folder: Path, shared: Path, *, models: Sequence[str], budget: str, state: Path) -> bool:
    """Race the plan that a tune finds on two cards against the one that the same tune finds on one, each with its own callers.

    What is there already of other models stays. Return whether all were raced.
    """
    place = state / "two_tuned.json"
    found: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    for name in models:
        steps, plans, running = {}, {}, []
        for count, label in _LABELS.items():
            bundle = tune_for_cards(folder, shared, models=[name], budget=budget, count=count)[name]
            if isinstance(bundle, str):
                plans[label] = f"no plan: {bundle}"
                continue
            made, rows, calls = engine_steps(bundle, feed_for(name, folder, shared))
            running.append(made)
            steps[label] = (rows, calls)
            plans[label] = made.plan.verdict
        found[name] = {"rates": race(steps, rounds=5, seconds=0.6) if len(steps) == 2 else {}, "plans": plans}
        for each in running:
            each.close()
        place.write_text(json.dumps(found))
        print(f"{name}: {json.dumps(found[name])[:1500]}", flush=True)
    return all(found[name]["rates"] for name in models)


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
