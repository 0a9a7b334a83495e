"""Nodes that an accelerator leaves to the CPU: what a profile says of them. The recorded one is ONNX Runtime 1.31's on an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from aivmm.models.lowering_ort import quantize_static
from aivmm.runtime.backend import Executable, ExplainsStrays
from aivmm.runtime.config import Config
from aivmm.runtime.null import NullBackend
from aivmm.runtime.null_device import NullDevice
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.ort_strays import strays_of
from aivmm.runtime.target import Target
from tests.contract_models import onnx_model

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# One call of a model of Relu, MatMul, Det, Mul, Det, Mul, as its profile lists it: name, operator, provider, microseconds.
CALL = [
    ("relu1", "Relu", CUDA, 20), ("mm", "MatMul", CUDA, 41), ("Memcpy_token_1", "MemcpyToHost", CUDA, 15), ("det1", "Det", CPU, 58),
    ("Memcpy", "MemcpyFromHost", CUDA, 13), ("mul", "Mul", CUDA, 17), ("Memcpy_token_2", "MemcpyToHost", CUDA, 30),
    ("det2", "Det", CPU, 54), ("Memcpy_token_0", "MemcpyFromHost", CUDA, 14), ("mul2", "Mul", CUDA, 19),
]  # fmt: skip


def events(calls: int, *, first_s: float = 1.0) -> list[dict[str, object]]:
    """The profile of some calls, the first of which took `first_s` where the others took 365 µs."""
    found: list[dict[str, object]] = [{"cat": "Session", "name": "session_initialization", "dur": 9_000}]
    for call in range(calls):
        for name, op, provider, micros in CALL:
            found.append({"cat": "Node", "name": f"{name}_kernel_time", "dur": micros, "args": {"op_name": op, "provider": provider}})
        found.append({"cat": "Session", "name": "model_run", "dur": first_s * 1e6 if call == 0 else 365})
    return found


def test_nodes_on_the_cpu_and_the_copies_for_them_are_counted_and_timed() -> None:
    found = strays_of(events(4), CUDA, warmup=1)
    assert [(each.node, each.op_type) for each in found.nodes] == [("det1", "Det"), ("det2", "Det")]
    assert len(found.copies) == 4 and {each.op_type for each in found.copies} == {"MemcpyToHost", "MemcpyFromHost"}
    assert found.seconds == pytest.approx((58 + 54 + 15 + 13 + 30 + 14) / 1e6)
    assert found.call_s == pytest.approx(365e-6)


def test_calls_that_warm_up_do_not_count() -> None:
    with pytest.raises(ValueError, match="warming up"):
        strays_of(events(1), CUDA, warmup=1)


def det_model(size: int = 64) -> bytes:
    """x, 64 x 64, through operators that CUDA has and one that it has not."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Det", ["a"], ["d"], name="determinant"),
        helper.make_node("Mul", ["a", "d"], ["y"], name="mul"),
    ]
    shape = (size, size)
    return onnx_model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)]).SerializeToString()


def test_every_node_of_a_cpu_session_is_where_it_was_asked(tmp_path: Path) -> None:
    backend, model = OnnxRuntime(), tmp_path / "model.onnx"
    model.write_bytes(det_model())
    target = backend.find("CPU")
    assert isinstance(target, Target) and isinstance(backend, ExplainsStrays)
    found = backend.strays(model, target, Config(), {"x": np.eye(64, dtype=np.float32)})
    assert found.nodes == found.copies == () and found.call_s > 0
    assert not list(Path.cwd().glob("onnxruntime_profile*"))


def test_the_made_up_card_counts_what_it_leaves_to_the_host() -> None:
    leaves = NullDevice(name="GPU.0", kind="gpu", copy_bytes_per_s=1e9, copy_s=1e-5, left=frozenset({"Det"}))
    takes = NullDevice(name="GPU.1", kind="gpu", copy_bytes_per_s=1e9, copy_s=1e-5)
    backend = NullBackend((leaves, takes))
    first, second = (each for each in backend.targets() if isinstance(each, Target))
    model = det_model()
    executable = backend.compile(model, first, Config())
    assert dict(executable.placement.nodes) == {"GPU.0": 2, "host": 1} and executable.placement.stray == ("determinant",)
    found = backend.strays(model, first, Config(), {})
    assert [each.op_type for each in found.nodes] == ["Det"] and len(found.copies) == 2
    copied = sum(each.seconds for each in found.copies)
    assert backend.expect_s(model, first, Config()) - backend.expect_s(model, second, Config()) == pytest.approx(copied)


