"""Answers in the order of their requests, as many in flight as keep everything busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from aivmm.errors import AivmmError
from aivmm.runtime.batching import Outputs

Submit = Callable[[Mapping[str, Any]], "Future[Outputs]"]


def ordered(submit: Submit, window: int, requests: Iterable[Mapping[str, Any]]) -> Iterator[Outputs]:
    """Submit each of `requests` and yield the outputs in their order, at most `window` in flight; see `Engine.stream`."""
    pending: deque[Future[Outputs]] = deque()
    # To be woken for each answer costs a busy processor more than to be woken for several, and half of the window keeps it busy meanwhile.
    several = max(0, window // 2 - 1)
    for inputs in requests:
        if len(pending) >= window:
            if not pending[0].done():
                pending[several].exception()
            yield pending.popleft().result()
        try:
            pending.append(submit(inputs))
        except AivmmError as error:  # its turn comes
            pending.append(Future())
            pending[-1].set_exception(error)
    while pending:
        yield pending.popleft().result()
