"""A prepared model answers as the original does, with fixed shapes, in versions that runtimes read; and says what was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import ModelError, UsageError
from aivmm.models.prepare import prepare
from aivmm.models.records import ModelFacts

F, I64 = TensorProto.FLOAT, TensorProto.INT64
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
Dims = list[int | str | None]
Feed = dict[str, Any]


def info(name: str, shape: Dims | None, kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).normal(size=shape).astype(np.float32), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto] | None = None,
    *,
    opset: int = 17,
    ir: int = 8,
    **more: Any,
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [], **more.pop("graph", {}))
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", [])]
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir, **more).SerializeToString())
    return path


def one(folder: Path, shape: Dims | None, *, op: str = "Relu", kind: int = F, name: str = "x") -> Path:
    return save(folder, [helper.make_node(op, [name], ["y"])], [info(name, shape, kind)], [info("y", None, kind)])


def run(path: Path, feed: Feed) -> list[npt.NDArray[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed))


def ready(source: Path, **options: Any) -> tuple[ModelFacts, onnx.ModelProto]:
    target = source.with_name("prepared.onnx")
    facts = prepare(source, target, **options)
    return facts, onnx.load(target)


def shapes(facts: ModelFacts) -> dict[str, tuple[int | None, ...]]:
    return {spec.name: spec.shape for spec in (*facts.inputs, *facts.outputs)}


def noted(facts: ModelFacts, *words: str) -> bool:
    return any(all(word in note for word in words) for note in facts.notes)


def agrees(source: Path, feed: Feed, **options: Any) -> ModelFacts:
    """Prepare and compare with what the original answers."""
    facts, _ = ready(source, **options)
    for mine, theirs in zip(run(source.with_name("prepared.onnx"), feed), run(source, feed), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    return facts


def refused(source: Path, kind: type[UsageError | ModelError] = UsageError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        ready(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- shapes


@pytest.mark.parametrize("symbol", ["N", "batch", "batch_size", "None", "unk__7", None, "whatever"])
def test_a_leading_open_axis_is_the_batch(tmp_path: Path, symbol: str | None) -> None:
    facts, _ = ready(one(tmp_path, [symbol, 4]))
    assert shapes(facts) == {"x": (1, 4), "y": (1, 4)}
    assert facts.batchable
    assert ready(one(tmp_path, [symbol, 4]), batch=8)[0].inputs[0].shape == (8, 4)


def test_a_fixed_model_is_not_batchable_and_refuses_another_batch(tmp_path: Path) -> None:
    facts, _ = ready(one(tmp_path, [1, 4]))
    assert (facts.batch, facts.batchable) == (1, False)
    assert "no open batch" in refused(one(tmp_path, [1, 4]), batch=2)


def test_the_batch_of_a_model_for_fixed_images_is_what_they_have_in_front(tmp_path: Path) -> None:
    facts, _ = ready(one(tmp_path, [4, 3, 8, 8]))
    assert (facts.batch, facts.batchable) == (4, False)
    assert ready(one(tmp_path, [4, 3, 8, 8]), batch=4)[0].batch == 4  # asked for what it is
    assert "no open batch" in refused(one(tmp_path, [4, 3, 8, 8]), batch=2)
    assert ready(one(tmp_path, [4, 8]))[0].batch == 1  # rows of what? not known to be a batch


def test_dim_and_shape_options_bind_and_carry_the_batch(tmp_path: Path) -> None:
    assert ready(one(tmp_path, ["N", "k"]), dims={"k": 3})[0].inputs[0].shape == (1, 3)
    facts, _ = ready(one(tmp_path, ["N", "k"]), shapes={"x": (2, 5)})
    assert facts.inputs[0].shape == (2, 5)
    assert facts.batch == 2


def test_an_extent_of_zero_is_an_extent(tmp_path: Path) -> None:
    assert shapes(ready(one(tmp_path, ["N", 0, 4]))[0]) == {"x": (1, 0, 4), "y": (1, 0, 4)}


def test_an_unknown_dimension_is_asked_for_with_the_option_to_add(tmp_path: Path) -> None:
    assert refused(one(tmp_path, ["N", "k"])) == "dimension 'k' of input 'x' is not known; add --dim k=128"
    assert refused(one(tmp_path, ["N", None, 80])) == "axis 1 of input 'x' is not known; add --shape x=1x128x80"
    assert "rank of input 'x' is not known; add its shape, e.g. --shape x=" in refused(one(tmp_path, None))
    assert ready(one(tmp_path, None), shapes={"x": (2, 3)})[0].outputs[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": {"z": (1, 4)}}, "no input is named 'z'; the inputs are 'x'"),
        ({"shapes": {"x": (1,)}}, "has 2 axes, not 1"),
        ({"shapes": {"x": (1, 5)}}, "fixed at 4, not 5"),
        ({"shapes": {"x": (0, 4)}}, "at least 1"),
        ({"shapes": {"x": (-1, 4)}}, "at least 1"),
        ({"dims": {"M": 2}}, "no input has a dimension 'M'; the dimensions are 'N'"),
        ({"dims": {"N": 0}}, "at least 1"),
        ({"dims": {"N": 2}, "shapes": {"x": (3, 4)}}, "conflicts"),
        ({"dims": {"N": 2}, "batch": 4}, "conflicts with batch 4"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(one(tmp_path, ["N", 4]), **options)


def test_inputs_that_share_a_symbol_cannot_differ(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Add", ["a", "b"], ["y"])], [info("a", ["N", "k"]), info("b", ["N", "k"])], [info("y", None)])
    assert "conflicts" in refused(path, shapes={"a": (1, 3), "b": (1, 4)})
    assert ready(path, shapes={"a": (1, 3)})[0].inputs[1].shape == (1, 3)


def test_expressions_of_symbols_follow_them(tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", ["a", "a", "p"], ["c"], axis=1), helper.make_node("Add", ["c", "m"], ["y"])]
    inputs = [info("a", ["batch", "k"]), info("p", ["batch", 1]), info("m", ["batch", "2*k + 1"])]
    facts, _ = ready(save(tmp_path, nodes, inputs, [info("y", None)]), dims={"k": 3})
    assert shapes(facts)["m"] == (1, 7)


def test_sequences_and_pictures_have_stated_defaults(tmp_path: Path) -> None:
    facts, _ = ready(one(tmp_path, ["batch", "seq_len", 8]))
    assert facts.inputs[0].shape == (1, 128, 8)
    assert noted(facts, "default 128", "--dim seq_len=128")
    assert ready(one(tmp_path, ["N", 3, "height", "width"]))[0].inputs[0].shape == (1, 3, 224, 224)
    facts, _ = ready(one(tmp_path, [None, 3, None, None]))
    assert facts.inputs[0].shape == (1, 3, 224, 224)
    assert noted(facts, "--shape x=1x3x224x224")


def test_a_default_that_does_not_run_gives_way_to_what_the_graph_accepts(tmp_path: Path) -> None:
    """Position embeddings for 64 tokens: the name says sequence, but 128 cannot be."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=1, end=2),
        helper.make_node("Slice", ["table", "zero", "s", "zero"], ["p"]),
        helper.make_node("Add", ["x", "p"], ["y"]),
    ]
    path = save(tmp_path, nodes, [info("x", ["batch", "seq", 8])], [info("y", None)], [weight("table", 64, 8), ints("zero", 0)])
    facts = agrees(path, {"x": np.ones((1, 64, 8), np.float32)})
    assert facts.inputs[0].shape == (1, 64, 8)
    assert noted(facts, "guessed 64", "128, the usual default, does not run", "--dim seq=64")


