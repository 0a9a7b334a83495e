"""What a worker can be asked to do. Each operation takes the worker's state and JSON values, and returns a JSON object."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from aivmm.models.input_contract import InputContract
from aivmm.probes import conformance, contention, copies, fusion, operator_probes, phases, serving, transfers, wire
from aivmm.probes.accuracy import combined, judge, narrowed
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.device_memory import memory_of
from aivmm.probes.lowering import lower, noise, rebatch, sensitivity
from aivmm.probes.machine import peak_memory_bytes
from aivmm.probes.runners import EngineRunner, ExecutableRunner, Runner, State
from aivmm.probes.timer import held, outspin, time_steps
from aivmm.probes.user_code import check_metric, dataset, metric
from aivmm.runtime.backend import Backend, Buffer, Executable, ExplainsStrays
from aivmm.runtime.config import Config
from aivmm.runtime.engine import Engine
from aivmm.runtime.null_device import METER
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target

_CALLS = 1000  # so many of the last calls of an engine are told of


def discover(state: State, *, backends: list[str]) -> dict[str, Any]:
    """List the targets of `backends`."""
    return {"targets": [wire.target_out(each) for name in backends for each in load_backend(name).targets()]}


def knobs(state: State, *, target: dict[str, Any]) -> dict[str, Any]:
    """List the knobs of a target."""
    found = wire.target_in(target)
    assert isinstance(found, Target)
    return {"knobs": [wire.knob_out(each) for each in load_backend(found.runtime).knobs(found)]}


def baselines(state: State, *, targets: list[dict[str, Any]], objective: str, backends: list[str]) -> dict[str, Any]:
    """List the baselines of the targets."""
    real = [each for each in map(wire.target_in, targets) if isinstance(each, Target)]
    found = [each for name in backends for each in load_backend(name).baselines(real, objective)]
    return {
        "baselines": [
            {"name": each.name, "target": wire.target_out(each.target), "config": wire.config_out(each.config), "callers": each.callers}
            for each in found
        ]
    }


def prepare(
    state: State,
    *,
    source: str,
    destination: str,
    shapes: dict[str, list[int]],
    dims: dict[str, int],
    batch: int,
    contract: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Prepare a model file; see `models.prepare`."""
    from aivmm.models.prepare import prepare as prepare_model

    bound = {name: tuple(shape) for name, shape in shapes.items()}
    asked = InputContract() if contract is None else wire.contract_in(contract)
    return {"facts": wire.facts_out(prepare_model(Path(source), Path(destination), shapes=bound, dims=dims, batch=batch, contract=asked))}


def demo(state: State, *, name: str, folder: str) -> dict[str, Any]:
    """Write a demo model."""
    from aivmm.models.demo import write_demo

    return {"path": str(write_demo(name, Path(folder)))}


def samples(state: State, *, model: str, specs: list[dict[str, Any]], destinations: list[str], seed: int) -> dict[str, Any]:
    """Make sample inputs that suit the model, one file each."""
    import onnx

    from aivmm.models.inputs import make_inputs

    made = make_inputs(onnx.load(model, load_external_data=False), wire.specs_in(specs), seed=seed, count=len(destinations))
    for path, arrays in zip(destinations, made, strict=True):
        save_arrays(path, arrays)
    return {}


def compile_model(
    state: State,
    *,
    name: str,
    model: str,
    target: dict[str, Any],
    config: dict[str, Any],
    inputs: str,
    reference: str = "",
    callers: int = 1,
    replicas: int = 1,
) -> dict[str, Any]:
    """Compile a model, `replicas` times, run it once, and judge its outputs against `reference` where one is given."""
    where = wire.target_in(target)
    assert isinstance(where, Target)
    backend = load_backend(where.runtime)
    arrays = load_arrays(inputs)
    memory = memory_of(backend, where, state.contexts)
    started = time.perf_counter()
    executable, *more = _compiled(backend, Path(model), where, wire.config_in(config), replicas)
    compiled = time.perf_counter()
    phases.enter(phases.RUN)
    runner = ExecutableRunner(executable, arrays, callers, more=more)
    bound = time.perf_counter()
    runner.steps[0]()
    first = time.perf_counter() - bound
    answer: dict[str, Any] = {
        "compile_s": compiled - started,
        "first_inference_s": first,
        "inputs": wire.specs_out(tuple(executable.inputs)),
        "outputs": wire.specs_out(tuple(executable.outputs)),
        "effective_config": dict(executable.effective_config),
        "devices": list(executable.placement.devices),
        "nodes": dict(executable.placement.nodes),
        "stray": list(executable.placement.stray)[:50],
        "strays": len(executable.placement.stray),
    }
    if memory is not None:
        answer["device_memory_bytes"] = memory.look() or None  # 0 where what told before tells no more
        state.memories[name] = memory
    if reference:
        answer |= _judged(runner.outputs(arrays), reference)
    state.runners[name] = runner
    return answer


