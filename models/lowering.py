"""Lowers a prepared model to int8 or int4: the recipes there are, one lowering, and the cache of what was lowered."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from filelock import FileLock

from aivmm.errors import AivmmError, Unsupported, UsageError
from aivmm.models import lowering_model as shared

Sample = Mapping[str, npt.NDArray[Any]]
Option = str | int | float | bool

_FORMAT = 1  # to be raised when the same recipe comes to write another model: old files are then not reused
_PLAIN_OPSET, _BLOCK_OPSET = 17, 21  # blocks of weights that share a scale came with opset 21
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to lower a model. `name` is stable: it stands in cache keys, the database and reports."""

    name: str  # "nncf-mixed"
    precision: str  # "int8" or "int4"
    tool: str  # "nncf" or "onnxruntime"
    options: tuple[tuple[str, Option], ...] = ()
    needs_data: bool = True
    why: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a recipe's name is lower-case words joined by hyphens, not {self.name!r}")

    def digest(self) -> str:
        """Hash of everything that shapes the outcome but the model and the data, the tool's version included: 16 hexadecimal digits."""
        said = [_FORMAT, self.name, self.precision, sorted(self.options), self.tool, _version(self.tool)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _version(tool: str) -> str:
    if tool == "onnxruntime":  # it comes under several names
        return str(shared.import_onnxruntime().__version__)
    return importlib.metadata.version(tool)


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


def _recipe(name: str, tool: str, why: str, *, precision: str = "int8", needs_data: bool = True, **options: Option) -> Recipe:
    return Recipe(name=name, precision=precision, tool=tool, options=tuple(sorted(options.items())), needs_data=needs_data, why=why)


_7BIT = "weights of 7 bits, so that products do not saturate on CPUs without VNNI"
# fmt: off
_RECIPES = {recipe.name: recipe for recipe in (
    _recipe("nncf-mixed", "nncf", "symmetric weights, asymmetric activations, bias correction", preset="mixed"),
    _recipe("nncf-mixed-7bit", "nncf", f"as nncf-mixed, {_7BIT}", preset="mixed", overflow="enable"),
    _recipe("nncf-symmetric", "nncf", "activations symmetric too: cheaper on some devices", preset="performance"),
    _recipe("nncf-transformer", "nncf", "SmoothQuant, attention's own products left alone", preset="mixed", model_type="transformer"),
    _recipe("nncf-transformer-7bit", "nncf", f"as nncf-transformer, {_7BIT}",
            preset="mixed", model_type="transformer", overflow="enable"),
    _recipe("nncf-weights-int8", "nncf", "weights alone: less memory to read", needs_data=False, mode="int8_sym"),
    _recipe("nncf-weights-int4", "nncf", "weights alone, a scale for each 64", precision="int4", needs_data=False,
            mode="int4_sym", group=64),
    _recipe("ort-minmax", "onnxruntime", "full ranges: nothing clipped", calibration="MinMax"),
    _recipe("ort-minmax-7bit", "onnxruntime", f"as ort-minmax, {_7BIT}", calibration="MinMax", reduce=True),
    _recipe("ort-percentile", "onnxruntime", "0.01 % of the values clipped", calibration="Percentile", percentile=99.99),
    _recipe("ort-entropy", "onnxruntime", "ranges that lose the least information", calibration="Entropy"),
    _recipe("ort-products", "onnxruntime", "products with weights alone", calibration="MinMax", operators="products",
            constant_only=True),
    _recipe("ort-products-7bit", "onnxruntime", f"as ort-products, {_7BIT}", calibration="MinMax", operators="products",
            constant_only=True, reduce=True),
    _recipe("ort-dynamic", "onnxruntime", "products with weights, ranges taken at each run", needs_data=False),
    _recipe("ort-dynamic-7bit", "onnxruntime", f"as ort-dynamic, {_7BIT}", needs_data=False, reduce=True),
    _recipe("ort-weights-int8", "onnxruntime", "weights alone, a scale for each 32", needs_data=False, bits=8, block=32,
            form="QOperator", accuracy_level=4),
    _recipe("ort-weights-int4", "onnxruntime", "weights alone, a scale for each 32", precision="int4", needs_data=False,
            bits=4, block=32),
    _recipe("ort-weights-int4-fused", "onnxruntime", "as ort-weights-int4, in ONNX Runtime's own operator", precision="int4",
            needs_data=False, bits=4, block=32, form="QOperator", accuracy_level=4),
)}
# fmt: on

# A first guess from cosines on the demo models (times were too noisy to rank by); which one wins differs by model and CPU: try several.
_CONVOLUTIONAL = ("nncf-mixed", "ort-minmax", "nncf-mixed-7bit", "nncf-symmetric", "ort-minmax-7bit", "ort-percentile", "ort-entropy")
_WEIGHTS = ("ort-dynamic", "ort-dynamic-7bit", "nncf-weights-int8", "ort-weights-int8")
_TRANSFORMER = ("nncf-transformer", "nncf-mixed", "ort-products", "nncf-transformer-7bit", "ort-products-7bit", *_WEIGHTS)
_DENSE = ("nncf-mixed", "ort-products", "nncf-mixed-7bit", "ort-products-7bit", *_WEIGHTS)
_INT8 = {
    "CNN": _CONVOLUTIONAL,
    "language transformer": _TRANSFORMER,
    "vision transformer": _TRANSFORMER,
    "RNN/speech": _DENSE,
    "recommender": _DENSE,
}
_INT4 = ("ort-weights-int4", "nncf-weights-int4", "ort-weights-int4-fused")


def recipes(precision: str, category: str, *, saturates: bool = False) -> tuple[Recipe, ...]:
    """Return the ways to lower a model of `category` (as `category.detect` names it) to "int8" or "int4", the best default first.

    `saturates` says that sums of int8 products overflow 16 bits on the CPU, as on x86 without VNNI: weights of 7 bits then come first.

    Raises:
        UsageError: no such precision can be lowered to.
    """
    if precision not in ("int8", "int4"):
        raise UsageError(f"no recipe lowers a model to {precision!r}", advice="choose from int8, int4")
    names: Sequence[str] = _INT4 if precision == "int4" else _INT8.get(category, _DENSE)
    if saturates:
        names = sorted(names, key=lambda name: not name.endswith("-7bit"))
    return tuple(_RECIPES[name] for name in names)


def lower(model: Path, destination: Path, recipe: Recipe, samples: Sequence[Sample]) -> Lowered:
    """Write the prepared `model`, lowered by `recipe` and calibrated on `samples`, to `destination`, in whole or not at all.

    The result has the inputs and outputs of `model`: names, types, shapes. Weights beyond one file's size go to `<destination>.data`.
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
        made = _made(base, folder / "made.onnx", recipe, samples)
        source = shared.read(model)
        nodes = shared.finished(made, source)
        draft = folder / destination.name
        data = shared.save(made, draft, data=f"{destination.name}.data")
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
    base = shared.ready(source, _BLOCK_OPSET if recipe.precision == "int4" else _PLAIN_OPSET)
    after = base.opset_imports.get("", 0)
    if before != after:
        notes.append(f"opset {before} raised to {after}")
    return base


def _made(base: Path, out: Path, recipe: Recipe, samples: Sequence[Sample]) -> ir.Model:
    """What the tool makes of the model at `base`; `out` is for tools that write files."""
    options = dict(recipe.options)
    try:
        if recipe.tool == "nncf":
            from aivmm.models import lowering_nncf

            return ir.from_proto(
                lowering_nncf.compress_weights(base, options) if "mode" in options else lowering_nncf.quantize(base, samples, options)
            )
        from aivmm.models import lowering_ort

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


# --- cache


def lower_cached(model: Path, folder: Path, recipe: Recipe, samples: Sequence[Sample], *, content: str) -> Lowered:
    """Return the lowered model from `folder`, made now if it is not there; `content` is the content hash of `model`.

    A second process that wants the same waits for the first. What a killed process left is swept, and a file that is not as it was
    written is made again. A refusal is remembered too.

    Raises:
        Unsupported, UsageError: as `lower` does.
    """
    key = _key(recipe, samples if recipe.needs_data else (), content)
    path = folder / f"{recipe.name}-{key}.onnx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{path.name}.lock"):
            _sweep(path)
            known = _known(path)
            if known is None:
                known = _lower_and_record(model, path, recipe, samples)
    except OSError as error:
        reason = error.strerror or shared.one_line(error)
        raise UsageError(f"cannot keep lowered models in {folder}: {reason}", advice="choose a folder that can be written") from error
    if isinstance(known, str):
        raise Unsupported(known)
    return known


def _key(recipe: Recipe, samples: Sequence[Sample], content: str) -> str:
    said = "\0".join([content, recipe.digest(), calibration_digest(samples)])
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def calibration_digest(samples: Sequence[Sample]) -> str:
    """Hash of the samples: their order, names, types, shapes and values."""
    digest = hashlib.sha256(str(len(samples)).encode())
    for sample in samples:
        for name in sorted(sample):
            array = np.ascontiguousarray(sample[name])
            digest.update(json.dumps([name, array.dtype.name, list(np.shape(sample[name]))]).encode())
            digest.update(json.dumps(array.astype(str).tolist()).encode() if array.dtype.hasobject else array.tobytes())
    return digest.hexdigest()


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _sweep(path: Path) -> None:
    """Remove what killed processes left of this key; the lock is held, so that nobody works there."""
    for left in path.parent.glob(f"{shared.workshop_prefix(path)}*"):
        shutil.rmtree(left, ignore_errors=True)
    _record_of(path).with_suffix(".part").unlink(missing_ok=True)


def _known(path: Path) -> Lowered | str | None:
    """What was made before, or why it could not be; None when it is not known, or not as it was written."""
    try:
        record = json.loads(_record_of(path).read_text(encoding="utf-8"))
        if "refused" in record:
            return str(record["refused"])
        if record["files"] != _files(path):
            return None
        made = record["made"]
        return Lowered(**{**made, "path": path, "notes": tuple(made["notes"])})
    except (OSError, ValueError, KeyError, TypeError):  # absent, half written, or written by hand
        return None


def _files(path: Path) -> dict[str, list[int | str]]:
    """Size and SHA-256 of the model file, and of its weights' file if it has one."""
    found: dict[str, list[int | str]] = {}
    for role, file in (("model", path), ("data", path.with_name(f"{path.name}.data"))):
        if role == "model" or file.exists():
            with file.open("rb") as stream:
                found[role] = [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
    return found


def _lower_and_record(model: Path, path: Path, recipe: Recipe, samples: Sequence[Sample]) -> Lowered | str:
    record = _record_of(path)
    record.unlink(missing_ok=True)  # it does not tell of what is written next
    try:
        made = lower(model, path, recipe, samples)
    except Unsupported as refusal:
        _write_record(record, {"refused": str(refusal)})
        return str(refusal)
    told = {**asdict(made), "path": path.name}
    _write_record(record, {"made": told, "files": _files(path)})
    return made


def _write_record(record: Path, told: Mapping[str, object]) -> None:
    draft = record.with_suffix(".part")
    with draft.open("w", encoding="utf-8") as stream:
        json.dump(told, stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(record)
