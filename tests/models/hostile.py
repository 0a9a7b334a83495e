"""Models that int8 breaks, each in a way of its own, beside blocks that it does no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


class _Graph:
    """Nodes in a chain of vectors [1, width]."""

    def __init__(self, width: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.width = width
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last = "x"

    def weight(self, array: npt.ArrayLike) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def then(self, op_type: str, *others: str, name: str = "", **attributes: int) -> None:
        made = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, [self.last, *others], [made], name=name or f"{op_type}{len(self.nodes)}", **attributes))
        self.last = made

    def benign(self) -> None:
        """A product that keeps the scale, and a Tanh that keeps the range: int8 costs little."""
        matrix = self.rng.normal(size=(self.width, self.width)) / np.sqrt(self.width)
        self.then("MatMul", self.weight(matrix))
        self.then("Tanh")

    def written(self, path: Path) -> Path:
        self.nodes[-1].output[0] = "y"
        ends = [helper.make_tensor_value_info(name, F, [1, self.width]) for name in ("x", "y")]
        graph = helper.make_graph(self.nodes, "hostile", ends[:1], ends[1:], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())
        return path


def _wide_range(graph: _Graph) -> None:
    """Values over ten powers of ten that a logarithm makes all count: no scale serves them, and no balancing with the weights."""
    graph.then("Mul", graph.weight(9.0))
    graph.then("Exp")
    mixing = np.eye(graph.width) + np.roll(np.eye(graph.width), 1, axis=1) * 0.5
    graph.then("MatMul", graph.weight(mixing), name="hostile")
    graph.then("Log")
    graph.then("Mul", graph.weight(1 / 9.0))


def _outlier_channel(graph: _Graph) -> None:
    """One channel is 20,000 times as large as the others, and its weights as much smaller."""
    scale = np.ones(graph.width)
    scale[0] = 20000.0
    graph.then("Mul", graph.weight(scale))
    matrix = graph.rng.normal(size=(graph.width, graph.width)) / np.sqrt(graph.width)
    graph.then("MatMul", graph.weight(matrix / scale[:, None]), name="hostile")
    graph.then("Tanh")


def _tiny_range(graph: _Graph) -> None:
    """All information is in the seventh digit of values near 1."""
    graph.then("Mul", graph.weight(1e-3))
    graph.then("Add", graph.weight(1.0))
    graph.then("MatMul", graph.weight(np.eye(graph.width)), name="hostile")
    graph.then("Sub", graph.weight(1.0))
    graph.then("Mul", graph.weight(1e3))


def _softmax_tail(graph: _Graph) -> None:
    """The output is the logarithm of a softmax's tail."""
    graph.then("Mul", graph.weight(12.0))
    graph.then("Softmax", axis=-1)
    graph.then("MatMul", graph.weight(np.eye(graph.width)), name="hostile")
    graph.then("Add", graph.weight(1e-20))
    graph.then("Log")


def _denormals(graph: _Graph) -> None:
    """Weights so small that their scale is a denormal number."""
    graph.then("MatMul", graph.weight(np.eye(graph.width) * 1e-38), name="hostile")
    graph.then("Mul", graph.weight(1e19))
    graph.then("Mul", graph.weight(1e19))


HOSTILE: dict[str, Callable[[_Graph], None]] = {
    "wide range": _wide_range,
    "outlier channel": _outlier_channel,
    "tiny range": _tiny_range,
    "softmax tail": _softmax_tail,
    "denormals": _denormals,
}


def hostile(path: Path, kind: str = "wide range", *, width: int = 64, before: int = 3, after: int = 2) -> Path:
    """Write a model of benign blocks with one hostile block between them."""
    graph = _Graph(width, seed=7)
    for _ in range(before):
        graph.benign()
    HOSTILE[kind](graph)
    for _ in range(after):
        graph.benign()
    return graph.written(path)