def test_an_extent_that_the_weights_imply_is_found(tmp_path: Path) -> None:
    path = save(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x", [None, None])], [info("y", None)], [weight("w", 777, 3)]
    )
    facts, _ = ready(path)
    assert facts.inputs[0].shape == (1, 777)
    assert noted(facts, "guessed 777", "--shape x=1x777")


def test_a_picture_whose_size_is_fixed_by_the_graph_is_found(tmp_path: Path) -> None:
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    path = save(tmp_path, nodes, [info("x", ["N", 1, "H", "W"])], [info("y", None)], [weight("w", 28 * 28, 2)])
    assert ready(path)[0].inputs[0].shape == (1, 1, 28, 28)


def test_defaults_are_kept_untried_where_no_runtime_can_try_them(tmp_path: Path) -> None:
    node = helper.make_node("Magic", ["x"], ["y"], domain="com.example")
    opsets = [helper.make_opsetid("com.example", 1)]
    path = save(tmp_path, [node], [info("x", ["batch", "time"])], [info("y", ["batch", "time"])], opsets=opsets)
    facts, model = ready(path)
    assert facts.inputs[0].shape == (1, 128)
    assert noted(facts, "not tried")
    assert model.graph.node[0].domain == "com.example"


# --- interface


def test_scalars_integers_booleans_and_strings_stay_as_they_are(tmp_path: Path) -> None:
    kinds = [("f", F, "float32"), ("i", I64, "int64"), ("b", TensorProto.BOOL, "bool"), ("s", TensorProto.STRING, "string")]
    nodes = [helper.make_node("Identity", [name], [name + "_out"]) for name, _, _ in kinds]
    inputs = [info(name, [], kind) for name, kind, _ in kinds]
    facts, _ = ready(save(tmp_path, nodes, inputs, [info(name + "_out", None, kind) for name, kind, _ in kinds]))
    assert [(spec.name, spec.dtype, spec.shape) for spec in facts.inputs] == [(name, dtype, ()) for name, _, dtype in kinds]
    assert [spec.dtype for spec in facts.outputs] == [dtype for _, _, dtype in kinds]


