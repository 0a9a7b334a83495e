"""Several operators in one request, fed with the values that they have inside the model; and what a runtime makes of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import Unsupported
from aivmm.probes import operator_probes, wire
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import Worker
from aivmm.probes.fusion import explain, fusion_in
from aivmm.probes.runners import State
from aivmm.runtime.config import Config
from aivmm.runtime.null import NullBackend, NullRequest
from aivmm.runtime.null_device import NullDevice
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Device, Target

FP32 = wire.config_out(Config(precision="fp32"))
RUNTIMES = ("openvino", "onnxruntime")


def cpu(runtime: str) -> Target:
    target = load_backend(runtime).find("CPU")  # type: ignore[attr-defined]
    assert isinstance(target, Target)
    return target


def save(
    path: Path, nodes: Sequence[onnx.NodeProto], inputs: Sequence[Any], outputs: Sequence[Any], weights: dict[str, Any] | None = None
) -> Path:
    for index, node in enumerate(nodes):
        node.name = f"n{index}"
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    edges = [[helper.make_tensor_value_info(*each) for each in side] for side in (inputs, outputs)]
    graph = helper.make_graph(list(nodes), "g", *edges, tensors)
    domains = dict.fromkeys(["", *(node.domain for node in nodes)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(each, 17 if not each else 1) for each in domains], ir_version=8)
    if not any(node.domain for node in nodes):
        model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path)
    return path


def reshape(path: Path) -> Path:
    inputs = [("input_0", TensorProto.FLOAT, (4, 6)), ("input_1", TensorProto.INT64, (2,))]
    return save(path, [helper.make_node("Reshape", ["input_0", "input_1"], ["y"])], inputs, [("y", TensorProto.FLOAT, (8, 3))])


def relu(path: Path, shape: tuple[int, ...]) -> Path:
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_come_in_order_and_a_refusal_costs_one_operator(worker: Worker, tmp_path: Path, runtime: str) -> None:
    odd = save(
        tmp_path / "odd.onnx",
        [helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")],
        [("x", TensorProto.FLOAT, (4,))],
        [("y", TensorProto.FLOAT, (4,))],
    )
    values = tmp_path / "values.npz"
    save_arrays(values, {"input_1": np.array([8, 3])})
    models = [
        {"path": str(relu(tmp_path / "small.onnx", (4,))), "values": ""},
        {"path": str(odd), "values": ""},
        {"path": str(reshape(tmp_path / "reshape.onnx")), "values": str(values)},
        {"path": str(relu(tmp_path / "large.onnx", (1, 64, 64, 64))), "values": ""},
    ]
    answer = worker.call(
        "probe_operators", limit_s=60.0, models=models, target=wire.target_out(cpu(runtime)), config=FP32, seconds=0.002, least=5
    )
    small, refused, reshaped, large = answer["answers"]
    assert "nowhere" in refused["refused"] or "NoSuchOperator" in refused["refused"]
    for each in (small, reshaped, large):
        assert len(each["durations"]) >= 5
        assert min(each["durations"]) > 0
        assert each["compile_s"] > 0
        assert each["first_inference_s"] > 0
        assert each["effective_config"]
    # A MiB is read and another written: no machine does that as fast as it handles four numbers.
    assert min(large["durations"]) > min(small["durations"])


class Slow:
    """A device on which one run takes 0.15 s by the clock on the wall; it counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = NullBackend([NullDevice(launch_s=0.15, real_time=True)])
        self.target = next(each for each in backend.targets() if isinstance(each, Target))
        self.runs = 0
        monkeypatch.setattr(operator_probes, "load_backend", lambda _: backend)
        run = NullRequest.run

        def counted(request: NullRequest) -> None:
            self.runs += 1
            run(request)

        monkeypatch.setattr(NullRequest, "run", counted)

    def probe(self, folder: Path, *, within_s: float) -> list[dict[str, Any]]:
        models = [{"path": str(relu(folder / f"{number}.onnx", (4,))), "values": ""} for number in range(2)]
        where = wire.target_out(self.target)
        answer = operator_probes.probe_operators(State(), models=models, target=where, config=FP32, seconds=0.0, within_s=within_s)
        found: list[dict[str, Any]] = answer["answers"]
        return found


