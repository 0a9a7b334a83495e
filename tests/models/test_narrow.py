"""Inputs in fewer bits: what is taken, what is said of it, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from aivmm.errors import UsageError
from aivmm.models.input_contract import InputContract, Normalisation, parse_normalise
from aivmm.models.inputs import load_inputs, make_inputs
from aivmm.models.lowering import lower
from aivmm.models.lowering_recipes import recipes
from aivmm.models.prepare import prepare
from aivmm.models.records import ModelFacts
from aivmm.tuner.options import TuneOptions
from tests.making import chain_model, onnx_model, write_model

HALF = InputContract(kind="narrow")
MEAN, SCALE = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
IMAGENET = "x=123.675,116.28,103.53/58.395,57.12,57.375"
Array = np.ndarray[Any, Any]
Steps = Sequence[tuple[str, bool, Any]]  # operator, whether the constant comes first, the constant


def pixels_as(*normalise: str) -> InputContract:
    return InputContract(kind="narrow:uint8", normalise=parse_normalise(normalise))


def image_model(path: Path, steps: Steps = (), *, shape: Sequence[int | str] = ("n", 3, 16, 16), dtype: int = TensorProto.FLOAT) -> Path:
    """Write a model that takes images, does `steps` to them, and convolves them; the channels of `shape` are on axis 1, or on the last."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    channels = shape[1] if shape[1] in (1, 3) else shape[3]
    weights: dict[str, Array] = {"w": np.random.default_rng(0).standard_normal((4, channels, 3, 3)).astype(kind)}
    nodes, last = [], "x"
    for index, (operator, first, constant) in enumerate(steps):
        weights[f"by{index}"] = np.asarray(constant, dtype=kind)
        nodes.append(helper.make_node(operator, [f"by{index}", last] if first else [last, f"by{index}"], [f"s{index}"]))
        last = f"s{index}"
    if shape[1] not in (1, 3):
        nodes.append(helper.make_node("Transpose", [last], ["turned"], perm=[0, 3, 1, 2]))
        last = "turned"
    nodes.append(helper.make_node("Conv", [last, "w"], ["y"]))
    return write_model(path, onnx_model(nodes, [("x", dtype, shape)], [("y", dtype, ("n", 4, "h", "w"))], weights))


def answer(path: Path, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # or it would compute a scale into the weights
    made: Array = onnxruntime.InferenceSession(path, options).run(None, {"x": x})[0]
    return made


def random_pixels(*shape: int) -> Array:
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


def prepared(source: Path, contract: InputContract, **options: Any) -> tuple[ModelFacts, Path]:
    path = source.with_name("prepared.onnx")
    facts = prepare(source, path, contract=contract, **options)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return facts, path


def test_wide_floats_are_taken_as_float16_and_cast_inside(tmp_path: Path) -> None:
    model = chain_model(rows=2, width=16)
    source = write_model(tmp_path / "m.onnx", model)
    facts = prepare(source, tmp_path / "narrow.onnx", contract=HALF)
    assert [str(each) for each in facts.inputs] == ["x: float16[2, 16]"] and [each.dtype for each in facts.outputs] == ["float32"]
    assert any("input x taken as float16 (--input-contract narrow)" in each for each in facts.notes)
    onnx.checker.check_model(onnx.load(tmp_path / "narrow.onnx"), full_check=True)
    array = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float16)
    narrow = onnxruntime.InferenceSession(tmp_path / "narrow.onnx").run(None, {"x": array})[0]
    wide = onnxruntime.InferenceSession(source).run(None, {"x": array.astype(np.float32)})[0]
    np.testing.assert_array_equal(narrow, wide)


def test_integers_and_what_is_handed_through_stay_as_they_are(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["i", "i"], ["y"])]
    model = onnx_model(nodes, [("i", TensorProto.INT64, (2,)), ("unread", TensorProto.FLOAT, (2,))], [("y", TensorProto.INT64, (2,))])
    facts = prepare(write_model(tmp_path / "m.onnx", model), tmp_path / "narrow.onnx", contract=HALF)
    assert [each.dtype for each in facts.inputs] == ["int64", "float32"]
    assert any("changes nothing" in each for each in facts.notes)


def test_nothing_is_narrowed_unasked(tmp_path: Path) -> None:
    facts = prepare(write_model(tmp_path / "m.onnx", chain_model()), tmp_path / "plain.onnx")
    assert facts.inputs[0].dtype == "float32" and not any("narrow" in each for each in facts.notes)
    with pytest.raises(UsageError, match="unknown --input-contract 'uint8'"):
        TuneOptions(model="m.onnx", input_contract="uint8")


