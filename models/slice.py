"""Writes runs of nodes of a prepared model as models of their own, connected by the names of the tensors between them.

Segments of one plan keep their weights in one file beside them, each weight once: a `WeightStore`. The messages are assembled here from the
nodes at known positions rather than extracted by reachability: what is in a segment is decided by the shared order, and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from aivmm.models.hashing import Hasher, raw_chunks, weight_bytes
from aivmm.models.operators import data_dependent
from aivmm.models.order import Boundary, PreparedGraph, can_cross, captures, subgraphs, tensor_spec
from aivmm.models.wire import node_proto, rename, tensor_proto, value_proto
from aivmm.tensors import TensorSpec

EXTERNAL_BYTES = 1 << 10  # smaller weights are written into the model itself
MAX_IR_VERSION = 13  # what ONNX Runtime 1.31 reads
_LARGE = 1 << 20
_ALIGNMENT, _LARGE_ALIGNMENT = 64, 4096  # a cache line; a page, so that runtimes can map it


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A written segment: the nodes [first, last], its edge in the order of the file, and its hashes (`aivmm.models.hashing`)."""

    path: Path
    first: int
    last: int
    structure: str
    content: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int
    weights: tuple[Path, ...]  # files of external data that it needs beside it; none when all weights are small
    data_dependent: bool


class WeightStore:
    """One file of weights beside the segments that share it. Append-only; what has the same bytes is stored once.

    Weights start at multiples of 64 bytes, those of a MiB or more at multiples of 4096; the gaps are zeros. The file is made anew with the
    first weight, opened for each one and closed again, so that a runtime can map it in between. The same weights in the same order give
    the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[tuple[str, int], int] = {}
        self._end = 0

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return self._end

    def put(self, tensor: ir.TensorProtocol, digest: str) -> tuple[int, int]:
        """Store `tensor`, whose bytes have the SHA-256 `digest`, unless it is stored already; return its offset and length in bytes."""
        length = int(tensor.nbytes)
        known = self._places.get((digest, length))
        if known is not None:
            return known, length
        alignment = _LARGE_ALIGNMENT if length >= _LARGE else _ALIGNMENT
        offset = -(-self._end // alignment) * alignment
        if not self._places:
            self.path.unlink(missing_ok=True)  # not emptied: a runtime may have mapped what an earlier store wrote there
        with self.path.open("ab") as file:
            file.write(bytes(offset - self._end))
            for chunk in raw_chunks(tensor):
                file.write(chunk)
        self._places[digest, length] = offset
        self._end = offset + length
        return offset, length


class Slicer:
    """Writes segments of one prepared model, loaded once. Close it (or use `with`) before the model's files are removed."""

    def __init__(self, model: Path | PreparedGraph, *, hasher: Hasher | None = None) -> None:
        self.prepared = model if isinstance(model, PreparedGraph) else PreparedGraph(model)
        self._hasher = hasher or Hasher(self.prepared)

    def __enter__(self) -> Slicer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model's files."""
        self.prepared.close()

    def write(self, first: int, last: int, destination: Path, *, weights: WeightStore | None = None) -> Segment:
        """Write the nodes [first, last] of the shared order (those of blocks i to j: `blocks[i].first`, `blocks[j].last`) to `destination`.

        Inputs are the tensors it reads that come from outside, in the order of first use; outputs are those made inside that are read
        after it or are outputs of the model. All keep their names. From the first node to the last it is the whole model with its declared
        interface. Weights of 1 KiB or more go to `weights`, by default a file of its own (`<destination>.weights`), which must lie in the
        folder of `destination`. Equal calls in equal order write equal bytes.

        Raises:
            ValueError: the positions are no run of nodes, a tensor at the edge cannot cross it, or `weights` lies elsewhere.
        """
        nodes = self.prepared.nodes
        whole = first == 0 and last == len(nodes) - 1
        if not whole and not 0 <= first <= last < len(nodes):
            raise ValueError(f"no run of nodes: [{first}, {last}] of {len(nodes)}")
        store = weights or WeightStore(destination.with_name(destination.name + ".weights"))
        if store.path.resolve().parent != destination.resolve().parent:
            raise ValueError(f"weights must lie beside {destination.name}, not in {store.path.parent}")
        edge = self.prepared.boundary(first, last)
        odd = next((value for value in (*edge.inputs, *edge.outputs) if not whole and not self._may_cross(value)), None)
        if odd is not None:
            raise ValueError(f"cannot cut through {odd.name!r}: {odd.type or 'its type is unknown'}")
        inside = nodes[first : last + 1]
        writer = _Writer(store, self._hasher)
        model = self._model(writer.graph(inside, edge), opsets=self.prepared.model.opset_imports)
        draft = destination.with_name(f"{destination.name}.part")
        draft.write_bytes(model.SerializeToString(deterministic=True))
        draft.replace(destination)  # not overwritten: a runtime may have mapped what was there
        hashes = self._hasher.run(first, last)
        return Segment(
            path=destination,
            first=first,
            last=last,
            structure=hashes.structure,
            content=hashes.content,
            inputs=tuple(map(tensor_spec, edge.inputs)),
            outputs=tuple(map(tensor_spec, edge.outputs)),
            weight_bytes=weight_bytes(edge, inside),
            weights=(store.path,) if writer.stored else (),
            data_dependent=any(map(data_dependent, inside)),
        )

    def write_whole(self, destination: Path, *, weights: WeightStore | None = None) -> Segment:
        """Write the whole model, uncut, as `write` does."""
        return self.write(0, len(self.prepared.nodes) - 1, destination, weights=weights)

    def _may_cross(self, value: ir.Value) -> bool:
        """The model's own inputs and outputs may be what they are; what we cut through must be a typed tensor."""
        return bool(value.is_graph_input() or value.is_graph_output()) or can_cross(value)

    def _model(self, graph: onnx.GraphProto, *, opsets: dict[str, int]) -> onnx.ModelProto:
        source = self.prepared.model
        model = onnx.ModelProto(ir_version=min(source.ir_version, MAX_IR_VERSION), producer_name="aivmm", graph=graph)
        model.opset_import.extend(onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in sorted(opsets.items()))
        model.functions.extend(ir.to_proto(function) for _, function in sorted(source.functions.items()))
        return model


