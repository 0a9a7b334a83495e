"""Replicas, copies with weights, and pipelines on two cards that take their time: alone, and all of it in one plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from aivmm.runtime import registry
from aivmm.runtime.plan import Copy, Execution
from tests.making import Part, chain_model, normal, reference
from tests.runtime.engines import Load
from tests.runtime.two_cards import COMPUTE_S, COPY_S, LAYERS, WIDTH

ONE, TWO = "null:GPU.0", "null:GPU.1"
PIPELINED = Execution(mode="pipelined", depth=2)
CALLS = 18
MODEL = chain_model(width=WIDTH, layers=LAYERS)
INPUTS = [{"x": normal(2, WIDTH, seed=seed)} for seed in range(CALLS)]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """What ONNX Runtime answers."""
    return [reference(MODEL, feeds)["y"] for feeds in INPUTS]


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The null runtime's devices are two cards."""
    monkeypatch.setitem(registry.BACKENDS, "null", "tests.runtime.two_cards:backend")


def halves(*, replicas: int, **second: Any) -> list[Part]:
    """Return the model as two stages of equal work, each on a card of its own."""
    products = [index for index, node in enumerate(MODEL.graph.node) if node.op_type == "MatMul"]
    middle = products[len(products) // 2]
    return [Part(ONE, 0, middle - 1, replicas=replicas), Part(TWO, middle, replicas=replicas, **second)]


def request_s(load: Load, expected: list[Any], parts: Sequence[Part], callers: int) -> tuple[float, dict[str, Any]]:
    """Run a stream of requests, whose answers have to be right and in order; return the seconds for one, and the statistics."""
    execution = PIPELINED if len(parts) > 1 else Execution()
    engine = load(MODEL, parts, execution=execution, callers=callers)
    arrived, answers = [], []
    for found in engine.stream(INPUTS):
        arrived.append(time.perf_counter())
        answers.append(found["y"])
    for answer, right in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer, right, rtol=1e-3, atol=1e-4)
    steady = arrived[CALLS // 3 :]  # what comes before fills the pipeline
    return (steady[-1] - steady[0]) / (len(steady) - 1), engine.stats()


def test_a_second_replica_of_each_stage_copies_while_the_first_computes(load: Load, expected: list[Any]) -> None:
    """A stage alone takes what it computes and what it copies; two replicas of it the longer of the two, a card each."""
    one, _ = request_s(load, expected, halves(replicas=1), 4)
    two, stats = request_s(load, expected, halves(replicas=2), 8)
    whole, _ = request_s(load, expected, [Part(ONE, replicas=2)], 2)
    assert [(each["target"], each["replicas"], each["count"]) for each in stats["stages"]] == [(ONE, 2, CALLS), (TWO, 2, CALLS)]
    assert stats["lanes"] == 8
    half = COMPUTE_S / 2
    assert one / two > 0.75 * (half + 2 * COPY_S) / half, "1.8 by the formula"
    assert whole / two > 0.75 * COMPUTE_S / half, "two cards against the best that one of them does"


def test_a_stage_of_a_pipeline_is_shared_out_by_weight_over_replicas_and_cards(load: Load, expected: list[Any]) -> None:
    """The second half is on the second card twice, and, at a third of their weight, beside the first half."""
    beside = Copy(model="made.onnx", target=ONE, precision="fp32", weight=2 / 3)
    _, stats = request_s(load, expected, halves(replicas=2, copies=(beside,)), 8)
    first, second = stats["stages"]
    assert first["count"] == second["count"] == CALLS and stats["mode"] == "pipelined"
    copies = {each["target"]: each for each in second["copies"]}
    assert {name: each["lanes"] for name, each in copies.items()} == {TWO: 9, ONE: 3}, "two replicas of weight 1 beside one of 2/3"
    assert all(each["count"] for each in copies.values()) and sum(each["count"] for each in copies.values()) == CALLS
