"""Shapes and types for every value of a model whose input shapes are bound.

onnx's inference stops where a shape is computed by nodes (Shape -> Gather -> Concat -> Reshape). With inputs bound that arithmetic is
constant, so it is worked out here, on a copy that only serves inference: the model itself keeps its nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from aivmm.models.intake_native import SMALL_BYTES, skeleton
from aivmm.models.wire import rename

_ROUNDS = 12
# fmt: off
_ARITHMETIC = frozenset((
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax",
    "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where", "Xor",
))
# fmt: on


def infer_shapes(model: ir.Model) -> list[str]:
    """Set the shape and type of each value that can be known; return notes on what could not.

    Input shapes must be set, nodes sorted and names unique. Shapes recorded in the file are not trusted (exporters leave stale ones):
    they only serve behind operators that onnx does not know.
    """
    recorded = _recorded(model)
    bare = skeleton(model)
    said = {value.name: value.dtype for value in model.graph.outputs}
    for output in bare.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    bare.graph.value_info.extend(info for node in bare.graph.node if _foreign(node) for name in node.output if (info := recorded.get(name)))
    known: dict[str, TypeProto] = {}
    _settle(bare, known)
    notes = _ask_runtime(bare, known)
    _settle(bare, known)
    _apply(model, known, recorded)
    for value in model.graph.outputs:
        if said[value.name] not in (None, ir.DataType.UNDEFINED, value.dtype):
            notes.append(f"output {value.name!r} is {value.dtype.numpy().name}, not {said[value.name].numpy().name} as the file says")
    _inside_subgraphs(model)
    missing = sum(value.shape is None for node in model.graph for value in node.outputs if value.name)
    if missing:
        notes.append(f"the shapes of {missing} of the model's values are not known before the run")
    return notes


def _settle(bare: ModelProto, known: dict[str, TypeProto]) -> None:
    """Infer and fold in turn until nothing more folds."""
    for _ in range(_ROUNDS):
        inferred = _native(bare)
        known |= {info.name: info.type for info in _infos(inferred.graph) if _rank_known(info.type)}
        if not _fold(bare, known):
            break


def _native(bare: ModelProto) -> ModelProto:
    asked = ModelProto()
    asked.CopyFrom(bare)
    for output in asked.graph.output:  # what the file says may be wrong, and inference believes it
        output.type.tensor_type.ClearField("elem_type")
    try:
        inferred = onnx.shape_inference.infer_shapes(asked, data_prop=True)
    except Exception:  # noqa: BLE001 - native: several kinds; an operator it refuses (a custom one, odd attributes) leaves shapes unknown
        return bare
    for output, said in zip(inferred.graph.output, bare.graph.output, strict=True):
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = said.type.tensor_type.elem_type
    return inferred


def _recorded(model: ir.Model) -> dict[str, ValueInfoProto]:
    """What the file says about values: types with symbolic extents made unknown."""
    found: dict[str, ValueInfoProto] = {}
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.type is not None and value.shape is not None:
                value.shape = ir.Shape([extent if isinstance(extent, int) and extent >= 0 else None for extent in value.shape])
                found[value.name] = ir.serde.serialize_value(value)
    return found


def _foreign(node: NodeProto) -> bool:
    return node.domain not in ("", "ai.onnx") and not onnx.defs.has(node.op_type, node.domain)


def _infos(graph: GraphProto) -> Iterator[ValueInfoProto]:
    yield from graph.value_info
    yield from graph.output


def _rank_known(kind: TypeProto) -> bool:
    return bool(kind.HasField("tensor_type") and kind.tensor_type.HasField("shape"))


def _fold(bare: ModelProto, known: dict[str, TypeProto]) -> bool:
    """Work out the nodes whose inputs are constant by now and put their values in their place; True when that changed anything."""
    known = {**known, **{info.name: info.type for info in bare.graph.input}}
    constants = {tensor.name: tensor for tensor in bare.graph.initializer}
    known |= {name: onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)) for name, tensor in constants.items()}
    kept: list[NodeProto] = []
    folded = False
    for node in bare.graph.node:
        values = _evaluate(node, constants, known, bare)
        branch = _taken_branch(node, constants)
        if values is not None:
            folded = True
            for tensor in values:
                constants[tensor.name] = tensor
                known[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        elif branch is not None:
            folded = True
            nodes, tensors = _inlined(node, branch)
            kept.extend(nodes)
            constants |= {tensor.name: tensor for tensor in tensors}
        else:
            kept.append(node)
    if folded:
        del bare.graph.node[:], bare.graph.initializer[:]
        bare.graph.node.extend(kept)
        bare.graph.initializer.extend(constants.values())
        outputs = {tensor.name for tensor in constants.values()} & {output.name for output in bare.graph.output}
        for output in bare.graph.output:  # an output that is a constant now keeps the type found for it
            if output.name in outputs:
                output.type.CopyFrom(known[output.name])
    return folded


def _evaluate(
    node: NodeProto, constants: dict[str, TensorProto], known: dict[str, TypeProto], bare: ModelProto
) -> list[TensorProto] | None:
    """The outputs of a node that only computes shapes, or None when they depend on data, are large, or the reference cannot run it."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in ("Shape", "Size"):
        extents = _static(known.get(node.input[0]))
        if extents is None:
            return None
        feeds = {node.input[0]: np.broadcast_to(np.zeros((), dtype=np.int8), extents)}  # takes no memory, whatever the shape
    elif node.op_type in _ARITHMETIC and all(name in constants for name in node.input if name):
        feeds = {name: numpy_helper.to_array(constants[name]) for name in node.input if name}
        if _makes_large(node.op_type, [feeds[name] for name in node.input if name]):
            return None
    else:
        return None
    if any(not _small(known.get(name)) for name in node.output):
        return None
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(_alone(node, list(feeds)), opsets=_opsets(bare)).run(None, feeds)
    except Exception:  # noqa: BLE001 - the reference raises whatever its operators raise; the shape then stays unknown
        return None
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in zip(node.output, results, strict=True) if name]


