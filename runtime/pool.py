"""Free lanes: who takes one has a request's turn, and waits while there is none."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import repeat
from queue import Empty, SimpleQueue

from aivmm.errors import AivmmError, UsageError
from aivmm.runtime.lane import Lane

_LOOKS_S = 1.0  # who waits looks again unasked: a signal may have come between giving back and telling


def closed() -> UsageError:
    """Return what a request is told that comes too late."""
    return UsageError("this engine is closed", advice="load the plan again")


class Pool:
    """Free lanes, the one first that has been free for longest. Thread-safe.

    Where nobody waits, taking is `lanes.popleft()` and giving back is `lanes.append()` and a look at the lane's `awaited`, without a lock:
    a queue's costs as much as the rest of a call. Who finds none marks all lanes as awaited *before* he looks again; so whoever gives one
    back either has his lane seen by that look, or sees that it is awaited and sends a token. A token too many makes somebody look once in
    vain.

    Whoever is interrupted by a signal (Ctrl-C) must not keep a lane: so `for lane in pool.takes: break` takes one, with `try` next. Signals
    are handled behind calls, and there a lane that `popleft` returned would be lost. For the same reason `lanes.append` comes first in a
    `finally`, and not `put`, at the begin of which they are handled as well.
    """

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.lanes: deque[Lane] = deque(lanes)
        self.takes: Iterator[Lane] = map(deque.popleft, repeat(self.lanes))  # raises IndexError where none is free, and goes on
        self._all = tuple(self.lanes)
        self._waiting = 0
        self._closed: AivmmError | None = None  # what is told to who comes too late
        self._lock = threading.Lock()
        self._tokens: SimpleQueue[None] = SimpleQueue()

    def put(self, lane: Lane) -> None:
        """Give a lane back."""
        self.lanes.append(lane)
        self.given(lane)

    def given(self, lane: Lane) -> None:
        """Do what is to be done once a lane was given back, by `lanes.append`."""
        if lane.awaited:
            self.wake()
        if lane.ended:
            with suppress(IndexError):  # who has the lane by now does the same
                while True:
                    lane.ended.pop()

    def wake(self) -> None:
        """Let one who waits look again, unless as many are about to as there are lanes.

        Else who was interrupted, and is counted as waiting still, would have tokens pile up.
        """
        if self._tokens.qsize() < len(self._all):
            self._tokens.put(None)

    def get(self) -> Lane:
        """Take a lane; wait while there is none.

        Raises:
            UsageError: the program is closed.
            AivmmError: it was given up, for this reason.
        """
        lane = None
        try:
            self._wait(1)
            try:
                while lane is None:
                    if self._closed is not None:
                        raise type(self._closed)(self._closed.message, advice=self._closed.advice)
                    with suppress(IndexError):
                        for lane in self.takes:  # noqa: B007 - it is returned
                            break
                    if lane is None:
                        with suppress(Empty):
                            self._tokens.get(timeout=_LOOKS_S)
            finally:
                self._wait(-1)
        except BaseException:  # not handled: Ctrl-C behind the loop
            if lane is not None:
                self.put(lane)
            raise
        return lane

    def close(self, why: AivmmError | None = None) -> None:
        """Tell whoever waits, or comes, that there will be no more."""
        with self._lock:
            self._closed = self._closed or why or closed()
            waiting = self._waiting
        for _ in range(waiting):
            self._tokens.put(None)

    def leave_behind(self, why: AivmmError) -> None:
        """Have no lanes any more, without a lock: whoever takes one without asking finds none, and asks. In the child of a fork only."""
        self._closed = why
        self.lanes.clear()

    def _wait(self, more: int) -> None:
        """Count who waits, where whoever gives a lane back looks: at the lane, which he has at hand."""
        with self._lock:
            self._waiting += more
            awaited = self._waiting > 0
            for each in self._all:
                each.awaited = awaited