class _Writer:
    """Assembles one graph; `stored` tells whether any of its weights went to the store."""

    def __init__(self, store: WeightStore, hasher: Hasher) -> None:
        self._store, self._hasher = store, hasher
        self.stored = False

    def graph(self, nodes: Sequence[ir.Node], edge: Boundary) -> onnx.GraphProto:
        graph = onnx.GraphProto(name="segment")
        graph.initializer.extend(self.tensor(value.const_value, value.name) for value in edge.initializers)
        graph.node.extend(node_proto(node, self.tensor) for node in nodes)
        _copy_captured(graph, nodes, edge.outputs)
        graph.input.extend(map(value_proto, edge.inputs))
        graph.output.extend(map(value_proto, edge.outputs))
        shown = set(edge.outputs)
        inner = (value for node in nodes for value in node.outputs if value.name and value not in shown)
        graph.value_info.extend(value_proto(value) for value in inner if value.type is not None)
        return graph

    def tensor(self, tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes < EXTERNAL_BYTES:
            return tensor_proto(tensor, name)
        self.stored = True
        offset, length = self._store.put(tensor, self._hasher.digest(tensor))
        proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy(), data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", self._store.path.name), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        return proto


def _copy_captured(graph: onnx.GraphProto, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Let subgraphs read a copy of what is an output of the segment too: OpenVINO mixes the two up (`aivmm.models.intake_plain`)."""
    captured = {value for node in nodes for value in captures(node)}
    mixed = {value.name for value in outputs if value in captured and value.producer() is not None}
    if not mixed:
        return
    taken = {name for node in nodes for name in _names(node)}
    copies = {name: next(wish for count in itertools.count() if (wish := f"{name}.copy{count}") not in taken) for name in mixed}
    written = list(graph.node)
    del graph.node[:]
    for node in written:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            outside = list(node.output)
            rename(node, copies)
            node.output[:] = outside
        graph.node.append(node)
        graph.node.extend(onnx.NodeProto(op_type="Identity", input=[name], output=[copies[name]]) for name in node.output if name in mixed)


def _names(node: ir.Node) -> Iterator[str]:
    """Yield the names that `node` and its subgraphs define."""
    yield from (value.name or "" for value in node.outputs)
    for body in subgraphs(node):
        yield from (value.name or "" for value in (*body.inputs, *body.initializers.values()))
        for inner in body:
            yield from _names(inner)


def segment(model: Path, first: int, last: int, destination: Path, *, weights: WeightStore | None = None) -> Segment:
    """Write the nodes [first, last] of the prepared `model` once; `Slicer` does it without loading the model each time."""
    with Slicer(model) as slicer:
        return slicer.write(first, last, destination, weights=weights)
