"""Carries a lowered model over to another batch, so that calibration is done once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from aivmm.errors import Unsupported
from aivmm.models import lowering_model as shared
from aivmm.models.intake_infer import infer_shapes

Array = npt.NDArray[Any]


def rebatch(lowered: Path, from_prepared: Path, to_prepared: Path, destination: Path) -> None:
    """Write `lowered`, made from `from_prepared`, to `destination` at the batch of `to_prepared`, another preparation of the same model.

    What differs between the two preparations is taken from `to_prepared`: the shapes of inputs and outputs, and constants (target shapes,
    initial states). Shapes in between are inferred anew, and the result is run once. Scales stay those of the calibration. Native code:
    call it in a worker.

    Raises:
        Unsupported: the models do not correspond, or the lowered model no longer holds what would have to change.
        UsageError: the destination cannot be written.
    """
    with shared.workshop(destination) as folder:
        before, after, model = shared.read(from_prepared), shared.read(to_prepared), shared.read(lowered)
        _must_correspond(before, after)
        if _ends(before) != _ends(model):
            raise Unsupported("the lowered model has other inputs or outputs than the model it is said to be of")
        for name, old, new in _changed(before, after):
            _put(model, name, old, new)
        _take_shapes(model, after)
        draft = folder / destination.name
        data = shared.save(model, draft, data=f"{destination.name}.data")
        shared.must_run(draft, {value.name or "": _known(value) for value in after.graph.outputs})
        shared.put_in_place(draft, data, destination)


def _ends(model: ir.Model) -> list[list[tuple[str | None, ir.DataType | None]]]:
    return [[(value.name, value.dtype) for value in values] for values in (model.graph.inputs, model.graph.outputs)]


def _must_correspond(before: ir.Model, after: ir.Model) -> None:
    """The two preparations have the same inputs, outputs, nodes and weights, but for the weights' values."""
    if _ends(before) != _ends(after):
        raise Unsupported("the two batches have different inputs or outputs")
    if len(before.graph) != len(after.graph):
        raise Unsupported(f"the two batches have different numbers of nodes: {len(before.graph)} and {len(after.graph)}")
    for mine, theirs in zip(before.graph, after.graph, strict=True):
        if _written(mine) != _written(theirs):
            raise Unsupported(f"node {mine.name!r} differs between the two batches")
    if odd := sorted(set(before.graph.initializers) ^ set(after.graph.initializers)):
        raise Unsupported(f"weight {odd[0]!r} is in one of the two batches only")


def _written(node: ir.Node) -> bytes:
    """Everything that says what the node does: operator, wiring, attributes, subgraphs; not what was inferred about it."""
    proto = ir.serde.serialize_node(node)
    del proto.metadata_props[:]
    proto.doc_string = ""
    for attribute in proto.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            del graph.value_info[:]
    proto.attribute.sort(key=lambda attribute: attribute.name)
    written: bytes = proto.SerializeToString(deterministic=True)
    return written


def _changed(before: ir.Model, after: ir.Model) -> Iterator[tuple[str, Array, Array]]:
    """Yield each weight that is not the same at both batches: its name and its value at either."""
    for name, value in before.graph.initializers.items():
        mine, theirs = value.const_value, after.graph.initializers[name].const_value
        if mine is None or theirs is None or mine.dtype != theirs.dtype:
            raise Unsupported(f"weight {name!r} is of different types at the two batches")
        if mine.shape != theirs.shape or mine.tobytes() != theirs.tobytes():
            yield name, mine.numpy(), theirs.numpy()


def _put(model: ir.Model, name: str, old: Array, new: Array) -> None:
    """Give the weight `name` of the lowered model its value at the new batch; it must still have that of the old one."""
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None or not np.array_equal(value.const_value.numpy(), old):
        raise Unsupported(f"constant {name!r} depends on the batch, and lowering changed it")
    value.const_value = ir.tensor(np.ascontiguousarray(new).reshape(new.shape), name=name)
    value.shape = ir.Shape(new.shape)


def _take_shapes(model: ir.Model, after: ir.Model) -> None:
    for mine, theirs in zip((*model.graph.inputs, *model.graph.outputs), (*after.graph.inputs, *after.graph.outputs), strict=True):
        mine.shape = theirs.shape
    ends = set(model.graph.outputs)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if value not in ends:
                value.shape = None
    infer_shapes(model)


def _known(value: ir.Value) -> tuple[int | None, ...] | None:
    return None if value.shape is None else tuple(extent if isinstance(extent, int) else None for extent in value.shape)
