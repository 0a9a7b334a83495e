"""Streams: each answer is given as soon as it and those before it are there, whatever the later ones do."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import pytest

from aivmm.errors import UsageError
from aivmm.runtime import streaming
from aivmm.runtime.plan import Batching, Execution
from aivmm.runtime.streaming import Begin, Reply, ordered
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, normal, reference
from tests.runtime.engines import Load


def test_answers_are_given_while_a_later_request_hangs(load: Load) -> None:
    parts = [Part(ONNXRUNTIME, 0, 3), Part(OPENVINO, 4)]
    engine = load(chain_model(), parts, execution=Execution(mode="pipelined"))
    assert engine._program.window > 4
    go = threading.Event()
    lane = engine._program.lanes[2]  # lanes are taken in their order: the third request's
    run, *rest = lane._steps[1]
    lane._steps[1] = (lambda: (go.wait(60), run()), *rest)
    requests = [{"x": normal(2, 32, seed=seed)} for seed in range(12)]
    stream = engine.stream(requests)
    with ThreadPoolExecutor(1) as asks:
        try:
            for each in requests[:2]:
                found = asks.submit(next, stream).result(30)
                np.testing.assert_allclose(found["y"], reference(chain_model(), each)["y"], rtol=1e-4, atol=1e-5)
        finally:
            go.set()
        assert len(asks.submit(list, stream).result(30)) == 10


def by_futures(submit: Callable[[Any], Future[Any]]) -> Begin:
    """Return what begins a request of which a future tells what comes."""
    return lambda inputs, reply: reply.follow(submit(inputs))


def test_answers_are_given_while_requests_come_slowly() -> None:
    taken: list[int] = []

    def slowly() -> Iterator[dict[str, Any]]:
        for number in range(8):
            time.sleep(0.02)
            taken.append(number)
            yield {"number": number}

    def submit(inputs: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        threading.Timer(0.001, answer.set_result, [inputs]).start()
        return answer

    for number, answer in enumerate(ordered(by_futures(submit), 6, slowly())):
        assert answer == {"number": number}
        assert taken[-1] <= number + 4  # all six of the window were, before; a busy machine may be late with an answer


@pytest.mark.parametrize("window", [1, 2, 6])
def test_the_window_is_full_while_requests_are_made_and_answers_looked_at(window: int) -> None:
    count = 12
    begun = [threading.Event() for _ in range(count + window)]
    submitted: list[int] = []
    waited: list[int] = []

    def requests() -> Iterator[dict[str, Any]]:
        for number in range(count):
            begun[number].set()
            yield {"number": number}
        for each in begun[count:]:
            each.set()

    def run(number: int) -> int:
        """Take until the request a window later is being made."""
        if not begun[number + window].wait(1):
            waited.append(number)
        return number

    with ThreadPoolExecutor(window) as lanes:

        def submit(inputs: Any) -> Future[Any]:
            submitted.append(inputs["number"])
            return lanes.submit(run, inputs["number"])

        for number, answer in enumerate(ordered(by_futures(submit), window, requests())):
            assert answer == number
            assert len(submitted) == min(count, number + 1 + window)
    assert not waited


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[tuple[Reply, float, bool | None]]:
    """Return a queue of who is waited for and for how long, once when that begins and once with what came of it."""
    seen: SimpleQueue[tuple[Reply, float, bool | None]] = SimpleQueue()
    real = Reply.wait

    def wait(self: Reply, seconds: float = -1) -> bool:
        seen.put((self, seconds, None))
        found = real(self, seconds)
        seen.put((self, seconds, found))
        return found

    monkeypatch.setattr(Reply, "wait", wait)
    return seen


def test_long_answers_are_not_waited_for_by_several_again_and_again(waits: SimpleQueue[tuple[Reply, float, bool | None]]) -> None:
    """To wait in vain is to be woken twice for an answer, on cores that stages have work for."""
    asked: list[Reply] = []
    count, window = 30, 6

    def begin(_: Any, reply: Reply) -> None:
        asked.append(reply)

    def answers() -> None:
        for number in range(count):
            time.sleep(0.011)
            while len(asked) <= number:  # who asks is late on a busy machine
                time.sleep(0.001)
            asked[number].set_result({"y": np.array(number)})

    stream = ordered(begin, window, ({} for _ in range(count)))
    with ThreadPoolExecutor(1) as asks:
        found = asks.submit(list, stream)
        answers()
        assert [int(each["y"]) for each in found.result(30)] == list(range(count))
    in_vain = sum(waits.get()[2] is False for _ in range(waits.qsize()))
    assert 0 < in_vain <= 3


@pytest.mark.parametrize(("window", "several"), [(2, 1), (6, 3), (8, 4), (9, 4)])
def test_who_waits_is_woken_once_for_several_answers(
    waits: SimpleQueue[tuple[Reply, float, bool | None]], window: int, several: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waking takes a processor from a stage. None is answered here before somebody waits for it, or for one behind it."""
    monkeypatch.setattr(streaming, "_HELD_S", 30.0)  # however busy the machine is
    asked: deque[Reply] = deque()
    count, woken = 10 * window, 0
    with ThreadPoolExecutor(1) as asks:
        found = asks.submit(list, ordered(lambda _, reply: asked.append(reply), window, ({} for _ in range(count))))
        while not found.done():
            with suppress(Empty):
                reply, _, came = waits.get(timeout=0.01)
                if came is None:
                    woken += 1
                    while not reply.there:
                        asked.popleft().set_result({})
    assert len(found.result()) == count
    assert woken <= (count - window) // several + 1 + window  # the last ones are waited for one by one


def test_an_answer_that_was_waited_for_in_vain_wakes_who_waits_again() -> None:
    reply = Reply()
    assert not reply.wait(0.001)
    assert not reply.wait(0.001)
    threading.Timer(0.02, reply.set_result, [{}]).start()
    assert reply.wait(30) and reply.result() == {}
    assert reply.wait(0) and reply.wait()


@pytest.mark.parametrize("how", ["plain", "deadline", "batched"])
def test_streams_give_right_answers_and_errors_at_their_place_however_requests_are_run(load: Load, how: str) -> None:
    batching = Batching(max_batch=2, max_wait_s=0.002) if how == "batched" else None
    engine = load(
        chain_model(), [Part(ONNXRUNTIME, 0, 3), Part(OPENVINO, 4)], execution=Execution(mode="pipelined", batching=batching), batch=2
    )
    engine.timeout_s = 30 if how == "deadline" else None
    requests: list[Any] = [{"x": normal(2, 32, seed=seed)} for seed in range(40)]
    stream = engine.stream([*requests, {"x": np.zeros((2, 31), np.float32)}, requests[0]])
    for each in requests:
        np.testing.assert_allclose(next(stream)["y"], reference(chain_model(), each)["y"], rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="x"):
        next(stream)
    assert list(stream) == []
    np.testing.assert_allclose(engine.run(requests[1])["y"], reference(chain_model(), requests[1])["y"], rtol=1e-4, atol=1e-5)


def test_a_stream_that_nobody_reads_on_keeps_no_request_from_its_turn(load: Load) -> None:
    engine = load(chain_model(), [Part(ONNXRUNTIME, 0, 3), Part(OPENVINO, 4)], execution=Execution(mode="pipelined"))
    x = {"x": normal(2, 32)}
    stream = engine.stream(x for _ in range(100))
    next(stream)
    with ThreadPoolExecutor(1) as asks:
        for _ in range(2 * engine._program.window):
            np.testing.assert_allclose(asks.submit(engine.run, x).result(30)["y"], reference(chain_model(), x)["y"], rtol=1e-4, atol=1e-5)
