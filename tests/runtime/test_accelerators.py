"""The contract of backends, held on real accelerators: NVIDIA's through CUDA, and whatever OpenVINO's GPU and NPU plug-ins find.

OpenVINO's GPU plug-in serves Intel's graphics; through OpenCL it runs on NVIDIA's cards too, where these tests were run (README's table).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aivmm.errors import Unsupported
from aivmm.probes.device_memory import reader
from aivmm.runtime.backend import Backend
from aivmm.runtime.config import Config
from aivmm.runtime.nvml import nvidia_devices
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.openvino import OpenVino
from aivmm.runtime.target import Target
from tests.contract_models import relu_model
from tests.contracts import BackendContract, run_once


def target_of(backend: OnnxRuntime | OpenVino, name: str) -> Target:
    found = backend.find(name)
    assert isinstance(found, Target)
    return found


@pytest.mark.gpu
class TestCuda(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return OnnxRuntime()

    @pytest.fixture
    def target(self) -> Target:
        return target_of(OnnxRuntime(), "CUDA:0")


@pytest.mark.gpu("openvino:GPU")
class TestOpenVinoGpu(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return OpenVino()

    @pytest.fixture
    def target(self) -> Target:
        return target_of(OpenVino(), "GPU.0")


@pytest.mark.gpu("openvino:NPU")
class TestOpenVinoNpu(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return OpenVino()

    @pytest.fixture
    def target(self) -> Target:
        return target_of(OpenVino(), "NPU")


@pytest.mark.gpu("openvino:GPU")
def test_openvinos_gpu_tells_what_it_is() -> None:
    device = target_of(OpenVino(), "GPU.0").device
    assert device.kind == "gpu" and device.model and device.uid and device.driver
    assert {"FULL_DEVICE_NAME", "DEVICE_UUID", "GPU_EXECUTION_UNITS_COUNT", "OPTIMIZATION_CAPABILITIES"} <= set(device.properties)
    same = [each for each in nvidia_devices()[0] if each.uid == device.uid]
    if "NVIDIA" in device.model:
        assert same and device.driver == same[0].driver, "its energy and memory are NVML's to count"


@pytest.mark.gpu("openvino:GPU")
def test_every_value_of_openvinos_gpu_knobs_is_taken() -> None:
    backend = OpenVino()
    target = target_of(backend, "GPU.0")
    knobs = backend.knobs(target)
    assert {each.name for each in knobs} >= {"NUM_STREAMS", "GPU_QUEUE_THROTTLE"}
    for knob in knobs:
        for value in knob.choices or (int(knob.low), int(knob.high)):
            executable = backend.compile(relu_model(4), target, Config.of({knob.name: value}))
            assert run_once(executable, {"x": np.array([-1, 0, 1, 2], dtype=np.float32)})["y"].tolist() == [0, 0, 1, 2], (knob.name, value)


@pytest.mark.gpu("openvino:GPU")
def test_openvinos_gpu_keeps_and_takes_back_what_it_compiled(tmp_path: Path) -> None:
    backend = OpenVino()
    target = target_of(backend, "GPU.0")
    assert backend.keeps_blobs(target)
    model = tmp_path / "relu.onnx"
    model.write_bytes(relu_model(4))
    blob = np.frombuffer(backend.compile_to_export(model, target, Config()).export_blob(), dtype=np.uint8).copy()
    executable = backend.import_blob(blob, model, target, Config())
    assert run_once(executable, {"x": np.array([-1, 0, 1, 2], dtype=np.float32)})["y"].tolist() == [0, 0, 1, 2]


@pytest.mark.gpu("openvino:GPU")
def test_openvinos_gpu_memory_is_counted() -> None:
    backend = OpenVino()
    target = target_of(backend, "GPU.0")
    read, _ = reader(backend, target)
    executable = backend.compile(relu_model(1 << 24), target, Config())
    before = backend.memory_in_use(target)
    request = executable.new_request()
    request.bind("x", np.zeros(1 << 24, dtype=np.float32))
    request.run()
    assert read() >= 0 and backend.memory_in_use(target) >= before


@pytest.mark.gpu
def test_a_precision_that_a_card_does_not_list_is_refused() -> None:
    backend = OnnxRuntime()
    with pytest.raises(Unsupported, match="does not run bf16 natively"):
        backend.compile(relu_model(4), target_of(backend, "CUDA:0"), Config(precision="bf16"))


def test_targets_without_hardware_are_absent_with_a_reason_and_a_remedy() -> None:
    absent = [each for backend in (OnnxRuntime(), OpenVino()) for each in backend.targets() if not isinstance(each, Target)]
    assert all(each.reason and each.advice for each in absent)
