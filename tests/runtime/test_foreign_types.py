"""Types that NumPy knows only through ml_dtypes cross both backends without a copy, bit by bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Request, holds_foreign, is_foreign
from aivmm.runtime.config import Config
from aivmm.runtime.finding import find_target
from aivmm.runtime.onnx_interface import ELEMENT_TYPES
from aivmm.runtime.registry import load_backend

RUNTIMES = ("openvino", "onnxruntime")


def request_for(runtime: str, element: int, extent: int | str) -> Request:
    """Return a request of an Identity on `x` to `y` of one type."""
    x, y = (helper.make_tensor_value_info(name, element, [extent]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
    backend = load_backend(runtime)
    return backend.compile(model, find_target(backend, "CPU"), Config(precision="fp32")).new_request()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("extent", [4, "n"])
def test_values_come_out_as_they_went_in(runtime: str, dtype: Any, extent: int | str) -> None:
    element = {name: number for number, name in ELEMENT_TYPES.items()}[np.dtype(dtype).name]
    request = request_for(runtime, element, extent)
    x = np.array([1.0, -2.0, 0.5, 0.0]).astype(dtype)
    request.bind("x", x)
    request.run()
    found = np.array(request.output("y"))
    assert found.dtype == x.dtype and found.tobytes() == x.tobytes()
    x[...] = np.array([3.0, 0.25, -1.0, 1.0]).astype(dtype)  # the same memory: nothing was copied
    request.run()
    assert np.array(request.output("y")).tobytes() == x.tobytes()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bound_output_is_written_in_place(runtime: str) -> None:
    request = request_for(runtime, TensorProto.BFLOAT16, 4)
    x, y = np.array([1, 2, 3, 4], dtype=ml_dtypes.bfloat16), np.zeros(4, dtype=ml_dtypes.bfloat16)
    request.bind("x", x)
    request.bind("y", y)
    request.run()
    assert y.tolist() == x.tolist() and request.output("y") is y


def test_openvino_does_not_take_values_that_share_bytes() -> None:
    request = request_for("openvino", TensorProto.INT4, 4)
    with pytest.raises(Unsupported, match="share bytes"):
        request.bind("x", np.array([1, 2, 3, 4], dtype=ml_dtypes.int4))


def test_numpys_own_types_are_not_foreign() -> None:
    assert not any(is_foreign(name) for name in ("float64", "float32", "float16", "int64", "uint8", "bool", "string", "unknown"))
    assert not any(holds_foreign(np.empty(1, dtype)) for dtype in ("float64", "int64", "longlong", "bool", "O", "U3", "complex64"))
    assert all(holds_foreign(np.empty(1, dtype)) for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.int4))
    assert is_foreign("bfloat16") and is_foreign("float8_e5m2") and is_foreign("int4")