# --- pixels


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_pixels_are_normalised_inside_exactly_as_outside(tmp_path: Path, layout: str) -> None:
    shape = (1, 3, 16, 16) if layout == "nchw" else (1, 16, 16, 3)
    source = image_model(tmp_path / "m.onnx", shape=shape)
    facts, path = prepared(source, pixels_as(IMAGENET))
    assert [str(each) for each in facts.inputs] == [f"x: uint8{list(shape)}"]
    assert [str(each) for each in facts.taken] == [
        "x as uint8, 0 to 255 (normalised inside: (pixel - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375])"
    ]
    assert facts.taken[0].normalisation == Normalisation(mean=MEAN, scale=SCALE)
    assert any("taken as uint8 (--input-contract narrow:uint8)" in each for each in facts.notes)
    x = random_pixels(*shape)
    channels = (3, 1, 1) if layout == "nchw" else (3,)
    outside = (x.astype(np.float32) - np.float32(MEAN).reshape(channels)) / np.float32(SCALE).reshape(channels)
    np.testing.assert_array_equal(answer(path, x), answer(source, outside))


def test_a_step_that_changes_nothing_is_left_out(tmp_path: Path) -> None:
    source = image_model(tmp_path / "m.onnx")
    _, path = prepared(source, pixels_as("x=0/255"))
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Cast", "Div", "Conv"]
    x = random_pixels(1, 3, 16, 16)
    np.testing.assert_array_equal(answer(path, x), answer(source, x.astype(np.float32) / np.float32(255)))


@pytest.mark.parametrize(
    "steps",
    [
        [("Div", False, 255)],
        [("Mul", False, 1 / 255), ("Sub", False, np.reshape((0.485, 0.456, 0.406), (3, 1, 1))), ("Div", False, 0.225)],
        [("Sub", False, 127.0), ("Mul", False, 1 / 128)],
        [("Sub", False, np.reshape((103.9, 116.8, 123.7), (3, 1, 1)))],  # the means alone, as Caffe had it
        [("Sub", True, 127.0)],
    ],
)
def test_a_model_that_normalises_pixels_itself_has_them_cast_alone(tmp_path: Path, steps: Steps) -> None:
    source = image_model(tmp_path / "m.onnx", steps)
    facts, path = prepared(source, pixels_as())
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Cast", *(each[0] for each in steps), "Conv"]
    operators = ", ".join(each[0] for each in steps)
    assert f"input x: the model's own first nodes ({operators}) turn 0 to 255 into its numbers" in facts.notes
    assert facts.taken[0].normalisation is None
    x = random_pixels(1, 3, 16, 16)
    np.testing.assert_array_equal(answer(path, x), answer(source, x.astype(np.float32)))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "nothing says how pixels become its numbers"),
        ([("Mul", False, 2.0), ("Sub", False, 1.0)], r"the model's first nodes \(Mul, Sub\) are made for other numbers"),  # of 0 to 1
        ([("Sub", False, 0.45), ("Div", False, 0.225)], "are made for other numbers than 0 to 255"),
        ([("Add", False, 1.0), ("Mul", False, 127.5)], "are made for other numbers than 0 to 255"),  # of -1 to 1
        ([("Mul", False, 0.0)], "are made for other numbers than 0 to 255"),
        ([("Div", True, 1.0)], "nothing says how pixels become its numbers"),
    ],
)
def test_a_normalisation_is_never_made_up(tmp_path: Path, steps: Steps, said: str) -> None:
    source = image_model(tmp_path / "m.onnx", steps)
    with pytest.raises(UsageError, match=f"input 'x' cannot be taken as uint8: .*{said}") as caught:
        prepared(source, pixels_as())
    assert "--normalise x=MEAN/SCALE" in str(caught.value)


def test_what_the_user_says_goes_before_what_the_model_does(tmp_path: Path) -> None:
    steps: Steps = [("Mul", False, 2.0), ("Sub", False, 1.0)]
    source = image_model(tmp_path / "m.onnx", steps)
    _, path = prepared(source, pixels_as("x=0/255"))
    x = random_pixels(1, 3, 16, 16)
    np.testing.assert_array_equal(answer(path, x), answer(source, x.astype(np.float32) / np.float32(255)))


