"""Where the search looks first on devices with memory of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.planner.candidates import Candidate
from aivmm.planner.space import Space
from aivmm.probes import wire
from aivmm.runtime.config import Config
from aivmm.runtime.ort_options import cpu_knobs, cuda_knobs
from aivmm.runtime.target import Device, Target
from aivmm.tuner.explore import Explorer
from aivmm.tuner.options import LARGE_BATCHES, TuneOptions
from aivmm.tuner.starts import can_be_replicated, promising, side_by_side

CARD = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="a card", memory_bytes=1 << 36), runtime_version="1")
CPU = Target(runtime="onnxruntime", name="CPU", device=Device(kind="cpu", model="a CPU"), runtime_version="1")
FORMS = ("fp16:ort-half", "int8:ort-minmax")
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


def test_a_model_of_one_batch_keeps_a_card_busy_by_its_callers() -> None:
    found = promising(_space("throughput", (1,)), {CARD: ["fp32"]}, {})
    assert [(each.batch, each.callers) for each in found] == [(1, 4), (1, 8)]


def test_cards_alone_are_searched_with_as_many_callers_as_are_promising_there() -> None:
    explorer = Explorer(cast(Any, None), searched_before=False)
    structure = SimpleNamespace(operators=[], cut_points=[], node_count=1)
    explorer.work = cast(
        Any,
        SimpleNamespace(
            options=TuneOptions(model="m", objective="throughput"),
            lab=SimpleNamespace(knobs=lambda target: KNOBS[str(target)]),
            subject=SimpleNamespace(structure=structure),
        ),
    )
    # A card has no number of cores: it was held to the callers of two, and half of what is promising was never asked for.
    space = explorer._space({CARD: ["fp32"]}, LARGE_BATCHES)
    found = promising(space, {CARD: ["fp32"]}, {})
    assert {(each.batch, each.callers) for each in found} == {(64, 4), (128, 8), (32, 8), (128, 4)}
    assert all(space.params(each) is not None for each in found)
    assert explorer._space({CPU: ["fp32"]}, (1,)).most_callers == 4


def test_replicas_that_divide_the_cores_are_looked_at_early_and_only_on_processors() -> None:
    cpu = replace(CPU, device=replace(CPU.device, cores=8))
    space = Space(
        targets=[cpu, CARD],
        knobs=KNOBS,
        objective="throughput",
        precisions={str(cpu): ["fp32"], str(CARD): ["fp32"]},
        most_callers=16,
        most_replicas=4,
        replicated=frozenset({str(cpu)}),
    )
    (found,) = side_by_side(space, {cpu: ["fp32"], CARD: ["fp32"]})
    assert (found.target, found.replicas, found.callers, found.config.get("intra_op_num_threads")) == (cpu, 4, 4, 2)
    assert found.config.get("session.intra_op.allow_spinning") == "0"
    assert space.params(found) is not None
    assert can_be_replicated(cpu) and not can_be_replicated(CARD)
    assert not can_be_replicated(replace(cpu, device=replace(cpu.device, cores=1)))  # nothing to divide
    assert not can_be_replicated(replace(cpu, runtime="null"))  # a call takes as long there whatever runs beside it


def test_what_is_promising_crosses_to_the_worker_and_back() -> None:
    assert [wire.knob_in(wire.knob_out(each)) for each in cuda_knobs()] == list(cuda_knobs())


def test_what_matters_for_int8_alone_is_searched_only_where_int8_is() -> None:
    name = "session.disable_quant_qdq"
    (fold,) = [each for each in cuda_knobs() if each.name == name]
    assert wire.knob_in(wire.knob_out(fold)) == fold
    spaces = {each: Space(targets=[CARD], knobs=KNOBS, objective="latency", precisions={str(CARD): ["fp32", each]}) for each in FORMS}
    assert [form for form, space in spaces.items() if name in {knob.name for knob in space.knobs_of(CARD)}] == ["int8:ort-minmax"]
    folded = Candidate(target=CARD, config=Config.of({name: "1"}, precision="int8:ort-minmax"))
    assert spaces["int8:ort-minmax"].params(folded) is not None
