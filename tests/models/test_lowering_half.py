"""A converted model computes in fp16 or bf16, keeps its interface, and says why where it cannot be made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from aivmm.errors import Unsupported
from aivmm.models.lowering import lower
from aivmm.models.lowering_recipes import recipes
from aivmm.models.prepare import prepare
from tests.models.test_lowering import by_onnxruntime, by_openvino, convolutions, feeds, products, weight, write


def prepared(source: Path) -> Path:
    target = source.with_name(f"{source.stem}-prepared.onnx")
    prepare(source, target, batch=1)
    return target


@pytest.mark.parametrize("make", [convolutions, products])
def test_fp16_halves_the_weights_and_stays_near(tmp_path: Path, make: object) -> None:
    source = prepared(make(tmp_path / "m.onnx"))  # type: ignore[operator]
    (recipe,) = recipes("fp16", "CNN")
    made = lower(source, tmp_path / "half.onnx", recipe, [])
    floats = sum(each.ByteSize() for each in onnx.load(source).graph.initializer if each.data_type == onnx.TensorProto.FLOAT)
    assert made.weight_bytes < 0.6 * floats and made.nodes > 0
    for feed in feeds(source, 2):
        for run in (by_onnxruntime, by_openvino):
            np.testing.assert_allclose(run(made.path, feed), by_onnxruntime(source, feed), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("make", [convolutions, products])
def test_bf16_products_run_where_the_runtime_has_them(tmp_path: Path, make: object) -> None:
    source = prepared(make(tmp_path / "m.onnx"))  # type: ignore[operator]
    (recipe,) = recipes("bf16", "CNN")
    made = lower(source, tmp_path / "bfloat.onnx", recipe, [])
    kinds = {each.data_type for each in onnx.load(made.path).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds and made.nodes > 0
    onnx.checker.check_model(onnx.load(made.path), full_check=True)
    for feed in feeds(source, 2):
        np.testing.assert_allclose(by_openvino(made.path, feed), by_onnxruntime(source, feed), rtol=0.1, atol=0.1)


def test_a_weight_beyond_fp16_is_a_reason(tmp_path: Path) -> None:
    source = prepared(
        write(tmp_path / "m.onnx", [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], [weight("w", 8, 8, spread=1e7)], [1, 8])
    )
    (recipe,) = recipes("fp16", "CNN")
    with pytest.raises(Unsupported, match="beyond 65504"):
        lower(source, tmp_path / "half.onnx", recipe, [])
    assert not (tmp_path / "half.onnx").exists()


def test_a_model_without_products_has_no_bf16(tmp_path: Path) -> None:
    source = prepared(write(tmp_path / "m.onnx", [onnx.helper.make_node("Relu", ["x"], ["y"])], [], [1, 8]))
    (recipe,) = recipes("bf16", "CNN")
    with pytest.raises(Unsupported, match="nothing to lower"):
        lower(source, tmp_path / "bfloat.onnx", recipe, [])
