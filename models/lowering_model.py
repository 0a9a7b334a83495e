"""What every way of lowering shares: the model is made ready for the tool, and what the tool made is checked, counted and written."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from aivmm.errors import Unsupported, UsageError
from aivmm.models.intake_infer import infer_shapes
from aivmm.models.intake_versions import NEWEST_OPSET, convert

if TYPE_CHECKING:
    from onnxruntime import InferenceSession as Session

NEWEST_IR = 13
SINGLE_FILE_BYTES = 2**30 + 2**29  # 1.5 GiB of weights still leave room for the graph below protobuf's 2 GiB

# NumPy's names of ONNX Runtime's "tensor(...)" types, where they differ.
_NUMPY = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(string)": "object"}
_HANDS_ON = frozenset({"Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
# Operators that compute on lowered values in themselves.
_LOWERED = frozenset(
    ["MatMulNBits", "GatherBlockQuantized", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"]
)
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
WORK = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Gather", "Einsum", "Attention"])


def read(path: Path) -> ir.Model:
    """Read a model; external weights stay on disk."""
    return ir.load(path)


def ready(model: ir.Model, opset: int) -> ir.Model:
    """Return the model at `opset` or later, its batch norms folded into the convolutions before them. `model` may be changed.

    A quantized weight is no constant any more, so that a runtime could not fold them later: ONNX Runtime then computes in float.

    Raises:
        Unsupported: the operator set cannot be raised.
    """
    before = model.opset_imports.get("", 0)
    if not before:
        raise Unsupported("the model has no standard operators")
    if before < opset:
        converted = convert(model, opset)
        if not isinstance(converted, ir.Model):
            raise Unsupported(f"opset {before} cannot be raised to {opset}: {converted}")
        model = converted
        infer_shapes(model)
    fold_batch_norms(model)
    _fold_casts(model)
    common.NameFixPass()(model)  # the converter leaves nodes without names, and tools go by them
    return model


def fold_batch_norms(model: ir.Model) -> int:
    """Fold each BatchNormalization whose only source is a Conv with constant weights into it, in place; return how many.

    y = s (W x + b - m) / sqrt(v + e) + t  becomes  W' = W k, b' = (b - m) k + t  with  k = s / sqrt(v + e), per output channel.
    """
    folded = 0
    for norm in [node for node in model.graph if node.op_type == "BatchNormalization" and not node.domain]:
        source = norm.inputs[0]
        conv = source.producer() if source is not None else None
        if conv is None or conv.op_type != "Conv" or conv.domain or len(source.uses()) != 1 or source.is_graph_output():
            continue
        if norm.attributes.get_int("training_mode", 0) or any(value.uses() for value in norm.outputs[1:]):
            continue
        operands = [_constant(value) for value in (conv.inputs[1], *norm.inputs[1:5])]
        bias = _constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.zeros(1, np.float32)
        if bias is None or any(each is None or each.dtype != np.float32 for each in operands):
            continue
        weight, scale, shift, mean, variance = (each.astype(np.float64) for each in operands if each is not None)
        factor = scale / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
        if not np.isfinite(factor).all():
            continue
        base = norm.outputs[0].name or norm.name or "norm"
        wide = factor.reshape(-1, *[1] * (weight.ndim - 1))
        folded_weight = _new_weight(model, f"{base}.folded_weight", (weight * wide).astype(np.float32))
        folded_bias = _new_weight(model, f"{base}.folded_bias", ((bias - mean) * factor + shift).astype(np.float32))
        conv.replace_input_with(1, folded_weight)
        if len(conv.inputs) < 3:
            conv.resize_inputs(3)
        conv.replace_input_with(2, folded_bias)
        _take_place(conv, norm)
        folded += 1
    if folded:
        common.RemoveUnusedNodesPass()(model)
    return folded


def _fold_casts(model: ir.Model) -> None:
    """Replace each Cast of a constant by its result: NNCF fails on them."""
    for node in [node for node in model.graph if node.op_type == "Cast" and not node.domain]:
        array, to = _constant(node.inputs[0]), node.attributes.get_int("to", 0)
        kinds = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL)
        if array is None or to not in kinds or node.outputs[0].is_graph_output():
            continue
        with np.errstate(all="ignore"):
            value = _new_weight(model, f"{node.outputs[0].name}.cast", array.astype(ir.DataType(to).numpy()))
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)


def _take_place(conv: ir.Node, norm: ir.Node) -> None:
    """Let the convolution's output stand where the norm's did, under the norm's name."""
    old, new = norm.outputs[0], conv.outputs[0]
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=is_output)
    graph = norm.graph
    assert graph is not None
    graph.remove(norm, safe=True)
    new.name = name


