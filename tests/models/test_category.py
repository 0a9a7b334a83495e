"""The family told from the operators: real models, the demos, and small graphs that stand for a kind."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
from onnx import parser

from aivmm.models.category import detect
from aivmm.models.demo import write_demo

MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "models"


def graph(text: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')


@pytest.mark.parametrize(
    ("file", "family"),
    [("ultraface_rfb_320", "CNN"), ("silero_vad_16k_op15", "RNN/speech"), ("magika_v3_3", "CNN"), ("super_resolution", "CNN")],
)
def test_real_models_are_told_apart(file: str, family: str) -> None:
    path = MODELS / f"{file}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here: the shared models are not part of the repository")
    found = detect(onnx.load(str(path)))
    assert found.name == family
    assert any(digit.isdigit() for digit in found.reason)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("squeezenet", "CNN"),
        ("shufflenet", "CNN"),
        ("encoder", "language transformer"),
        ("lstm", "RNN/speech"),
        ("recommender", "recommender"),
    ],
)
def test_demos_are_told_apart(name: str, family: str, tmp_path: Path) -> None:
    assert detect(onnx.load(str(write_demo(name, tmp_path)))).name == family


ATTENTION = """
  q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
  kt = Transpose<perm=[0, 2, 1]>(k) s = MatMul(q, kt) scaled = Div(s, root) p = Softmax<axis=-1>(scaled) y = MatMul(p, v)
"""
WEIGHTS = "float[8,8] wq, float[8,8] wk, float[8,8] wv, float root"


def with_weights(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    for name, shape in shapes.items():
        model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, shape, [0.1] * math.prod(shape)))
    return model


def test_attention_over_an_image_is_a_vision_transformer() -> None:
    text = "vit (float[1,3,16,16] image) => (float[1,4,8] y) { e = Conv<strides=[8,8]>(image, patch) f = Flatten<axis=2>(e)"
    model = with_weights(
        graph(text.replace("Flatten<axis=2>(e)", "Reshape(e, shape) x = Transpose<perm=[0,2,1]>(f)") + ATTENTION + "}"),
        patch=(8, 3, 8, 8), wq=(8, 8), wk=(8, 8), wv=(8, 8), root=(),
    )  # fmt: skip
    model.graph.initializer.append(onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [0, 8, -1]))
    found = detect(model)
    assert found.name == "vision transformer"
    assert "1 attention" in found.reason


def test_attention_over_a_spectrogram_is_speech() -> None:
    text = "asr (float[1,80,50] mel) => (float[1,50,8] y) { e = Conv<pads=[1,1]>(mel, w) x = Transpose<perm=[0,2,1]>(e)" + ATTENTION + "}"
    assert detect(with_weights(graph(text), w=(8, 80, 3), wq=(8, 8), wk=(8, 8), wv=(8, 8), root=())).name == "RNN/speech"


def test_a_softmax_classifier_is_no_attention_and_a_small_mlp_is_unknown() -> None:
    text = "mlp (float[1,4] x) => (float[1,3] y) { h = MatMul(x, a) r = Relu(h) z = MatMul(r, b) y = Softmax(z) }"
    found = detect(with_weights(graph(text), a=(4, 8), b=(8, 3)))
    assert found.name == "unknown"
    assert "2 dense products" in found.reason


def test_message_passing_is_a_graph() -> None:
    text = """gnn (float[10,8] nodes, int64[30] source, int64[30,1] target) => (float[10,8] y) {
      h = MatMul(nodes, a) m = Gather(h, source) zero = Sub(h, h) y = ScatterND<reduction="add">(zero, target, m) }"""
    assert detect(with_weights(graph(text), a=(8, 8))).name == "scientific/graph"


def test_float64_numerics_are_scientific() -> None:
    assert detect(graph("ode (double[3,3] a) => (double[3,3] y) { b = MatMul(a, a) y = Add(a, b) }")).name == "scientific/graph"


def test_attention_and_recurrence_in_functions_and_branches_count() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    m (float[1,5,8] x, float[8,8] w) => (float[1,5,8] y) { y = own.attend(x, w) }
    <domain: "own", opset_import: ["" : 17]>
    attend (x, w) => (y) { q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(q) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, q) }"""
    assert detect(parser.parse_model(text)).name == "language transformer"