def test_bfloat16_is_named_as_numpy_users_name_it(tmp_path: Path) -> None:
    assert ready(one(tmp_path, [1, 4], op="Identity", kind=TensorProto.BFLOAT16))[0].inputs[0].dtype == "bfloat16"


def test_unused_inputs_stay_and_handed_through_outputs_are_listed_but_not_in_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [info("x", [2]), info("idle", [3])], [info("y", [2]), info("x", [2])])
    facts, model = ready(path)
    assert [spec.name for spec in facts.inputs] == [value.name for value in model.graph.input] == ["x", "idle"]
    assert [spec.name for spec in facts.outputs] == ["y", "x"]
    assert [value.name for value in model.graph.output] == ["y"]
    assert noted(facts, "'idle' is not used")
    assert noted(facts, "'x'", "handed through")


def test_weights_listed_as_inputs_are_no_longer_inputs_and_unread_ones_go(tmp_path: Path) -> None:
    weights = [weight("w", 4), weight("dead", 5)]
    inputs = [info("x", [1, 4]), info("w", [4]), info("dead", [5])]
    facts, model = ready(save(tmp_path, [helper.make_node("Add", ["x", "w"], ["y"])], inputs, [info("y", [1, 4])], weights, ir=3))
    assert [spec.name for spec in facts.inputs] == ["x"]
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]
    assert noted(facts, "2 weights", "no longer inputs")
    assert noted(facts, "1 weights that no node reads")


def test_a_data_dependent_extent_is_unknown_and_not_invented(tmp_path: Path) -> None:
    facts, _ = ready(save(tmp_path, [helper.make_node("NonZero", ["x"], ["y"])], [info("x", [2, 3])], [info("y", [2, "found"], I64)]))
    assert facts.outputs[0].shape == (2, None)


def test_a_wrong_recorded_output_shape_is_corrected(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Flatten", ["x"], ["y"])], [info("x", ["N", 2, 3])], [info("y", ["N", 7])])
    assert ready(path)[0].outputs[0].shape == (1, 6)


def test_values_that_are_no_tensors_are_refused_with_the_reason(tmp_path: Path) -> None:
    output = helper.make_tensor_sequence_value_info("y", F, None)
    path = save(tmp_path, [helper.make_node("SequenceConstruct", ["x"], ["y"])], [info("x", [2])], [output])
    assert "output 'y' is not a tensor" in refused(path, ModelError)


def test_a_zipmap_at_the_end_hands_out_its_tensor(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"]),
        helper.make_node("ZipMap", ["p"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]),
    ]
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(I64, helper.make_tensor_type_proto(F, [])))
    output = helper.make_value_info("probabilities", kind)
    path = save(tmp_path, nodes, [info("x", ["N", 2])], [output], opsets=[helper.make_opsetid("ai.onnx.ml", 2)])
    facts, _ = ready(path)
    assert shapes(facts)["probabilities"] == (1, 2)
    assert run(path.with_name("prepared.onnx"), {"x": np.zeros((1, 2), np.float32)})[0].tolist() == [[0.5, 0.5]]


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