def _constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return np.asarray(value.const_value.numpy())


def _new_weight(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    while name in model.graph.initializers:
        name += "_"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


# --- writing


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights, as they are stored."""
    return sum(
        value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None
    )


def save(model: ir.Model, path: Path, *, data: str | None = None) -> Path | None:
    """Write the model, weights of more than `SINGLE_FILE_BYTES` to a file `data` beside it; return that file if there is one."""
    if weight_bytes(model) <= SINGLE_FILE_BYTES:
        ir.external_data.load_to_model(model)
        ir.save(model, path, format="protobuf")
        return None
    name = data or f"{path.name}.data"
    ir.save(model, path, format="protobuf", external_data=name)
    return path.with_name(name)


def finished(model: ir.Model, source: ir.Model) -> int:
    """Tidy what a tool made of `source`, in place; return how many of its operators compute on lowered values.

    Raises:
        Unsupported: nothing was lowered, or inputs, outputs or versions are not what they must be.
    """
    common.TopologicalSortPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _same_interface("input", model.graph.inputs, source.graph.inputs)
    _same_interface("output", model.graph.outputs, source.graph.outputs)
    if model.opset_imports.get("", 0) > NEWEST_OPSET or model.ir_version > NEWEST_IR:
        raise Unsupported(f"the tool wrote opset {model.opset_imports.get('', 0)} and IR {model.ir_version}, which runtimes do not read")
    nodes = lowered_nodes(model)
    if not nodes:
        raise Unsupported("nothing to lower: the model has no operator that this recipe covers")
    return nodes


def _same_interface(kind: str, made: Sequence[ir.Value], wanted: Sequence[ir.Value]) -> None:
    if [value.name for value in made] != [value.name for value in wanted]:
        raise Unsupported(f"the tool changed the {kind}s' names to {', '.join(str(value.name) for value in made)}"[:300])
    for mine, theirs in zip(made, wanted, strict=True):
        if mine.dtype != theirs.dtype:
            raise Unsupported(f"the tool made {kind} {mine.name!r} {mine.dtype}, it was {theirs.dtype}")
        if mine.shape is not None and theirs.shape is not None and not _fits(mine.shape, theirs.shape):
            raise Unsupported(f"the tool made {kind} {mine.name!r} {mine.shape}, it was {theirs.shape}")
        mine.shape = theirs.shape  # tools write inferred shapes, of other symbols, or none


def _fits(one: ir.Shape, other: ir.Shape) -> bool:
    known = (isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and not any(known)


def lowered_nodes(model: ir.Model) -> int:
    """Count operators that read a dequantized weight, products of two dequantized values, and what computes on integers in itself."""
    return sum(is_lowered(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))


def has_int4(model: ir.Model) -> bool:
    """Say whether any weight is stored in 4 bits: tools that are asked for int4 fall back to int8 where they see fit."""
    fours = (ir.DataType.INT4, ir.DataType.UINT4)
    if any(value.dtype in fours for graph in model.graphs() for value in graph.initializers.values()):
        return True
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return any(node.op_type in ("GatherBlockQuantized", "MatMulNBits") and node.attributes.get_int("bits", 4) == 4 for node in nodes)


def is_lowered(node: ir.Node) -> bool:
    """Say whether an operator computes on lowered values or weights."""
    if node.op_type in _LOWERED:
        return True
    if node.op_type not in WORK:
        return False
    if any(value is not None and value.dtype in _HALVES and _constant(value) is not None for value in node.inputs):
        return True
    origins = [_dequantized(value) for value in node.inputs[: 1 if node.op_type == "Gather" else 3]]
    weights = any(origin is not None and _constant(origin) is not None for origin in origins[:3])
    return weights or (len(origins) > 1 and origins[0] is not None and origins[1] is not None)


def _dequantized(value: ir.Value | None) -> ir.Value | None:
    """What a DequantizeLinear read to make `value`, reshaped and transposed perhaps."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _HANDS_ON and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None


def import_onnxruntime() -> Any:
    """Import ONNX Runtime so that it sends no usage data, whoever imported it before (`aivmm/__init__` has set what stops it)."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


def must_load(path: Path, *, optimised: bool = False) -> Session:
    """Have ONNX Runtime read the model, as it stands, or (`optimised`) as it would run it.

    Raises:
        Unsupported: it does not, in its own words: then the tool wrote a graph that is not valid.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session: Session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no class of their own but Exception
        raise Unsupported(f"what was made does not load: {one_line(error)}") from error
    return session


def must_run(path: Path, outputs: Mapping[str, tuple[int | None, ...] | None]) -> None:
    """Have ONNX Runtime run the model once, on zeros; its outputs must have the shapes given, None being any.

    Raises:
        Unsupported: it does not run, or an output has another shape.
    """
    session = must_load(path)
    feed = {each.name: np.zeros(each.shape, _NUMPY.get(each.type, each.type[7:-1])) for each in session.get_inputs()}
    try:
        made = session.run(list(outputs), feed)
    except Exception as error:  # as above; TypeError of NumPy for a type that it lacks among them
        raise Unsupported(f"what was made does not run: {one_line(error)}") from error
    for (name, wanted), array in zip(outputs.items(), made, strict=True):
        if wanted is not None and not _fits(ir.Shape(wanted), ir.Shape(np.shape(array))):
            raise Unsupported(f"what was made has output {name!r} of shape {np.shape(array)}, not {wanted}")


def put_in_place(draft: Path, data: Path | None, destination: Path) -> None:
    """Move a finished model file, and that of its weights if any, to where it belongs; the model last: it means that all is there."""
    beside = destination.with_name(f"{destination.name}.data")
    if data is not None:
        data.replace(beside)
    draft.replace(destination)
    if data is None:
        beside.unlink(missing_ok=True)


# --- running a tool


def one_line(error: BaseException) -> str:
    """The error's own words in one line, its kind before them when they are no sentence."""
    words = " ".join(str(error).split())[:300]
    return words if " " in words else f"{type(error).__name__} {words}".strip()


@contextlib.contextmanager
def workshop(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination`, which Python's `tempfile` uses too meanwhile: tools leave gigabytes there.

    Changes this process' global state while it lasts, so not for use in several threads.

    Raises:
        UsageError: it cannot be made, or the disk is full.
    """
    before = tempfile.tempdir
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Windows keeps a file that a session still maps: it is then left for the next sweep.
        with tempfile.TemporaryDirectory(prefix=workshop_prefix(destination), dir=destination.parent, ignore_cleanup_errors=True) as folder:
            tempfile.tempdir = folder
            yield Path(folder)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UsageError(f"cannot lower the model to {destination}: {reason}", advice="check the folder and its free space") from error
    finally:
        tempfile.tempdir = before


def workshop_prefix(destination: Path) -> str:
    """How the names of temporary folders for `destination` begin."""
    return f".{destination.name}.w-"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a tool from printing, logging and warning: what a worker prints is taken for its error. Global, so not for several threads."""
    ort = import_onnxruntime()
    root = logging.getLogger()
    silent = logging.NullHandler()
    disabled = logging.root.manager.disable
    root.addHandler(silent)  # `logging.warning()` would otherwise set up a handler that stays
    logging.disable(logging.CRITICAL)
    ort.set_default_logger_severity(4)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        ort.set_default_logger_severity(2)  # its default; there is no way to ask what it was
        logging.disable(disabled)
        root.removeHandler(silent)
