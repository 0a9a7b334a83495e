"""What preparing does to the graph, to versions and to files: the answers stay, and what cannot be carried over is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import ModelError, UsageError
from aivmm.models.prepare import prepare
from tests.models.preparing import I64, F, agrees, info, ints, noted, one, ready, refused, run, save, weight

# --- the graph


def test_nodes_are_sorted_named_and_the_dead_are_gone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Abs", ["r"], ["y"], name="same"),
        helper.make_node("Relu", ["x"], ["r"], name="same"),
        helper.make_node("Neg", ["x"], ["nobody"]),
    ]
    facts, model = ready(save(tmp_path, nodes, [info("x", [4])], [info("y", [4])]))
    names = [node.name for node in model.graph.node]
    assert [node.op_type for node in model.graph.node] == ["Relu", "Abs"]
    assert len(set(names)) == 2
    assert all(names)
    assert noted(facts, "1 nodes that no output needs")


def test_constants_become_weights(tmp_path: Path) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], value_float=2.0), helper.make_node("Mul", ["x", "c"], ["y"])]
    path = save(tmp_path, nodes, [info("x", [4])], [info("y", [4])])
    agrees(path, {"x": np.arange(4, dtype=np.float32)})
    model = onnx.load(path.with_name("prepared.onnx"))
    assert [node.op_type for node in model.graph.node] == ["Mul"]
    assert [tensor.name for tensor in model.graph.initializer] == ["c"]


def test_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Neg", ["t"], ["b"])]
    function = helper.make_function("local", "Twist", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Twist", ["x"], ["m"], domain="local"), helper.make_node("Twist", ["m"], ["y"], domain="local")]
    opsets = [helper.make_opsetid("local", 1)]
    path = save(tmp_path, nodes, [info("x", [4])], [info("y", [4])], opsets=opsets, functions=[function])
    agrees(path, {"x": np.array([-2, -1, 1, 2], np.float32)})
    model = onnx.load(path.with_name("prepared.onnx"))
    assert [node.op_type for node in model.graph.node] == ["Relu", "Neg", "Relu", "Neg"]
    assert not model.functions


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    body = [helper.make_node("Loopy", ["a"], ["b"], domain="local")]
    function = helper.make_function("local", "Loopy", ["a"], ["b"], body, [helper.make_opsetid("local", 1)])
    opsets = [helper.make_opsetid("local", 1)]
    node = helper.make_node("Loopy", ["x"], ["y"], domain="local")
    path = save(tmp_path, [node], [info("x", [4])], [info("y", [4])], opsets=opsets, functions=[function])
    assert "functions cannot be inlined" in refused(path, ModelError)


def test_control_flow_is_kept_with_what_it_reads_from_outside(tmp_path: Path) -> None:
    then = helper.make_graph([helper.make_node("Add", ["x", "w"], ["t"])], "then", [], [info("t", None)])
    other = helper.make_graph([helper.make_node("Sub", ["x", "w"], ["e"])], "else", [], [info("e", None)])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "w"], ["v_out"])],
        "body",
        [info("i", [], I64), info("go", [], TensorProto.BOOL), info("v", None)],
        [info("go_on", [], TensorProto.BOOL), info("v_out", None)],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["picked"], then_branch=then, else_branch=other),
        helper.make_node("Loop", ["trips", "", "picked"], ["y"], body=body),
    ]
    inputs = [info("x", ["N", 4]), info("flag", [], TensorProto.BOOL)]
    path = save(tmp_path, nodes, inputs, [info("y", None)], [weight("w", 4), numpy_helper.from_array(np.array(3, np.int64), "trips")])
    for flag in (True, False):
        agrees(path, {"x": np.ones((1, 4), np.float32), "flag": np.array(flag)})
    assert [node.op_type for node in onnx.load(path.with_name("prepared.onnx")).graph.node] == ["If", "Loop"]


def test_shapes_computed_by_nodes_are_known_and_the_nodes_stay(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["r"]),
        helper.make_node("Equal", ["n", "one"], ["single"]),
        helper.make_node(
            "If",
            ["single"],
            ["y"],
            then_branch=helper.make_graph([helper.make_node("Squeeze", ["r", "zero"], ["t"])], "t", [], [info("t", None)]),
            else_branch=helper.make_graph([helper.make_node("Identity", ["r"], ["e"])], "e", [], [info("e", None)]),
        ),
    ]
    weights = [ints("zero", 0), ints("one", 1), ints("rest", -1, 3)]
    path = save(tmp_path, nodes, [info("x", ["N", 2, 6])], [info("y", None)], weights)
    facts = agrees(path, {"x": np.arange(12, dtype=np.float32).reshape(1, 2, 6)})
    assert facts.outputs[0].shape == (4, 3)
    model = onnx.load(path.with_name("prepared.onnx"))
    assert [node.op_type for node in model.graph.node] == ["Shape", "Gather", "Concat", "Reshape", "Equal", "If"]
    known = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info}
    assert known["r"] == [1, 4, 3]


def test_behind_microsofts_operators_shapes_are_known_too(tmp_path: Path) -> None:
    nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["m"], domain="com.microsoft"), helper.make_node("Relu", ["m"], ["y"])]
    opsets = [helper.make_opsetid("com.microsoft", 1)]
    path = save(tmp_path, nodes, [info("x", ["N", 4])], [info("y", None)], [weight("w", 4, 5)], opsets=opsets)
    assert agrees(path, {"x": np.ones((1, 4), np.float32)}).outputs[0].shape == (1, 5)


# --- versions


@pytest.mark.parametrize("opset", [7, 13, 26])
def test_a_common_opset_is_kept(tmp_path: Path, opset: int) -> None:
    path = save(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [info("x", [4])], [info("y", [4])], opset=opset)
    facts, model = ready(path)
    assert facts.opset == opset == model.opset_import[0].version


def test_a_version_newer_than_the_runtimes_is_lowered(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [info("x", [4])], [info("y", [4])], opset=27, ir=14)
    facts, model = ready(path)
    assert (facts.opset, facts.ir_version, model.ir_version) == (26, 10, 10)
    assert noted(facts, "opset 27 converted to opset 26")
    assert run(path.with_name("prepared.onnx"), {"x": np.array([-1, 0, 1, 2], np.float32)})[0].tolist() == [0, 0, 1, 2]


def test_an_operator_that_only_a_newer_opset_has_is_refused(tmp_path: Path) -> None:
    if not onnx.defs.has("SwiGLU", 28, ""):
        pytest.skip("this onnx does not know SwiGLU, an operator of opset 28")
    path = save(tmp_path, [helper.make_node("SwiGLU", ["x", "x"], ["y"])], [info("x", [4])], [info("y", [4])], opset=28, ir=14)
    assert "cannot be lowered" in refused(path, ModelError)


def test_an_ir_version_that_a_type_needs_is_not_lowered_below_it(tmp_path: Path) -> None:
    weights = [helper.make_tensor("w", TensorProto.FLOAT4E2M1, [2], [1.0, 2.0])]
    path = save(tmp_path, [helper.make_node("Cast", ["w"], ["y"], to=F)], [info("x", [2])], [info("y", [2])], weights, opset=23, ir=11)
    assert ready(path)[0].ir_version == 11


def legacy(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, **attributes)


def test_opset_1_broadcasting_reshape_and_attributes_keep_their_meaning(tmp_path: Path) -> None:
    nodes = [
        legacy("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        legacy("Add", ["c", "b"], ["a"], broadcast=1, axis=1),
        legacy("Relu", ["a"], ["r"], consumed_inputs=[0]),
        legacy("PRelu", ["r", "b"], ["p"]),
        legacy("Mul", ["p", "row"], ["m"], broadcast=1),
        legacy("Dropout", ["m"], ["d"], is_test=1),
        legacy("Reshape", ["d"], ["f"], shape=[0, -1]),
        legacy("Cast", ["f"], ["t"], to="DOUBLE"),
        legacy("Concat", ["t", "t"], ["y"]),
    ]
    weights = [weight("w", 3, 2, 3, 3), weight("b", 3, seed=1), weight("row", 4, seed=2)]
    inputs = [info("x", [1, 2, 4, 4]), info("w", [3, 2, 3, 3]), info("b", [3]), info("row", [4])]
    path = save(tmp_path, nodes, inputs, [info("y", None, TensorProto.DOUBLE)], weights, opset=1, ir=3)
    facts, _ = ready(path)
    x = np.random.default_rng(3).normal(size=(1, 2, 4, 4)).astype(np.float32)
    w, b, row = (numpy_helper.to_array(tensor) for tensor in weights)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    relu = np.maximum(np.einsum("nchwij,ocij->nohw", windows, w) + b[:, None, None], 0)
    flat = (relu * row).reshape(1, -1).astype(np.float64)
    np.testing.assert_allclose(
        run(path.with_name("prepared.onnx"), {"x": x})[0], np.concatenate([flat, flat], axis=1), rtol=1e-4, atol=1e-5
    )
    assert facts.opset == 17
    assert noted(facts, "opset 1 carried over")
    assert noted(facts, "opset 7 converted to opset 17")


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (legacy("Tile", ["x", "n", "n"], ["y"]), "it has 3 inputs"),
        (legacy("LpPool", ["x"], ["y"], p=2.0, kernel_shape=[1, 1]), "attribute 'p'"),
        (legacy("Add", ["x", "n"], ["y"], broadcast=1, axis=4), "does not fit"),
    ],
)
def test_old_semantics_that_cannot_be_carried_over_are_refused(tmp_path: Path, node: onnx.NodeProto, why: str) -> None:
    path = save(tmp_path, [node], [info("x", [1, 1, 2, 2]), info("n", [2])], [info("y", None)], opset=5, ir=3)
    message = refused(path, ModelError)
    assert "cannot be carried over" in message
    assert why in message


# --- files


def test_external_weights_are_taken_in_when_they_fit(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x", ["N", 64])], [info("y", None)], [weight("w", 64, 64)])
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").stat().st_size == 64 * 64 * 4
    agrees(path, {"x": np.ones((1, 64), np.float32)})
    assert [child.name for child in tmp_path.glob("prepared*")] == ["prepared.onnx"]


def test_trial_runs_find_external_weights(tmp_path: Path) -> None:
    path = save(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x", [None, None])], [info("y", None)], [weight("w", 99, 64)]
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert ready(path)[0].inputs[0].shape == (1, 99)


def test_large_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aivmm.models.prepare._SINGLE_FILE_BYTES", 1000)
    path = save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x", [1, 64])], [info("y", None)], [weight("w", 64, 64)])
    agrees(path, {"x": np.ones((1, 64), np.float32)})
    assert (tmp_path / "prepared.onnx.data").stat().st_size >= 64 * 64 * 4
    assert (tmp_path / "prepared.onnx").stat().st_size < 1000


def test_a_destination_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    path = one(tmp_path, [1, 4])
    with pytest.raises(UsageError, match="cannot write"):
        prepare(path, tmp_path / "absent" / "out.onnx")
    with pytest.raises(UsageError, match="is the model itself"):
        prepare(path, path)


def test_the_same_model_is_prepared_to_the_same_bytes(tmp_path: Path) -> None:
    path = one(tmp_path, ["N", 4])
    prepare(path, tmp_path / "a.onnx")
    prepare(path, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
