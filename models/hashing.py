"""Structure and content hashes of a prepared model, of any run of its nodes, and the signature of one operator.

*Structure*: operators, attributes, shapes, types, topology, and the values of small integer constants that shape the work (axes, target
shapes, k, ...); no names, no weights. It keys times. *Content*: the same with every constant's value. It keys answers.

What is hashed is an exact description, not a digest of digests: nodes are numbered in depth-first order from the outputs, and every read is
written as (node, output), (input) or (constant). Attributes equal to their schema's default count as absent, and an operator's version is
that of its schema, so that exporting at another opset does not hide that the work is the same.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir

from aivmm.models.order import Boundary, PreparedGraph, depth_first, dtype_name, shape_of, subgraphs

SMALL = 64  # elements: no operator takes a longer list of axes or extents
_CHUNK = 1 << 24  # bytes hashed or copied at a time
_INT32_SHAPES_WORK = frozenset({"Slice", "Range", "OneHot"})  # elsewhere int32 constants are biases and tables: weights

Reference = tuple[object, ...]
Resolve = Callable[[ir.Value], Reference]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashes:
    """The two hashes, SHA-256 in hexadecimal."""

    structure: str
    content: str


class Hasher:
    """Hashes of one prepared graph. Each weight is read once, whatever is asked."""

    def __init__(self, prepared: PreparedGraph) -> None:
        self._prepared = prepared
        self._opsets: Mapping[str, int] = prepared.model.opset_imports
        self._digests: dict[int, tuple[object, str]] = {}  # the tensor is kept beside its digest, so that its id stays its own
        self._types: dict[ir.Value, Reference] = {}
        self._plain: dict[ir.Node, str] = {}
        self._signatures: dict[ir.Node, str] = {}

    def whole(self) -> Hashes:
        """Return the hashes of the whole model. The order of its declared inputs and outputs counts, their names do not."""
        return self.run(0, len(self._prepared.nodes) - 1)

    def run(self, first: int, last: int) -> Hashes:
        """Return the hashes of the nodes [first, last]; a run that is the same in another model has the same."""
        edge = self._prepared.boundary(first, last)
        inside = set(self._prepared.nodes[first : last + 1])
        order = depth_first(edge.outputs, self._prepared.reads, inside=inside)
        constants: dict[ir.Value, int] = {}
        structure = _sha256(self._describe(edge, order, constants))
        tensors = [value.const_value for value in constants] + [tensor for node in order for tensor in _hidden_tensors(node)]
        return Hashes(structure=structure, content=_sha256([structure, *("" if each is None else self.digest(each) for each in tensors)]))

    def signature(self, node: ir.Node) -> str:
        """Return what makes `node` the same operator as another: operator, attributes, and the types of all it reads and writes."""
        known = self._signatures.get(node)
        if known is None:
            numbered: dict[ir.Value, int] = {}

            def resolve(value: ir.Value) -> Reference:
                kind = "constant" if value.is_initializer() else "input"
                return (kind, numbered.setdefault(value, len(numbered)), *self._type(value))

            known = self._signatures[node] = _sha256([self._node(node, resolve)])
        return known

    def digest(self, tensor: ir.TensorProtocol) -> str:
        """Return the SHA-256 of the tensor's bytes as ONNX's raw data has them, wherever they are stored."""
        known = self._digests.get(id(tensor))
        if known is None:
            found = hashlib.sha256()
            for chunk in raw_chunks(tensor):
                found.update(chunk)
            known = self._digests[id(tensor)] = (tensor, found.hexdigest())
        return known[1]

    def _describe(self, edge: Boundary, order: Sequence[ir.Node], constants: dict[ir.Value, int]) -> Iterator[str]:
        """Yield the exact description of a run; `constants` receives the constants in the order in which they are numbered."""
        known: dict[ir.Value, Reference] = {value: ("input", index) for index, value in enumerate(edge.inputs)}

        def resolve(value: ir.Value) -> Reference:
            if value in known:
                return known[value]
            return ("constant", constants.setdefault(value, len(constants)), *self._type(value))

        yield ascii([self._type(value) for value in edge.inputs])
        for index, node in enumerate(order):
            yield self._node(node, resolve)
            known.update({value: ("node", index, place) for place, value in enumerate(node.outputs)})
        yield ascii([resolve(value) for value in edge.outputs])

    def _node(self, node: ir.Node, resolve: Resolve, depth: int = 0) -> str:
        """Describe one node: what it is in itself, and where each of its inputs comes from."""
        reads = [None if value is None else (*resolve(value), _work_values(node, value)) for value in node.inputs]
        bodies = [self._graph(body, resolve, depth) for body in _bodies(node)]
        plain = self._plain.get(node)
        if plain is None:
            plain = self._plain[node] = self._itself(node)
        return f"{plain}{reads!a}{bodies or ''!a}"

    def _itself(self, node: ir.Node) -> str:
        version, defaults = _schema(node.domain, node.op_type, self._opsets.get(node.domain, 1))
        attributes = sorted(
            (name, str(attribute.type.name), encoded)
            for name, attribute in node.attributes.items()
            if (encoded := _attribute(attribute)) != defaults.get(name)
        )
        function = self._prepared.model.functions.get(node.op_identifier())
        body = None if function is None else self._graph(function.graph, lambda value: ("free",), 0)
        outputs = [self._type(value) if value.name else None for value in node.outputs]
        while outputs and outputs[-1] is None:
            outputs.pop()
        return ascii((node.domain, node.op_type, node.overload, version, attributes, outputs, body))

    def _graph(self, graph: ir.Graph, outer: Resolve, depth: int) -> str:
        """Describe a subgraph; `depth` tells its own values from those of the graphs around it."""
        known: dict[ir.Value, Reference] = {value: ("inner input", depth, index) for index, value in enumerate(graph.inputs)}
        for number, value in enumerate(graph.initializers.values()):
            known[value] = ("inner constant", depth, number, *self._type(value))
        for index, node in enumerate(graph):
            known.update({value: ("inner node", depth, index, place) for place, value in enumerate(node.outputs)})

        def resolve(value: ir.Value) -> Reference:
            return known[value] if value in known else outer(value)

        types = [self._type(value) for value in graph.inputs]
        return ascii((types, [self._node(node, resolve, depth + 1) for node in graph], [resolve(value) for value in graph.outputs]))

    def _type(self, value: ir.Value) -> Reference:
        known = self._types.get(value)
        if known is None:
            plain = value.type is None or isinstance(value.type, ir.TensorType)
            known = self._types[value] = (dtype_name(value.dtype) if plain else str(value.type), shape_of(value))
        return known


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return ascii(("ref", attribute.ref_attr_name))
    kind, value = attribute.type, attribute.value
    if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return ""  # described where what it captures is known
    if kind in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        tensors = [value] if kind == ir.AttributeType.TENSOR else value
        return ascii([(dtype_name(each.dtype), tuple(each.shape.numpy()), _small_integers(each)) for each in tensors])
    if kind in (ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return ascii(tuple(value))
    return ascii(value) if isinstance(value, (int, float, str, bytes)) else ascii(str(value))


def _hidden_tensors(node: ir.Node) -> Iterator[ir.TensorProtocol]:
    """Yield the constants inside `node`: tensors among its attributes, then those of its subgraphs, in an order free of names."""
    for _, attribute in sorted(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            yield attribute.as_tensor()
        elif attribute.type == ir.AttributeType.TENSORS:
            yield from attribute.as_tensors()
    for body in _bodies(node):
        yield from (value.const_value for value in body.initializers.values())
        for inner in body:
            yield from _hidden_tensors(inner)


def raw_chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview | bytes]:
    """Yield the tensor's bytes in ONNX's raw layout (little-endian, sub-byte elements packed) piece by piece, without copying mapped data.

    Strings, which have no raw layout, come as length and bytes.
    """
    if tensor.dtype == ir.DataType.STRING:
        for text in np.asarray(tensor.numpy(), dtype=object).reshape(-1):
            data = text if isinstance(text, bytes) else str(text).encode()
            yield len(data).to_bytes(8, "little") + data
        return
    if tensor.dtype.bitwidth < 8 or sys.byteorder != "little" or not isinstance(tensor, ir.ExternalTensor):
        view = memoryview(tensor.tobytes())
    else:
        view = memoryview(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer
    for start in range(0, len(view), _CHUNK):
        yield view[start : start + _CHUNK]


def _sha256(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode("ascii"))
        found.update(b"\n")
    return found.hexdigest()


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the subgraphs of `node` in the order of their attributes' names: the order in the file says nothing."""
    for _, attribute in sorted(node.attributes.items()):
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _work_values(node: ir.Node, value: ir.Value) -> tuple[int, ...] | None:
    """Return the values of a constant input where they decide what work `node` does, not only what it answers."""
    if not value.is_initializer() or value.const_value is None:
        return None
    if value.const_value.dtype == ir.DataType.INT32 and node.op_type not in _INT32_SHAPES_WORK:
        return None
    return _small_integers(value.const_value)


