"""What a graph implies about its inputs: the range that an index must stay in, and the operators that an input reaches unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, inliner, numpy_helper, shape_inference

from aivmm.tensors import TensorSpec

Range = tuple[int | None, int | None]  # inclusive; None is no bound

_FREE: Range = (None, None)
_MOVES_FIRST = frozenset(
    [
        "Cast",
        "CastLike",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Identity",
        "Transpose",
        "Flatten",
        "Expand",
        "Tile",
        "Split",
        "Dropout",
        "Pad",
        "Trilu",
        "Gather",
        "GatherElements",
        "GatherND",
        "ReduceMax",
        "ReduceMin",
        "Compress",
        "ReverseSequence",
    ]
)  # their first input's values come out unchanged
_MOVES_ALL = frozenset({"Concat", "Max", "Min"})
_INDEXES = frozenset({"Gather", "GatherElements", "ScatterElements", "Scatter", "GatherND", "ScatterND", "GatherBlockQuantized"})
_WHOLE_ARITHMETIC = frozenset({"Add", "Sub", "Div", "Neg", "Abs", "Sum"})  # of 64-bit integers: no result grows out of them
_COMPARISONS = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Sign"})
_SMALL = 1 << 16  # elements up to which a constant's values are looked at


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, those of subgraphs (If, Loop, Scan) included."""
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from nodes_of(body)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` with its own functions put in place of their calls; the model itself when it has none."""
    return inliner.inline_local_functions(model) if model.functions else model


class InputTrace:
    """Follows the inputs of a model through its graph. `specs` give the inputs' shapes."""

    def __init__(self, model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> None:
        model = without_functions(model)
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._aliases: dict[tuple[int, int], str] = {}  # (id of a Loop or Scan, input) -> the name inside its body
        self._ranges: dict[str, Range] = {}
        self._nodes = list(nodes_of(model.graph))  # kept: `_aliases` goes by their identity
        for graph in (model.graph, *(body for node in self._nodes for body in subgraphs(node))):
            self._tensors.update((each.name, each) for each in graph.initializer)
        for node in self._nodes:
            self._enter(node)
        self._shapes = _shapes(model, specs)

    def _enter(self, node: onnx.NodeProto) -> None:
        for index, name in enumerate(node.input):
            self._readers.setdefault(name, []).append((node, index))
        if node.op_type == "Constant":
            self._tensors.update((node.output[0], each.t) for each in node.attribute if each.name == "value")
            for each in node.attribute:
                if each.name in ("value_int", "value_ints"):
                    self._tensors[node.output[0]] = numpy_helper.from_array(np.array(helper.get_attribute_value(each), np.int64))
        elif node.op_type in ("Loop", "Scan"):
            (body,) = subgraphs(node)
            first = 2 if node.op_type == "Loop" else 0
            self._aliases.update(
                {(id(node), index): body.input[index].name for index in range(first, min(len(node.input), len(body.input)))}
            )

    def range_of(self, name: str) -> Range:
        """Return the range in which every use of `name` as an index is inside its table."""
        if name not in self._ranges:
            self._ranges[name] = _FREE  # a Loop can lead back here
            found = _FREE
            for node, index in self._readers.get(name, ()):
                found = _both(found, self._demand(node, index))
            self._ranges[name] = found
        return self._ranges[name]

    def reached(self, name: str) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Yield each (node, input index) that `name` arrives at with its values unchanged."""
        seen, todo = {name}, [name]
        while todo:
            for node, index in self._readers.get(todo.pop(), ()):
                yield node, index
                moved = self._moved(node, index)
                todo.extend(each for each in moved if each not in seen)
                seen.update(moved)

    def only_counts(self, name: str) -> bool:
        """Say whether an integer input is only ever calculated with: its values reach outputs, comparisons, or a `Mod` that bounds them.

        Then no table, extent, trip count or network of floats depends on how large they are, and all that their type holds may come.
        """
        seen, todo = {name}, [name]
        while todo:
            for node, index in self._readers.get(todo.pop(), ()):
                if node.op_type in _COMPARISONS or (node.op_type == "Mod" and index == 0 and self._values(node.input[1]) is not None):
                    continue
                if not self._keeps_integers(node, index):
                    return False
                made = [each for each in node.output if each and each not in seen]
                todo.extend(made)
                seen.update(made)
        return True

    def _keeps_integers(self, node: onnx.NodeProto, index: int) -> bool:
        if node.op_type in ("Cast", "CastLike") or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "Mul" and len(node.input) == 2:
            other = self._values(node.input[1 - index])
            return other is not None and bool((np.abs(other) < 1 << 16).all())
        return node.op_type in _WHOLE_ARITHMETIC or (bool(self._moved(node, index)) and not any(subgraphs(node)))

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the shape of a tensor as far as it is known with the inputs' shapes bound, or None."""
        return tuple(self._tensors[name].dims) if name in self._tensors else self._shapes.get(name)

    def _moved(self, node: onnx.NodeProto, index: int) -> list[str]:
        """Return the tensors in which the values of that input appear unchanged."""
        if (id(node), index) in self._aliases:
            return [self._aliases[id(node), index]]
        moves = node.op_type in _MOVES_ALL or (node.op_type in _MOVES_FIRST and index == 0) or (node.op_type == "Where" and index > 0)
        return [each for each in node.output if each] if moves else []

    def _demand(self, node: onnx.NodeProto, index: int) -> Range:
        """Return the range that this one use asks of its input."""
        op = node.op_type
        if op in _INDEXES and index == 1:
            return self._table_range(node)
        if op == "EmbedLayerNormalization" and index in (0, 1, 8):  # word, segment and position ids
            table = self.shape(node.input[{0: 2, 1: 4, 8: 3}[index]])
            return (0, table[0] - 1) if table and table[0] else _FREE
        if op == "OneHot" and index == 0:
            depth = self._values(node.input[1])
            return (0, int(depth.max()) - 1) if depth is not None else _FREE
        if op in ("Equal", "Add", "Sub", "Mul") and len(node.input) == 2:
            other = self._values(node.input[1 - index])
            if other is None or not other.size:
                return _FREE
            if op == "Equal":  # with 0, 1, 2, ...: one-hot arithmetic; with a few values: a comparison
                steps = np.unique(other)
                counts_up = len(steps) > 2 and int(steps[-1] - steps[0]) == len(steps) - 1
                return (int(steps[0]), int(steps[-1])) if counts_up else _FREE
            return _undone(op, index, self.range_of(node.output[0]), other)
        found = _FREE
        for each in self._moved(node, index):
            found = _both(found, self.range_of(each))
        return found

    def _table_range(self, node: onnx.NodeProto) -> Range:
        shape = self.shape(node.input[0])
        if shape is None:
            return _FREE
        if node.op_type in ("GatherND", "ScatterND"):
            indices = self.shape(node.input[1])
            skipped = next((each.i for each in node.attribute if each.name == "batch_dims"), 0)
            last = indices[-1] if indices else None
            extents = shape[skipped:] if last is None else shape[skipped : skipped + last]
        else:
            axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
            extents = shape[axis : axis + 1] if axis >= 0 else shape[axis:][:1]
        known = [each for each in extents if each]
        return (0, min(known) - 1) if known else _FREE

    def _values(self, name: str) -> npt.NDArray[Any] | None:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > _SMALL:
            return None
        values: npt.NDArray[Any] = numpy_helper.to_array(tensor)
        return values if values.dtype.kind in "iuf" and np.isfinite(values).all() else None


def _both(one: Range, two: Range) -> Range:
    low = max((each for each in (one[0], two[0]) if each is not None), default=None)
    high = min((each for each in (one[1], two[1]) if each is not None), default=None)
    return low, high


def _undone(op: str, index: int, wanted: Range, other: npt.NDArray[Any]) -> Range:
    """Return the range of x for which `x op other` (or `other op x` at index 1) stays in `wanted`, for every element of `other`."""
    low, high = wanted
    least, most = other.min().item(), other.max().item()
    if op == "Mul":
        if least <= 0:
            return _FREE
        bounds = (None if low is None else low / least, None if high is None else high / most)
    elif op == "Sub" and index == 1:
        bounds = (None if high is None else most - high, None if low is None else least - low)
    elif op == "Sub":
        bounds = (None if low is None else low + most, None if high is None else high + least)
    else:
        bounds = (None if low is None else low - least, None if high is None else high - most)
    return (None if bounds[0] is None else math.ceil(bounds[0])), (None if bounds[1] is None else math.floor(bounds[1]))


def _shapes(model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> dict[str, tuple[int | None, ...]]:
    """Infer shapes with the inputs' shapes bound, on a copy without the weights: those can be gigabytes, and only their shapes matter."""
    bound = {spec.name: spec.shape for spec in specs}
    copy = onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    graph = copy.graph
    graph.node.extend(model.graph.node)
    for each in model.graph.initializer:
        if math.prod(each.dims) <= 1024 and each.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(each)
        else:
            graph.input.append(helper.make_tensor_value_info(each.name, each.data_type, each.dims))
    constants = {each.name for each in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in constants:
            shape = bound.get(value.name)
            kind = value.type.tensor_type.elem_type
            graph.input.append(value if shape is None else helper.make_tensor_value_info(value.name, kind, shape))
    try:
        inferred = shape_inference.infer_shapes(copy, data_prop=True).graph
    except (shape_inference.InferenceError, ValueError):  # a graph that inference stumbles over still has its declared shapes
        inferred = graph
    return {
        each.name: tuple(extent.dim_value if extent.HasField("dim_value") else None for extent in each.type.tensor_type.shape.dim)
        for each in (*inferred.input, *inferred.value_info, *inferred.output)
        if each.type.HasField("tensor_type") and each.type.tensor_type.HasField("shape")
    }
