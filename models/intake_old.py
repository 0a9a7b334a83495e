"""Carries models of opset 1 to 6 over to opset 7. onnx's own converter asks for shapes that opset-1 operators never declared and gives up.

Opset 7 is where today's broadcasting begins. What differs before it is listed in onnx's `docs/Changelog.md`; each difference handled is
one function here, and a node that still does not fit opset 7's schema afterwards is refused, so nothing is carried over by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, shape_inference

from aivmm.errors import ModelError
from aivmm.models.intake_check import subgraphs

OPSET = 7
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less")


def fill_attribute_types(model: ModelProto) -> None:
    """Set the type field of attributes, which IR version 1 did not have, from the field that holds the value."""
    fields = {"f": 1, "i": 2, "s": 3, "t": 4, "g": 5, "floats": 6, "ints": 7, "strings": 8, "tensors": 9, "graphs": 10}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.UNDEFINED:
                present = _present(attribute, fields)
                attribute.type = fields[present] if present else AttributeProto.INTS  # an empty list of integers is stored as nothing


def _present(attribute: AttributeProto, fields: Mapping[str, int]) -> str | None:
    return next((field.name for field, _ in attribute.ListFields() if field.name in fields), None)


def raise_to_7(model: ModelProto) -> None:
    """Rewrite the nodes of a model of opset 1 to 6 so that they mean the same in opset 7; raise `ModelError` for what cannot."""
    _Old(model).run()


class _Old:
    """One rewriting: keeps the types known so far, since `axis` broadcasting needs ranks."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
        self.types: dict[str, TypeProto] = {value.name: value.type for value in model.graph.input}
        self.data: dict[str, TensorProto] = {}
        self.names = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self.nodes: list[NodeProto] = []
        for tensor in model.graph.initializer:
            self._know(tensor)

    def run(self) -> None:
        """Rewrite node by node, in the order given (models of that time are sorted)."""
        for node in self.model.graph.node:
            if subgraphs(node):
                raise self.cannot(node, "control flow was experimental then")
            if node.domain in ("", "ai.onnx"):
                _pop(node, "consumed_inputs")
                fix = _FIXES.get(node.op_type)
                if fix is not None:
                    fix(self, node)
                self._must_fit(node)
            self._emit(node)
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        del self.model.opset_import[:]
        self.model.opset_import.append(helper.make_opsetid("", OPSET))

    def rank(self, name: str) -> int | None:
        """Rank of a tensor, None when unknown."""
        known = self.types.get(name)
        return len(known.tensor_type.shape.dim) if known is not None and known.tensor_type.HasField("shape") else None

    def unsqueeze(self, node: NodeProto, index: int, rank: int, trailing: int) -> None:
        """Give input `index` of `node`, of rank `rank`, that many trailing axes of extent 1."""
        name = self._fresh(f"{node.input[index]}_{trailing}_axes")
        self._emit(helper.make_node("Unsqueeze", [node.input[index]], [name], axes=list(range(rank, rank + trailing))))
        node.input[index] = name

    def constant(self, node: NodeProto, values: list[int]) -> None:
        """Append a constant int64 vector to the inputs of `node`."""
        tensor = helper.make_tensor(self._fresh(f"{node.output[0]}_{node.op_type.lower()}"), TensorProto.INT64, [len(values)], values)
        self.model.graph.initializer.append(tensor)
        self._know(tensor)
        node.input.append(tensor.name)

    def cannot(self, node: NodeProto, why: str) -> ModelError:
        """The error that says which node stays behind, and why."""
        message = f"{node.op_type} ({node.name or node.output[0]!r}) of opset {self.opset} cannot be carried over to opset {OPSET}: {why}"
        return ModelError(message, advice="export the model again with opset 17")

    def _must_fit(self, node: NodeProto) -> None:
        if not onnx.defs.has(node.op_type, OPSET, ""):
            raise self.cannot(node, "the operator no longer exists")
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
        if schema.deprecated:
            raise self.cannot(node, "the operator no longer exists")
        for attribute in node.attribute:
            declared = schema.attributes.get(attribute.name)
            if declared is None or int(declared.type) != attribute.type:
                raise self.cannot(node, f"its attribute {attribute.name!r} changed its meaning")
        if not schema.min_input <= len(node.input) <= schema.max_input:
            raise self.cannot(node, f"it has {len(node.input)} inputs")
        if not schema.min_output <= len(node.output) <= schema.max_output:
            raise self.cannot(node, f"it has {len(node.output)} outputs")

    def _know(self, tensor: TensorProto) -> None:
        self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        self.data[tensor.name] = tensor

    def _fresh(self, wish: str) -> str:
        name, count = wish, 1
        while name in self.names:
            count += 1
            name = f"{wish}_{count}"
        self.names.add(name)
        return name

    def _emit(self, node: NodeProto) -> None:
        self.nodes.append(node)
        if node.domain not in ("", "ai.onnx"):
            return
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
        known = {name: self.types[name] for name in node.input if name in self.types}
        data = {name: self.data[name] for name in node.input if name in self.data}
        try:
            self.types.update(shape_inference.infer_node_outputs(schema, node, known, data, opset_imports=[helper.make_opsetid("", OPSET)]))
        except Exception:  # noqa: BLE001 - native inference raises several kinds; an unknown type is refused only where it is needed
            return


