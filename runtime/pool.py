"""Free lanes: who takes one has a request's turn, and waits while there is none."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from queue import SimpleQueue

from aivmm.errors import AivmmError, UsageError
from aivmm.runtime.lane import Lane


def closed() -> UsageError:
    """Return what a request is told that comes too late."""
    return UsageError("this engine is closed", advice="load the plan again")


class Pool:
    """Free lanes, the one first that has been free for longest. Thread-safe.

    Where nobody waits, taking is `lanes.popleft()` and giving back is `lanes.append()` and a look at `waiting`, without a lock: a queue's
    costs as much as the rest of a call. Who finds none counts himself as waiting *before* he looks again; so whoever gives one back
    either has his lane seen by that look, or sees him waiting and sends a token. A token too many makes somebody look once in vain.
    """

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.lanes: deque[Lane] = deque(lanes)
        self.waiting = 0
        self._closed: AivmmError | None = None  # what is told to who comes too late
        self._lock = threading.Lock()
        self._tokens: SimpleQueue[None] = SimpleQueue()

    def put(self, lane: Lane) -> None:
        """Give a lane back."""
        self.lanes.append(lane)
        if self.waiting:
            self._tokens.put(None)

    def wake(self) -> None:
        """Let one who waits look again."""
        self._tokens.put(None)

    def get(self) -> Lane:
        """Take a lane; wait while there is none.

        Raises:
            UsageError: the program is closed.
            AivmmError: it was given up, for this reason.
        """
        with self._lock:
            self.waiting += 1
        try:
            while True:
                if self._closed is not None:
                    raise type(self._closed)(self._closed.message, advice=self._closed.advice)
                try:
                    return self.lanes.popleft()
                except IndexError:
                    self._tokens.get()
        finally:
            with self._lock:
                self.waiting -= 1

    def close(self, why: AivmmError | None = None) -> None:
        """Tell whoever waits, or comes, that there will be no more."""
        with self._lock:
            self._closed = self._closed or why or closed()
            waiting = self.waiting
        for _ in range(waiting):
            self._tokens.put(None)