def _compiled(backend: Backend, model: Path, target: Target, config: Config, replicas: int) -> list[Executable]:
    found: list[Executable] = []
    try:
        for _ in range(replicas):
            found.append(backend.compile(model, target, config))
    except BaseException:  # not handled, only cleaned up: fewer replicas are not what was asked for
        for each in found:
            each.close()
        raise
    return found


def strays(
    state: State, *, model: str, target: dict[str, Any], config: dict[str, Any], inputs: str = "", folder: str = ""
) -> dict[str, Any]:
    """Say what the nodes cost that a target leaves to the CPU. Without `inputs` suitable ones are made in `folder`.

    Returns `nodes` and `copies`, each with name, operator and seconds, and `call_s`; empty where the backend has no way to tell.
    """
    where = wire.target_in(target)
    assert isinstance(where, Target)
    backend = load_backend(where.runtime)
    if not isinstance(backend, ExplainsStrays):
        return {}
    arrays = load_arrays(inputs or _made_inputs(Path(model), Path(folder)))
    found = backend.strays(Path(model), where, wire.config_in(config), arrays)
    return {
        "nodes": [[each.node, each.op_type, each.seconds] for each in found.nodes],
        "copies": [[each.node, each.op_type, each.seconds] for each in found.copies],
        "call_s": found.call_s,
    }