@pytest.mark.gpu
def test_a_cuda_session_tells_its_nodes_on_the_cpu_and_what_they_cost(tmp_path: Path) -> None:
    backend, model = OnnxRuntime(), tmp_path / "model.onnx"
    model.write_bytes(det_model())
    target = backend.find("CUDA:0")
    assert isinstance(target, Target)
    executable = backend.compile(model, target, Config())
    assert executable.placement.stray == ("determinant",)
    found = backend.strays(model, target, Config(), {"x": np.eye(64, dtype=np.float32)})
    assert [each.op_type for each in found.nodes] == ["Det"]
    assert sorted(each.op_type for each in found.copies) == ["MemcpyFromHost", "MemcpyToHost"]
    assert 0 < found.seconds < found.call_s


@pytest.mark.gpu
def test_a_cuda_session_takes_int8_computes_in_fp32_and_tells_what_it_leaves_to_the_cpu(tmp_path: Path) -> None:
    """CUDA's provider has QuantizeLinear and DequantizeLinear, the latter not of the biases' int32: decision 0068."""
    backend, model, lowered = OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "int8.onnx"
    model.write_bytes(conv_model())
    samples = [{"x": np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype(np.float32)} for seed in range(4)]
    quantize_static(model, lowered, samples, {"calibration": "MinMax"})
    cpu, card = backend.find("CPU"), backend.find("CUDA:0")
    assert isinstance(cpu, Target) and isinstance(card, Target)
    wanted = answer(backend.compile(model, cpu, Config()), samples[0])
    for folded in ("0", "1"):
        config = Config.of({"session.disable_quant_qdq": folded}, precision="fp32")
        executable = backend.compile(lowered, card, config)
        found = answer(executable, samples[0])
        assert 1e-6 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.1, "lowered in truth, and not to nonsense"
        assert executable.placement.nodes["CUDAExecutionProvider"] > 0
        strays = backend.strays(lowered, card, config, samples[0])
        assert len(executable.placement.stray) == len(strays.nodes)
        assert {each.op_type for each in strays.nodes} <= {"DequantizeLinear"}
        assert folded == "0" or not executable.placement.stray


def conv_model() -> bytes:
    """Two convolutions with biases, x of 1 x 3 x 16 x 16."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,)}
    weights = {name: 0.2 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2", "b2"], ["y"], name="second", pads=[1] * 4),
    ]
    places = [("x", TensorProto.FLOAT, (1, 3, 16, 16))], [("y", TensorProto.FLOAT, (1, 8, 16, 16))]
    return onnx_model(nodes, *places, weights).SerializeToString()


def answer(executable: Executable, inputs: dict[str, Any]) -> Any:
    """Return the first output for some inputs."""
    request = executable.new_request()
    for name, array in inputs.items():
        request.bind(name, array)
    (spec,) = executable.outputs
    output = np.empty(spec.shape, np.float32)  # type: ignore[arg-type]
    request.bind(spec.name, output)
    request.run()
    return output


def test_the_weights_of_an_int8_model_are_folded_where_its_quantization_is_to_be_left_alone(tmp_path: Path) -> None:
    """Which is what spares CUDA the biases: on a CPU's graph the same pass can be seen."""
    backend, model, lowered = OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "int8.onnx"
    model.write_bytes(conv_model())
    samples = [{"x": np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype(np.float32)} for seed in range(4)]
    quantize_static(model, lowered, samples, {"calibration": "MinMax"})
    cpu = backend.find("CPU")
    assert isinstance(cpu, Target)
    left = {}
    for folded in ("0", "1"):
        config = Config.of({"session.disable_quant_qdq": folded, "graph_optimization_level": "basic"})
        graph = onnx.load_from_string(backend.compile_to_export(lowered, cpu, config).export_blob()).graph
        weights = {each.name for each in graph.initializer}
        left[folded] = [each for each in graph.node if each.op_type == "DequantizeLinear" and each.input[0] in weights]
    assert len(left["0"]) == 4 and not left["1"]
