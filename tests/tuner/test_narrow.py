"""Parts of a processor: who gets how many cores, and what a candidate can keep busy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aivmm.planner.candidates import Candidate
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.target import Target
from aivmm.tuner.narrow import cores_of, narrowed, parts_of, with_threads
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
