"""Who may run CUDA graphs beside whom: replays side by side, a recording alone.

ONNX Runtime records with `cudaStreamCaptureModeGlobal`, under which CUDA forbids every thread of the process, whichever card it uses, what
could be unsafe (to allocate, to copy other memory than page-locked): it would fail, and spoil the recording. A replay records nothing.
"""

from __future__ import annotations

import threading


class Turns:
    """A lock that many hold at once to replay, or one alone to record; who records goes before those who come after."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._replaying = 0
        self._recording = False
        self._waiting = 0  # to record
        self.replay, self.record = _Replay(self), _Record(self)

    def begin_replay(self) -> None:
        """Wait until nobody records or waits to."""
        with self._changed:
            while self._recording or self._waiting:
                self._changed.wait()
            self._replaying += 1

    def end_replay(self) -> None:
        """Let who waits to record have a look."""
        with self._changed:
            self._replaying -= 1
            if self._waiting and not self._replaying:
                self._changed.notify_all()

    def begin_record(self) -> None:
        """Wait until nobody replays or records."""
        with self._changed:
            self._waiting += 1
            try:
                while self._recording or self._replaying:
                    self._changed.wait()
                self._recording = True
            finally:
                self._waiting -= 1
                if not self._recording:  # Ctrl-C: those who waited for this one
                    self._changed.notify_all()

    def end_record(self) -> None:
        """Let the others go on."""
        with self._changed:
            self._recording = False
            self._changed.notify_all()


class _Replay:
    """`with turns.replay:`; no generator, which would take a microsecond of each call."""

    def __init__(self, turns: Turns) -> None:
        self.__begin, self.__end = turns.begin_replay, turns.end_replay

    def __enter__(self) -> None:
        self.__begin()

    def __exit__(self, *_: object) -> None:
        self.__end()


class _Record:
    """`with turns.record:`"""

    def __init__(self, turns: Turns) -> None:
        self.__begin, self.__end = turns.begin_record, turns.end_record

    def __enter__(self) -> None:
        self.__begin()

    def __exit__(self, *_: object) -> None:
        self.__end()


class Recordings(threading.local):
    """Runs of one session by each thread: ONNX Runtime records a graph for each anew, in its third run there (CUDA's provider, 1.31)."""

    RUNS = 4  # one more than are needed: to take a replay for a recording costs a wait
    runs = 0

    @property
    def pending(self) -> bool:
        """Say whether the calling thread's next run may record."""
        return self.runs < self.RUNS

    def add(self) -> None:
        """Count a run of the calling thread that did not fail."""
        if self.runs < self.RUNS:
            self.runs += 1
