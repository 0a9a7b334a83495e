"""The unique operators of a model, and a standalone model of one node for each, to be measured alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from aivmm.errors import Unsupported
from aivmm.models.flops import bytes_moved, flops
from aivmm.models.hashing import Hasher, weight_bytes
from aivmm.models.order import Boundary, PreparedGraph, dtype_name, elements, nbytes, shape_of, static_shape, subgraphs
from aivmm.models.records import Operator
from aivmm.models.wire import node_proto, tensor_proto, value_proto

MAX_CONSTANT_BYTES = 1 << 30  # a model in memory must stay below protobuf's 2 GiB, and a probe below the machine
MAX_IR_VERSION = 10  # what every runtime in use reads
_FEW = 64  # elements: scales, thresholds and ranges are no longer; activations mostly are
_QUANTISED = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4))
_MAX_VALUES_BYTES = 1 << 26  # of one tensor whose values are wanted

_BY_VALUES = frozenset(("NonZero", "Loop", "Scan", "If", "NonMaxSuppression", "Unique", "Compress", "StringSplit", "RegexFullMatch"))


def data_dependent(node: ir.Node) -> bool:
    """Say whether the time of `node` depends on values: by what it is, or because a tensor's shape is only known when it runs."""
    if node.op_type in _BY_VALUES or any(True for _ in subgraphs(node)):
        return True
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    return any(static_shape(value) is None for value in values)


def find_operators(prepared: PreparedGraph, hasher: Hasher) -> dict[str, Operator]:
    """Return the unique operators of the main graph by signature, in the order in which they first come."""
    groups: dict[str, list[ir.Node]] = {}
    for node in prepared.nodes:
        groups.setdefault(hasher.signature(node), []).append(node)
    return {
        signature: Operator(
            signature=signature,
            op_type=nodes[0].op_type,
            domain=nodes[0].domain,
            description=describe(nodes[0]),
            count=len(nodes),
            nodes=tuple(node.name or "" for node in nodes),
            flops=flops(nodes[0]),
            bytes=bytes_moved(nodes[0]),
            data_dependent=data_dependent(nodes[0]),
        )
        for signature, nodes in groups.items()
    }


def describe(node: ir.Node) -> str:
    """Return one line for people: "Conv 3x3 stride 2: 1x3x224x224 -> 1x64x111x111". Names from the model are not in it."""
    data = [value for value in node.inputs if value is not None and not value.is_initializer()]
    made = [value for value in node.outputs if value.name]
    sides = [", ".join(map(_extents, values[:3])) for values in (data, made)]
    return f"{' '.join([node.op_type, *_features(node)])}: {sides[0] or 'constants'} -> {sides[1]}"


def _features(node: ir.Node) -> list[str]:
    """What tells operators of one type apart at a glance: kernel, stride, dilation, groups, axis, mode, hidden size."""
    words = []
    ints = {name: tuple(attribute.as_ints()) for name, attribute in node.attributes.items() if attribute.type == ir.AttributeType.INTS}
    kernel = (
        ints.get("kernel_shape") or (static_shape(node.inputs[1]) or ())[2:]
        if node.op_type in ("Conv", "ConvTranspose")
        else ints.get("kernel_shape")
    )
    if kernel:
        words.append("x".join(map(str, kernel)))
    for name, word in (("strides", "stride"), ("dilations", "dilation")):
        if (values := ints.get(name)) and set(values) != {1}:
            words.append(f"{word} {'x'.join(map(str, dict.fromkeys(values)))}")
    for name, usual in (("group", 1), ("axis", None), ("hidden_size", None), ("num_heads", None)):
        if name in node.attributes and (value := node.attributes.get_int(name)) != usual:
            words.append(f"{name.replace('_', ' ')} {value}")
    return words


def _extents(value: ir.Value) -> str:
    shape = shape_of(value)
    if shape is None:
        return "?"
    return "x".join("?" if extent is None else str(extent) for extent in shape) or "scalar"


