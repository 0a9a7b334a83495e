"""Random small graphs of every wiring that a model may have: control flow with captures, sequences, hostile names, shared weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HOSTILE = ("../../x", "<script>alert(1)</script>", "two\nlines", "a b", "é/ü", "x" * 300, "'; DROP TABLE probe; --", "{{7*7}}", "\\", "%s")
SHAPE = (2, 3)
_UNARY = ("Relu", "Sigmoid", "Neg", "Identity", "Exp", "Dropout")
_KINDS = ("unary", "unary", "binary", "binary", "weight", "split", "variadic", "if", "if", "loop", "scan", "sequence", "shape")
_INT, _BOOL = TensorProto.INT64, TensorProto.BOOL


def info(name: str, shape: Sequence[int | str] = SHAPE, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Describe a value."""
    return helper.make_tensor_value_info(name, kind, shape)


def feeds_for(flag: bool) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs for a graph of `graphs`."""
    rng = np.random.default_rng(3)
    x0, x1 = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    return {"x0": x0, "x1": x1, "flag": np.array(flag)}


@st.composite
def graphs(draw: st.DrawFn, most: int = 9) -> onnx.GraphProto:
    """DAGs of 2 to `most` pieces over floats of `SHAPE`, with the inputs x0, x1 and flag, of which any may be unused."""
    values = ["x0", "x1"]
    nodes: list[onnx.NodeProto] = []
    for index in range(draw(st.integers(2, most))):
        name = f"v{index}" if draw(st.booleans()) else f"{index}{draw(st.sampled_from(HOSTILE))}"
        nodes += _piece(draw, draw(st.sampled_from(_KINDS)), name, index, values)
        values.append(name)
    for index, node in enumerate(nodes):
        node.name = f"node{index}"
    outputs = draw(st.lists(st.sampled_from(values[2:]), min_size=1, max_size=3, unique=True))
    inputs = [info("x0"), info("x1"), info("flag", (), _BOOL)]
    known = [info(name) for name in values[2:] if name not in outputs]  # inference does not see through loops
    return helper.make_graph(nodes, "random", inputs, [info(name) for name in outputs], _constants(), value_info=known)


def _constants() -> list[onnx.TensorProto]:
    rng = np.random.default_rng(0)
    floats = {"w0": (3, 3), "w1": (3, 3), "k": SHAPE}
    integers = {"halves": [1, 1], "trips": 2, "at": 1}
    return [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in floats.items()] + [
        numpy_helper.from_array(np.array(value, np.int64), name) for name, value in integers.items()
    ]


def _piece(draw: st.DrawFn, kind: str, name: str, index: int, values: Sequence[str]) -> list[onnx.NodeProto]:
    """Return nodes that make `name`, the last of them, from `values`."""
    node = helper.make_node
    a, b = draw(st.sampled_from(values)), draw(st.sampled_from(values))
    if kind == "unary":
        return [node(draw(st.sampled_from(_UNARY)), [a], [name])]
    if kind == "binary":
        return [node(draw(st.sampled_from(["Add", "Sub", "Max"])), [a, b], [name])]
    if kind == "weight":
        return [node("MatMul", [a, draw(st.sampled_from(["w0", "w1"]))], [name])]
    if kind == "variadic":
        return [node("Sum", draw(st.lists(st.sampled_from(values), min_size=1, max_size=4)), [name])]
    if kind == "split":
        top, bottom = f"{name}.0", f"{name}.1"
        ends = draw(st.sampled_from([(bottom, top), (top, top)]))
        return [node("Split", [a, "halves"], [top, bottom], axis=0), node("Concat", ends, [name], axis=0)]
    if kind == "if":
        bodies = [_body(draw, f"{side}{index}", values, draw(st.integers(0, 1))) for side in ("then", "else")]
        return [node("If", ["flag"], [name], then_branch=bodies[0], else_branch=bodies[1])]
    if kind == "loop":
        return [node("Loop", ["trips", "", a], [name], body=_loop(index, b))]
    if kind == "scan":
        return [node("Scan", [a, b], [f"{name}.state", name], body=_scan(index, draw(st.sampled_from(["k", *values]))), num_scan_inputs=1)]
    if kind == "shape":
        return [node("Shape", [a], [f"{name}.shape"]), node("Reshape", [b, f"{name}.shape"], [name])]
    return [node("SequenceConstruct", [a, b], [f"sequence{name}"]), node("SequenceAt", [f"sequence{name}", "at"], [name])]


def _body(draw: st.DrawFn, name: str, values: Sequence[str], depth: int) -> onnx.GraphProto:
    """A branch that reads values around it; with depth left it may hold another If, whose branches read from all scopes."""
    made = f"{name}.sum"
    nodes = [helper.make_node("Add", [draw(st.sampled_from(values)), draw(st.sampled_from([*values, "k"]))], [made])]
    last = made
    if depth and draw(st.booleans()):
        last = f"{name}.deep"
        bodies = [_body(draw, f"{name}.{side}", [*values, made], 0) for side in ("then", "else")]
        nodes.append(helper.make_node("If", ["flag"], [last], then_branch=bodies[0], else_branch=bodies[1]))
    return helper.make_graph(nodes, name, [], [info(last)])


def _loop(index: int, captured: str) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Add", [f"state{index}", captured], [f"next{index}"]),
        helper.make_node("Identity", [f"go{index}"], [f"still{index}"]),
    ]
    inputs = [info(f"i{index}", (), _INT), info(f"go{index}", (), _BOOL), info(f"state{index}")]
    return helper.make_graph(nodes, f"loop{index}", inputs, [info(f"still{index}", (), _BOOL), info(f"next{index}")])


def _scan(index: int, captured: str) -> onnx.GraphProto:
    """Adds a row to all rows of the state and of a captured value; hands out the first row of the sum."""
    row = (SHAPE[1],)
    nodes = [
        helper.make_node("Add", [f"all{index}", f"row{index}"], [f"sum{index}"]),
        helper.make_node("Max", [f"sum{index}", captured], [f"new{index}"]),
        helper.make_node("ReduceMax", [f"new{index}"], [f"top{index}"], axes=[0], keepdims=0),
    ]
    inputs = [info(f"all{index}"), info(f"row{index}", row)]
    return helper.make_graph(nodes, f"scan{index}", inputs, [info(f"new{index}"), info(f"top{index}", row)])
