"""A stage that hangs: its request has an answer or its own error in time, others go on, and nothing waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aivmm
from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference

X = {"x": normal(2, 32)}
PARTS = [Part(ONNXRUNTIME, 0, 3), Part(OPENVINO, 4)]
Load = Callable[..., Engine]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    engines: list[Engine] = []

    def make(*, fallbacks: Any = (), timeout_s: float = 0.5, **fields: Any) -> Engine:
        bundle = make_bundle(tmp_path / f"{len(engines)}.aivmm", chain_model(), PARTS, fallbacks=fallbacks, **fields)
        engine = aivmm.load_plan(bundle, timeout_s=timeout_s)
        assert isinstance(engine, Engine)
        engines.append(engine)
        return engine

    yield make
    for each in engines:
        each.close()


class Hang:
    """The second stage of every lane hangs from now on, until this is let go."""

    def __init__(self, engine: Engine) -> None:
        self.go = threading.Event()
        for lane in engine._program.lanes:
            real = lane._steps[1][0]
            lane._steps[1] = (lambda real=real: (self.go.wait(60), real()), *lane._steps[1][1:])


@pytest.fixture
def hang() -> Iterator[Callable[[Engine], Hang]]:
    made: list[Hang] = []

    def start(engine: Engine) -> Hang:
        made.append(Hang(engine))
        return made[-1]

    yield start
    for each in made:
        each.go.set()


def assert_right(outputs: Any) -> None:
    np.testing.assert_allclose(outputs["y"], reference(chain_model(), X)["y"], rtol=1e-4, atol=1e-5)


MODES = pytest.mark.parametrize("execution", [Execution(), Execution(mode="pipelined"), Execution(batching=Batching(max_batch=2))])


@MODES
def test_the_fallback_answers_what_hangs_and_all_that_comes_later(load: Load, hang: Any, execution: Execution) -> None:
    engine = load(fallbacks=[[Part(ONNXRUNTIME)]], execution=execution, batch=2)
    assert_right(engine.run(X))
    hang(engine)
    waiting = [engine.submit(X) for _ in range(2)]
    assert_right(engine.run(X))
    for each in waiting:
        assert_right(each.result(30))
    stats = engine.stats()
    assert [each["outcome"] for each in stats["attempts"]] == ["runs", "failed", "runs"]
    assert any("hangs" in each and "openvino:CPU" in each for each in stats["events"])


@MODES
def test_without_a_fallback_the_request_is_told_in_time_and_so_is_who_comes_later(load: Load, hang: Any, execution: Execution) -> None:
    engine = load(execution=execution, batch=2)
    assert_right(engine.run(X))
    hang(engine)
    with pytest.raises(Unsupported, match=r"no answer within 0.5 s: a stage hangs \(on openvino:CPU\); load the plan again"):
        engine.run(X)
    with pytest.raises(Unsupported, match="a stage hangs"):
        engine.run(X)
    engine.close()  # and does not wait for it


def test_the_late_answer_of_what_hung_goes_to_nobody(load: Load, hang: Any) -> None:
    engine = load(fallbacks=[[Part(ONNXRUNTIME)]])
    engine.run(X)
    stuck = hang(engine)
    future = engine.submit(X)
    first = future.result(30)
    stuck.go.set()
    assert future.result() is first
    assert_right(engine.run(X))


def test_closing_while_something_hangs_ends_at_its_deadline(load: Load, hang: Any) -> None:
    engine = load()
    engine.run(X)
    hang(engine)
    future = engine.submit(X)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(Unsupported, match="hangs"):
        future.result(30)
    closing.join(30)
    assert not closing.is_alive()


def test_answers_in_time_and_errors_of_their_own_are_as_without_a_deadline(load: Load) -> None:
    engine = load(timeout_s=60.0)
    for each in engine.stream(X for _ in range(20)):
        assert_right(each)
    with pytest.raises(UsageError, match="'x'"):
        engine.run({"x": np.zeros(3, np.float32)})
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="no time to wait"):
            engine.timeout_s = bad
