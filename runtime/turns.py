"""Who may run CUDA graphs beside whom: replays side by side, a recording alone.

ONNX Runtime records with `cudaStreamCaptureModeGlobal`, under which CUDA forbids every thread of the process, whichever card it uses, what
could be unsafe (to allocate, to copy other memory than page-locked): it would fail, and spoil the recording. A replay records nothing.
"""

from __future__ import annotations

import threading


class Turns:
    """A lock that many hold at once to replay, or one alone to record; who waits to record goes before those who come after."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.replaying = 0
        self.recording = False
        self.waiting = 0  # to record
        self.replay, self.record = _Replay(self), _Record(self)


class _Replay:
    """`with turns.replay:`, on the way of each call: no generator, and no calls of ours."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._lock = turns, turns.lock

    def __enter__(self) -> None:
        turns = self._turns
        with self._lock:
            while turns.recording or turns.waiting:
                turns.changed.wait()
            turns.replaying += 1

    def __exit__(self, *_: object) -> None:
        turns = self._turns
        with self._lock:
            turns.replaying -= 1
            if turns.waiting and not turns.replaying:
                turns.changed.notify_all()


class _Record:
    """`with turns.record:`"""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __enter__(self) -> None:
        turns = self._turns
        with turns.lock:
            turns.waiting += 1
            try:
                while turns.recording or turns.replaying:
                    turns.changed.wait()
                turns.recording = True
            finally:
                turns.waiting -= 1
                if not turns.recording:  # Ctrl-C: those who waited for this one
                    turns.changed.notify_all()

    def __exit__(self, *_: object) -> None:
        turns = self._turns
        with turns.lock:
            turns.recording = False
            turns.changed.notify_all()


class Recordings(threading.local):
    """Runs of one session by each thread: ONNX Runtime records a graph for each anew, in its third run there (CUDA's provider, 1.31)."""

    RUNS = 4  # one more than are needed: to take a replay for a recording costs a wait
    left = RUNS  # runs of the calling thread that may yet record; counted down by those that do not fail
