"""Running a bundle from the command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from aivmm.errors import UsageError
from aivmm.runtime.backend import Buffer
from aivmm.runtime.engine import Engine
from aivmm.runtime.many import ShapedEngine, load_one
from aivmm.tensors import TensorSpec

_PREVIEW = 6


def run_bundle(
    plan: Path,
    inputs: Path | None,
    output: Path | None,
    repeat: int,
    *,
    model: str | None = None,
    bucket: str | None = None,
    keys: Sequence[Path] = (),
    trace: Path | None = None,
) -> dict[str, Any]:
    """Run the bundle at `plan` `repeat` times and return what came out, as `aivmm run --json` gives it.

    Of a plan in several shapes `bucket` names one; else inputs choose it, and without any it is the first. `trace` is where a recording of
    the stages goes.

    Raises:
        AivmmError: the bundle does not load, the inputs do not fit, or the outputs cannot be written.
    """
    with load_one(plan, model, require_signature=list(keys) or None) as engine:
        if bucket is not None or inputs is None:
            bucket, chosen = shape_of(engine, bucket)
            arrays = inputs_for(chosen.inputs, inputs)
        else:
            arrays = inputs_for(engine.inputs, inputs)
        durations = []
        outputs: dict[str, Buffer] = {}
        with nullcontext() if trace is None else engine.trace() as recording:
            for _ in range(repeat):
                started = time.perf_counter()
                outputs = engine.run(arrays)
                durations.append(time.perf_counter() - started)
        used, one = _used(engine, arrays)
        stats = engine.stats()
        result = {
            "schema": 1,
            "model": one.plan.model.name,
            "bucket": used,
            "buckets": [] if isinstance(engine, Engine) else list(engine.engines),
            "targets": list(dict.fromkeys(each.target for stage in one.stages for each in stage.everywhere())),
            "validity": stats["validity"],
            "runs": repeat,
            "median_s": median(durations),
            "load_s": stats["load_s"],
            "outputs": [
                {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "preview": _preview(array)}
                for name, array in outputs.items()
            ],
            "events": list(engine.events),
        }
    if output:
        _write(output, outputs)
        result["written"] = str(output)
    if trace is not None and recording is not None:
        result["trace"] = str(recording.write(trace))
    return result


def inputs_for(specs: Sequence[TensorSpec], path: Path | None) -> dict[str, Buffer]:
    """Return the inputs that a file holds for `specs`, or random ones.

    Raises:
        UsageError: the file cannot be read, or does not fit.
    """
    return _read(path, tuple(specs)) if path else _random(tuple(specs))


def shape_of(loaded: Engine | ShapedEngine, name: str | None) -> tuple[str | None, Engine]:
    """Return one of the shapes of a plan, by default the first, with its engine; a plan of one shape has no name for it.

    Raises:
        UsageError: there is no such shape.
    """
    if isinstance(loaded, Engine):
        if name is not None:
            raise UsageError(f"there is no shape {name!r}: the plan has one only", advice="leave --bucket out")
        return None, loaded
    if name is None:
        name = next(iter(loaded.engines))
    if name not in loaded.engines:
        raise UsageError(f"there is no shape {name!r}", advice=f"the plan has {', '.join(map(repr, loaded.engines))}")
    return name, loaded.engines[name]


def _used(engine: Engine | ShapedEngine, arrays: dict[str, Buffer]) -> tuple[str | None, Engine]:
    """Return the shape that took `arrays`, or "fallback", with its engine."""
    if isinstance(engine, Engine):
        return None, engine
    name = engine.bucket_of(arrays)
    if name is not None:
        return name, engine.engines[name]
    assert engine.fallback is not None
    return "fallback", engine.fallback


def _read(path: Path, specs: tuple[TensorSpec, ...]) -> dict[str, Buffer]:
    from aivmm.models.inputs import load_inputs

    return load_inputs(path, specs)[0]


def _write(path: Path, outputs: dict[str, Buffer]) -> None:
    odd = next((name for name in outputs if "/" in name or "\\" in name or name == "file"), None)
    # Names from a model become members of an archive here: those that are not plain go by number.
    stored: dict[str, Any] = outputs if odd is None else {f"output_{index}": array for index, array in enumerate(outputs.values())}
    try:
        with path.open("wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                **{name: array.astype(str) if array.dtype.kind == "O" else array for name, array in stored.items()},
            )
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}", advice="choose another file with -o") from error


def _random(specs: tuple[TensorSpec, ...]) -> dict[str, Buffer]:
    generator = np.random.default_rng(0)
    made: dict[str, Buffer] = {}
    for spec in specs:
        shape = tuple(1 if extent is None else extent for extent in spec.shape)
        if spec.dtype == "string":
            made[spec.name] = np.full(shape, "text", dtype=object)
        elif np.dtype(spec.dtype).kind == "f":
            made[spec.name] = np.asarray(generator.standard_normal(shape)).astype(spec.dtype)
        else:
            # Zeros are valid indices, flags and lengths in nearly all models; real ones come with --inputs.
            made[spec.name] = np.zeros(shape, dtype=spec.dtype)
    return made


def _preview(array: Buffer) -> str:
    flat = np.asarray(array).ravel()[:_PREVIEW]
    shown = ", ".join(f"{each:.4g}" if isinstance(each, np.floating) else str(each) for each in flat)
    return f"[{shown}{', ...' if np.asarray(array).size > _PREVIEW else ''}]"
