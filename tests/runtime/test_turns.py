"""Graphs: replays run beside each other, on one card or two, and a recording is alone."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import pytest

from aivmm.runtime import ort_requests
from aivmm.runtime import turns as turns_module
from aivmm.runtime.ort_requests import StagedRequest
from aivmm.runtime.turns import Recordings, Turn, Turns
from tests.making import normal
from tests.runtime.interrupts import interrupted_at, interrupts
from tests.runtime.test_staged import SHAPE, staged

PATIENCE_S = 20.0


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_replays_are_inside_together_and_a_recording_is_not_until_they_have_left() -> None:
    turns, together, leave, recording, late = Turns(), threading.Barrier(3), threading.Event(), threading.Event(), threading.Event()
    told: list[bool] = []

    def replay(turn: Turn) -> None:
        turn.replay(lambda: (together.wait(PATIENCE_S), leave.wait(PATIENCE_S)))

    def replay_late(turn: Turn) -> None:
        turn.replay(lambda: told.append(recording.is_set()))
        late.set()

    recorder, latest, *earlier = (turns.add() for _ in range(4))
    replays = [in_thread(partial(replay, each)) for each in earlier]
    together.wait(PATIENCE_S)  # both are inside
    threads = [*replays, in_thread(lambda: recorder.record(recording.set))]
    while not turns.recording.locked():
        assert threads[-1].is_alive()
    threads.append(in_thread(lambda: replay_late(latest)))
    assert not late.wait(0.05) and not recording.is_set()
    leave.set()
    for each in threads:
        each.join(PATIENCE_S)
        assert not each.is_alive()
    assert told == [True]  # it came in behind the recording


def test_nobody_is_inside_with_a_recording_whoever_comes_when() -> None:
    turns, inside, wrong = Turns(), [0, 0], []

    def work(seed: int) -> None:
        rng, turn = np.random.default_rng(seed), turns.add()

        def run(records: bool) -> None:
            inside[records] += 1
            if inside[True] > 1 or (inside[True] and inside[False]):
                wrong.append(tuple(inside))
            inside[records] -= 1

        for _ in range(200):
            if rng.random() < 0.2:
                turn.record(partial(run, True))
            else:
                turn.replay(partial(run, False))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6), timeout=PATIENCE_S))
    assert not wrong


def test_who_replays_again_and_again_keeps_nobody_from_recording() -> None:
    turns, enough = Turns(), threading.Event()

    def replay(turn: Turn) -> None:
        while not enough.is_set():
            turn.replay(partial(sum, range(1000)))

    threads = [in_thread(partial(replay, turns.add())) for _ in range(2)]
    turn = turns.add()
    recorder = in_thread(lambda: [turn.record(int) for _ in range(20)])
    recorder.join(PATIENCE_S)
    enough.set()
    for each in threads:
        each.join(PATIENCE_S)
    assert not any(each.is_alive() for each in (recorder, *threads))


def test_a_replay_that_waits_comes_before_the_recordings_that_wait_with_it() -> None:
    turns, inside, leave, order = Turns(), threading.Event(), threading.Event(), []

    def record(turn: Turn, of: str) -> None:
        turn.record(partial(order.append, of))

    first, replays, *more = (turns.add() for _ in range(8))  # each from a thread of its own, as where threads come anew for each request
    threads = [in_thread(lambda: first.record(lambda: (inside.set(), leave.wait(PATIENCE_S))))]
    assert inside.wait(PATIENCE_S)
    threads += [in_thread(partial(record, each, "recording")) for each in more]
    threads.append(in_thread(lambda: replays.replay(partial(order.append, "replay"))))
    while not replays.waits.locked():
        assert threads[-1].is_alive()
    assert not order
    leave.set()
    for each in threads:
        each.join(PATIENCE_S)
        assert not each.is_alive()
    assert order == ["replay", *["recording"] * len(more)]


def test_a_request_that_is_gone_is_waited_for_no_more() -> None:
    turns = Turns()
    kept = turns.add()
    for _ in range(3):
        turns.add()
    assert len(turns.requests) <= 2  # those that are, and the one added last
    kept.record(int)


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


def of_turns(code: CodeType) -> bool:
    return code.co_filename == turns_module.__file__ or code is StagedRequest.run.__code__


@pytest.mark.parametrize("records", [False, True])
def test_whenever_a_run_is_interrupted_others_record_and_replay_after_it(records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_requests, "_TURNS", Turns())  # the process's own would be lost to other tests, should this one fail
    request, other = recorded()[0], recorded()[0]
    for _ in range(Recordings.RUNS):
        request.run()

    def others() -> None:
        for _ in range(Recordings.RUNS + 1):
            other.run()

    step = 1
    while True:
        request._recordings.left = Recordings.RUNS if records else 0
        if not interrupted_at(step, request.run, of_turns):
            break
        thread = in_thread(others)  # which has not recorded yet
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"graphs wait for ever after an interrupt at instruction {step}"
        request._recordings.left = 0
        request.run()
        step += 1
    assert step > 20  # instructions of Python's that a run has in any case


@pytest.mark.skipif(sys.platform == "win32", reason="no signal reaches a thread that waits there")
@pytest.mark.parametrize("records", [False, True])
def test_who_is_interrupted_while_it_waits_for_its_turn_leaves_nothing_behind(records: bool) -> None:
    turns, inside, leave, over = Turns(), threading.Event(), threading.Event(), threading.Event()
    mine, others = turns.add(), turns.add()

    def hold() -> None:
        (others.replay if records else others.record)(lambda: (inside.set(), leave.wait(PATIENCE_S)))

    def raises(*_: object) -> None:
        if not over.is_set():
            over.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        while not over.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    holder = in_thread(hold)
    assert inside.wait(PATIENCE_S)
    with interrupts(raises):
        interrupter = in_thread(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                (mine.record if records else mine.replay)(int)
        finally:
            over.set()
            interrupter.join(PATIENCE_S)
    leave.set()
    after = [holder, in_thread(lambda: mine.replay(int)), in_thread(lambda: others.record(int))]
    for each in after:
        each.join(PATIENCE_S)
        assert not each.is_alive()
