"""Streams: each answer is given as soon as it and those before it are there, whatever the later ones do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from aivmm.runtime.plan import Execution
from aivmm.runtime.streaming import ordered
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

    for number, answer in enumerate(ordered(submit, 6, slowly())):
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

        for number, answer in enumerate(ordered(submit, window, requests())):
            assert answer == number
            assert len(submitted) == min(count, number + 1 + window)
    assert not waited


class _Counted(Future[Any]):
    """An answer that knows how often somebody waited for one of its kind until a time was over."""

    in_vain = 0

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        except TimeoutError:
            _Counted.in_vain += 1
            raise


def test_long_answers_are_not_waited_for_by_several_again_and_again() -> None:
    """To wait in vain is to be woken twice for an answer, on cores that stages have work for."""
    asked: list[Future[Any]] = []
    count, window = 30, 6

    def submit(inputs: Any) -> Future[Any]:
        asked.append(_Counted())
        return asked[-1]

    def answers() -> None:
        for number in range(count):
            time.sleep(0.004)
            while len(asked) <= number:  # who asks is late on a busy machine
                time.sleep(0.001)
            asked[number].set_result(number)

    _Counted.in_vain = 0
    stream = ordered(submit, window, ({} for _ in range(count)))
    with ThreadPoolExecutor(1) as asks:
        found = asks.submit(list, stream)
        answers()
        assert found.result(30) == list(range(count))
    assert 0 < _Counted.in_vain <= 3