def _alone(node: NodeProto, inputs: Sequence[str]) -> GraphProto:
    """A graph of one node: given a bare node, the reference takes the newest operator set."""
    graph = GraphProto(name="one", node=[node])
    graph.input.extend(ValueInfoProto(name=name) for name in inputs)
    graph.output.extend(ValueInfoProto(name=name) for name in node.output)
    return graph


def _opsets(bare: ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in bare.opset_import}


def _static(kind: TypeProto | None) -> tuple[int, ...] | None:
    if kind is None or not _rank_known(kind):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else None


def _small(kind: TypeProto | None) -> bool:
    """False only when the value is known to be large: most shape arithmetic is folded before its own shape is known."""
    extents = _static(kind)
    return extents is None or float(np.prod(extents, dtype=np.float64)) * 8 <= SMALL_BYTES


def _makes_large(op_type: str, values: Sequence[npt.NDArray[Any]]) -> bool:
    """True for the operators whose output may be larger than their inputs, when it is."""
    if op_type == "ConstantOfShape" or op_type == "Expand":
        return bool(np.prod(values[-1], dtype=np.float64) * 8 > SMALL_BYTES)
    if op_type == "Range":
        if any(value.size != 1 for value in values):
            return True
        start, limit, delta = (float(value.item()) for value in values)
        return delta == 0 or abs((limit - start) / delta) * 8 > SMALL_BYTES
    return False


def _taken_branch(node: NodeProto, constants: dict[str, TensorProto]) -> GraphProto | None:
    """The branch of an If whose condition is constant."""
    if node.op_type != "If" or node.domain not in ("", "ai.onnx") or node.input[0] not in constants:
        return None
    taken = "then_branch" if bool(np.all(numpy_helper.to_array(constants[node.input[0]]))) else "else_branch"
    return next((attribute.g for attribute in node.attribute if attribute.name == taken), None)


