"""Prepares a model for everything after: one file of fixed input shapes, in versions that runtimes read, tidy, with shapes inferred."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import psutil
from onnx_ir.passes import common

from aivmm.errors import ModelError, UsageError
from aivmm.models.category import detect
from aivmm.models.input_contract import InputContract
from aivmm.models.intake_infer import infer_shapes
from aivmm.models.intake_interface import keep_tensors
from aivmm.models.intake_native import described
from aivmm.models.intake_plain import plain_model, plain_proto
from aivmm.models.intake_trial import Trial
from aivmm.models.intake_versions import fit_versions, repair_old
from aivmm.models.load import LoadedModel, load_model
from aivmm.models.narrow import narrow_inputs
from aivmm.models.records import ModelFacts
from aivmm.models.shapes import Bound, OpenInput, bind
from aivmm.tensors import TensorSpec

_SINGLE_FILE_BYTES = 2**28  # a model read whole takes four times its weights; from beside the file they are mapped
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def prepare(
    source: Path,
    destination: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    contract: InputContract | None = None,
) -> ModelFacts:
    """Write the prepared form of the model at `source` to `destination`, and say what it is and what was changed.

    Weights that do not fit into one file go to `<destination>.data`. Outputs that are inputs are left to whoever runs the model, since no
    runtime writes them; the facts still list them. `shapes` binds whole inputs, `dims` symbolic dimensions, `batch` what
    is left open of the batch; `contract` says which inputs are taken in fewer bits, none if None. Raises `ModelError` for a file that
    cannot be used, `UsageError` for a shape that does not fit, for extents that must be given, for inputs that cannot be taken so, and for
    a destination that cannot be written. Runs native code (shape inference, trial runs): call it in a worker.
    """
    notes: list[str] = []
    loaded = load_model(source)
    if destination.exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the model itself", advice="write the prepared model to another file")
    model = _tidied(_read(loaded, notes), notes)
    interface = [value.name or "" for value in model.graph.outputs]
    _note_interface(model, notes)
    plain_model(model, notes)
    given = [_open_input(value) for value in model.graph.inputs]  # as the model has them: pixels stay images
    taken = narrow_inputs(model, contract or InputContract(), shapes=shapes or {}, notes=notes)
    if taken:
        _name_nodes(model)
    bound = bind(
        given,
        shapes=shapes or {},
        dims=dims or {},
        batch=batch,
        trial=Trial(model, source.parent),
    )
    _set_shapes(model, bound)
    notes += [*bound.notes, *infer_shapes(model)]
    made = _outputs(model, bound, source.parent, notes)
    _show_inner_ranks(model, bound, source.parent)
    _write(model, destination)
    inputs = tuple(_spec(value) for value in model.graph.inputs)
    known = {spec.name: spec for spec in (*inputs, *made)}
    return ModelFacts(
        name=source.stem,
        path=str(source),
        sha256=loaded.sha256,
        category=detect(described(model)),
        inputs=inputs,
        outputs=tuple(known[name] for name in interface),
        opset=model.opset_imports.get("", 0),
        ir_version=model.ir_version,
        batch=bound.batch,
        batchable=bound.batchable,
        notes=tuple(notes),
        taken=taken,
    )


def _read(loaded: LoadedModel, notes: list[str]) -> ir.Model:
    """The model in onnx-ir's form, of a supported version; external weights stay on disk until they are written."""
    was_old = repair_old(loaded.proto, notes)
    keep_tensors(loaded.proto, notes)
    plain_proto(loaded.proto, notes)
    try:
        model = ir.from_proto(loaded.proto)
    except Exception as error:  # onnx-ir raises several kinds for models that the checks of load.py still let through
        raise ModelError(f"the model cannot be taken apart: {_one_line(error)}", advice="export the model again") from error
    ir.external_data.set_base_dir(model.graph, loaded.path.parent)
    weights = len(set(model.graph.inputs) & set(model.graph.initializers.values()))
    common.RemoveInitializersFromInputsPass()(model)
    if weights:
        notes.append(f"{weights} weights that were also listed as inputs are no longer inputs")
    if model.functions:
        count = len(model.functions)
        try:
            common.InlinePass()(model)
        except Exception as error:  # the pass raises several kinds: functions that call themselves, mixed operator sets
            raise ModelError(
                f"the model's functions cannot be inlined: {_one_line(error)}", advice="export it without functions"
            ) from error
        notes.append(f"{count} model functions inlined")
    return fit_versions(model, was_old=was_old, notes=notes)


def _one_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split())[:200]


