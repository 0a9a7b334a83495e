"""What a worker does for operators: several small models in one request, and the values that tensors have inside the whole model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aivmm.errors import AivmmError, Unsupported
from aivmm.probes import phases, wire
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.machine import wait_until_quiet
from aivmm.probes.runners import ExecutableRunner, State
from aivmm.runtime.backend import Backend, Buffer, Executable, aligned_empty
from aivmm.runtime.cpu import usable_cores
from aivmm.runtime.onnx_interface import read_interface
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target
from aivmm.tensors import TensorSpec

_LEAST = 5  # durations of each operator,
_SLOW_S, _SLOW_LEAST = 0.1, 3  # but not so many of one that takes so long
_TIGHT = 0.01  # of the median: what is known so well is not timed any longer
_POOLED = 1 << 16  # elements: larger inputs repeat as many random ones
_COMPILERS = 4  # threads; more only wait for each other
_LATE = {"late": "there was no time left for it"}


@dataclass(slots=True)
class _Ready:
    """An operator that is compiled and waits for its turn."""

    executable: Executable
    inputs: Mapping[str, Buffer]
    dense: Sequence[TensorSpec]  # the inputs that are made when its turn has come, by the thread that runs it
    compile_s: float


def probe_operators(
    state: State,
    *,
    models: Sequence[Mapping[str, str]],
    target: dict[str, Any],
    config: dict[str, Any],
    seconds: float,
    least: int = _LEAST,
    within_s: float = math.inf,
) -> dict[str, Any]:
    """Compile `models` side by side, then time them one after another, each for `seconds` and at least `least` times.

    `within_s` is how long all of this may take: what is slow then runs fewer times, and what has no time left is not timed, nor stored: its
    answer is `late`. The first model runs once in any case, since nobody knows before how long that takes.

    Each of `models` has a `path`, and where its inputs' values matter a file of arrays, `values`; the other inputs are made up. Answers
    come in the same order: what `probe` of one model gives, or `refused` with the runtime's words. Compiling is native code of one thread
    mostly, and takes longer than the timing; while anything is timed, nothing is compiled.
    """
    ends = time.perf_counter() + within_s
    where = wire.target_in(target)
    assert isinstance(where, Target)
    backend = load_backend(where.runtime)
    with ThreadPoolExecutor(max_workers=min(_COMPILERS, usable_cores())) as pool:
        ready = list(pool.map(lambda each: _prepared(backend, where, config, each), models))
    phases.enter(phases.RUN)
    # The threads of what was compiled spin for a while before they sleep.
    wait_until_quiet(os.getpid())
    answers: list[dict[str, Any]] = []
    for index, each in enumerate(ready):
        if isinstance(each, AivmmError):
            answers.append({"refused": each.message})
        elif index and time.perf_counter() > ends:
            each.executable.close()
            answers.append(_LATE)
        else:
            answers.append(_timed(state, each, seconds, least, ends))
        ready[index] = Unsupported("done")  # its memory is free for the next
    return {"answers": answers}


def _prepared(backend: Backend, target: Target, config: dict[str, Any], model: Mapping[str, str]) -> _Ready | AivmmError:
    try:
        path = Path(model["path"])
        inputs, dense = _inputs(path, model.get("values", ""))
        started = time.perf_counter()
        executable = backend.compile(path, target, wire.config_in(config))
        return _Ready(executable=executable, inputs=inputs, dense=dense, compile_s=time.perf_counter() - started)
    except AivmmError as error:
        return error


def _timed(state: State, ready: _Ready, seconds: float, least: int, ends: float) -> dict[str, Any]:
    from aivmm.probes import operations

    name = "\0operator"
    executable = ready.executable
    try:
        dense = {spec.name: _pooled(spec, seed) for seed, spec in enumerate(ready.dense)}
        runner = ExecutableRunner(executable, {**ready.inputs, **dense}, 1, private=dense.keys())
        state.runners[name] = runner
        started = time.perf_counter()
        runner.steps[0]()
        first_s = time.perf_counter() - started
        slow = first_s > _SLOW_S
        if slow:  # one run to settle, and then as many as there is time for
            least = min(least, _SLOW_LEAST, max(0, int(min((ends - time.perf_counter()) / first_s, _SLOW_LEAST + 1)) - 1))
        if not least:
            return _LATE
        answer = operations.timed(state, name=name, seconds=seconds, least=least, settle=1 if slow else 2, tight=_TIGHT)
        return {
            "durations": answer["durations"],
            "compile_s": ready.compile_s,
            "first_inference_s": first_s,
            "effective_config": dict(executable.effective_config),
            "nodes": dict(executable.placement.nodes),
        }
    except AivmmError as error:
        return {"refused": error.message}
    finally:
        state.runners.pop(name, None)
        executable.close()


def _inputs(model: Path, values: str) -> tuple[dict[str, Buffer], list[TensorSpec]]:
    """Return an array for each input of the model, its value inside the whole model where that is known, or else one made up.

    Returned apart are the inputs that take any large tensor; see `_pooled`.
    """
    known = load_arrays(values) if values else {}
    specs = [spec for spec in read_interface(model).inputs if spec.name not in known]
    dense = [spec for spec in specs if _is_dense(spec)]
    others = [spec for spec in specs if not _is_dense(spec)]
    if others:
        import onnx

        from aivmm.models.inputs import make_inputs

        known |= make_inputs(onnx.load(str(model), load_external_data=False), others, seed=0)[0]
    return known, dense


def _is_dense(spec: TensorSpec) -> bool:
    return spec.dtype in ("float32", "float64", "float16") and spec.static and (spec.nbytes or 0) > _POOLED


def _pooled(spec: TensorSpec, seed: int) -> Buffer:
    """Return an aligned array of standard normal numbers, a few over and over.

    Making a million anew takes longer than to run most operators on them.
    """
    array, pool = aligned_empty(spec), _pool(seed, spec.dtype)
    flat = array.reshape(-1)
    whole = flat.size // _POOLED * _POOLED
    flat[:whole].reshape(-1, _POOLED)[...] = pool
    flat[whole:] = pool[: flat.size - whole]
    return array


@lru_cache(maxsize=64)  # 16 MiB
def _pool(seed: int, dtype: str) -> Buffer:
    """Return standard normal numbers, which all operators share: they take longer to make than a runtime to compile one."""
    return np.random.default_rng(seed).standard_normal(_POOLED, dtype=np.float32).astype(dtype)


def tensor_values(
    state: State, *, model: str, target: dict[str, Any], config: dict[str, Any], inputs: str, names: Sequence[str], destination: str
) -> dict[str, Any]:
    """Run the whole model once on the arrays in `inputs`, and write to `destination` those tensors of `names` that it can give.

    What it cannot give, for lack of a known type, is left out. The model gets further outputs, so it is compiled anew, beside the original
    since it may have external data there.
    """
    import onnx

    where = wire.target_in(target)
    assert isinstance(where, Target)
    given = load_arrays(inputs)
    proto = onnx.load(model, load_external_data=False)
    declared = {each.name for each in proto.graph.output}
    inner = {each.name: each for each in proto.graph.value_info}
    asked = [name for name in dict.fromkeys(names) if name in declared or name in inner]
    proto.graph.output.extend(inner[name] for name in asked if name not in declared)
    path = Path(model).with_name(f"{Path(model).stem}.values.onnx")
    try:
        path.write_bytes(proto.SerializeToString())
        executable = load_backend(where.runtime).compile(path, where, wire.config_in(config))
        try:
            phases.enter(phases.RUN)
            outputs = ExecutableRunner(executable, given, 1).outputs(given)
        finally:
            executable.close()
    finally:
        path.unlink(missing_ok=True)
    save_arrays(destination, {name: array for name, array in {**given, **outputs}.items() if name in set(names)})
    return {}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"probe_operators": probe_operators, "tensor_values": tensor_values}
