"""A stage that hangs: its request has an answer or its own error in time, others go on, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from decimal import Decimal
from fractions import Fraction
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.deadline import Deadlines, _look, _wait
from aivmm.runtime.engine import Engine
from aivmm.runtime.null import NullRequest
from aivmm.runtime.null_memory import NullTensor
from aivmm.runtime.plan import Batching, Execution
from aivmm.runtime.program import _running
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, normal, reference
from tests.runtime.engines import Load

X = {"x": normal(2, 32)}
PARTS = [Part(ONNXRUNTIME, 0, 3), Part(OPENVINO, 4)]


@pytest.fixture
def load_watched(load: Load) -> Load:
    """Load the chain with a deadline for its requests, which is far until something hangs: what is well may be slow on a busy machine."""
    return lambda *, parts=PARTS, timeout_s=60.0, **fields: load(chain_model(), parts, timeout_s=timeout_s, **fields)


NEAR_S = 1.0  # the deadline once something hangs


class Hang:
    """The second stage of every lane hangs from now on, until this is let go, and the deadline is near."""

    def __init__(self, engine: Engine) -> None:
        self.go = threading.Event()
        engine.timeout_s = NEAR_S
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
def test_the_fallback_answers_what_hangs_and_all_that_comes_later(load_watched: Load, hang: Any, execution: Execution) -> None:
    engine = load_watched(fallbacks=[[Part(ONNXRUNTIME)]], execution=execution, batch=2)
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
def test_without_a_fallback_the_request_is_told_in_time_and_so_is_who_comes_later(
    load_watched: Load, hang: Any, execution: Execution
) -> None:
    engine = load_watched(execution=execution, batch=2)
    assert_right(engine.run(X))
    hang(engine)
    with pytest.raises(Unsupported, match=r"no answer within 1 s: a stage hangs \(on openvino:CPU\); load the plan again"):
        engine.run(X)
    with pytest.raises(Unsupported, match="a stage hangs"):
        engine.run(X)
    engine.close()  # and does not wait for it


def test_the_late_answer_of_what_hung_goes_to_nobody(load_watched: Load, hang: Any) -> None:
    engine = load_watched(fallbacks=[[Part(ONNXRUNTIME)]])
    engine.run(X)
    stuck = hang(engine)
    future = engine.submit(X)
    first = future.result(30)
    stuck.go.set()
    assert future.result() is first
    assert_right(engine.run(X))


def test_closing_while_something_hangs_ends_at_its_deadline(load_watched: Load, hang: Any) -> None:
    engine = load_watched()
    engine.run(X)
    hang(engine)
    future = engine.submit(X)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(Unsupported, match="hangs"):
        future.result(30)
    closing.join(30)
    assert not closing.is_alive()


def test_answers_in_time_and_errors_of_their_own_are_as_without_a_deadline(load_watched: Load) -> None:
    engine = load_watched(timeout_s=60.0)
    for each in engine.stream(X for _ in range(20)):
        assert_right(each)
    with pytest.raises(UsageError, match="'x'"):
        engine.run({"x": np.zeros(3, np.float32)})
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="no time to wait"):
            engine.timeout_s = bad


NULL = [Part("null:CPU")]


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Call it, and null devices hang; but the requests that the engine has already fail at once, where it is not only `hanging`."""
    run, go = NullRequest.run, threading.Event()
    fail: list[Any] = []
    ill = threading.Event()

    def dying(request: NullRequest) -> None:
        if any(request is each for each in fail):
            raise Unsupported("null: device lost")
        if ill.is_set():
            go.wait(60)
        run(request)

    def start(engine: Engine, *, hanging: bool = False) -> None:
        engine.timeout_s = NEAR_S
        fail.extend(each for lane in (() if hanging else engine._program.lanes) for each in lane._requests)
        ill.set()

    monkeypatch.setattr(NullRequest, "run", dying)
    yield start
    go.set()


def test_what_hangs_when_it_is_asked_whether_it_is_alive_costs_the_deadline_and_no_more(load_watched: Load, sick: Any) -> None:
    engine = load_watched(parts=NULL, fallbacks=[[Part(ONNXRUNTIME)]])
    assert_right(engine.run(X))
    sick(engine)
    assert_right(engine.submit(X).result(30))
    assert_right(engine.submit(X).result(30))


def test_closing_ends_too_when_that_hangs_and_nothing_is_left(load_watched: Load, sick: Any) -> None:
    engine = load_watched(parts=NULL)
    assert_right(engine.run(X))
    sick(engine)
    future = engine.submit(X)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    assert isinstance(future.exception(30), Unsupported)
    closing.join(30)
    assert not closing.is_alive()


def test_a_fallback_that_hangs_as_well_is_given_up_in_its_turn(load_watched: Load, sick: Any) -> None:
    engine = load_watched(parts=NULL, fallbacks=[NULL, [Part(ONNXRUNTIME)]])
    assert_right(engine.run(X))
    sick(engine, hanging=True)
    assert_right(engine.submit(X).result(30))
    assert [each.target for each in engine.stages] == [ONNXRUNTIME]