def _tidied(model: ir.Model, notes: list[str]) -> ir.Model:
    nodes, constants, opset = _count(model), _constants(model), model.opset_imports.get("")
    common.TopologicalSortPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    lifted = constants - _constants(model)
    weights = len(model.graph.initializers)
    common.RemoveUnusedNodesPass()(model)
    unused = weights - len(model.graph.initializers)
    common.RemoveUnusedOpsetsPass()(model)
    if opset is not None:  # a model of custom operators alone still says which version its standard ones would have
        model.opset_imports[""] = opset
    dead = nodes - lifted - _count(model)
    if lifted:
        notes.append(f"{lifted} Constant nodes turned into weights")
    if dead:
        notes.append(f"{dead} nodes that no output needs removed")
    if unused:
        notes.append(f"{unused} weights that no node reads removed")
    interface = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    common.NameFixPass()(model)
    if interface != [value.name for value in (*model.graph.inputs, *model.graph.outputs)]:
        raise ModelError("two inputs or outputs of the model share a name", advice="export the model again")
    _name_nodes(model)
    return model


def _count(model: ir.Model) -> int:
    return sum(1 for graph in model.graphs() for _ in graph)


def _constants(model: ir.Model) -> int:
    return sum(node.op_type == "Constant" for graph in model.graphs() for node in graph)


def _name_nodes(model: ir.Model) -> None:
    """Names are unique within each graph already; make them unique over all: probes and reports speak of nodes."""
    seen: set[str] = set()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        wish = name = node.name or node.op_type
        count = 1
        while name in seen:
            count += 1
            name = f"{wish}_{count}"
        node.name = name
        seen.add(name)


# --- inputs and outputs


def _open_input(value: ir.Value) -> OpenInput:
    dims = None if value.shape is None else tuple(extent if isinstance(extent, int) else extent.value for extent in value.shape)
    return OpenInput(name=value.name or "", dims=dims, image_like=dims is not None and len(dims) == 4 and value.dtype in _FLOATS)


def _set_shapes(model: ir.Model, bound: Bound) -> None:
    for value in model.graph.inputs:
        value.shape = ir.Shape(bound.shapes[value.name or ""])
        size = math.prod(bound.shapes[value.name or ""]) * ((value.dtype.bitwidth + 7) // 8 if value.dtype != ir.DataType.STRING else 1)
        if size > psutil.virtual_memory().total:
            raise UsageError(
                f"input {value.name!r} of shape {list(bound.shapes[value.name or ''])} takes {size:,} bytes, more memory than there is",
                advice=f"bind a smaller one with --shape {value.name}=...",
            )


def _outputs(model: ir.Model, bound: Bound, folder: Path, notes: list[str]) -> tuple[TensorSpec, ...]:
    """The outputs; where inference cannot even tell a rank, one run does."""
    rankless = [value for value in model.graph.outputs if value.shape is None]
    ranks = Trial(model, folder).output_ranks(bound.shapes) if rankless else {}
    for value in rankless:
        rank = ranks.get(value.name or "")
        if rank is None:
            notes.append(f"the rank of output {value.name!r} is not known before the run")
        else:
            value.shape = ir.Shape([None] * rank)
    return tuple(_spec(value) for value in model.graph.outputs)


def _show_inner_ranks(model: ir.Model, bound: Bound, folder: Path) -> None:
    """Behind a Loop no rank can be inferred, and no cut can be made without one: one run tells, as it does for outputs."""
    hidden = {str(value.name): value for node in model.graph for value in node.outputs if value.shape is None and value.uses()}
    hidden = {name: value for name, value in hidden.items() if not value.is_graph_output()}
    for name, (dtype, rank) in Trial(model, folder).kinds(bound.shapes, list(hidden)).items():
        hidden[name].type = ir.TensorType(dtype)
        hidden[name].shape = ir.Shape([None] * rank)


def _spec(value: ir.Value) -> TensorSpec:
    extents: Sequence[object] = list(value.shape) if value.shape is not None else ()
    shape = tuple(extent if isinstance(extent, int) else None for extent in extents)
    return TensorSpec(name=value.name or "", dtype=dtype_name(value.dtype), shape=shape)


def dtype_name(dtype: ir.DataType | None) -> str:
    """NumPy's name of an element type ("float32", "bool"), ml_dtypes' for those it lacks ("bfloat16"), or "string"."""
    if dtype is None or dtype == ir.DataType.UNDEFINED:
        raise ModelError("the element type of an output cannot be inferred", advice="export the model again with typed outputs")
    return "string" if dtype == ir.DataType.STRING else str(dtype.numpy().name)


def _note_interface(model: ir.Model, notes: list[str]) -> None:
    outputs = set(model.graph.outputs)
    for value in model.graph.inputs:
        if value in outputs:
            notes.append(f"output {value.name!r} is the input of that name, handed through")
        elif not value.uses():
            notes.append(f"input {value.name!r} is not used by the model")


# --- writing


def _write(model: ir.Model, destination: Path) -> None:
    """Write in whole or not at all: the model file appears last, under a name of its own first."""
    weights = sum(
        value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None
    )
    external = f"{destination.name}.data" if weights > _SINGLE_FILE_BYTES else None
    draft = destination.with_name(f"{destination.name}.part")
    try:
        if external is None:
            ir.external_data.load_to_model(model)
        ir.save(model, draft, format="protobuf", external_data=external)
        draft.replace(destination)
    except OSError as error:
        draft.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot write the prepared model to {destination}: {reason}", advice="check the folder and its free space"
        ) from error
