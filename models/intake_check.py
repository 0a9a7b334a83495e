"""Checks of a graph's wiring that no runtime reports in words a user understands: who defines what, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from aivmm.errors import ModelError
from aivmm.models.intake_external import stored_bytes, tensors

_EXPORT = "the model is damaged; export it again"


def check_graph(model: ModelProto) -> None:
    """Raise `ModelError` for undefined or doubly defined tensors, cycles, damaged weights and operator sets unknown to this onnx.

    Nodes may come in any order (they are sorted later); subgraphs see the tensors around them.
    """
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise ModelError(
                f"the model uses opset {entry.version}, newer than the newest known here ({newest})",
                advice="export it with opset 26 or lower",
            )
    _check_scope(model.graph, frozenset(), f"graph {model.graph.name!r}")
    for function in model.functions:
        where = f"function {function.domain}::{function.name}"
        _check_nodes(function.node, set(function.input), list(function.output), where)
    for tensor in tensors(model):
        _check_tensor(tensor)


def _check_scope(graph: GraphProto, outer: frozenset[str], where: str) -> None:
    inputs = [value.name for value in graph.input]
    _refuse_duplicates(inputs, where, "input")
    weights = [tensor.name for tensor in graph.initializer] + [sparse.values.name for sparse in graph.sparse_initializer]
    _refuse_duplicates(weights, where, "initializer")
    outputs = [value.name for value in graph.output]
    _refuse_duplicates(outputs, where, "output")
    _check_nodes(graph.node, {*inputs, *weights}, outputs, where, outer)


def _check_nodes(
    nodes: Sequence[NodeProto], given: set[str], outputs: Iterable[str], where: str, outer: frozenset[str] = frozenset()
) -> None:
    producers: dict[str, int] = {}
    for position, node in enumerate(nodes):
        if not node.op_type:
            raise ModelError(f"{_label(node, position)} of {where} has no operator type", advice=_EXPORT)
        for name in filter(None, node.output):
            if name in producers or name in given:
                other = _label(nodes[producers[name]], producers[name]) if name in producers else "an input or initializer"
                raise ModelError(f"tensor {name!r} of {where} is written twice: by {other} and {_label(node, position)}", advice=_EXPORT)
            producers[name] = position
    known = outer | given | set(producers)
    needs: list[set[int]] = []
    for position, node in enumerate(nodes):
        reads = {*node.input, *_captured(node)} - {""}
        for name in sorted(reads):
            if name not in known:
                raise ModelError(f"{_label(node, position)} of {where} reads {name!r}, which nothing defines", advice=_EXPORT)
        needs.append({producers[name] for name in reads if name in producers})
    for name in outputs:
        if name not in known:
            raise ModelError(f"output {name!r} of {where} is not defined by any node", advice=_EXPORT)
    _refuse_cycle(nodes, needs, where)
    for position, node in enumerate(nodes):
        for graph in subgraphs(node):
            _check_scope(graph, frozenset(known), f"the {graph.name or 'sub'} graph of {_label(node, position)}")


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Return the graphs in a node's attributes: branches of If, bodies of Loop and Scan."""
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


def _captured(node: NodeProto) -> set[str]:
    """Names that a node's subgraphs read from the scopes around them."""
    names: set[str] = set()
    for graph in subgraphs(node):
        local = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        local |= {sparse.values.name for sparse in graph.sparse_initializer}
        local |= {name for inner in graph.node for name in inner.output}
        reads = {value.name for value in graph.output}
        for inner in graph.node:
            reads |= {*inner.input, *_captured(inner)}
        names |= reads - local
    return names - {""}


def _refuse_cycle(nodes: Sequence[NodeProto], needs: Sequence[set[int]], where: str) -> None:
    """Kahn's algorithm; what is left over hangs on a cycle, and walking back along needs ends in it."""
    waiting = [len(before) for before in needs]
    after: dict[int, list[int]] = {}
    for position, before in enumerate(needs):
        for earlier in before:
            after.setdefault(earlier, []).append(position)
    ready = [position for position, count in enumerate(waiting) if count == 0]
    done: set[int] = set()
    while ready:
        position = ready.pop()
        done.add(position)
        for later in after.get(position, ()):
            waiting[later] -= 1
            if waiting[later] == 0:
                ready.append(later)
    if len(done) < len(nodes):
        ring = _ring({position: needs[position] - done for position in range(len(nodes)) if position not in done})
        names = " -> ".join(_label(nodes[position], position) for position in ring[:4])
        raise ModelError(f"{where} has a cycle of {len(ring)} nodes: {names}{' -> ...' if len(ring) > 4 else ''}", advice=_EXPORT)


def _ring(needs: Mapping[int, set[int]]) -> list[int]:
    walk = [min(needs)]
    seen = {walk[0]: 0}
    while True:
        step = min(needs[walk[-1]])
        if step in seen:
            return list(reversed(walk[seen[step] :]))
        seen[step] = len(walk)
        walk.append(step)


def _refuse_duplicates(names: Sequence[str], where: str, what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ModelError(f"{where} lists {what} {twice[0]!r} twice", advice=_EXPORT)
    if "" in names:
        raise ModelError(f"{where} has an {what} without a name", advice=_EXPORT)


def _check_tensor(tensor: TensorProto) -> None:
    if any(extent < 0 for extent in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} has a negative extent", advice=_EXPORT)
    if tensor.data_location == TensorProto.EXTERNAL or not tensor.HasField("raw_data"):
        return
    needed = stored_bytes(tensor)
    if needed is not None and needed != len(tensor.raw_data):
        raise ModelError(f"tensor {tensor.name!r} holds {len(tensor.raw_data)} bytes, but its shape and type need {needed}", advice=_EXPORT)


def _label(node: NodeProto, position: int) -> str:
    return f"node {node.name!r} ({node.op_type or '?'})" if node.name else f"node {position} ({node.op_type or '?'})"