def test_a_callback_may_ask_the_engine_again(load_watched: Load) -> None:
    engine = load_watched(timeout_s=30.0)
    answers: list[Any] = []
    both = threading.Event()

    def again(_: Any) -> None:
        engine.submit(X).add_done_callback(lambda done: (answers.append(done.result()), both.set()))

    engine.submit(X).add_done_callback(again)
    assert both.wait(20)
    assert_right(answers[0])


def test_the_watch_ends_though_it_is_forgotten_while_it_looks() -> None:
    some, looked = threading.Event(), threading.Event()

    def deadlines() -> object | None:
        if looked.is_set():
            return None
        looked.set()
        some.set()  # as the finalizer does, right behind this look
        return some

    thread = threading.Thread(target=_look, args=(deadlines, deque(), some, 1.0), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_a_fallback_takes_what_the_plan_took(load_watched: Load, hang: Any) -> None:
    engine = load_watched(fallbacks=[[Part(ONNXRUNTIME)]])
    as_list = {"x": X["x"].tolist()}
    assert_right(engine.run(as_list))
    hang(engine)
    assert_right(engine.run(as_list))


def test_what_cannot_be_kept_is_refused(load_watched: Load) -> None:
    engine = load_watched()
    with pytest.raises(UsageError, match="the input 'x' lies on a device, and requests with a deadline are kept on the host; give"):
        engine.run({"x": NullTensor(X["x"], "null:GPU.0")})
    with pytest.raises(UsageError, match="the input 'x' cannot be kept for a deadline"):
        engine.run({"x": (each for each in ())})
    assert_right(engine.run(X))


@pytest.mark.parametrize("given", [-1.0, float("nan"), True, "5", b"5", np.array([1.0, 2.0]), object()])
def test_what_is_no_time_to_wait_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="is no time to wait; give seconds above 0, or None"):
        Deadlines(given)


@pytest.mark.parametrize("given", [Decimal(5), Fraction(5), np.float32(5), np.array(5.0), 5])
def test_numbers_of_any_kind_are_seconds(given: Any) -> None:
    kept = Deadlines(given).timeout_s
    assert type(kept) is float and kept == 5


def test_a_deadline_within_the_wait_for_company_is_refused_and_leaves_nothing_open(load_watched: Load) -> None:
    waiting = Execution(batching=Batching(max_batch=2, max_wait_s=0.5))
    before = set(_running)
    with pytest.raises(UsageError, match="no time to wait"):
        load_watched(timeout_s=-1.0)
    assert set(_running) <= before
    with pytest.raises(UsageError, match=r"timeout_s=0.5 is over while requests may still wait 0.5 s for company"):
        load_watched(execution=waiting, batch=2, timeout_s=0.5)
    assert set(_running) <= before
    engine = load_watched(execution=waiting, batch=2, timeout_s=30.0)
    assert_right(engine.run(X))


@pytest.mark.parametrize("given", [normal(2, 32), [normal(2, 32)]], ids=lambda each: type(each).__name__)
def test_inputs_without_names_are_refused_in_words_and_in_their_turn(load_watched: Load, given: Any) -> None:
    engine = load_watched()
    for ask in (engine.run, engine.submit, lambda inputs: asyncio.run(engine.arun(inputs))):
        with pytest.raises(UsageError, match="inputs are given by name"):
            ask(given)
    stream = engine.stream([X, X, given, X])
    for _ in range(2):
        assert_right(next(stream))
    with pytest.raises(UsageError, match="inputs are given by name"):
        next(stream)


def test_what_was_stopped_with_the_whole_process_is_not_taken_to_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = [0.0]
    monkeypatch.setattr("aivmm.runtime.deadline.monotonic", lambda: monotonic() + stopped[0])
    deadlines, running = Deadlines(60.0), Future[Any]()
    answer = deadlines.watch(running, lambda: {"late": np.zeros(1)})
    while not deadlines._thread or deadlines._some.is_set():  # until it waits
        sleep(0.01)
    sleep(0.1)
    before = deadlines._due[0][0]
    stopped[0] = 100.0  # for as long nothing runs, and this is when all goes on
    while not answer.done() and deadlines._due[0][0] < before + 99.0:
        sleep(0.01)
    running.set_result({"y": np.ones(1)})
    assert "y" in answer.result(30)


def test_a_request_that_comes_before_the_watch_goes_on_is_due_no_later_than_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("aivmm.runtime.deadline.monotonic", lambda: now[0])
    due, some = deque[Any]([(105.0, "before", None)]), threading.Event()

    def stopped(at_most_s: float) -> bool:
        now[0] += 3600.0  # the process is stopped, and then a request comes before its watch is woken up
        due.append((now[0] + 5.0, "after", None))
        return False

    monkeypatch.setattr(some, "wait", stopped)
    _wait(some, 0.5, due, 5.0)
    assert [when for when, _, _ in due] == [105.0 + 3599.5, 3705.0]


def test_the_watch_of_a_closed_engine_ends(load_watched: Load) -> None:
    engine = load_watched()
    assert_right(engine.run(X))
    assert engine._deadlines is not None
    thread = engine._deadlines._thread
    engine.close()
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