def _inlined(node: NodeProto, branch: GraphProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes and weights of a branch, its own names prefixed by the node's name, and its outputs handed to the node's."""
    own = {tensor.name for tensor in branch.initializer} | {name for inner in branch.node for name in inner.output if name}
    names = {name: f"{node.output[0]}/{branch.name}/{name}" for name in own}
    nodes = [_renamed(inner, names) for inner in branch.node]
    for output, target in zip(branch.output, node.output, strict=False):
        if target:
            nodes.append(onnx.helper.make_node("Identity", [names.get(output.name, output.name)], [target]))
    tensors = []
    for tensor in branch.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = names[tensor.name]
        tensors.append(copy)
    return nodes, tensors


def _renamed(node: NodeProto, names: dict[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    rename(copy, names)
    return copy


def _ask_runtime(bare: ModelProto, known: dict[str, TypeProto]) -> list[str]:
    """ONNX Runtime infers shapes through operators of its own; asked only where they leave gaps. A session of the skeleton is enough.

    What it knows enters `bare` as recorded shapes, so that onnx's inference goes on behind them.
    """
    gaps = [name for node in bare.graph.node for name in node.output if name and name not in known]
    if not gaps or not any(node.domain == "com.microsoft" for node in bare.graph.node):
        return []
    asked = ModelProto()
    asked.CopyFrom(bare)
    present = {output.name for output in asked.graph.output}
    asked.graph.output.extend(ValueInfoProto(name=name) for name in gaps if name not in present)
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(asked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - native, of several kinds: a runtime that cannot load the model leaves the gaps as they are
        return [f"ONNX Runtime cannot infer the shapes of this model: {' '.join(str(error).split())[:160]}"]
    for output in session.get_outputs():
        kind = _element_type(output.type)
        if output.name in gaps and kind is not None and output.shape:
            shape = [extent if isinstance(extent, int) else None for extent in output.shape]
            info = onnx.helper.make_tensor_value_info(output.name, kind, shape)
            known[output.name] = info.type
            bare.graph.value_info.append(info)
    return []


def _element_type(text: str) -> int | None:
    """ONNX's number of a type that ONNX Runtime writes as `tensor(float)`; None for what is no tensor."""
    inner = re.fullmatch(r"tensor\((\w+)\)", text)
    return dict(TensorProto.DataType.items()).get(inner[1].upper()) if inner else None


def _apply(model: ir.Model, known: dict[str, TypeProto], recorded: dict[str, ValueInfoProto]) -> None:
    passed_through = set(model.graph.inputs) | set(model.graph.initializers.values())
    for value in (*(value for node in model.graph for value in node.outputs), *model.graph.outputs):
        if value in passed_through or not value.name:
            continue
        kind = known.get(value.name)
        if kind is None and value.name in recorded:
            kind = recorded[value.name].type
        if kind is None:
            value.shape = None
            continue
        value.shape = _shape(kind)
        if kind.tensor_type.elem_type:
            value.type = ir.TensorType(ir.DataType(kind.tensor_type.elem_type))


def _shape(kind: TypeProto) -> ir.Shape:
    dims: Sequence[onnx.TensorShapeProto.Dimension] = kind.tensor_type.shape.dim
    return ir.Shape([dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims])


def _inside_subgraphs(model: ir.Model) -> None:
    """Let native inference fill branches and bodies, now that all around them is known."""
    bare = skeleton(model)
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.shape is not None and not value.is_graph_output():
                bare.graph.value_info.append(ir.serde.serialize_value(value))
    inferred = ir.from_proto(_native(bare))
    for mine, theirs in zip(model.graphs(), inferred.graphs(), strict=True):
        if mine is model.graph:
            continue
        found = {value.name: value for node in theirs for value in node.outputs}
        for node in mine:
            for value in node.outputs:
                other = found.get(value.name)
                if value.shape is None and other is not None and other.shape is not None and other.type is not None:
                    value.shape = ir.Shape([extent if isinstance(extent, int) else None for extent in other.shape])
                    value.type = other.type