def test_half_floats_are_normalised_before_they_are_rounded(tmp_path: Path) -> None:
    source = image_model(tmp_path / "m.onnx", dtype=TensorProto.FLOAT16)
    facts, path = prepared(source, pixels_as(IMAGENET))
    assert facts.taken[0].model_dtype == "float16"
    x = random_pixels(1, 3, 16, 16)
    outside = (x.astype(np.float32) - np.float32(MEAN).reshape(3, 1, 1)) / np.float32(SCALE).reshape(3, 1, 1)
    # By what ONNX says: ONNX Runtime's CPU convolves halves as floats, and leaves out the rounding in between.
    given = ((path, x), (source, outside.astype(np.float16)))
    mine, theirs = (ReferenceEvaluator(onnx.load(model)).run(None, {"x": each})[0] for model, each in given)
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("normalise", "said"),
    [
        (["z=0/1"], "--normalise names 'z', which is no input of floats that the model reads; there are: x"),
        (["x=1,2/1"], r"gives 2 numbers for input 'x' of shape \[\?, 3, 16, 16\]"),
    ],
)
def test_a_normalisation_that_does_not_fit_the_model_is_refused(tmp_path: Path, normalise: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prepared(image_model(tmp_path / "m.onnx"), pixels_as(*normalise))


def test_without_an_image_there_is_nothing_to_take_unasked(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.onnx", chain_model(rows=2, width=16))
    with pytest.raises(UsageError, match="no input has rank 4 and 1 or 3 channels; name the inputs"):
        prepared(source, pixels_as())
    facts, _ = prepared(source, pixels_as("x=128/64"))  # who names it knows
    assert facts.inputs[0].dtype == "uint8"


def test_open_sides_of_pixels_are_bound_as_those_of_images(tmp_path: Path) -> None:
    source = image_model(tmp_path / "m.onnx", shape=("n", 3, "unk__1", "unk__2"))
    plain = prepare(source, tmp_path / "plain.onnx")
    facts, _ = prepared(source, pixels_as("x=0/255"))
    assert facts.inputs[0].shape == plain.inputs[0].shape == (1, 3, 224, 224) and facts.category == plain.category


def test_samples_made_up_for_pixels_are_images(tmp_path: Path) -> None:
    facts, path = prepared(image_model(tmp_path / "m.onnx", shape=(1, 3, 64, 64)), pixels_as("x=0/255"))
    (sample,) = make_inputs(onnx.load(path), facts.inputs, seed=0)
    x = sample["x"].astype(np.float64)
    assert sample["x"].dtype == np.uint8 and x.max() - x.min() > 100
    assert np.abs(np.diff(x, axis=3)).mean() < x.std()  # neighbours are alike, as in photographs


@pytest.mark.parametrize(("precision", "name"), [("fp16", "ort-half"), ("int8", "ort-minmax")])
def test_what_takes_pixels_is_lowered_as_other_models_are(tmp_path: Path, precision: str, name: str) -> None:
    _, path = prepared(image_model(tmp_path / "m.onnx", shape=(1, 3, 16, 16)), pixels_as(IMAGENET))
    how = next(each for each in recipes(precision, "CNN") if each.name == name)
    samples = [{"x": np.random.default_rng(seed).integers(0, 256, (1, 3, 16, 16)).astype(np.uint8)} for seed in range(8)]
    lower(path, tmp_path / "low.onnx", how, samples)
    assert onnx.load(tmp_path / "low.onnx").graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    mine, theirs = (answer(each, samples[0]["x"]).astype(np.float64).ravel() for each in (tmp_path / "low.onnx", path))
    assert not np.array_equal(mine, theirs)
    assert mine @ theirs / (np.linalg.norm(mine) * np.linalg.norm(theirs)) > 0.999


def test_samples_of_floats_are_no_pixels(tmp_path: Path) -> None:
    facts, _ = prepared(image_model(tmp_path / "m.onnx"), pixels_as("x=0/255"))
    for array, said in (
        (np.zeros((1, 3, 16, 16), np.float32), "is float32, expected uint8"),
        (np.full((1, 3, 16, 16), 256), "uint8 cannot hold"),
    ):
        np.savez(tmp_path / "x.npz", x=array)
        with pytest.raises(UsageError, match=f"array 'x' .*{said}"):
            load_inputs(tmp_path / "x.npz", facts.inputs)
    np.savez(tmp_path / "x.npz", x=np.full((1, 3, 16, 16), 255))
    assert load_inputs(tmp_path / "x.npz", facts.inputs)[0]["x"].dtype == np.uint8  # of another type of integers, where all fit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "does not read as NAME=MEAN/SCALE"),
        ("x=1", "does not read as NAME=MEAN/SCALE"),
        ("=1/2", "does not read as NAME=MEAN/SCALE"),
        ("x=a/2", "holds what is no number"),
        ("x=1,/2", "holds what is no number"),
        ("x=nan/2", "not finite"),
        ("x=1/0", "divides by 0"),
        ("x=1,2,3/1,2", "has 3 means and 2 scales"),
    ],
)
def test_what_is_no_normalisation_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TuneOptions(model="m.onnx", input_contract="narrow:uint8", normalise=(text,))


def test_other_shapes_run_the_file_and_so_no_other_contract() -> None:
    with pytest.raises(UsageError, match="--other-shapes dynamic runs the model as its file has it"):
        TuneOptions(model="m.onnx", input_contract="narrow", other_shapes="dynamic")


def test_a_normalisation_without_its_contract_is_refused() -> None:
    with pytest.raises(UsageError, match="add --input-contract narrow:uint8"):
        TuneOptions(model="m.onnx", normalise=("x=0/255",))
    with pytest.raises(UsageError, match="names 'x' twice"):
        TuneOptions(model="m.onnx", input_contract="narrow:uint8", normalise=("x=0/255", "x=0/1"))
    assert parse_normalise(["a=b=1/2"]) == {"a=b": Normalisation(mean=(1.0,), scale=(2.0,))}
