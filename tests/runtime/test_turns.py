"""Graphs: replays run beside each other, on one card or two, and a recording is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from aivmm.runtime.ort_requests import StagedRequest
from aivmm.runtime.turns import Recordings, Turns
from tests.making import normal
from tests.runtime.test_staged import SHAPE, staged

PATIENCE_S = 20.0


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_replays_are_inside_together_and_a_recording_is_not_until_they_have_left() -> None:
    turns, together, leave, recording = Turns(), threading.Barrier(3), threading.Event(), threading.Event()

    def replay() -> None:
        with turns.replay:
            together.wait(PATIENCE_S)
            leave.wait(PATIENCE_S)

    def record() -> None:
        with turns.record:
            recording.set()

    replays = [in_thread(replay) for _ in range(2)]
    together.wait(PATIENCE_S)  # both are inside
    recorder = in_thread(record)
    while not turns.waiting:
        assert recorder.is_alive()
    late = in_thread(turns.replay.__enter__)
    assert not recording.is_set() and turns.replaying == 2
    leave.set()
    for each in (*replays, recorder, late):
        each.join(PATIENCE_S)
        assert not each.is_alive()
    assert recording.is_set() and turns.replaying == 1  # the late one came in behind it


def test_nobody_is_inside_with_a_recording_whoever_comes_when() -> None:
    turns, inside, wrong = Turns(), [0, 0], []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            records = bool(rng.random() < 0.2)
            with turns.record if records else turns.replay:
                inside[records] += 1
                if inside[True] > 1 or (inside[True] and inside[False]):
                    wrong.append(tuple(inside))
                inside[records] -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6), timeout=PATIENCE_S))
    assert not wrong


def test_what_a_thread_has_recorded_another_has_not() -> None:
    recordings = Recordings()
    recordings.left -= Recordings.RUNS
    assert not recordings.left
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: recordings.left).result(PATIENCE_S) == Recordings.RUNS


def recorded() -> tuple[StagedRequest, Any]:
    """Return a request whose runs are recorded, bound, and its stream."""
    request, stream = staged(recorded=True)
    for name in "ab":
        request.bind(name, normal(*SHAPE, seed=ord(name)))
    return request, stream


def test_two_requests_replay_at_once_after_each_has_recorded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    def caller() -> None:
        request, stream = recorded()
        for _ in range(Recordings.RUNS):
            request.run()
        wait = stream.wait

        def meets() -> None:
            together.wait(PATIENCE_S)  # raises unless the other is inside of its run as well
            wait()

        monkeypatch.setattr(stream, "wait", meets)
        together.wait(PATIENCE_S)  # both have recorded
        request.run()

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(caller) for _ in range(2)]:
            each.result(2 * PATIENCE_S)


def test_a_run_that_failed_has_recorded_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    request, stream = recorded()

    def fails() -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as broken:
        broken.setattr(stream, "wait", fails)
        for _ in range(2 * Recordings.RUNS):
            with pytest.raises(RuntimeError, match="no"):
                request.run()
    assert request._recordings is not None and request._recordings.left == Recordings.RUNS
