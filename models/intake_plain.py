"""Writes plainly what runtimes are known to read wrongly, or not at all; answers stay the same.

- An output that is an input: neither runtime writes a buffer bound to it. It is left out of the prepared model; the engine hands it out.
- `Dropout`: nothing at inference, but OpenVINO gives the name of its output to its input. It becomes `Identity`.
- An output that the branches of an `If` read too: OpenVINO 2026.4, reading from a path, hands out that value for what the branch makes
  (ONNX_ITERATOR=0 in the environment avoids it). The branches read a copy; `aivmm.models.slice` does the same where a cut makes outputs.
- An output of a branch or body that is a value around it: ONNX Runtime does not know it there. An `Identity` inside makes it.
- Sparse weights: onnx-ir does not hold them. They become dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, numpy_helper

from aivmm.errors import ModelError
from aivmm.models.intake_check import subgraphs

_MOST_DENSE = 1 << 28  # elements of a sparse weight written out: a GiB of floats


def plain_proto(model: ModelProto, notes: list[str]) -> None:
    """Rewrite, in place, what onnx-ir would not take in. The wiring must be checked already.

    Raises:
        ModelError: a sparse weight is too large to be written out, or its indices lie outside it.
    """
    graphs = list(_all_graphs(model.graph))
    sparse = sum(_make_dense(graph) for graph in graphs)
    handed = sum(_make_own_outputs(graph) for graph in graphs[1:])
    if sparse:
        notes.append(f"{sparse} sparse weights written out as dense ones")
    if handed:
        notes.append(f"{handed} outputs of branches that were values around them are made inside")


def plain_model(model: ir.Model, notes: list[str]) -> None:
    """Rewrite, in place, what runtimes read wrongly. Constants must be initializers already.

    Raises:
        ModelError: all outputs are inputs, so that the model computes nothing.
    """
    dropouts = sum(_make_identity(node) for graph in model.graphs() for node in list(graph) if _is_idle(node))
    copies = _copy_captured(model.graph)
    inputs = set(model.graph.inputs)
    kept = [value for value in model.graph.outputs if value not in inputs]
    if not kept:
        raise ModelError("the model computes nothing: each of its outputs is an input", advice="export it with what it should compute")
    model.graph.outputs[:] = kept
    if dropouts:
        notes.append(f"{dropouts} Dropout nodes, which do nothing at inference, written as Identity")
    if copies:
        notes.append(f"{copies} outputs that branches or bodies read too are copied for them")


def _all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph itself first, then every one inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _all_graphs(inner)


# --- before onnx-ir


def _make_dense(graph: GraphProto) -> int:
    count = len(graph.sparse_initializer)
    graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    return count


def _dense(sparse: SparseTensorProto) -> TensorProto:
    name, shape = sparse.values.name, tuple(sparse.dims)
    if math.prod(shape) > _MOST_DENSE:
        raise ModelError(f"the sparse weight {name!r} has {math.prod(shape)} elements", advice="export it as a dense weight")
    if TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
        raise ModelError(f"the sparse weight {name!r} lies in another file", advice="export it as a dense weight")
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(shape, dtype=values.dtype)
    try:
        flat = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), shape)
        dense.reshape(-1)[flat] = values
    except (IndexError, ValueError) as error:
        raise ModelError(f"the sparse weight {name!r} has indices outside its shape {list(shape)}") from error
    return numpy_helper.from_array(dense, name)


def _make_own_outputs(graph: GraphProto) -> int:
    """Let a branch or body make each of its outputs itself."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {name for node in graph.node for name in node.output}
    foreign = [value for value in graph.output if value.name not in own]
    for number, value in enumerate(foreign):
        name = _fresh(f"{value.name}.{graph.name or 'branch'}.{number}", own)
        graph.node.append(NodeProto(op_type="Identity", input=[value.name], output=[name]))
        value.name = name
        own.add(name)
    return len(foreign)


def _fresh(wish: str, taken: set[str]) -> str:
    return wish if wish not in taken else next(name for count in range(len(taken) + 1) if (name := f"{wish}.{count}") not in taken)


# --- in onnx-ir


def _is_idle(node: ir.Node) -> bool:
    """True for a Dropout that does nothing, and whose mask nobody reads."""
    if node.op_type != "Dropout" or node.domain not in ("", "ai.onnx"):
        return False
    masks = node.outputs[1:]
    if any(mask.uses() or mask.is_graph_output() for mask in masks) or node.inputs[0] is None:
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return True
    tensor = training.const_value if training.is_initializer() else None
    return tensor is not None and not bool(np.any(tensor.numpy()))


def _make_identity(node: ir.Node) -> int:
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    node.resize_outputs(1)
    return 1


def _copy_captured(graph: ir.Graph) -> int:
    """Give the subgraphs that read an output of `graph` a copy of it to read."""
    outputs = {value for value in graph.outputs if value.producer() is not None}
    copies: dict[ir.Value, ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.graph is graph:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value in outputs:
                node.replace_input_with(index, copies.get(value) or copies.setdefault(value, _copied(graph, value)))
    return len(copies)


def _copied(graph: ir.Graph, value: ir.Value) -> ir.Value:
    producer = value.producer()
    assert producer is not None
    copy = ir.Node("", "Identity", [value])
    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
    copy.outputs[0].name = f"{value.name}.copy"
    graph.insert_after(producer, copy)
    return copy.outputs[0]
