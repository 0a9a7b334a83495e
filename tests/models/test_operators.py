"""Each unique operator of a model stands alone and answers as it does inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import Unsupported
from aivmm.models import operators as module
from aivmm.models.demo import write_demo
from aivmm.models.graph import analyse
from aivmm.models.operators import OperatorModels
from aivmm.models.prepare import prepare


def info(name: str, shape: Sequence[int | str] = (2, 3), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def array(name: str, value: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def save(path: Path, nodes: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto] = (), **edges: Any) -> Path:
    for index, node in enumerate(nodes):
        node.name = f"n{index}"
    graph = helper.make_graph(list(nodes), "g", edges.get("inputs", [info("x")]), edges.get("outputs", [info("y")]), list(weights))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=edges.get("ir_version", 9))
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return path


def session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("prepared")

    def make(name: str) -> Path:
        destination = folder / f"{name}.prepared.onnx"
        if not destination.exists():
            prepare(write_demo(name, folder), destination)
        return destination

    return make


@pytest.mark.parametrize("name", ["squeezenet", "lstm", "recommender"])
def test_every_operator_of_a_model_loads_in_both_runtimes_with_the_shapes_it_has_inside(prepared: Callable[[str], Path], name: str) -> None:
    structure, models, core = analyse(prepared(name)), OperatorModels(prepared(name)), ov.Core()
    assert tuple(models.signatures) == tuple(operator.signature for operator in structure.operators)
    assert sum(operator.count for operator in structure.operators) == structure.node_count
    for operator in structure.operators:
        data = models.build(operator.signature)
        proto = onnx.load_from_string(data)
        assert [node.op_type for node in proto.graph.node] == [operator.op_type]
        assert proto.ir_version <= 10
        loaded = session(data)
        shape = loaded.get_outputs()[0].shape
        assert operator.description.split(" -> ")[1].split(", ")[0] == "x".join(map(str, shape))
        core.compile_model(core.read_model(data), "CPU")


def test_the_same_operator_counts_once_and_its_nodes_are_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Exp", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["y"])]
    relu, exp = analyse(save(tmp_path / "m.onnx", nodes)).operators
    assert (relu.count, relu.nodes, relu.flops, relu.bytes) == (2, ("n0", "n2"), 6.0, 48)
    assert (exp.count, exp.nodes) == (1, ("n1",))


def test_an_operator_alone_answers_as_inside_and_keeps_its_real_constants(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Exp", ["a"], ["y"])]
    w = np.random.default_rng(0).standard_normal((3, 3))
    models = OperatorModels(save(tmp_path / "m.onnx", nodes, [array("w", w)]))
    x = np.ones((2, 3), np.float32)
    (answer,) = session(models.build(models.signatures[0])).run(None, {"input_0": x})
    np.testing.assert_allclose(answer, x @ w.astype(np.float32), rtol=1e-6)


def test_external_constants_come_along(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [array("w", np.eye(3))])
    onnx.save(onnx.load(path), tmp_path / "e.onnx", save_as_external_data=True, location="data", size_threshold=0)
    models, external = OperatorModels(path), OperatorModels(tmp_path / "e.onnx")
    assert models.build(models.signatures[0]) == external.build(external.signatures[0])


def test_names_of_the_model_are_not_in_the_operators_model(tmp_path: Path) -> None:
    def build(prefix: str) -> bytes:
        nodes = [helper.make_node("MatMul", [f"{prefix}x", f"{prefix}w"], [f"{prefix}y"])]
        path = save(tmp_path / "m.onnx", nodes, [array(f"{prefix}w", np.eye(3))], inputs=[info(f"{prefix}x")], outputs=[info(f"{prefix}y")])
        models = OperatorModels(path)
        return models.build(models.signatures[0])

    assert build("") == build("../../<b>\n")


def test_a_value_read_twice_is_one_input(tmp_path: Path) -> None:
    models = OperatorModels(save(tmp_path / "m.onnx", [helper.make_node("Mul", ["x", "x"], ["y"])]))
    assert [each.name for each in session(models.build(models.signatures[0])).get_inputs()] == ["input_0"]


def test_optional_inputs_and_outputs_that_are_missing_stay_missing(tmp_path: Path) -> None:
    nodes = [helper.make_node("LSTM", ["x", "w", "r", "", "", "h"], ["", "", "y"], hidden_size=4)]
    weights = [array("w", np.ones((1, 16, 3))), array("r", np.ones((1, 16, 4)))]
    edges = {"inputs": [info("x", (5, 1, 3)), info("h", (1, 1, 4))], "outputs": [info("y", (1, 1, 4))]}
    models = OperatorModels(save(tmp_path / "m.onnx", nodes, weights, **edges))
    loaded = session(models.build(models.signatures[0]))
    assert [each.name for each in loaded.get_inputs()] == ["input_0", "input_5"]
    assert [each.name for each in loaded.get_outputs()] == ["output_2"]


def test_outputs_left_out_at_the_end_are_as_good_as_never_named(tmp_path: Path) -> None:
    def build(outputs: Sequence[str]) -> bytes:
        nodes = [helper.make_node("LSTM", ["x", "w", "r"], list(outputs), hidden_size=4)]
        weights = [array("w", np.ones((1, 16, 3))), array("r", np.ones((1, 16, 4)))]
        edges = {"inputs": [info("x", (5, 1, 3))], "outputs": [info("y", (5, 1, 1, 4))]}
        models = OperatorModels(save(tmp_path / "m.onnx", nodes, weights, **edges))
        return models.signatures[0].encode() + models.build(models.signatures[0])

    assert build(["y"]) == build(["y", "", ""])


def test_what_a_branch_captures_becomes_an_input_or_a_constant(tmp_path: Path) -> None:
    bodies = [helper.make_graph([helper.make_node(op, ["a", "k"], ["r"])], op, [], [info("r")]) for op in ("Add", "Mul")]
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])]
    edges = {"inputs": [info("x"), info("flag", (), TensorProto.BOOL)]}
    path = save(tmp_path / "m.onnx", nodes, [array("k", [1, 2, 3])], **edges)
    operator = analyse(path).operators[1]
    assert (operator.op_type, operator.data_dependent, operator.flops, operator.bytes) == ("If", True, None, None)
    loaded = session(OperatorModels(path).build(operator.signature))
    (answer,) = loaded.run(None, {"flag": np.array(False), "a": np.full((2, 3), 2, np.float32)})
    assert answer.tolist() == [[2, 4, 6]] * 2


def test_an_operator_between_sequences_is_refused_with_the_reason(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        helper.make_node("SequenceAt", ["s", "first"], ["y"]),
    ]
    models = OperatorModels(save(tmp_path / "m.onnx", nodes, [array("first", 0, np.int64)]))
    for signature in models.signatures:
        with pytest.raises(Unsupported, match="cannot stand alone: Sequence"):
            models.build(signature)


def test_constants_over_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = OperatorModels(save(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [array("w", np.eye(3))]))
    monkeypatch.setattr(module, "MAX_CONSTANT_BYTES", 35)
    with pytest.raises(Unsupported, match="its constants are"):
        models.build(models.signatures[0])
    with pytest.raises(KeyError):
        models.build("0" * 64)


def test_a_newer_file_version_is_written_down(tmp_path: Path) -> None:
    models = OperatorModels(save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], ir_version=12))
    assert onnx.load_from_string(models.build(models.signatures[0])).ir_version == 10


def test_a_description_tells_operators_of_one_type_apart(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], dilations=[1, 2], group=2)]
    edges = {"inputs": [info("x", (1, 4, 9, 9))], "outputs": [info("y", ("n", "c", "h", "w"))]}
    (conv,) = analyse(save(tmp_path / "m.onnx", nodes, [array("w", np.ones((8, 2, 3, 3)))], **edges)).operators
    assert conv.description == "Conv 3x3 stride 2 dilation 1x2 group 2: 1x4x9x9 -> 1x8x4x3"


def test_a_dynamic_shape_makes_an_operator_depend_on_data(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    (relu,) = analyse(save(tmp_path / "m.onnx", nodes, inputs=[info("x", ("n", 3))], outputs=[info("y", ("n", 3))])).operators
    assert (relu.data_dependent, relu.flops, relu.bytes, relu.description) == (True, None, None, "Relu: ?x3 -> ?x3")


def needed(path: Path, op_type: str) -> dict[str, str]:
    models = OperatorModels(path)
    signature = next(each.signature for each in analyse(path).operators if each.op_type == op_type)
    return models.values_needed(signature)


def test_values_that_decide_the_work_are_asked_for_by_the_name_that_they_have_inside(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["extents"]),
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "extents"], ["y"]),
    ]
    shape = (20, 30)
    path = save(tmp_path / "m.onnx", nodes, inputs=[info("x", shape)], outputs=[info("y", shape)])
    assert needed(path, "Reshape") == {"input_1": "extents"}
    assert needed(path, "Relu") == {}


def test_a_few_floats_and_all_that_a_data_dependent_operator_reads_are_asked_for(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Range", ["low", "high", "step"], ["r"]),
        helper.make_node("NonZero", ["a"], ["y"]),
    ]
    inputs = [info("x", (20, 30)), *(info(name, ()) for name in ("low", "high", "step"))]
    outputs = [info("y", (2, "found"), TensorProto.INT64), info("r", ("n",))]
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, outputs=outputs)
    assert needed(path, "NonZero") == {"input_0": "a"}
    assert needed(path, "Range") == {"input_0": "low", "input_1": "high", "input_2": "step"}


def test_constants_and_quantised_activations_are_not_asked_for(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["x", "rows"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "scale"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
    ]
    weights = [array("rows", [0, 1], np.int64), array("scale", 0.1)]
    path = save(tmp_path / "m.onnx", nodes, weights, inputs=[info("x", (20, 60))], outputs=[info("y", (2, 60))])
    assert [needed(path, each) for each in ("Gather", "QuantizeLinear", "DequantizeLinear")] == [{}, {}, {}]


def test_a_node_with_subgraphs_asks_by_the_models_own_names(tmp_path: Path) -> None:
    bodies = [helper.make_graph([helper.make_node(op, ["a", "a"], ["r"])], op, [], [info("r")]) for op in ("Add", "Mul")]
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])]
    path = save(tmp_path / "m.onnx", nodes, inputs=[info("x"), info("flag", (), TensorProto.BOOL)])
    assert needed(path, "If") == {"flag": "flag", "a": "a"}
