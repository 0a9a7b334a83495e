"""ONNX Runtime passes the contract, and what is special about it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Backend
from aivmm.runtime.config import Config
from aivmm.runtime.onnxruntime import OnnxRuntime, _Executable
from aivmm.runtime.ort_library import TRIAL
from aivmm.runtime.ort_options import PROVIDERS
from aivmm.runtime.ort_requests import BoundRequest
from aivmm.runtime.target import Device, Target, Unavailable
from tests.contracts import BackendContract


class TestOnnxRuntime(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return OnnxRuntime()


def cpu() -> Target:
    found = OnnxRuntime().find("CPU")
    assert isinstance(found, Target)
    return found


def test_a_mistyped_setting_is_refused_instead_of_ignored(relu: bytes) -> None:
    with pytest.raises(Unsupported, match=r"allow_spining"):
        OnnxRuntime().compile(relu, cpu(), Config.of({"session.intra_op.allow_spining": "0"}))


def test_providers_that_need_a_missing_card_are_absent_with_the_reason() -> None:
    for each in OnnxRuntime().targets():
        if not isinstance(each, Target):
            assert each.reason and each.target.startswith("onnxruntime:")


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("kind", ["MIGraphX", "DirectML", "QNN", "CoreML", "NvTensorRtRtx"])
def test_a_provider_that_the_build_lacks_never_passes_the_trial(kind: str) -> None:
    import onnxruntime

    if PROVIDERS[kind].name in onnxruntime.get_available_providers():
        pytest.skip(f"this build has {kind}")
    backend = OnnxRuntime()
    assert isinstance(backend.find(f"{kind}:0" if PROVIDERS[kind].indexed else kind), Unavailable)
    # Were it asked for all the same: ONNX Runtime takes the name with a warning and would run on the CPU.
    made_up = Target(runtime="onnxruntime", name=kind, device=Device(kind="gpu", model=kind), runtime_version="1")
    with pytest.raises(Unsupported):
        backend.compile(TRIAL, made_up, Config())
    assert not [each for each in backend.targets() if kind in str(each)]


@pytest.mark.parametrize("kind", ["MIGraphX", "DirectML", "QNN", "CoreML", "NvTensorRtRtx"])
def test_the_knobs_of_such_a_provider_are_options_that_it_takes(kind: str) -> None:
    target = Target(runtime="onnxruntime", name=kind, device=Device(kind="gpu", model=kind), runtime_version="1")
    knobs = OnnxRuntime().knobs(target)
    assert knobs and all(knob.default == knob.choices[0] for knob in knobs)
    assert {knob.name.removeprefix("provider.") for knob in knobs} <= PROVIDERS[kind].options


def test_directml_gets_the_session_that_it_asks_for_and_one_call_at_a_time(relu: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(runtime="onnxruntime", name="DirectML:0", device=Device(kind="gpu", model="an adapter"), runtime_version="1")
    options, of_provider = OnnxRuntime()._options(target, Config())
    assert options.enable_mem_pattern is False and options.execution_mode.name == "ORT_SEQUENTIAL" and of_provider == {"device_id": "0"}
    # There is no such adapter here: the CPU's session stands for one.
    session = OnnxRuntime().compile(relu, cpu(), Config())._session
    executable = _Executable(session, target, Config())
    within, met, running = threading.Lock(), threading.Event(), 0
    most: list[int] = []

    def run(self: BoundRequest) -> None:
        nonlocal running
        with within:
            running += 1
            most.append(running)
        met.wait(0.05)
        with within:
            running -= 1

    monkeypatch.setattr(BoundRequest, "run", run)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda request: request.run(), [executable.new_request() for _ in range(4)]))
    assert most == [1, 1, 1, 1]


def test_the_placement_counts_the_nodes(relu: bytes) -> None:
    executable = OnnxRuntime().compile(relu, cpu(), Config())
    assert dict(executable.placement.nodes) == {"CPUExecutionProvider": 1}
    assert executable.placement.stray == ()


@pytest.fixture
def relu() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return data


def test_runs_with_strings_go_through_a_feed() -> None:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.STRING, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    request = OnnxRuntime().compile(model, cpu(), Config()).new_request()
    request.bind("x", np.array(["a", "b"], dtype=object))
    request.run()
    assert list(request.output("y")) == ["a", "b"]


def test_outputs_whose_shapes_are_not_known_keep_their_names_in_every_order_of_binding() -> None:
    """The library numbers outputs by who was bound first."""
    from onnx import TensorProto, helper

    count = 8
    nodes = [helper.make_node("Concat", ["x"] * (index + 1), [f"y{index}"], axis=0) for index in range(count)]
    outputs = [helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, [f"n{index}"]) for index in range(count)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    request = OnnxRuntime().compile(model, cpu(), Config()).new_request()
    request.bind("x", np.float32([1, 2]))
    own = np.zeros(2 * 6, dtype=np.float32)
    request.bind("y5", own)
    for _ in range(2):
        request.run()
        assert [request.output(f"y{index}").size for index in range(count)] == [2 * (index + 1) for index in range(count)]
    assert request.output("y5") is own and own.tolist() == [1, 2] * 6