# --- real models


def real(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the repository (../shared/models)")
    return path


def facts_of(source: Path, folder: Path) -> ModelFacts:
    facts = prepare(source, folder / "prepared.onnx")
    model = onnx.load(folder / "prepared.onnx")
    onnx.checker.check_model(model, full_check=True)
    unknown = [
        value.name for value in model.graph.value_info if not all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    ]
    assert unknown == []
    return facts


def same_answers(source: Path, folder: Path, feed: Feed) -> None:
    for mine, theirs in zip(run(folder / "prepared.onnx", feed), run(source, feed), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_ultraface_has_one_input_left_and_answers_alike(tmp_path: Path) -> None:
    source = real("ultraface_rfb_320.onnx")
    facts = facts_of(source, tmp_path)
    assert shapes(facts) == {"input": (1, 3, 240, 320), "scores": (1, 4420, 2), "boxes": (1, 4420, 4)}
    same_answers(source, tmp_path, {"input": np.random.default_rng(0).normal(size=(1, 3, 240, 320)).astype(np.float32)})


def test_silero_is_bound_to_its_window_of_512_samples(tmp_path: Path) -> None:
    source = real("silero_vad_16k_op15.onnx")
    facts = facts_of(source, tmp_path)
    assert shapes(facts) == {"input": (1, 512), "state": (2, 1, 128), "sr": (), "output": (1, 1), "stateN": (2, 1, 128)}
    assert facts.batchable
    assert noted(facts, "guessed 512", "--dim sequence=512")
    random = np.random.default_rng(0)
    audio, state = (0.1 * random.normal(size=shape).astype(np.float32) for shape in ((1, 512), (2, 1, 128)))
    same_answers(source, tmp_path, {"input": audio, "state": state, "sr": np.array(16000, np.int64)})


def test_magika_answers_alike_at_batch_1(tmp_path: Path) -> None:
    source = real("magika_v3_3.onnx")
    facts = facts_of(source, tmp_path)
    assert shapes(facts) == {"bytes": (1, 2048), "target_label": (1, 214)}
    assert facts.batchable
    same_answers(source, tmp_path, {"bytes": np.random.default_rng(0).integers(0, 257, (1, 2048)).astype(np.int32)})


def test_super_resolution_is_raised_from_opset_1_and_computes_what_it_meant(tmp_path: Path) -> None:
    """No runtime loads the original, so its four convolutions and pixel shuffle are worked out with NumPy."""
    source = real("super_resolution.onnx")
    facts = facts_of(source, tmp_path)
    assert (facts.opset, [spec.name for spec in facts.inputs]) == (17, ["1"])
    weights = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in onnx.load(source).graph.initializer}
    x = np.random.default_rng(0).normal(size=(1, 1, 224, 224)).astype(np.float32)
    y: npt.NDArray[Any] = x[0].astype(np.float64)
    for layer in range(4):
        w, b = weights[str(2 * layer + 2)], weights[str(2 * layer + 3)]
        edge = w.shape[-1] // 2
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, ((0, 0), (edge, edge), (edge, edge))), w.shape[2:], axis=(1, 2))
        y = np.tensordot(w, windows, axes=([1, 2, 3], [0, 3, 4])) + b[:, None, None]
        y = np.maximum(y, 0) if layer < 3 else y
    shuffled = y.reshape(1, 3, 3, 224, 224).transpose(0, 3, 1, 4, 2).reshape(1, 1, 672, 672)
    np.testing.assert_allclose(run(tmp_path / "prepared.onnx", {"1": x})[0], shuffled, rtol=1e-3, atol=1e-4)