def test_what_is_slow_runs_no_longer_than_there_is_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A product of matrices that takes seconds on a slow device would outrun a tuning's budget by far: each operator runs five times."""
    slow = Slow(monkeypatch)
    answers = slow.probe(tmp_path, within_s=0.0)
    assert ["late" in each for each in answers] == [True, True]
    assert slow.runs == 1  # nobody knew before how long it takes
    slow.runs = 0
    answers = slow.probe(tmp_path, within_s=1000.0)
    assert [len(each["durations"]) for each in answers] == [3, 3]
    assert slow.runs == 2 * (1 + 1 + 3)


def test_made_up_extents_would_be_refused_by_the_runtime(worker: Worker, tmp_path: Path) -> None:
    models = [{"path": str(reshape(tmp_path / "reshape.onnx")), "values": ""}]
    target = wire.target_out(cpu("onnxruntime"))
    answer = worker.call("probe_operators", limit_s=60.0, models=models, target=target, config=FP32, seconds=0.002)
    assert "Reshape" in answer["answers"][0]["refused"]


def test_values_inside_the_model_come_from_a_run_of_it(worker: Worker, tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Exp", ["b"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, (3,))], [("y", TensorProto.FLOAT, (3,))])
    before = sorted(each.name for each in tmp_path.iterdir())
    inputs, found = tmp_path / "in.npz", tmp_path / "out.npz"
    save_arrays(inputs, {"x": np.array([-1, 1, 2], np.float32)})
    target = wire.target_out(cpu("onnxruntime"))
    worker.call(
        "tensor_values",
        limit_s=60.0,
        model=str(path),
        target=target,
        config=FP32,
        inputs=str(inputs),
        names=["x", "b", "no such tensor"],
        destination=str(found),
    )
    values = load_arrays(str(found))
    assert {name: array.tolist() for name, array in values.items()} == {"x": [-1, 1, 2], "b": [0, 2, 4]}
    assert sorted(each.name for each in tmp_path.iterdir() if each not in (inputs, found)) == before


def convolution(path: Path) -> Path:
    """Conv, BatchNormalization and Relu; then a Softmax; and a shape that can be known beforehand."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((16, 16, 3, 3), dtype=np.float32),
        **{name: np.ones(16, np.float32) for name in ("scale", "bias", "mean", "variance")},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "variance"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Shape", ["x"], ["extents"]),
        helper.make_node("Reshape", ["r", "extents"], ["s"]),
        helper.make_node("Softmax", ["s"], ["y"], axis=-1),
    ]
    shape = (1, 16, 32, 32)
    return save(path, nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)], weights)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nodes_that_are_fused_away_are_named_with_what_they_went_into(worker: Worker, tmp_path: Path, runtime: str) -> None:
    path = convolution(tmp_path / "m.onnx")
    answer = worker.call("fusion", limit_s=60.0, model=str(path), target=wire.target_out(cpu(runtime)), config=FP32)
    found = fusion_in(answer)
    assert found.fused_into["n1"] == "n0"
    assert found.fused_into["n2"] == "n0"
    assert "n3" in found.vanished
    assert {"n0", "n5"} <= set(found.own)
    every = [*found.own, *found.fused_into, *found.vanished]
    assert sorted(every) == [f"n{index}" for index in range(6)]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_names_with_commas_are_told_apart(tmp_path: Path, runtime: str) -> None:
    path = convolution(tmp_path / "m.onnx")
    model = onnx.load(path)
    for node, name in zip(model.graph.node, ("a,b", "b", "a", "d", "e", "f"), strict=True):
        node.name = name
    onnx.save(model, path)
    found = explain(path, cpu(runtime), FP32)
    assert {name: found.fused_into.get(name) for name in ("a,b", "b", "a")} == {"a,b": None, "b": "a,b", "a": "a,b"}


def test_a_runtime_that_does_not_tell_says_so(tmp_path: Path) -> None:
    target = Target(runtime="other", name="0", device=Device(kind="other", model="m"), runtime_version="1")
    with pytest.raises(Unsupported, match="other:0 does not tell"):
        explain(relu(tmp_path / "m.onnx", (4,)), target, FP32)
