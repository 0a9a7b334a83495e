"""Answers in the order of their requests, as many in flight as keep everything busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from itertools import takewhile
from threading import Lock
from time import perf_counter
from typing import Any

from aivmm.errors import AivmmError
from aivmm.runtime.batching import Outputs

_SLOW_S = 0.002  # from one request to the next: beyond it who waits for answers is not kept waiting for those behind them
_HELD_S = 0.01  # for which an answer may be held back while the window is full, so that several are given at once
_SHARE = 2  # of the window that is answered when who waits is woken: the rest keeps the stages busy until he has brought more
_RETRIED = 32  # answers given by fewer, after so many did not come in that time, before as many are waited for again


class Reply:
    """What comes of one request of a stream: a future for one thread that waits, without the lock, the condition and the callbacks."""

    __slots__ = ("_awaited", "_error", "_outputs", "there")

    def __init__(self) -> None:
        self.there = False
        self._outputs: Outputs = {}
        self._error: BaseException | None = None
        self._awaited: Any = None  # a lock that somebody waits for

    def put(self, outputs: Outputs) -> Callable[[], None] | None:
        """Take the answer; return what wakes who waits for it, if somebody does. Whoever puts it calls that soon."""
        self._outputs = outputs
        self.there = True
        # Looked at behind `there`, as `wait` looks the other way around: one of the two sees the other.
        return None if self._awaited is None else self._awaited.release

    def set_result(self, outputs: Outputs) -> None:
        """Take the answer."""
        wake = self.put(outputs)
        if wake is not None:
            wake()

    def set_exception(self, error: BaseException) -> None:
        """Take the error that is the answer."""
        self._error = error
        self.set_result({})

    def follow(self, running: Future[Outputs]) -> Reply:
        """Take what a future brings; return itself."""
        running.add_done_callback(self._take)
        return self

    def _take(self, done: Future[Outputs]) -> None:
        error = done.exception()
        if error is None:
            self.set_result(done.result())
        else:
            self.set_exception(error)

    def wait(self, seconds: float = -1) -> bool:
        """Wait until it is there, for so long at most; return whether it is."""
        awaited = Lock()  # a new one each time: whoever was not waited for any more releases another
        awaited.acquire()
        self._awaited = awaited
        return self.there or awaited.acquire(timeout=seconds)

    def result(self) -> Outputs:
        """Return the answer, or raise what it is; waits for it. To be called once."""
        if not self.there:
            self.wait()
        error, self._error = self._error, None
        if error is None:
            return self._outputs
        try:
            raise error
        finally:
            del error  # whose traceback refers to this frame


Begin = Callable[[Mapping[str, Any], Reply], object]


def ordered(begin: Begin, window: int, requests: Iterable[Mapping[str, Any]]) -> Iterator[Outputs]:
    """Have each of `requests` begun and yield the outputs in their order, at most `window` in flight; see `Engine.stream`.

    The window is full while the next request is made, and again while the caller looks at an answer.
    """
    pending: deque[Reply] = deque()
    given, several, fewer = perf_counter(), window // _SHARE, 0
    for inputs in requests:
        slowly = perf_counter() - given > _SLOW_S
        first = None
        if len(pending) >= window:
            several, fewer = (several, fewer - 1) if fewer else (window // _SHARE, 0)
            if several > 1 and not pending[0].there and not pending[several - 1].wait(_HELD_S):
                several, fewer = _came(pending), _RETRIED
            first = pending.popleft().result()
        reply = Reply()
        try:
            begin(inputs, reply)
        except AivmmError as error:  # its turn comes
            reply.set_exception(error)
        pending.append(reply)
        if first is not None:
            yield first
        if slowly:  # what is there is given, but for what would leave nothing to do meanwhile
            while pending[0].there and not pending[-1].there:
                yield pending.popleft().result()
        if slowly or first is not None:
            given = perf_counter()
    while pending:
        yield pending.popleft().result()


def _came(pending: Iterable[Reply]) -> int:
    """Return how many answers there are that can be given, one at least."""
    return max(1, sum(1 for _ in takewhile(lambda each: each.there, pending)))