def accepts(state: State, *, model: str, target: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Compile a model and drop it: a target that refuses it raises Unsupported."""
    where = wire.target_in(target)
    assert isinstance(where, Target)
    load_backend(where.runtime).compile(Path(model), where, wire.config_in(config)).close()
    return {}


def load_bundle(state: State, *, name: str, bundle: str, inputs: str, reference: str = "") -> dict[str, Any]:
    """Load a bundle with the engine, run it once, and judge its outputs against `reference` where one is given."""
    arrays = load_arrays(inputs)
    started = time.perf_counter()
    engine = Engine.load(bundle, cache=False)  # what compiling costs is part of the answer
    loaded = time.perf_counter()
    phases.enter(phases.RUN)
    runner = EngineRunner(engine, arrays)
    engine.run(arrays)
    answer: dict[str, Any] = {
        "load_s": loaded - started,
        "compile_s": engine.load_s,
        "first_inference_s": time.perf_counter() - loaded,
        "events": engine.events,
    }
    if reference:
        answer |= _judged_everywhere(runner, arrays, reference)
    state.runners[name] = runner
    return answer


def load_cached(state: State, *, bundle: str) -> dict[str, Any]:
    """Load a bundle as production's second start does: with its compiled stages in the engine's cache, here one that is thrown away.

    Returns `load_s`, how many stages were `found` there, and the cache's `problems`.
    """
    kept = os.environ.get("AIVMM_CACHE")
    with tempfile.TemporaryDirectory(prefix="aivmm-stages-", ignore_cleanup_errors=True) as folder:  # Windows keeps what is mapped
        os.environ["AIVMM_CACHE"] = folder
        try:
            Engine.load(bundle).close()
            started = time.perf_counter()
            engine = Engine.load(bundle)
            seconds = time.perf_counter() - started
            cache = engine.stats()["cache"]
            engine.close()
        finally:
            if kept is None:
                del os.environ["AIVMM_CACHE"]
            else:
                os.environ["AIVMM_CACHE"] = kept
    return {"load_s": seconds, "found": cache["hits"], "problems": cache["problems"]}


def stages(state: State, *, name: str, seconds: float) -> dict[str, Any]:
    """Tell what each stage of a loaded bundle took in its place in the calls so far, and time it alone, on the engine's own buffers.

    Returns `stages`, each with `placed` and `alone`: durations in seconds, those in its place of the same calls for each stage; and
    `beyond`, what single calls of the engine take beyond all of their stages. In its place a stage finds the caches as its neighbours left
    them, and what it takes includes taking over what they made. `seconds` are spent on timing alone, and half as many on `beyond`.
    """
    runner = state.runners[name]
    assert isinstance(runner, EngineRunner)
    lane, clock = max(runner.engine.lanes(), key=lambda each: each.clocks[0].count), time.perf_counter
    if runner.simulated:  # neighbours cost nothing there
        exact = [_simulated(run, 5, 1) for run in lane.runs]
        beyond_s = median(_simulated(runner.steps[0], 5, 1)) - sum(map(median, exact))
        return {"stages": [{"placed": each, "alone": each} for each in exact], "beyond": [beyond_s]}
    placed = [each.recent_ns()[-_CALLS:] / 1e9 for each in lane.clocks]
    called: list[float] = []
    end = clock() + seconds / 2
    while len(called) < 5 or (clock() < end and len(called) < _CALLS):
        before = clock()
        runner.steps[0]()
        called.append(clock() - before)
    inside = sum(each.recent_ns()[-len(called) :] / 1e9 for each in lane.clocks)
    alone = [time_steps([run], seconds=seconds / len(placed), least=5, settle=3, each=True).durations for run in lane.runs]
    return {
        "stages": [{"placed": one.tolist(), "alone": other} for one, other in zip(placed, alone, strict=True)],
        "beyond": (np.array(called) - inside).tolist(),
    }


def outputs(state: State, *, name: str, inputs: str, destination: str, everywhere: bool = False) -> dict[str, Any]:
    """Run once on the arrays in `inputs` and write the outputs to `destination`; returns the `files`.

    With `everywhere`, and stages that have copies, run once through each: the files beyond the first are numbered. Their order is the same
    in each call.
    """
    runner, arrays = state.runners[name], load_arrays(inputs)
    found = _everywhere(runner, arrays) if everywhere else [runner.outputs(arrays)]
    files = [destination, *(f"{destination.removesuffix('.npz')}-copy{index}.npz" for index in range(1, len(found)))]
    for file, each in zip(files, found, strict=True):
        save_arrays(file, each)
    return {"files": files}


def judge_again(state: State, *, name: str, inputs: str, reference: str) -> dict[str, Any]:
    """Run what is loaded on other inputs and judge the outputs."""
    return _judged_everywhere(state.runners[name], load_arrays(inputs), reference)


def _everywhere(runner: Runner, inputs: Mapping[str, Buffer]) -> list[dict[str, Buffer]]:
    return runner.each_outputs(inputs) if isinstance(runner, EngineRunner) else [runner.outputs(inputs)]


def _judged_everywhere(runner: Runner, inputs: Mapping[str, Buffer], reference: str) -> dict[str, Any]:
    """Judge what a runner answers; where it runs in several places, by the worst of them."""
    judged = [_judged(each, reference) for each in _everywhere(runner, inputs)]
    problem = next((each["problem"] for each in judged if each["problem"]), "")
    return {"accuracy": combined([each["accuracy"] for each in judged]), "problem": problem}


def _judged(outputs: Mapping[str, Buffer], reference: str) -> dict[str, Any]:
    expected = load_arrays(reference)
    accuracy = judge(outputs, expected)
    return {"accuracy": accuracy.metrics(), "problem": accuracy.problem or narrowed(outputs, expected)}


def arithmetic_energy(state: State, *, name: str) -> dict[str, Any]:
    """Call once what is loaded under `name` on null devices; return the `joules` and simulated `seconds` of the call."""
    before = METER.read()
    state.runners[name].steps[0]()
    joules, seconds = (after - earlier for after, earlier in zip(METER.read(), before, strict=True))
    return {"joules": joules, "seconds": seconds}


def timed(
    state: State,
    *,
    name: str,
    seconds: float,
    least: int = 2,
    most: int = 10_000,
    settle: int = 2,
    each: bool = False,
    repeat: int = 1,
    steady_s: float = 0.0,
    outspin_s: float = 0.0,
    core: int | None = None,
    tight: float = 0.0,
    window: bool = False,
) -> dict[str, Any]:
    """Time what is loaded under `name`; see `timer.time_steps`. Also tells the worker's peak memory in bytes.

    With `outspin_s` it is called before until threads of something else that is loaded here spin no more, for so long at most. With a
    `core`, what is loaded must run on the calling thread alone, and is kept on that core, or on the one where it is when `core` is -1; the
    answer says on which.
    """
    steps = state.runners[name].steps
    if state.runners[name].simulated:
        return {
            "durations": _simulated(steps[0], max(least, 3), repeat),
            "warmup": [],
            "inner": 1,
            "memory_bytes": peak_memory_bytes(),
            "core": -1,
        }
    if outspin_s:
        outspin(steps[0], outspin_s)
    with held(steps[0], core) if core is not None else nullcontext(-1) as kept_on:
        timing = time_steps(
            steps,
            seconds=seconds,
            least=least,
            most=most,
            settle=settle,
            each=each,
            repeat=repeat,
            steady_s=steady_s,
            tight=tight,
            window=window,
        )
    return {
        "durations": timing.durations,
        "warmup": timing.warmup,
        "inner": timing.inner,
        "memory_bytes": peak_memory_bytes(),
        "device_memory_bytes": state.memories[name].look() if name in state.memories else None,
        "core": kept_on,
    }


def _simulated(step: Callable[[], object], count: int, repeat: int) -> list[float]:
    """Return the simulated seconds of so many calls, in each of which null devices ran; the machine's own speed is not in them."""
    durations = []
    for _ in range(count):
        _, before = METER.read()
        for _ in range(repeat):
            step()
        durations.append(METER.read()[1] - before)
    return durations


def probe(
    state: State,
    *,
    model: str,
    target: dict[str, Any],
    config: dict[str, Any],
    inputs: str = "",
    reference: str = "",
    seconds: float = 0.02,
) -> dict[str, Any]:
    """Compile, judge, time and drop one small model (an operator or a segment). Without `inputs` suitable ones are made."""
    path = inputs
    name = "\0probe"
    if not path:
        path = _made_inputs(Path(model))
    try:
        answer = compile_model(state, name=name, model=model, target=target, config=config, inputs=path, reference=reference)
        answer |= timed(state, name=name, seconds=seconds, least=3, settle=2)
    finally:
        close(state, name=name)
        if not inputs:
            Path(path).unlink()
    return answer


def _made_inputs(model: Path, folder: Path | None = None) -> str:
    import onnx

    from aivmm.models.inputs import make_inputs
    from aivmm.runtime.onnx_interface import read_interface

    path = (folder or model.parent) / f"{model.stem}.inputs.npz"
    save_arrays(path, make_inputs(onnx.load(str(model), load_external_data=False), read_interface(model).inputs, seed=0)[0])
    return str(path)


def close(state: State, *, name: str) -> dict[str, Any]:
    """Free what `name` holds."""
    state.memories.pop(name, None)
    runner = state.runners.pop(name, None)
    if runner is not None:
        runner.close()
    return {}


def memory(state: State) -> dict[str, Any]:
    """Return the worker's own peak resident memory."""
    return {"peak_bytes": peak_memory_bytes()}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "arithmetic_energy": arithmetic_energy,
    "accepts": accepts,
    "baselines": baselines,
    "check_metric": check_metric,
    "close": close,
    "compile": compile_model,
    "dataset": dataset,
    "demo": demo,
    "discover": discover,
    "judge": judge_again,
    "knobs": knobs,
    "load_bundle": load_bundle,
    "load_cached": load_cached,
    "lower": lower,
    "noise": noise,
    "sensitivity": sensitivity,
    "memory": memory,
    "metric": metric,
    "outputs": outputs,
    "prepare": prepare,
    "probe": probe,
    "rebatch": rebatch,
    "samples": samples,
    "stages": stages,
    "strays": strays,
    "timed": timed,
    **conformance.OPERATIONS,
    **operator_probes.OPERATIONS,
    **transfers.OPERATIONS,
    **copies.OPERATIONS,
    **fusion.OPERATIONS,
    **serving.OPERATIONS,
    **contention.OPERATIONS,
}