class OperatorModels:
    """Standalone models of a prepared model's unique operators, built from one load."""

    def __init__(self, model: Path | PreparedGraph) -> None:
        self._prepared = model if isinstance(model, PreparedGraph) else PreparedGraph(model)
        hasher = Hasher(self._prepared)
        self._nodes: dict[str, ir.Node] = {}
        for node in self._prepared.nodes:
            self._nodes.setdefault(hasher.signature(node), node)

    def close(self) -> None:
        """Let go of the model's files."""
        self._prepared.close()

    @property
    def signatures(self) -> Sequence[str]:
        """The signatures that can be asked for, in the order of `find_operators`."""
        return tuple(self._nodes)

    def values_needed(self, signature: str) -> dict[str, str]:
        """Return which tensor of the whole model each input of the operator's own model stands for whose values may decide what it does.

        Those are indices, extents, axes, pads, conditions, strings, a few floats (scales, ranges, thresholds), and all that an operator
        reads whose work depends on data. Made-up values would be refused (a Reshape to random extents), or lead to other work.

        Raises:
            KeyError: no operator of this model has this signature.
        """
        node = self._nodes[signature]
        names = {} if any(True for _ in subgraphs(node)) else _names_by_place(node)
        reads = (value for value in self._prepared.reads(node) if not value.is_initializer())
        return {names.get(value.name, value.name): value.name for value in reads if _decides(value) or self._depends(node, value)}

    @staticmethod
    def _depends(node: ir.Node, value: ir.Value) -> bool:
        return data_dependent(node) and (nbytes(value) or 0) <= _MAX_VALUES_BYTES

    def build(self, signature: str) -> bytes:
        """Return an ONNX model of the one node: its constants as initializers with their data, all else it reads as inputs.

        Tensors are named `input_0`, `constant_1`, `output_0`, ... by place, so that equal operators of equal constants give equal bytes;
        a node with subgraphs keeps the model's names, and what its subgraphs capture becomes inputs and initializers too.

        Raises:
            KeyError: no operator of this model has this signature.
            Unsupported: the operator cannot stand alone; the message says why.
        """
        node = self._nodes[signature]
        reads = self._prepared.reads(node)
        constants = [value for value in reads if value.is_initializer()]
        self._refuse(node, Boundary(inputs=reads, outputs=tuple(node.outputs), initializers=tuple(constants)))
        names = {} if any(True for _ in subgraphs(node)) else _names_by_place(node)
        proto = node_proto(node, lambda tensor, name: tensor_proto(tensor, name))
        if names:
            proto.name = node.op_type
            proto.input[:] = [names.get(name, name) for name in proto.input]
            proto.output[:] = [names.get(name, name) for name in proto.output]
        graph = onnx.GraphProto(name=node.op_type, node=[proto])
        graph.input.extend(value_proto(value, names) for value in reads if not value.is_initializer())
        graph.output.extend(value_proto(value, names) for value in node.outputs if value.name)
        graph.initializer.extend(tensor_proto(value.const_value, names.get(value.name, value.name)) for value in constants)
        return bytes(self._model(node, graph).SerializeToString(deterministic=True))

    def _refuse(self, node: ir.Node, edge: Boundary) -> None:
        odd = next((value for value in (*edge.inputs, *edge.outputs) if value.name and not _is_typed(value)), None)
        if odd is not None:
            raise Unsupported(f"{node.op_type} cannot stand alone: {odd.type or 'a tensor without a known type'} at its edge")
        size = weight_bytes(edge, [node])
        if size > MAX_CONSTANT_BYTES:
            raise Unsupported(f"{node.op_type} cannot stand alone: its constants are {size / 2**30:.1f} GiB, the limit is 1 GiB")

    def _model(self, node: ir.Node, graph: onnx.GraphProto) -> onnx.ModelProto:
        model = onnx.ModelProto(ir_version=min(self._prepared.model.ir_version, MAX_IR_VERSION), producer_name="aivmm", graph=graph)
        model.opset_import.extend(onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in self._opsets().items())
        function = self._prepared.model.functions.get(node.op_identifier())
        if function is not None:
            model.functions.extend(ir.to_proto(each) for each in self._prepared.model.functions.values())
        return model

    def _opsets(self) -> Mapping[str, int]:
        return dict(sorted(self._prepared.model.opset_imports.items()))


def _decides(value: ir.Value) -> bool:
    """Say whether a tensor's values may decide the work of whoever reads it, by its type and size."""
    shape = static_shape(value)
    if value.dtype is None or (nbytes(value) or 0) > _MAX_VALUES_BYTES:
        return False
    if value.dtype.is_floating_point() or value.dtype in _QUANTISED:
        return shape is not None and elements(shape) <= _FEW
    return True


def _is_typed(value: ir.Value) -> bool:
    known = isinstance(value.type, ir.TensorType) and dtype_name(value.dtype) != "unknown"
    return bool(known or value.is_initializer())


def _names_by_place(node: ir.Node) -> dict[str, str]:
    """Name each value by where it is first read or written. A value read twice keeps one name."""
    names: dict[str, str] = {}
    for index, value in enumerate(node.inputs):
        if value is not None:
            names.setdefault(value.name, f"{'constant' if value.is_initializer() else 'input'}_{index}")
    for index, value in enumerate(node.outputs):
        if value.name:
            names[value.name] = f"output_{index}"
    return names
