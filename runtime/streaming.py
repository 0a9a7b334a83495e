"""Answers in the order of their requests, as many in flight as keep everything busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from time import perf_counter
from typing import Any

from aivmm.errors import AivmmError
from aivmm.runtime.batching import Outputs

Submit = Callable[[Mapping[str, Any]], "Future[Outputs]"]
_HELD_S = 0.002  # for which an answer may be held back, so that several are given at once
_RETRIED = 32  # answers given one by one after several did not come in that time, before they are waited for again


def ordered(submit: Submit, window: int, requests: Iterable[Mapping[str, Any]]) -> Iterator[Outputs]:
    """Submit each of `requests` and yield the outputs in their order, at most `window` in flight; see `Engine.stream`.

    The window is full while the next request is made, and again while the caller looks at an answer.
    """
    pending: deque[Future[Outputs]] = deque()
    given, alone = perf_counter(), 0
    for inputs in requests:
        slowly = perf_counter() - given > _HELD_S
        first = None
        if len(pending) >= window:
            alone = alone - 1 if alone else _wait(pending, window)
            first = pending.popleft().result()
        try:
            pending.append(submit(inputs))
        except AivmmError as error:  # its turn comes
            pending.append(Future())
            pending[-1].set_exception(error)
        if first is not None:
            yield first
        if slowly:  # what is there is given, but for what would leave nothing to do meanwhile
            while pending[0].done() and not pending[-1].done():
                yield pending.popleft().result()
        if slowly or first is not None:
            given = perf_counter()
    while pending:
        yield pending.popleft().result()


def _wait(pending: deque[Future[Outputs]], window: int) -> int:
    """Wait until half of the window is answered, which keeps the rest busy, but not for long where that takes longer than the first; return
    how many answers are better waited for one by one.

    To be woken for each answer costs a busy processor up to a sixth of its work where they are short. Where they are not, to wait in vain
    costs another wake-up for each, and as much time of the processors as the first one's (60 µs for answers of 3 ms on two cores).
    """
    several = window // 2 - 1
    if several > 0 and not pending[0].done():
        try:
            pending[several].exception(_HELD_S)
        except TimeoutError:
            return _RETRIED
    return 0