def _pop(node: NodeProto, name: str) -> AttributeProto | None:
    for position, attribute in enumerate(node.attribute):
        if attribute.name == name:
            taken = AttributeProto()
            taken.CopyFrom(attribute)
            del node.attribute[position]
            return taken
    return None


def _has(node: NodeProto, name: str) -> bool:
    return any(attribute.name == name for attribute in node.attribute)


def _broadcast(old: _Old, node: NodeProto) -> None:
    """`broadcast=1, axis=k`: B's axes are A's from k on; today's rule aligns the last axes, so B needs axes of 1 behind its own."""
    broadcast, axis = _pop(node, "broadcast"), _pop(node, "axis")
    if broadcast is None or broadcast.i == 0 or axis is None:
        return
    a, b = old.rank(node.input[0]), old.rank(node.input[1])
    if a is None or b is None:
        raise old.cannot(node, "it broadcasts along an axis of a tensor of unknown rank")
    start = axis.i if axis.i >= 0 else axis.i + a
    trailing = a - start - b
    if trailing < 0:
        raise old.cannot(node, f"axis {axis.i} does not fit its inputs of ranks {a} and {b}")
    if trailing > 0:
        old.unsqueeze(node, 1, b, trailing)


def _prelu(old: _Old, node: NodeProto) -> None:
    """A slope of one value per channel counted from axis 1; today it must be broadcastable from the right."""
    x, slope = old.rank(node.input[0]), old.rank(node.input[1])
    if slope == 1 and x is None:
        raise old.cannot(node, "the rank of its input is unknown")
    shape = old.types[node.input[1]].tensor_type.shape.dim if slope == 1 else []
    if slope == 1 and x is not None and x > 2 and shape[0].dim_value != 1:
        old.unsqueeze(node, 1, 1, x - 2)


def _reshape(old: _Old, node: NodeProto) -> None:
    shape = _pop(node, "shape")
    if shape is not None:
        old.constant(node, list(shape.ints))


def _batch_norm(old: _Old, node: NodeProto) -> None:
    """Outputs beyond the first were training's running statistics."""
    test = _pop(node, "is_test")
    extra = [name for name in node.output[1:] if name]
    read = {name for other in old.model.graph.node for name in other.input} | {value.name for value in old.model.graph.output}
    if (extra and (test is None or test.i == 0)) or read & set(extra):
        raise old.cannot(node, "it is in training mode")
    del node.output[1:]


def _cast(old: _Old, node: NodeProto) -> None:
    to = _pop(node, "to")
    if to is None:
        raise old.cannot(node, "it does not say to which type")
    try:
        code = TensorProto.DataType.Value(to.s.decode().upper()) if to.type == AttributeProto.STRING else to.i
    except ValueError as error:
        raise old.cannot(node, f"its type {to.s!r} is unknown") from error
    node.attribute.append(helper.make_attribute("to", code))


def _upsample(old: _Old, node: NodeProto) -> None:
    width, height = _pop(node, "width_scale"), _pop(node, "height_scale")
    if width is not None and height is not None:
        node.attribute.append(helper.make_attribute("scales", [1.0, 1.0, height.f, width.f]))


def _rename(before: str, after: str) -> Callable[[_Old, NodeProto], None]:
    def fix(old: _Old, node: NodeProto) -> None:
        del old
        for attribute in node.attribute:
            if attribute.name == before:
                attribute.name = after

    return fix


def _drop(*names: str) -> Callable[[_Old, NodeProto], None]:
    """Attributes that say nothing about inference, or that today's operator infers."""

    def fix(old: _Old, node: NodeProto) -> None:
        del old
        for name in names:
            _pop(node, name)

    return fix


def _default(**values: float) -> Callable[[_Old, NodeProto], None]:
    """Defaults that opset 6 changed."""

    def fix(old: _Old, node: NodeProto) -> None:
        for name, value in values.items():
            if old.opset < 6 and not _has(node, name):
                node.attribute.append(helper.make_attribute(name, value))

    return fix


def _concat(old: _Old, node: NodeProto) -> None:
    if old.opset < 4 and not _has(node, "axis"):
        node.attribute.append(helper.make_attribute("axis", 1))


_FIXES: dict[str, Callable[[_Old, NodeProto], None]] = {
    **dict.fromkeys(_BROADCASTING, _broadcast),
    **dict.fromkeys(("RNN", "LSTM", "GRU"), _drop("output_sequence")),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Concat": _concat,
    "Dropout": _drop("is_test"),
    "Gemm": _drop("broadcast"),
    "PRelu": _prelu,
    "Pad": _rename("paddings", "pads"),
    "Reshape": _reshape,
    "Selu": _default(alpha=1.6732, gamma=1.0507),
    "Upsample": _upsample,
}
