"""What the contract of `Backend` runs: small models that every runtime of the last years reads, with what they must answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aivmm.runtime.backend import Buffer, aligned_empty
from aivmm.tensors import TensorSpec

Arrays = Mapping[str, np.ndarray[Any, Any]]
Tensor = tuple[str, int, Sequence[int | str]]  # name, element type, shape; a string is a dynamic extent


def onnx_model(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: Arrays | None = None
) -> onnx.ModelProto:
    """Return a model that every runtime of the last years reads: opset 17, IR 8."""
    graph = helper.make_graph(
        list(nodes),
        "contract",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def one_node(op_type: str, inputs: Sequence[Tensor], output: Tensor, **attributes: Any) -> onnx.ModelProto:
    """Return the model of a single operator that takes all inputs."""
    return onnx_model([helper.make_node(op_type, [each[0] for each in inputs], [output[0]], **attributes)], inputs, [output])


def relu_model(*shape: int | str) -> bytes:
    """Return y = max(x, 0) in float32."""
    return one_node("Relu", [("x", TensorProto.FLOAT, shape)], ("y", TensorProto.FLOAT, shape)).SerializeToString()


def buffer_like(array: np.ndarray[Any, Any]) -> Buffer:
    """Return an aligned copy of `array`, as the engine would bind it."""
    buffer = aligned_empty(TensorSpec(name="", dtype=array.dtype.name, shape=array.shape))
    np.copyto(buffer, array)
    return buffer


@dataclass(frozen=True)
class Case:
    """A model, what to feed it, and what it must answer."""

    name: str
    model: onnx.ModelProto
    feeds: Arrays
    answers: Arrays


def element_types() -> list[Case]:
    """Return one small model for each kind of tensor that real models carry besides float32 images."""
    integers = np.array([[1, -2, 3], [40_000, -50_000, 60_000]])
    truths = np.array([True, False, True])
    half = np.array([0.5, -1.5, 2.0], dtype=np.float16)
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    indices = np.array([3, 0, 3], dtype=np.int64)
    return [
        Case(
            f"{dtype} arithmetic",
            one_node("Add", [("a", kind, (2, 3)), ("b", kind, (2, 3))], ("y", kind, (2, 3))),
            {"a": integers.astype(dtype), "b": integers.astype(dtype)},
            {"y": (integers * 2).astype(dtype)},
        )
        for dtype, kind in (("int64", TensorProto.INT64), ("int32", TensorProto.INT32))
    ] + [
        Case(
            "bool",
            one_node("And", [("a", TensorProto.BOOL, (3,)), ("b", TensorProto.BOOL, (3,))], ("y", TensorProto.BOOL, (3,))),
            {"a": truths, "b": ~truths | truths},
            {"y": truths},
        ),
        Case(
            "uint8 to float",
            one_node("Cast", [("x", TensorProto.UINT8, (3,))], ("y", TensorProto.FLOAT, (3,)), to=TensorProto.FLOAT),
            {"x": np.array([0, 7, 255], dtype=np.uint8)},
            {"y": np.array([0, 7, 255], dtype=np.float32)},
        ),
        Case(
            "float16",
            one_node("Relu", [("x", TensorProto.FLOAT16, (3,))], ("y", TensorProto.FLOAT16, (3,))),
            {"x": half},
            {"y": np.maximum(half, 0)},
        ),
        Case(
            "scalar",
            one_node("Add", [("a", TensorProto.FLOAT, ()), ("b", TensorProto.FLOAT, ())], ("y", TensorProto.FLOAT, ())),
            {"a": np.array(1.5, dtype=np.float32), "b": np.array(-4.0, dtype=np.float32)},
            {"y": np.array(-2.5, dtype=np.float32)},
        ),
        Case(
            "no elements at all",
            one_node("Relu", [("x", TensorProto.FLOAT, (0, 3))], ("y", TensorProto.FLOAT, (0, 3))),
            {"x": np.zeros((0, 3), dtype=np.float32)},
            {"y": np.zeros((0, 3), dtype=np.float32)},
        ),
        Case(
            "indices into a table",
            onnx_model(
                [helper.make_node("Gather", ["table", "i"], ["y"])],
                [("i", TensorProto.INT64, (3,))],
                [("y", TensorProto.FLOAT, (3, 3))],
                {"table": table},
            ),
            {"i": indices},
            {"y": table[indices]},
        ),
        Case(
            "a pass-through",
            one_node("Identity", [("x", TensorProto.FLOAT, (2, 2))], ("y", TensorProto.FLOAT, (2, 2))),
            {"x": np.array([[1, 2], [3, 4]], dtype=np.float32)},
            {"y": np.array([[1, 2], [3, 4]], dtype=np.float32)},
        ),
        Case(
            "outputs of sizes known only after the run beside one that is known, alike in no order",
            onnx_model(
                [
                    helper.make_node("NonZero", ["x"], ["places"]),
                    helper.make_node("Relu", ["x"], ["plain"]),
                    helper.make_node("Cast", ["places"], ["floats"], to=TensorProto.FLOAT),
                    helper.make_node("Neg", ["floats"], ["negated"]),
                ],
                [("x", TensorProto.FLOAT, (2, 3))],
                [
                    ("negated", TensorProto.FLOAT, (2, "n")),
                    ("plain", TensorProto.FLOAT, (2, 3)),
                    ("places", TensorProto.INT64, (2, "n")),
                    ("floats", TensorProto.FLOAT, (2, "n")),
                ],
            ),
            {"x": np.array([[1, 0, 3], [0, 5, 0]], dtype=np.float32)},
            {
                "negated": np.array([[0, 0, -1], [0, -2, -1]], dtype=np.float32),
                "plain": np.array([[1, 0, 3], [0, 5, 0]], dtype=np.float32),
                "places": np.array([[0, 0, 1], [0, 2, 1]], dtype=np.int64),
                "floats": np.array([[0, 0, 1], [0, 2, 1]], dtype=np.float32),
            },
        ),
        Case(
            "names with slashes and colons, inputs not in order of use, a tensor that is output and used on",
            onnx_model(
                [helper.make_node("Sub", ["b/in:0", "a:0"], ["mid/out:1"]), helper.make_node("Relu", ["mid/out:1"], ["z;end"])],
                [("a:0", TensorProto.FLOAT, (2,)), ("b/in:0", TensorProto.FLOAT, (2,))],
                [("z;end", TensorProto.FLOAT, (2,)), ("mid/out:1", TensorProto.FLOAT, (2,))],
            ),
            {"a:0": np.array([5, 1], dtype=np.float32), "b/in:0": np.array([2, 3], dtype=np.float32)},
            {"z;end": np.array([0, 2], dtype=np.float32), "mid/out:1": np.array([-3, 2], dtype=np.float32)},
        ),
    ]


def perceptron() -> Case:
    """Return two dense layers with a batch norm's worth of fusible operators between them."""
    random = np.random.default_rng(7)
    first, second = random.normal(size=(16, 32)).astype(np.float32), random.normal(size=(32, 4)).astype(np.float32)
    bias = random.normal(size=32).astype(np.float32)
    x = random.normal(size=(3, 16)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["m"]),
        helper.make_node("Add", ["m", "bias"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("MatMul", ["r", "second"], ["y"]),
    ]
    weights = {"first": first, "bias": bias, "second": second}
    model = onnx_model(nodes, [("x", TensorProto.FLOAT, (3, 16))], [("y", TensorProto.FLOAT, (3, 4))], weights)
    return Case("two dense layers", model, {"x": x}, {"y": np.maximum(x @ first + bias, 0) @ second})


def spoilt_models() -> dict[str, bytes]:
    good = perceptron().model.SerializeToString()
    alien = helper.make_graph(
        [helper.make_node("Teleport", ["x"], ["y"], domain="no.such.domain")],
        "alien",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2,))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2,))],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("no.such.domain", 1)]
    return {
        "empty": b"",
        "text": b"<html>this is not a model</html>",
        "truncated": good[: len(good) // 2],
        "unknown operator": helper.make_model(alien, opset_imports=opsets, ir_version=8).SerializeToString(),
    }