def _small_integers(tensor: ir.TensorProtocol) -> tuple[int, ...] | None:
    if tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) or len(tensor.shape) > 1 or tensor.size > SMALL:
        return None
    return tuple(int(each) for each in tensor.numpy().reshape(-1))


@cache
def _schema(domain: str, op_type: str, opset: int) -> tuple[int, dict[str, str]]:
    """Return the version of the operator's schema and its default attributes, encoded; the opset itself for operators without a schema."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return opset, {}
    defaults = {}
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name:
            value = onnx.helper.get_attribute_value(attribute.default_value)
            value = value.decode() if isinstance(value, bytes) else value
            defaults[name] = ascii(tuple(value)) if isinstance(value, (list, tuple)) else ascii(value)
    return int(schema.since_version), defaults


def small_constant(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the integers of a small constant, None when `value` is no constant, too long, or not of integers."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return _small_integers(value.const_value)


def weight_bytes(edge: Boundary, nodes: Iterable[ir.Node]) -> int:
    """Return the bytes of the constants that `nodes`, with this edge, use: each once, those in subgraphs included, strings not counted."""
    return _constant_bytes(edge.initializers) + sum(_inner_bytes(node) for node in nodes)


def _inner_bytes(node: ir.Node) -> int:
    return sum(_constant_bytes(body.initializers.values()) + sum(map(_inner_bytes, body)) for body in subgraphs(node))


def _constant_bytes(values: Iterable[ir.Value]) -> int:
    tensors = [value.const_value for value in values if value.const_value is not None]
    return sum(int(tensor.nbytes) for tensor in tensors if tensor.dtype != ir.DataType.STRING)
