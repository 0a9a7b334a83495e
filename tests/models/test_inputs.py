"""Made inputs make sense to the graph they are for; inputs read from a file are checked one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, parser

from aivmm.errors import UsageError
from aivmm.models.inputs import load_inputs, make_inputs
from aivmm.tensors import TensorSpec

MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "models"


def spec(name: str, dtype: str, *shape: int | None) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def nothing(*specs: TensorSpec) -> onnx.ModelProto:
    """Make a model that passes its inputs through, so that only names and types speak."""
    values = [helper.make_tensor_value_info(each.name, _elem(each.dtype), each.shape) for each in specs]
    nodes = [helper.make_node("Identity", [each.name], [f"{each.name}/out"]) for each in specs]
    outputs = [helper.make_tensor_value_info(f"{each.name}/out", _elem(each.dtype), each.shape) for each in specs]
    return helper.make_model(helper.make_graph(nodes, "nothing", values, outputs))


def _elem(dtype: str) -> int:
    return (
        onnx.TensorProto.STRING
        if dtype == "string"
        else int(getattr(onnx.TensorProto, dtype.upper().replace("FLOAT64", "DOUBLE").replace("FLOAT32", "FLOAT")))
    )


def made(*specs: TensorSpec, model: onnx.ModelProto | None = None, seed: int = 0) -> dict[str, Any]:
    (sample,) = make_inputs(model or nothing(*specs), specs, seed=seed)
    for each in specs:
        assert sample[each.name].shape == each.shape
        assert sample[each.name].flags.c_contiguous
    return sample


def graph(text: str, **constants: Any) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    return model


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        ("a = Gather(table, ids)", 0, 6),
        ("b = Cast<to=7>(ids) c = Unsqueeze(b, axes) d = Slice(c, zero, one, zero) a = Gather(table, d)", 0, 6),
        ("b = Add(ids, offsets) a = Gather(table, b)", 0, 2),
        ("b = Sub(ids, offsets) a = Gather(table, b)", 4, 6),
        ("b = Gather(table, ids) c = Gather<axis=1>(table, ids) a = Concat<axis=-1>(b, c)", 0, 2),
        ("b = Unsqueeze(ids, last) c = Equal(b, counting) a = Cast<to=1>(c)", 0, 4),
        ("d = OneHot(ids, depth, values) a = Cast<to=1>(d)", 0, 3),
    ],
)
def test_indices_use_their_table_and_stay_within_it(body: str, low: int, high: int) -> None:
    model = graph(
        f"m (int64[40] ids) => (float[a, b] a) {{ {body} }}",
        table=np.zeros((7, 3), np.float32),
        axes=np.array([0]),
        last=np.array([1]),
        zero=np.array([0]),
        one=np.array([1]),
        offsets=np.array([4] * 20 + [0] * 20),
        counting=np.arange(5),
        depth=np.array(4),
        values=np.array([0.0, 1.0], np.float32),
    )
    ids = made(spec("ids", "int64", 40), model=model)["ids"]
    assert (ids.min(), ids.max()) == (low, high)


def test_indices_into_computed_tensors_stay_within_bound_shapes() -> None:
    model = graph("m (float[n,8] x, int64[2,e] edge_index) => (float[2,e,8] y) { h = Relu(x) y = Gather(h, edge_index) }")
    edges = made(spec("x", "float32", 5, 8), spec("edge_index", "int64", 2, 200), model=model)["edge_index"]
    assert set(np.unique(edges)) == {0, 1, 2, 3, 4}


def test_indices_are_followed_into_branches() -> None:
    inner = parser.parse_graph("g () => (float[9, 3] r) { r = Gather(table, ids) }")
    node = helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner)
    values = [
        helper.make_tensor_value_info("ids", onnx.TensorProto.INT32, [9]),
        helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []),
    ]
    table = onnx.numpy_helper.from_array(np.zeros((3, 3), np.float32), "table")
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [9, 3])
    model = helper.make_model(helper.make_graph([node], "g", values, [output], [table]))
    sample = made(spec("ids", "int32", 9), spec("flag", "bool"), model=model)
    assert sample["ids"].max() <= 2
    assert sample["flag"] == np.True_


def test_names_say_what_an_input_is() -> None:
    specs = [
        spec("attention_mask", "int64", 2, 6),
        spec("padMask", "bool", 2, 6),
        spec("src_key_padding_mask", "bool", 2, 6),
        spec("token_type_ids", "int64", 2, 6),
        spec("position_ids", "int64", 2, 6),
        spec("sr", "int64"),
        spec("sample_rate", "float32", 1),
        spec("scale", "float32"),
        spec("state", "float32", 2, 1, 8),
        spec("past_key_values.0.key", "float16", 1, 2, 3, 4),
        spec("encoder_hidden_states", "float32", 1, 6, 8),
        spec("lengths", "int64", 2),
        spec("text", "string", 2),
    ]
    sample = made(*specs)
    assert (sample["attention_mask"] == 1).all()
    assert sample["padMask"].all()
    assert not sample["src_key_padding_mask"].any()
    assert not sample["token_type_ids"].any()
    assert sample["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert sample["sr"] == 16000
    assert sample["sample_rate"].tolist() == [16000]
    assert not sample["state"].any()
    assert not sample["past_key_values.0.key"].any()
    assert sample["encoder_hidden_states"].std() > 0.5
    assert sample["lengths"].tolist() == [6, 6]
    assert all(isinstance(each, str) and each for each in sample["text"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "uint8", "int8", "int64", "complex64"])
def test_every_type_is_made_finite_and_varied(dtype: str) -> None:
    array = made(spec("x", dtype, 4, 9))["x"]
    assert array.dtype.name == dtype
    assert np.isfinite(array.astype(np.complex128)).all()
    assert len(np.unique(array.astype(np.complex128))) > 4


@pytest.mark.parametrize("shape", [(2, 3, 64, 48), (2, 64, 48, 3), (2, 1, 64, 48)])
def test_images_differ_from_each_other_and_stay_in_range(shape: tuple[int, ...]) -> None:
    image = made(spec("x", "float32", *shape))["x"]
    assert np.abs(image).max() <= 3
    assert 0.4 < image.std() < 1.6
    assert np.linalg.norm(image[0] - image[1]) > 0.3 * np.linalg.norm(image[0])


def test_a_seed_gives_the_same_samples_and_another_seed_others() -> None:
    specs = [spec("x", "float32", 1, 9)]
    three = make_inputs(nothing(*specs), specs, seed=5, count=3)
    (one,) = make_inputs(nothing(*specs), specs, seed=5)
    np.testing.assert_array_equal(one["x"], three[0]["x"])
    assert not np.array_equal(three[0]["x"], three[1]["x"])
    assert not np.array_equal(made(*specs, seed=6)["x"], one["x"])


def test_an_unbound_extent_names_the_input() -> None:
    specs = [spec("tokens", "int64", 1, None)]
    with pytest.raises(UsageError, match=r"tokens: int64\[1, \?\]"):
        make_inputs(nothing(spec("tokens", "int64", 1, 4)), specs, seed=0)


def test_magika_gets_tokens_of_its_alphabet_and_silero_a_waveform() -> None:
    if not MODELS.is_dir():
        pytest.skip("the shared models are not here: they are not part of the repository")
    tokens = made(spec("bytes", "int32", 8, 2048), model=onnx.load(str(MODELS / "magika_v3_3.onnx")))["bytes"]
    assert 0 <= tokens.min() < 20
    assert 236 < tokens.max() <= 256
    specs = [spec("input", "float32", 1, 512), spec("state", "float32", 2, 1, 128), spec("sr", "int64")]
    sample = made(*specs, model=onnx.load(str(MODELS / "silero_vad_16k_op15.onnx")))
    assert 0 < sample["input"].std() < 0.3
    assert sample["sr"] == 16000
    assert not sample["state"].any()


SPECS = [spec("x", "float32", 2, 3), spec("n", "int64")]
GOOD: dict[str, Any] = {"x": np.ones((2, 3), np.float32), "n": np.int64(4)}


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "inputs.npz"
    np.savez(path, **arrays)
    return path


def test_exact_shapes_are_one_sample(tmp_path: Path) -> None:
    (sample,) = load_inputs(saved(tmp_path, **GOOD), SPECS)
    np.testing.assert_array_equal(sample["x"], GOOD["x"])
    assert sample["n"].shape == ()


def test_one_more_axis_is_several_samples_also_for_scalars(tmp_path: Path) -> None:
    samples = load_inputs(saved(tmp_path, x=np.arange(24, dtype=np.float32).reshape(4, 2, 3), n=np.arange(4)), SPECS)
    assert [int(sample["n"]) for sample in samples] == [0, 1, 2, 3]
    assert all(isinstance(sample["n"], np.ndarray) and sample["x"].flags.c_contiguous for sample in samples)
    assert samples[3]["x"][0, 0] == 18


def test_types_are_cast_within_their_kind(tmp_path: Path) -> None:
    (sample,) = load_inputs(saved(tmp_path, x=np.full((2, 3), 0.1), n=np.uint8(4)), SPECS)
    assert sample["x"].dtype == np.float32
    assert sample["n"].dtype == np.int64


def test_bfloat16_survives_a_file_that_has_no_name_for_it(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    (sample,) = load_inputs(saved(tmp_path, x=values), [spec("x", "bfloat16", 2)])
    np.testing.assert_array_equal(sample["x"], values)


def test_strings_are_read_without_pickle(tmp_path: Path) -> None:
    (sample,) = load_inputs(saved(tmp_path, t=np.array(["one", "two"])), [spec("t", "string", 2)])
    assert sample["t"].tolist() == ["one", "two"]
    assert sample["t"].dtype == object


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "no array for input x: float32"),
        ({"y": np.zeros(3)}, "array 'y' is no input"),
        ({"x": np.zeros((2, 4), np.float32)}, r"array 'x' has shape \[2, 4\], expected \[2, 3\]"),
        ({"x": np.zeros((2, 3), np.int32)}, "array 'x' is int32, expected float32"),
        ({"x": np.full((2, 3), np.nan, np.float32)}, "array 'x' holds NaN"),
        ({"x": np.full((2, 3), 1e300)}, "array 'x' holds numbers too large for float32"),
        ({"n": np.uint64(2**63)}, "array 'n' holds 9223372036854775808"),
        ({"n": np.float32(1)}, "array 'n' is float32, expected int64"),
        ({"n": np.array([1, 2])}, "array 'n' holds 2 samples, 'x' one sample"),
        ({"x": np.zeros((3, 2, 3), np.float32), "n": np.array([1, 2])}, "array 'x' holds 3 samples, 'n' 2 samples"),
        ({"x": np.zeros((0, 2, 3), np.float32), "n": np.zeros(0, np.int64)}, "holds no samples"),
        ({"x": np.array([object()] * 3)}, "Python objects"),
    ],
)
def test_a_wrong_array_is_named_with_what_was_expected_and_found(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(UsageError, match=message) as caught:
        load_inputs(saved(tmp_path, **arrays), SPECS)
    assert "\n" not in str(caught.value)


def test_what_is_no_npz_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    whole = saved(tmp_path, x=np.random.default_rng(0).random((2, 3)), n=1).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    damaged = bytearray(whole)
    damaged[140] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for path in ("absent.npz", ".", "one.npy", "text.npz", "cut.npz", "damaged.npz"):
        with pytest.raises(UsageError) as caught:
            load_inputs(tmp_path / path, SPECS)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "large"),
    [
        ("a = Add(t, t)", True),
        ("b = Mod(t, day) c = Gather(table, b) d = ReduceSum(c) a = Cast<to=7>(d)", True),  # Mod bounds it
        ("b = Mul(t, two) c = Sub(b, t) a = Unsqueeze(c, zero)", True),
        ("b = Less(t, day) a = Cast<to=7>(b)", True),
        ("a = Gather(day, t)", False),  # an index
        ("b = Cast<to=1>(t) c = Exp(b) a = Cast<to=7>(c)", False),  # a network of floats, which 2^32 would saturate
        ("b = Mul(t, t) a = Neg(b)", False),  # 2^33 squared fits nowhere
        ("a = Mod(day, t)", False),
    ],
)
def test_64_bit_integers_that_are_only_calculated_with_go_beyond_32_bits(body: str, large: bool) -> None:
    model = graph(
        f"m (int64[40] t) => (int64[n] a) {{ {body} }}",
        day=np.array([40], np.int64), two=np.array([2], np.int64), zero=np.array([0], np.int64), table=np.zeros((40, 3), np.float32),
    )  # fmt: skip
    found = made(spec("t", "int64", 40), model=model)["t"]
    assert bool((found >= 1 << 32).any()) == large
    assert found.min() >= 0 and (found < 10).any()  # and small ones are there too


def test_an_extent_stays_small() -> None:
    model = graph("m (int64 t) => (int64[n] a) { b = Add(t, t) a = Range(zero, b, one) }", zero=np.int64(0), one=np.int64(1))
    assert made(spec("t", "int64"), model=model)["t"] < 10


def test_a_lone_64_bit_integer_that_is_only_calculated_with_is_large() -> None:
    model = graph("m (int64 t) => (int64 a) { a = Add(t, t) }")
    assert made(spec("t", "int64"), model=model)["t"] >= 1 << 32
