"""The models that reach a device's limits compute what they say, in both runtimes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest

from aivmm.models.ceilings import call_model, copy_model, matmul_flops, matmul_model, stage_model


def run(data: bytes, array: Any) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    core = ov.Core()
    compiled = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [session.run(None, {session.get_inputs()[0].name: array})[0], compiled(array)[0]]


def test_the_product_is_one_of_square_matrices_with_a_constant() -> None:
    data = matmul_model(16)
    weights = onnx.numpy_helper.to_array(onnx.load_from_string(data).graph.initializer[0])
    x = np.random.default_rng(0).standard_normal((16, 16), dtype=np.float32)
    for answer in run(data, x):
        np.testing.assert_allclose(answer, x @ weights, rtol=1e-4, atol=1e-4)
    assert matmul_flops(16) == 2 * 16**3


def test_equal_sizes_give_equal_files() -> None:
    assert matmul_model(16) == matmul_model(16) != matmul_model(32)


@pytest.mark.parametrize(("data", "count"), [(copy_model(64), 8), (call_model(), 1)])
def test_copies_read_and_write_every_byte_that_they_count(data: bytes, count: int) -> None:
    x = np.arange(1, count + 1, dtype=np.float32)
    for answer in run(data, x):
        assert answer.tolist() == (2 * x).tolist()


def test_a_stage_has_the_names_that_it_is_asked_for() -> None:
    graph = onnx.load_from_string(stage_model(64, reads="a", writes="b")).graph
    assert [each.name for each in (*graph.input, *graph.output)] == ["a", "b"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 16


@pytest.mark.parametrize("size", [0, 4, 12])
def test_bytes_that_make_no_two_floats_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="no multiple of 8"):
        copy_model(size)
