"""Deadlines: a request whose stage hangs gets its error in time, though nobody can stop what hangs. Decision 0031 has the rule."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from time import monotonic
from typing import SupportsFloat

from aivmm.errors import UsageError
from aivmm.runtime.batching import Outputs
from aivmm.runtime.plan import Execution

Answer = Callable[[], Outputs]  # what answers a request in the place of a stage that hangs, or raises
_Due = tuple[float, Future[Outputs], Answer]
_LOOKS_S = 0.5
_STOPPED_S = 0.5  # whoever wakes up so late was not let run: the process was stopped, or its machine


def _seconds(given: object) -> float:
    """Return what is a number, of whatever kind, as the clock counts; NaN for what is none, though Python can make one of it."""
    if isinstance(given, bool | str | bytes | bytearray) or not isinstance(given, SupportsFloat):
        return float("nan")
    try:
        return float(given)
    except (TypeError, ValueError, OverflowError):  # an array of several numbers, say
        return float("nan")


class Deadlines:
    """Watches requests on a thread of its own, which ends when nobody refers to this any more. Thread-safe."""

    def __init__(self, timeout_s: float, executions: Iterable[Execution] = ()) -> None:
        """Give requests `timeout_s` seconds each, however they are run of `executions`.

        Raises:
            UsageError: that is no time to wait, or is over before a request may have found company for its batch.
        """
        seconds = _seconds(timeout_s)
        if not 0 < seconds < float("inf"):
            raise UsageError(f"timeout_s={timeout_s!r} is no time to wait", advice="give seconds above 0, or None")
        wait_s = max((each.batching.max_wait_s for each in executions if each.batching is not None), default=0.0)
        if seconds <= wait_s:
            raise UsageError(
                f"timeout_s={seconds:g} is over while requests may still wait {wait_s:g} s for company in their batch", advice="give more"
            )
        self.timeout_s = seconds
        # All wait for as long, so who came first is due first.
        self._due: deque[_Due] = deque()
        self._some = threading.Event()
        self._lock = threading.Lock()  # for the start alone: no lock is held while an answer is settled, since its callbacks may ask again
        self._thread: threading.Thread | None = None

    def watch(self, running: Future[Outputs], instead: Answer) -> Future[Outputs]:
        """Return a future of what `running` brings or, when that takes too long, of what `instead` does, called on a thread of its own."""
        answer: Future[Outputs] = Future()
        answer.set_running_or_notify_cancel()
        running.add_done_callback(lambda done: _settle(answer, done))
        if not answer.done():
            self._due.append((monotonic() + self.timeout_s, answer, instead))
            self._start()
            self._some.set()
        return answer

    def late(self, answer: Future[Outputs], instead: Answer) -> None:
        """Answer a request that is due."""
        found: Future[Outputs] = Future()
        try:
            found.set_result(instead())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer to this request
            found.set_exception(error)
        _settle(answer, found)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                weakref.finalize(self, self._some.set).atexit = False
                watched = weakref.ref(self), self._due, self._some, self.timeout_s
                self._thread = threading.Thread(target=_look, args=watched, name="aivmm-deadline", daemon=True)
                self._thread.start()


def _settle(answer: Future[Outputs], done: Future[Outputs]) -> None:
    """Answer as `done` says, unless the other one was first: the future itself takes one answer and refuses the next."""
    with suppress(InvalidStateError):
        error = done.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(done.result())


def _wait(some: threading.Event, at_most_s: float, due: deque[_Due], timeout_s: float) -> None:
    """Wait for `some`; where the process was stopped meanwhile (a frozen container, SIGSTOP), what is due is due as much later.

    Stages were stopped as well: they do not hang, and a plan that is given up does not come back. What came since all goes on, before this
    thread did, was not stopped: nothing is due later than what comes now. Only this thread takes from the left.
    """
    started = monotonic()
    some.wait(at_most_s)
    now_s = monotonic()
    late_s = now_s - started - at_most_s
    if late_s > _STOPPED_S:
        for place in range(len(due)):
            when, answer, instead = due[place]
            due[place] = min(when + late_s, now_s + timeout_s), answer, instead


def _look(deadlines: weakref.ref[Deadlines], due: deque[_Due], some: threading.Event, timeout_s: float) -> None:
    while True:
        if not due:
            some.clear()  # first: whoever calls after this is seen below, or ends the wait
            if deadlines() is None:
                return
            if not due:
                some.wait()
            continue
        when, answer, instead = due[0]
        left = when - monotonic()
        if left > 0 and not answer.done():
            some.clear()
            _wait(some, min(left, _LOOKS_S), due, timeout_s)  # an answer in time frees its place without a sound: look again
            continue
        due.popleft()
        owner = deadlines()
        if not answer.done() and owner is not None:
            threading.Thread(target=owner.late, args=(answer, instead), name="aivmm-rescue", daemon=True).start()
        del answer, instead, owner
