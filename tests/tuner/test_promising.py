"""Where the search looks first on devices with memory of their own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from aivmm.planner.space import Space
from aivmm.probes import wire
from aivmm.runtime.ort_options import cpu_knobs, cuda_knobs
from aivmm.runtime.target import Device, Target
from aivmm.tuner.explore import promising

CARD = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="a card", memory_bytes=1 << 36), runtime_version="1")
CPU = Target(runtime="onnxruntime", name="CPU", device=Device(kind="cpu", model="a CPU"), runtime_version="1")
KNOBS = {str(CARD): cuda_knobs(), str(CPU): cpu_knobs()}


def _space(objective: str, batches: Sequence[int]) -> Space:
    precisions = {str(CARD): ["fp32", "fp16:ort-half"], str(CPU): ["fp32"]}
    return Space(targets=[CPU, CARD], knobs=KNOBS, objective=objective, precisions=precisions, batches=batches, most_callers=8)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_card_is_looked_at_first_where_its_promising_settings_stand_together(objective: str) -> None:
    space = _space(objective, (1, 32, 64) if objective == "throughput" else (1,))
    found = promising(space, {CPU: ["fp32"], CARD: ["fp32", "fp16:ort-half"]}, {str(CARD): ["fp16:ort-half"]})
    assert {each.target for each in found} == {CARD}  # a CPU's defaults are as good a place to begin as any
    assert found[0].config.precision == "fp16:ort-half" and found[1].config.precision == "fp32"
    settings = found[0].config.as_dict()
    assert settings["host_memory"] == "pinned" and settings["provider.prefer_nhwc"] == "1"
    assert ("provider.enable_cuda_graph" in settings) == (objective == "latency")  # a graph runs one call at a time
    assert [(each.batch, each.callers) for each in found[::2]] == ([(64, 4), (32, 8)] if objective == "throughput" else [(1, 1)])
    assert all(space.params(each) is not None for each in found)  # points of the space, like any other


def test_what_is_promising_crosses_to_the_worker_and_back() -> None:
    assert [wire.knob_in(wire.knob_out(each)) for each in cuda_knobs()] == list(cuda_knobs())
