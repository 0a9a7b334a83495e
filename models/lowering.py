"""Lowers a prepared model to another precision: one lowering, by one recipe, in whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from aivmm.errors import AivmmError, Unsupported, UsageError
from aivmm.models import lowering_model as shared
from aivmm.models.lowering_recipes import Recipe

Sample = Mapping[str, npt.NDArray[Any]]

# Blocks of weights that share a scale came with opset 21, convolutions of bfloat16 with opset 22.
_OPSETS = {"int4": 21, "bf16": 22}
_PLAIN_OPSET = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """A lowered model that was made."""

    path: Path
    recipe: str
    precision: str
    nodes: int  # operators that compute on lowered values or weights
    weight_bytes: int  # of all weights, as stored
    duration_s: float  # of lowering it
    notes: tuple[str, ...] = ()


def lower(model: Path, destination: Path, recipe: Recipe, samples: Sequence[Sample], *, whole: Path | None = None) -> Lowered:
    """Write the prepared `model`, lowered by `recipe` and calibrated on `samples`, to `destination`, in whole or not at all.

    A recipe of a part needs the model lowered by the recipe of the `whole`. The result has the inputs and outputs of `model`: names, types,
    shapes. Weights beyond one file's size go to `<destination>.data`.
    Native, slow code that also silences this process' output meanwhile: call it in a worker.

    Raises:
        Unsupported: the recipe does not apply, in one line: no data, nothing to lower, or the tool's own refusal.
        UsageError: the destination cannot be written.
    """
    start = time.perf_counter()
    if recipe.needs_data and not samples:
        raise Unsupported(f"{recipe.name} needs samples to calibrate on")
    with shared.workshop(destination) as folder:
        source = shared.read(model)
        _must_fit(source, samples)
        base = folder / "base.onnx"
        notes: list[str] = []
        shared.save(_base(source, recipe, notes), base)
        made = _made(base, folder / "made.onnx", recipe, samples) if recipe.whole is None else _part(base, whole, recipe)
        source = shared.read(model)
        nodes = shared.finished(made, source)
        if recipe.precision == "int4" and not shared.has_int4(made):
            raise Unsupported(
                "no weight came out in int4: the tool keeps first and last layers, and what does not divide into groups, in int8"
            )
        draft = folder / destination.name
        data = shared.save(made, draft, data=f"{destination.name}.data")
        if recipe.precision != "bf16":  # ONNX Runtime's CPU has next to no operator in it
            shared.must_load(draft)
        shared.put_in_place(draft, data, destination)
        return Lowered(
            path=destination,
            recipe=recipe.name,
            precision=recipe.precision,
            nodes=nodes,
            weight_bytes=shared.weight_bytes(made),
            duration_s=time.perf_counter() - start,
            notes=tuple(notes),
        )


def _must_fit(model: ir.Model, samples: Sequence[Sample]) -> None:
    names = {value.name for value in model.graph.inputs}
    for sample in samples:
        if set(sample) != names:
            raise UsageError(f"a calibration sample has {sorted(sample)}, the model's inputs are {sorted(map(str, names))}")


def _base(source: ir.Model, recipe: Recipe, notes: list[str]) -> ir.Model:
    before = source.opset_imports.get("", 0)
    base = shared.ready(source, _OPSETS.get(recipe.precision, _PLAIN_OPSET))
    after = base.opset_imports.get("", 0)
    if before != after:
        notes.append(f"opset {before} raised to {after}")
    return base


def base_of(model: Path, recipe: Recipe, notes: list[str] | None = None) -> ir.Model:
    """Return the model as the recipe's tool is given it: names of nodes and values are those that lowered models keep."""
    return _base(shared.read(model), recipe, [] if notes is None else notes)


def _part(base: Path, whole: Path | None, recipe: Recipe) -> ir.Model:
    from aivmm.models.lowering_parts import mixed

    if whole is None:
        raise ValueError(f"{recipe.name} is a part of a lowered model that was not given")
    return mixed(shared.read(base), shared.read(whole), recipe.plain)


def _made(base: Path, out: Path, recipe: Recipe, samples: Sequence[Sample]) -> ir.Model:
    """What the tool makes of the model at `base`; `out` is for tools that write files."""
    options = dict(recipe.options)
    try:
        if recipe.tool == "nncf":
            from aivmm.models import lowering_nncf

            return ir.from_proto(
                lowering_nncf.compress_weights(base, options) if "mode" in options else lowering_nncf.quantize(base, samples, options)
            )
        from aivmm.models import lowering_half, lowering_ort

        if recipe.kind == "cast":
            return lowering_half.converted(base, recipe.precision)
        if "calibration" in options:
            lowering_ort.quantize_static(base, out, samples, options)
        elif "bits" in options:
            lowering_ort.quantize_weights(base, out, options)
        else:
            lowering_ort.quantize_dynamic(base, out, options)
        return shared.read(out)
    except (AivmmError, MemoryError, OSError):
        raise
    except Exception as error:  # a tool's refusal may be of any kind: KeyError, ValidationError, RuntimeError of native code
        raise Unsupported(f"{recipe.name}: {shared.one_line(error)}") from error
