"""From onnx-ir objects to ONNX messages, for models that we assemble ourselves: nothing but what a runtime needs, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

Store = Callable[[ir.TensorProtocol, str], onnx.TensorProto]


def tensor_proto(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    """Return `tensor` with its data inside, as raw little-endian bytes (strings as strings), wherever it was stored."""
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        texts = np.asarray(tensor.numpy(), dtype=object).reshape(-1)
        proto.string_data.extend(text if isinstance(text, bytes) else str(text).encode() for text in texts)
    else:
        proto.raw_data = tensor.tobytes()
    return proto


def value_proto(value: ir.Value, names: Mapping[str, str] | None = None) -> onnx.ValueInfoProto:
    """Return name, type and shape of `value`, renamed by `names`."""
    proto = onnx.ValueInfoProto(name=(names or {}).get(value.name, value.name))
    if value.type is not None:
        ir.serde.serialize_type_into(proto.type, value.type)
        if value.shape is not None:
            ir.serde.serialize_shape_into(proto.type, value.shape)
    return proto


def node_proto(node: ir.Node, store: Store) -> onnx.NodeProto:
    """Return `node` without its comments; initializers of its subgraphs go through `store`, tensor attributes are written inline.

    onnx-ir would write external tensors as they are, with a location that means nothing beside another file.
    """
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain, name=node.name or "", overload=node.overload)
    proto.input.extend("" if value is None else value.name for value in node.inputs)
    outputs = [value.name or "" for value in node.outputs]
    while outputs and not outputs[-1]:
        outputs.pop()
    proto.output.extend(outputs)
    for attribute in sorted(node.attributes.values(), key=lambda each: str(each.name)):
        proto.attribute.append(_attribute_proto(attribute, store))
    return proto


def _attribute_proto(attribute: ir.Attr, store: Store) -> onnx.AttributeProto:
    if attribute.is_ref():
        return ir.serde.serialize_reference_attribute(attribute)
    kind = attribute.type
    if kind == ir.AttributeType.GRAPH:
        return onnx.AttributeProto(name=attribute.name, type=onnx.AttributeProto.GRAPH, g=_graph_proto(attribute.as_graph(), store))
    if kind == ir.AttributeType.GRAPHS:
        graphs = [_graph_proto(graph, store) for graph in attribute.as_graphs()]
        return onnx.AttributeProto(name=attribute.name, type=onnx.AttributeProto.GRAPHS, graphs=graphs)
    if kind == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return onnx.AttributeProto(name=attribute.name, type=onnx.AttributeProto.TENSOR, t=tensor_proto(tensor, tensor.name or ""))
    if kind == ir.AttributeType.TENSORS:
        tensors = [tensor_proto(tensor, tensor.name or "") for tensor in attribute.as_tensors()]
        return onnx.AttributeProto(name=attribute.name, type=onnx.AttributeProto.TENSORS, tensors=tensors)
    proto = ir.serde.serialize_attribute(attribute)
    proto.doc_string = ""
    return proto


def _graph_proto(graph: ir.Graph, store: Store) -> onnx.GraphProto:
    proto = onnx.GraphProto(name=graph.name or "body")
    proto.input.extend(value_proto(value) for value in graph.inputs)
    proto.output.extend(value_proto(value) for value in graph.outputs)
    proto.initializer.extend(store(value.const_value, name) for name, value in graph.initializers.items() if value.const_value is not None)
    for node in graph:
        proto.node.append(node_proto(node, store))
        proto.value_info.extend(value_proto(value) for value in node.outputs if value.name and value.type is not None)
    outputs = {value.name for value in graph.outputs}
    kept = [info for info in proto.value_info if info.name not in outputs]
    del proto.value_info[:]
    proto.value_info.extend(kept)
    return proto


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Rename, in place, what a node reads and writes, in its subgraphs too (names are unique along a scope, so nothing is shadowed)."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for inner in graph.node:
                rename(inner, names)
            for output in graph.output:
                output.name = names.get(output.name, output.name)
