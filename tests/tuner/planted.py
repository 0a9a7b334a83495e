"""Small models with one operator that OpenVINO computes silently wrong, between operators that both runtimes compute right.

What is wrong is known from hand checks and from benchmarks/results/onnx_conformance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
_WIDTH = 64


class _Graph:
    """Collects nodes and weights; each method adds one node (or a few) and returns the name of its output."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(5)
        self._count = 0

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        self._count += 1
        output = f"{op}_{self._count}"
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def weight(self, value: np.ndarray) -> str:
        self._count += 1
        self._weights.append(numpy_helper.from_array(np.asarray(value), f"w{self._count}"))
        return f"w{self._count}"

    def dense(self, x: str, width: int = _WIDTH, dtype: type = np.float32) -> str:
        """A layer, its weights of a size that keeps the variance."""
        kernel = (self._rng.standard_normal((width, width)) * (2 / width) ** 0.5).astype(dtype)
        return self.node("Relu", self.node("MatMul", x, self.weight(kernel)))

    def conv(self, x: str, before: int, after: int) -> str:
        kernel = self._rng.standard_normal((after, before, 3, 3)) * (2 / (9 * before)) ** 0.5
        return self.node("Relu", self.node("Conv", x, self.weight(kernel.astype(np.float32)), pads=[1, 1, 1, 1]))

    def model(self, inputs: dict[str, tuple[int, list[int]]], output: str, dtype: int, shape: list[int]) -> onnx.ModelProto:
        self._nodes.append(helper.make_node("Identity", [output], ["y"], name="last"))
        graph = helper.make_graph(
            self._nodes,
            "planted",
            [helper.make_tensor_value_info(name, kind, extent) for name, (kind, extent) in inputs.items()],
            [helper.make_tensor_value_info("y", dtype, shape)],
            self._weights,
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def quantised_add() -> onnx.ModelProto:
    """`com.microsoft.QLinearAdd`, whose sums beyond the range saturate; OpenVINO lets them wrap."""
    g = _Graph()
    x = g.dense(g.dense("x"))
    scale, zero = g.weight(np.float32(0.01)), g.weight(np.int8(0))
    q = g.node("QuantizeLinear", x, scale, zero)
    added = g.node("QLinearAdd", q, scale, zero, q, scale, zero, scale, zero, domain="com.microsoft")
    y = g.dense(g.dense(g.node("DequantizeLinear", added, scale, zero)))
    return g.model({"x": (FLOAT, [1, _WIDTH])}, y, FLOAT, [1, _WIDTH])


def large_integers() -> onnx.ModelProto:
    """Time stamps of 64 bits, of which a day's share is taken; OpenVINO computes in 32 bits. Small inputs do not show it."""
    g = _Graph()
    day = g.weight(np.int64(86_400_000))
    share = g.node("Div", g.node("Cast", g.node("Mod", "t", day), to=FLOAT), g.weight(np.float32(86_400_000)))
    y = g.dense(g.dense(g.node("Add", share, g.dense("x"))))
    return g.model({"t": (INT64, [1, _WIDTH]), "x": (FLOAT, [1, _WIDTH])}, y, FLOAT, [1, _WIDTH])


def large_integers_inside() -> onnx.ModelProto:
    """Integers that grow beyond 32 bits inside the model, whatever its inputs are."""
    g = _Graph()
    ids = g.node("Cast", g.node("Mul", g.dense(g.dense("x")), g.weight(np.float32(1000))), to=INT64)
    grown = g.node("Div", g.node("Mul", ids, g.weight(np.int64(2**33 + 1))), g.weight(np.int64(2**33)))
    y = g.dense(g.dense(g.node("Cast", grown, to=FLOAT)))
    return g.model({"x": (FLOAT, [1, _WIDTH])}, y, FLOAT, [1, _WIDTH])


def double_precision() -> onnx.ModelProto:
    """A model in float64, which OpenVINO computes in float32."""
    g = _Graph()
    y = "x"
    for _ in range(4):
        y = g.dense(y, dtype=np.float64)
    return g.model({"x": (DOUBLE, [1, _WIDTH])}, y, DOUBLE, [1, _WIDTH])


def double_inside() -> onnx.ModelProto:
    """A float32 model with numbers in float64 inside that no float32 holds: exp(200) is infinite there."""
    g = _Graph()
    offset = g.weight(np.float64(200))
    wide = g.node("Add", g.node("Cast", g.dense(g.dense("x")), to=DOUBLE), offset)
    back = g.node("Sub", g.node("Log", g.node("Exp", wide)), offset)
    y = g.dense(g.dense(g.node("Cast", back, to=FLOAT)))
    return g.model({"x": (FLOAT, [1, _WIDTH])}, y, FLOAT, [1, _WIDTH])


def antialiased_resize() -> onnx.ModelProto:
    """A network with an antialiased Resize inside, which OpenVINO computes differently."""
    g = _Graph()
    x = g.conv(g.conv("x", 3, 16), 16, 16)
    sizes = g.weight(np.array([1, 16, 13, 13], dtype=np.int64))
    small = g.node("Resize", x, "", "", sizes, mode="linear", antialias=1)
    y = g.conv(g.conv(small, 16, 16), 16, 8)
    return g.model({"x": (FLOAT, [1, 3, 32, 32])}, y, FLOAT, [1, 8, 13, 13])


def _in_branches(node: Callable[[_Graph, str], str], where: Collection[int]) -> onnx.ModelProto:
    """A network that splits into six branches of one to six layers, with other nodes in the middle of some, and joins them again."""
    g = _Graph()
    stem = g.conv(g.conv("x", 3, 8), 8, 8)
    ends = []
    for branch in range(6):
        y = g.conv(stem, 8, 8)
        for _ in range(branch // 2):
            y = g.conv(y, 8, 8)
        y = node(g, y) if branch in where else y
        for _ in range(branch - branch // 2):
            y = g.conv(y, 8, 8)
        ends.append(y)
    y = g.conv(g.conv(g.node("Concat", *ends, axis=1), 48, 8), 8, 8)
    return g.model({"x": (FLOAT, [1, 3, 16, 16])}, y, FLOAT, [1, 8, 16, 16])


def wrong_in_a_branch() -> onnx.ModelProto:
    """Quantised sums that saturate, in one of six branches; OpenVINO lets them wrap."""

    def doubled(g: _Graph, y: str) -> str:
        scale, zero = g.weight(np.float32(0.01)), g.weight(np.int8(0))
        q = g.node("QuantizeLinear", y, scale, zero)
        added = g.node("QLinearAdd", q, scale, zero, q, scale, zero, scale, zero, domain="com.microsoft")
        return g.node("DequantizeLinear", added, scale, zero)

    return _in_branches(doubled, {3})


def integers_in_a_branch() -> onnx.ModelProto:
    """Integers beyond 32 bits in one of six branches."""

    def grown(g: _Graph, y: str) -> str:
        whole = g.node("Cast", g.node("Mul", y, g.weight(np.float32(1000))), to=INT64)
        back = g.node("Div", g.node("Mul", whole, g.weight(np.int64(2**33 + 1))), g.weight(np.int64(2**33)))
        return g.node("Mul", g.node("Cast", back, to=FLOAT), g.weight(np.float32(0.001)))

    return _in_branches(grown, {4})


def doubles_in_a_branch() -> onnx.ModelProto:
    """Numbers in one of six branches that only float64 holds."""

    def wide(g: _Graph, y: str) -> str:
        offset = g.weight(np.float64(200))
        far = g.node("Exp", g.node("Add", g.node("Cast", y, to=DOUBLE), offset))
        return g.node("Cast", g.node("Sub", g.node("Log", far), offset), to=FLOAT)

    return _in_branches(wide, {4})


def resize_in_a_branch() -> onnx.ModelProto:
    """An antialiased Resize that hardly makes anything smaller, in one of six branches, and one back."""

    def there_and_back(g: _Graph, y: str) -> str:
        smaller = g.node("Resize", y, "", "", g.weight(np.array([1, 8, 14, 14])), mode="linear", antialias=1)
        return g.node("Resize", smaller, "", "", g.weight(np.array([1, 8, 16, 16])), mode="linear")

    return _in_branches(there_and_back, {5})


BRANCHES = (wrong_in_a_branch, integers_in_a_branch, doubles_in_a_branch, resize_in_a_branch)

PLANTED: dict[str, Callable[[], onnx.ModelProto]] = {
    each.__name__: each
    for each in (
        quantised_add,
        large_integers,
        large_integers_inside,
        double_precision,
        double_inside,
        antialiased_resize,
        *BRANCHES,
    )
}


def write_planted(name: str, folder: Path) -> Path:
    """Write one of `PLANTED` or `REFUSED` below `folder`."""
    path = folder / f"{name}.onnx"
    path.write_bytes({**PLANTED, **REFUSED}[name]().SerializeToString())
    return path


def _scaled_by_determinant(g: _Graph, y: str) -> str:
    """Nodes of which OpenVINO has no rule for one, Det."""
    small = g.node("Slice", y, g.weight(np.array([0, 0])), g.weight(np.array([3, 3])), g.weight(np.array([2, 3])))
    factor = g.node("Unsqueeze", g.node("Sigmoid", g.node("Det", small)), g.weight(np.array([2, 3])))
    return g.node("Mul", y, factor)


def _network_with(node: Callable[[_Graph, str], str]) -> onnx.ModelProto:
    """A convolutional network of twelve layers with other nodes in its middle, [1, 16, 16, 16] to the same."""
    g = _Graph()
    y = g.conv("x", 3, 16)
    for _ in range(5):
        y = g.conv(y, 16, 16)
    y = node(g, y)
    for _ in range(6):
        y = g.conv(y, 16, 16)
    return g.model({"x": (FLOAT, [1, 3, 16, 16])}, y, FLOAT, [1, 16, 16, 16])


def refused_by_openvino() -> onnx.ModelProto:
    """A network with a determinant a channel, which OpenVINO has no rule for."""
    return _network_with(_scaled_by_determinant)


def refused_in_branches() -> onnx.ModelProto:
    """A determinant in two of six branches, at different depths: in no order of nodes is it one run."""
    return _in_branches(_scaled_by_determinant, {2, 5})


def _clipped_as_integers(g: _Graph, y: str) -> str:
    """Nodes of which ONNX Runtime has no kernel for one, a Max of 16-bit integers."""
    steps = g.node("Cast", g.node("Mul", y, g.weight(np.float32(256))), to=TensorProto.INT16)
    return g.node("Mul", g.node("Cast", g.node("Max", steps, g.weight(np.int16(8))), to=FLOAT), g.weight(np.float32(1 / 256)))


def refused_by_onnxruntime() -> onnx.ModelProto:
    """A network with a Max that ONNX Runtime refuses."""
    return _network_with(_clipped_as_integers)


def refused_by_both() -> onnx.ModelProto:
    """A network that neither runtime takes whole: what the one refuses, the other has."""
    return _network_with(lambda g, y: _clipped_as_integers(g, g.conv(_scaled_by_determinant(g, y), 16, 16)))


def refused_among_dynamic_shapes() -> onnx.ModelProto:
    """A network that goes on with as many numbers as are positive, and a CumProd of those, which OpenVINO has no rule for."""
    g = _Graph()
    x = g.dense(g.dense("x"))
    places = g.node("Transpose", g.node("NonZero", x), perm=[1, 0])
    picked = g.node("Sigmoid", g.node("Sqrt", g.node("GatherND", x, places)))
    product = g.node("CumProd", picked, g.weight(np.int64(0)))
    y = g.node("ReduceSum", g.node("Sqrt", g.node("Add", product, picked)), g.weight(np.array([0])), keepdims=1)
    model = g.model({"x": (FLOAT, [1, _WIDTH])}, y, FLOAT, [1])
    model.opset_import[0].version, model.ir_version = 26, 13
    return model


REFUSED: dict[str, Callable[[], onnx.ModelProto]] = {
    each.__name__: each
    for each in (refused_by_openvino, refused_by_onnxruntime, refused_among_dynamic_shapes, refused_in_branches, refused_by_both)
}
