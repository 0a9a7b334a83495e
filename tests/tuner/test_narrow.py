"""Parts of a processor: who gets how many cores, and what a candidate can keep busy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from aivmm.planner.candidates import Candidate
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.target import Target
from aivmm.tuner.copying import Known
from aivmm.tuner.narrow import cores_of, narrowed, parts_of, with_threads
from aivmm.tuner.options import allowed_s
from aivmm.tuner.throughput import Finder
from tests.planner.test_search import target

OV = (Knob(name="INFERENCE_NUM_THREADS", kind="int", low=1, high=16, default=None, why="-"),)
PINNED = (*OV, Knob(name="ENABLE_CPU_PINNING", kind="choice", choices=(True, False), default=True, why="-"))
ORT = (
    Knob(name="intra_op_num_threads", kind="int", low=1, high=16, default=None, why="-"),
    Knob(name="session.intra_op.allow_spinning", kind="choice", choices=("1", "0"), default="1", why="-"),
)


def cpu(cores: int) -> Target:
    found = target("CPU")
    return replace(found, device=replace(found.device, kind="cpu", cores=cores))


def gpu() -> Target:
    found = target("GPU.0")
    return replace(found, device=replace(found.device, kind="gpu", cores=None))


@pytest.mark.parametrize(("cores", "parts"), [(1, []), (2, [1]), (3, [1]), (4, [2, 1]), (6, [3, 1]), (16, [8, 4])])
def test_a_processor_is_divided_in_two_and_in_four_as_far_as_it_has_cores(cores: int, parts: list[int]) -> None:
    assert parts_of(cpu(cores)) == parts


@pytest.mark.parametrize(
    ("settings", "callers", "cores"),
    [
        ({}, 1, 8),  # the runtime's default: a thread for each core
        ({"INFERENCE_NUM_THREADS": 2}, 1, 2),
        ({"INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 2}, 4, 2),  # of all streams together
        ({"intra_op_num_threads": 2}, 1, 2),
        ({"intra_op_num_threads": 2}, 4, 5),  # each caller's own thread, and the other one of the pool
        ({"intra_op_num_threads": 0}, 1, 8),
        ({"threads": 32}, 1, 8),
    ],
)
def test_cores_that_a_candidate_keeps_busy(settings: dict[str, Setting], callers: int, cores: int) -> None:
    assert cores_of(Candidate(target=cpu(8), config=Config.of(settings), callers=callers)) == cores
    assert cores_of(Candidate(target=gpu(), config=Config.of(settings), callers=callers)) == 0


def test_on_a_part_of_the_processor_nothing_spins_and_no_stream_is_without_a_thread() -> None:
    busy = Config.of({"INFERENCE_NUM_THREADS": 4, "NUM_STREAMS": 4}, precision="fp32")
    assert with_threads(busy, OV, 2) == Config.of({"INFERENCE_NUM_THREADS": 2}, precision="fp32")
    assert with_threads(Config.of({"PERFORMANCE_HINT": "THROUGHPUT"}), OV, 2) == Config.of({"INFERENCE_NUM_THREADS": 2})
    assert with_threads(Config(), ORT, 2) == Config.of({"intra_op_num_threads": 2, "session.intra_op.allow_spinning": "0"})
    assert with_threads(Config(), ORT, 1) == Config.of({"intra_op_num_threads": 1})
    assert with_threads(Config(), (), 1) is None


def test_what_runs_beside_others_is_not_pinned_to_the_cores_that_they_are_pinned_to() -> None:
    assert with_threads(Config(), PINNED, 8) == Config.of({"INFERENCE_NUM_THREADS": 8, "ENABLE_CPU_PINNING": False})
    assert with_threads(Config(), PINNED, 16) == Config.of({"INFERENCE_NUM_THREADS": 16})  # there is no core left to run on


def test_a_candidate_on_parts_runs_one_call_at_a_time_in_what_it_computed_in() -> None:
    config = Config.of({"intra_op_num_threads": 4}, precision="int8:made")
    found = narrowed(Candidate(target=cpu(4), config=config, batch=8, callers=3), ORT)
    assert [(each.batch, each.callers, each.config.precision, cores_of(each)) for each in found] == [
        (8, 1, "int8:made", 2),
        (8, 1, "int8:made", 1),
    ]
    assert narrowed(Candidate(target=gpu(), config=config), ORT) == []


@pytest.mark.parametrize(("seconds", "measured"), [(0.9, {"openvino:CPU", "onnxruntime:CPU"}), (1.1, {"onnxruntime:CPU"})])
def test_parts_of_a_processor_are_measured_where_a_stage_on_it_could_gain_something_beside_a_card(
    seconds: float, measured: set[str]
) -> None:
    cpus = [replace(cpu(16), runtime=name) for name in ("openvino", "onnxruntime")]
    work = SimpleNamespace(
        targets=[*cpus, gpu()],
        min_segments=1,
        subject=SimpleNamespace(base_batch=1),
        lab=SimpleNamespace(knobs=lambda each: OV if each.runtime == "openvino" else ORT),
    )
    took = {gpu(): 0.1, cpus[0]: seconds, cpus[1]: 0.5}
    finder = Finder(
        work=work,  # type: ignore[arg-type]
        measurer=None,  # type: ignore[arg-type]
        evidence=SimpleNamespace(structure=SimpleNamespace(blocks=[1, 2])),  # type: ignore[arg-type]
        configs={str(each): Config(precision="fp32") for each in took},
        known=[Known(candidate=Candidate(target=each, config=Config()), seconds=taken) for each, taken in took.items()],
        learn=lambda wanted: (),
        reference_s=None,
        best_s=None,
        measure_new=True,
    )
    assert {str(each.target) for each in finder._parts()} == measured


@pytest.mark.parametrize(("budget_s", "most_s"), [(2, 15), (6, 15), (20, 20), (60, 60), (120, 90), (600, 300)])
def test_what_runs_at_once_is_measured_for_as_long_as_the_budget_and_of_large_ones_for_a_share(budget_s: float, most_s: float) -> None:
    assert allowed_s(budget_s) == most_s
