"""Hands a model to onnx's native functions without its big weights, which they would copy and which may exceed protobuf's 2 GiB."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir

SMALL_BYTES = 4096  # weights up to this size stay: shapes, axes, scales and the like, whose values the native functions read


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """Return the main graph as a proto in which big initializers are inputs (type and shape only). `model` is not changed.

    The model's functions must be inlined already. Recorded shapes of intermediate values are left out: callers infer them anew.
    """
    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.node.extend(_bare(ir.serde.serialize_node(node)) for node in model.graph)
    graph.input.extend(ir.serde.serialize_value(value) for value in model.graph.inputs)
    graph.output.extend(ir.serde.serialize_value(value) for value in model.graph.outputs)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ValueError(f"initializer {name!r} has no value")
        if tensor.nbytes > SMALL_BYTES:
            shape = [extent for extent in tensor.shape if isinstance(extent, int)]
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
        else:
            graph.initializer.append(_inline(name, tensor))
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=opsets, graph=graph)


def described(model: ir.Model) -> onnx.ModelProto:
    """Return the model as a proto for reading: every node, shape and weight is there, only the big weights' values are not."""
    proto = skeleton(model)
    weights = model.graph.initializers
    inputs = [info for info in proto.graph.input if info.name not in weights]
    stubs = [info for info in proto.graph.input if info.name in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    for info in stubs:
        kind = info.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        proto.graph.initializer.append(
            onnx.TensorProto(name=info.name, data_type=kind.elem_type, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
        )
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.shape is not None and value.type is not None and not value.is_graph_output():
                proto.graph.value_info.append(ir.serde.serialize_value(value))
    return proto


def with_weights(proto: onnx.ModelProto, weights: Iterable[ir.Value]) -> ir.Model:
    """Return a model from a (changed) skeleton, with the big weights put back by name."""
    model = ir.from_proto(proto)
    inputs = {value.name: value for value in model.graph.inputs}
    for old in weights:
        value = inputs.get(old.name)
        if value is not None and old.name not in model.graph.initializers:
            model.graph.inputs.remove(value)
            value.const_value = old.const_value
            model.graph.register_initializer(value)
    return model


def _bare(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node without notes for people, which may be long (stack traces)."""
    node.ClearField("doc_string")
    del node.metadata_props[:]
    return node


def _inline(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    proto = ir.serde.serialize_tensor(tensor)
    proto.name = name
    return proto
