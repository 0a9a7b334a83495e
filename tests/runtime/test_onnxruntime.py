"""ONNX Runtime passes the contract, and what is special about it."""

from __future__ import annotations

import numpy as np
import pytest

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Backend
from aivmm.runtime.config import Config
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.target import Target
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
