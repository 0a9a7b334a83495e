"""An output is a classifier's by what made it: the largest element of an embedding means nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.models.classifier import class_outputs
from aivmm.models.demo import write_demo

SHARED = Path(__file__).parents[3] / "shared" / "models"


def model(path: Path, *nodes: tuple[str, list[str], list[str]], name: str = "y", shape: tuple[int, ...] = (1, 10)) -> Path:
    """Write a chain over x [1, 3, 4, 4] with some weights to choose from."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (10, 3, 3, 3), "matrix": (48, 10), "bias": (10,), "scores": (10, 10)}
    weights = [numpy_helper.from_array(rng.normal(size=each).astype(np.float32), key) for key, each in shapes.items()]
    made = [helper.make_node(op_type, inputs, outputs) for op_type, inputs, outputs in nodes]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
        weights,
    )
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    return path


FLAT = ("Flatten", ["x"], ["f"])
CONV = ("Conv", ["x", "kernel"], ["c"])


@pytest.mark.parametrize(
    ("nodes", "classifies"),
    [
        ([FLAT, ("Gemm", ["f", "matrix", "bias"], ["y"])], True),
        ([FLAT, ("MatMul", ["f", "matrix"], ["m"]), ("Add", ["m", "bias"], ["y"])], True),
        ([FLAT, ("MatMul", ["f", "matrix"], ["m"]), ("Softmax", ["m"], ["s"]), ("Identity", ["s"], ["y"])], True),
        ([CONV, ("Relu", ["c"], ["r"]), ("GlobalAveragePool", ["r"], ["g"]), ("Flatten", ["g"], ["y"])], True),
        ([FLAT, ("MatMul", ["f", "matrix"], ["y"])], False),  # a projection
        ([FLAT, ("Gemm", ["f", "matrix", "bias"], ["m"]), ("LpNormalization", ["m"], ["y"])], False),
        ([FLAT, ("Gemm", ["f", "matrix", "bias"], ["m"]), ("Tanh", ["m"], ["y"])], False),
        ([FLAT, ("Gemm", ["f", "matrix", "bias"], ["m"]), ("Sigmoid", ["m"], ["y"])], False),  # each on its own
    ],
    ids=["Gemm", "MatMul and Add", "Softmax", "pooled", "projection", "normalised", "pooler", "several labels"],
)
def test_what_made_an_output_tells(tmp_path: Path, nodes: list[tuple[str, list[str], list[str]]], classifies: bool) -> None:
    assert class_outputs(model(tmp_path / "m.onnx", *nodes)) == (("y",) if classifies else ())


def test_a_name_tells_where_the_operator_does_not(tmp_path: Path) -> None:
    product = ("MatMul", ["f", "matrix"])
    assert class_outputs(model(tmp_path / "a.onnx", FLAT, (*product, ["logits"]), name="logits")) == ("logits",)
    dense = ("Gemm", ["f", "matrix", "bias"])
    assert class_outputs(model(tmp_path / "b.onnx", FLAT, (*dense, ["image_embeds"]), name="image_embeds")) == ()


def test_rows_of_two_scores_and_maps_are_no_classes(tmp_path: Path) -> None:
    assert class_outputs(model(tmp_path / "m.onnx", CONV, ("Softmax", ["c"], ["y"]), shape=(1, 10, 2, 2))) == ()


def test_real_networks(tmp_path: Path) -> None:
    assert class_outputs(SHARED / "magika_v3_3.onnx") == ("target_label",)
    assert class_outputs(SHARED / "ultraface_rfb_320.onnx") == ()  # scores of 4,420 boxes
    assert class_outputs(write_demo("squeezenet", tmp_path)) == ("probabilities",)
    assert class_outputs(write_demo("encoder", tmp_path)) == ()
