"""Free lanes: who takes one has a request's turn, and waits while there is none."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from queue import SimpleQueue

from aivmm.errors import AivmmError, UsageError
from aivmm.runtime.lane import Lane


def closed() -> UsageError:
    """Return what a request is told that comes too late."""
    return UsageError("this engine is closed", advice="load the plan again")


class Pool:
    """Free lanes, the one first that has been free for longest. Thread-safe.

    Where nobody waits, taking is `lanes.popleft()` and giving back is `lanes.append()` and a look at the lane's `awaited`, without a lock:
    a queue's costs as much as the rest of a call. Who finds none marks all lanes as awaited *before* he looks again; so whoever gives one
    back either has his lane seen by that look, or sees that it is awaited and sends a token. A token too many makes somebody look once in
    vain.
    """

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.lanes: deque[Lane] = deque(lanes)
        self._all = tuple(self.lanes)
        self._waiting = 0
        self._closed: AivmmError | None = None  # what is told to who comes too late
        self._lock = threading.Lock()
        self._tokens: SimpleQueue[None] = SimpleQueue()

    def put(self, lane: Lane) -> None:
        """Give a lane back."""
        self.lanes.append(lane)
        if lane.awaited:
            self._tokens.put(None)
        if lane.ended:
            with suppress(IndexError):  # who has the lane by now does the same
                while True:
                    lane.ended.pop()

    def wake(self) -> None:
        """Let one who waits look again."""
        self._tokens.put(None)

    def get(self) -> Lane:
        """Take a lane; wait while there is none.

        Raises:
            UsageError: the program is closed.
            AivmmError: it was given up, for this reason.
        """
        self._wait(1)
        try:
            while True:
                if self._closed is not None:
                    raise type(self._closed)(self._closed.message, advice=self._closed.advice)
                try:
                    return self.lanes.popleft()
                except IndexError:
                    self._tokens.get()
        finally:
            self._wait(-1)

    def close(self, why: AivmmError | None = None) -> None:
        """Tell whoever waits, or comes, that there will be no more."""
        with self._lock:
            self._closed = self._closed or why or closed()
            waiting = self._waiting
        for _ in range(waiting):
            self._tokens.put(None)

    def _wait(self, more: int) -> None:
        """Count who waits, where whoever gives a lane back looks: at the lane, which he has at hand."""
        with self._lock:
            self._waiting += more
            awaited = self._waiting > 0
            for each in self._all:
                each.awaited = awaited
