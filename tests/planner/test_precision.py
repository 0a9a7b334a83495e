"""What does not apply to a target is refused with the reason; which parts of a model to lower follows from noise, gain and limit."""

from __future__ import annotations

import pytest

from aivmm.planner.precision import Choice, Way, adds_up, front, most_noise, searched_front, unfit
from aivmm.runtime.target import Device, Target

_DEVICE = {"CPU": "cpu", "GPU.0": "gpu", "NPU": "npu", "CUDA:0": "gpu", "TensorRT:0": "gpu", "QNN": "npu"}
STATIC = Way(name="ort-minmax", precision="int8", kind="static")
SYMMETRIC = Way(name="nncf-symmetric", precision="int8", kind="static", symmetric=True)
DYNAMIC = Way(name="ort-dynamic", precision="int8", kind="dynamic")
WEIGHTS = Way(name="ort-weights-int4", precision="int4", kind="weights")
FUSED = Way(name="ort-weights-int4-fused", precision="int4", kind="weights", fused=True)
RECURRENT = Way(name="ort-dynamic-recurrent", precision="int8", kind="dynamic")
HALF = Way(name="ort-half", precision="fp16", kind="cast")
BFLOAT = Way(name="bfloat-products", precision="bf16", kind="cast")


def target(name: str, *precisions: str) -> Target:
    runtime, _, device = name.partition(":")
    made = Device(kind=_DEVICE[device], model="a device")  # type: ignore[arg-type]
    return Target(runtime=runtime, name=device, device=made, runtime_version="1", precisions=precisions or ("fp32",))


@pytest.mark.parametrize(
    ("way", "where", "operators", "reason"),
    [
        (STATIC, "onnxruntime:CPU", ["Conv"], ""),
        (STATIC, "openvino:NPU", ["Conv"], ""),
        (STATIC, "onnxruntime:CUDA:0", ["Conv"], ""),
        (DYNAMIC, "onnxruntime:CUDA:0", ["MatMul"], "lacks the operators"),
        (STATIC, "onnxruntime:TensorRT:0", ["Conv"], "without a zero point"),
        (SYMMETRIC, "onnxruntime:TensorRT:0", ["Conv"], ""),
        (STATIC, "openvino:CPU", ["Relu"], "no operator with weights"),
        (DYNAMIC, "openvino:CPU", ["MatMul"], ""),
        (DYNAMIC, "openvino:GPU.0", ["MatMul"], "for CPUs"),
        (DYNAMIC, "onnxruntime:CPU", ["Conv"], "the model has none"),
        (RECURRENT, "onnxruntime:CPU", ["MatMul"], "recurrent cells"),
        (RECURRENT, "onnxruntime:CPU", ["LSTM"], ""),
        (WEIGHTS, "onnxruntime:CUDA:0", ["MatMul"], ""),
        (WEIGHTS, "openvino:NPU", ["MatMul"], "needs weights and activations"),
        (FUSED, "openvino:GPU.0", ["MatMul"], "ONNX Runtime's own operators"),
        (HALF, "openvino:CPU", ["Conv"], "does not compute in fp16"),
        (HALF, "openvino:GPU.0 fp16", ["Conv"], ""),
        (HALF, "onnxruntime:CUDA:0", ["Conv"], ""),
        (BFLOAT, "onnxruntime:CPU", ["Conv"], "does not compute in bf16"),
        (BFLOAT, "openvino:CPU bf16", ["Conv"], ""),
    ],
)
def test_what_does_not_apply_is_refused_with_the_reason(way: Way, where: str, operators: list[str], reason: str) -> None:
    name, _, more = where.partition(" ")
    found = unfit(way, target(name, *(("fp32", more) if more else ())), op_types=operators)
    assert (found == "") if reason == "" else (reason in found)


def test_noise_adds_up_or_it_does_not() -> None:
    assert adds_up([1e-3, 2e-3], 2.9e-3)
    assert adds_up([0.0, 0.0], 0.0)
    assert not adds_up([1e-3, 2e-3], 0.5)
    assert not adds_up([1e-3, 1e30], 1.0)
    assert not adds_up([1e-3, float("inf")], 1.0)


def test_the_front_gives_up_gain_for_less_noise() -> None:
    found = front([0.5, 0.01, 0.02, 0.001], [5, 3, 2, 1], [1.0, 0.1, 0.015])
    assert [each.parts for each in found] == [(0, 1, 2, 3), (1, 2, 3), (1, 3)]
    assert [each.gain for each in found] == sorted((each.gain for each in found), reverse=True)
    assert front([0.5, 0.5], [1, -1], [0.1]) == ()


def test_where_noise_does_not_add_up_mixtures_are_searched_for_noise_and_gain() -> None:
    # Parts 1 and 3 each do nothing alone, and together everything.
    def noise(parts: tuple[int, ...]) -> float:
        return 1.0 if {1, 3} <= set(parts) else 0.001 * len(parts)

    found = searched_front([1, 4, 1, 2, 1], [0.001] * 5, noise, trials=60, seed=1)
    good = [each for each in found if each.noise < 0.01]
    assert max(good, key=lambda each: each.gain) == Choice(parts=(0, 1, 2, 4), noise=noise((0, 1, 2, 4)), gain=7)
    for one in found:
        assert not any(other.noise < one.noise and other.gain >= one.gain for other in found)


def test_a_stopped_search_of_mixtures_evaluates_nothing_more() -> None:
    calls: list[tuple[int, ...]] = []

    def noise(parts: tuple[int, ...]) -> float:
        calls.append(parts)
        return 0.1

    searched_front([1, 1], [0.1, 0.1], noise, trials=50, seed=0, stop=lambda: len(calls) >= 2)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("limits", "cosine", "most"),
    [
        ({}, 0.99, 0.02),
        ({"sqnr": 30.0}, None, 1e-3),
        ({"sqnr": 10.0, "cosine": 0.999}, None, 0.002),
        ({"top1_agreement": 0.99}, None, None),
    ],
)
def test_limits_on_accuracy_allow_so_much_noise(limits: dict[str, float], cosine: float | None, most: float | None) -> None:
    assert most_noise(limits, cosine) == (None if most is None else pytest.approx(most))
