"""A prepared model answers as the original does, with fixed shapes, in versions that runtimes read; and says what was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from aivmm.errors import ModelError
from tests.models.preparing import I64, F, agrees, info, ints, noted, one, ready, refused, run, save, shapes, weight

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
