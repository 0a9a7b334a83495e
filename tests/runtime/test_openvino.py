"""OpenVINO passes the contract, and what is special about it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Backend
from aivmm.runtime.config import Config
from aivmm.runtime.openvino import OpenVino
from aivmm.runtime.target import Target
from tests.contracts import BackendContract


class TestOpenVino(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return OpenVino()


def test_importing_openvino_through_us_loads_no_telemetry() -> None:
    code = "import sys; from aivmm.runtime.openvino import OpenVino; OpenVino().targets(); print('openvino_telemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_driver_is_a_reason_and_a_remedy() -> None:
    absent = [each for each in OpenVino().targets() if not hasattr(each, "device")]
    for each in absent:
        assert each.reason and "site-packages" not in each.reason
        assert each.advice


def test_what_cannot_be_shared_is_refused_in_one_line() -> None:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    cpu = OpenVino().find("CPU")
    assert isinstance(cpu, Target)
    request = OpenVino().compile(model, cpu, Config()).new_request()
    read_only = np.zeros(4, dtype=np.float32)
    read_only.flags.writeable = False
    for odd, words in ((read_only, "read-only"), (np.zeros((4, 2), np.float32)[:, 0], "not C-contiguous"), ([1.0], "a list")):
        with pytest.raises(Unsupported, match=words):
            request.bind("x", odd)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="no such array for 'x'"):
        request.bind("x", np.zeros(5, dtype=np.float32))
