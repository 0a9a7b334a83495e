"""The demo models: same bytes each time, valid, varied outputs, and two runtimes agree on them at any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from aivmm.errors import UsageError
from aivmm.models.demo import demo_names, write_demo
from aivmm.models.inputs import make_inputs
from aivmm.tensors import TensorSpec

LARGE = {"alexnet", "zfnet512", "vgg19", "resnet50", "densenet121", "inception_v1"}  # what they test, smaller ones test in the fast tier
EXTENTS = {"seq": 24, "time": 20}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in demo_names()]


def specs_of(model: onnx.ModelProto, batch: int) -> list[TensorSpec]:
    extents = {**EXTENTS, "batch": batch}
    return [
        TensorSpec(
            name=value.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=tuple(each.dim_value or extents[each.dim_param] for each in value.type.tensor_type.shape.dim),
        )
        for value in model.graph.input
    ]


def relative(found: Any, reference: Any) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def written(name: str, folder: Path) -> Path:
    """Write a demo once for all tests of this file."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        assert write_demo(name, folder) == path
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demos")


@pytest.mark.parametrize("name", NAMES)
def test_two_runtimes_agree_on_every_demo_at_batch_1_and_2_and_inputs_matter(name: str, folder: Path) -> None:
    path = written(name, folder)
    onnx.checker.check_model(str(path))
    model = onnx.load(str(path))
    assert model.ir_version <= 10
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    core = openvino.Core()
    for batch in (1, 2):
        specs = specs_of(model, batch)
        readable = core.read_model(path)
        readable.reshape({spec.name: list(spec.shape) for spec in specs})
        compiled = core.compile_model(readable, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # the default is bf16 on some machines
        samples = make_inputs(model, specs, seed=11, count=2)
        outputs = [session.run(None, sample) for sample in samples]
        for sample, expected in zip(samples, outputs, strict=True):
            for found, reference in zip(compiled(sample).values(), expected, strict=True):
                assert np.isfinite(reference).all()
                assert relative(found, reference) <= 2e-5
        for first, *others in zip(*outputs, strict=True):
            assert all(relative(other, first) > 0.05 for other in others), "different inputs must give different outputs"
            assert first.std() > 0 or first.size == 1


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "encoder", "recommender"])
def test_a_demo_has_the_same_bytes_each_time(name: str, folder: Path, tmp_path: Path) -> None:
    assert write_demo(name, tmp_path).read_bytes() == written(name, folder).read_bytes()


def test_no_probability_of_a_demo_is_saturated(folder: Path) -> None:
    path = written("shufflenet", folder)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    for image in (rng.standard_normal((1, 3, 224, 224), dtype=np.float32), rng.random((1, 3, 224, 224), dtype=np.float32)):
        (probabilities,) = session.run(None, {"image": image})
        assert probabilities.sum() == pytest.approx(1, abs=1e-4)
        assert 0.002 < probabilities.max() < 0.5


def test_binding_batch_and_sequence_makes_every_shape_of_the_encoder_exact(folder: Path) -> None:
    model = onnx.load(str(written("encoder", folder)))
    for value in (*model.graph.input, *model.graph.output):
        for extent in value.type.tensor_type.shape.dim:
            if extent.dim_param:
                extent.dim_value = {"batch": 2, "seq": 24}[extent.dim_param]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shapes = {each.name: [extent.dim_value for extent in each.type.tensor_type.shape.dim] for each in inferred.graph.value_info}
    made = {name for node in model.graph.node for name in node.output} - {each.name for each in model.graph.output}
    assert made == set(shapes)
    assert all(all(shape) for shape in shapes.values())
    assert shapes["layer0/scores"] == [2, 4, 24, 24]


def test_the_encoder_ignores_tokens_that_are_masked_out(folder: Path) -> None:
    session = onnxruntime.InferenceSession(str(written("encoder", folder)), providers=["CPUExecutionProvider"])
    ids = np.arange(10, dtype=np.int64)[None]
    mask = np.array([[1] * 6 + [0] * 4], np.int64)
    changed = np.where(mask == 1, ids, 77)
    (_, one), (_, two) = (session.run(None, {"input_ids": each, "attention_mask": mask}) for each in (ids, changed))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_an_unknown_demo_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_demo("../resnet", tmp_path)
    assert all(name in str(caught.value) for name in demo_names())
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write"):
        write_demo("recommender", tmp_path / "file")


def test_every_demo_is_described_in_one_line() -> None:
    expected = {"squeezenet", "resnet50", "densenet121", "shufflenet", "inception_v1", "inception_v2", "alexnet", "vgg19", "zfnet512"}
    assert set(demo_names()) == expected | {"encoder", "lstm", "recommender"}
    assert all(line and "\n" not in line for line in demo_names().values())
