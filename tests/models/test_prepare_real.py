"""Real models, prepared: their interface is bound as they mean it, and they answer as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from aivmm.models.prepare import prepare
from aivmm.models.records import ModelFacts
from tests.models.preparing import Feed, noted, run, shapes

SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"


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
