"""Who may run CUDA graphs beside whom: replays side by side, a recording alone.

ONNX Runtime records with `cudaStreamCaptureModeGlobal`, under which CUDA forbids every thread of the process, whichever card it uses, what
could be unsafe (to allocate, to copy other memory than page-locked): it would fail, and spoil the recording. A replay records nothing.

Signals interrupt Python between any two calls (Ctrl-C; a time limit that a handler raises), and whatever is not given back then keeps all
graphs of the process waiting for ever. So all that is held here are locks of the interpreter's own, each held by a `with` of its own: those
are entered and left in C, where no signal is handled, and nothing besides says who holds what.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable


class Turns:
    """Has each request's recordings wait until all replays have left, and each replay while there is a recording or one waits."""

    def __init__(self) -> None:
        self.gate = threading.Lock()  # held by who records or waits to; each who found it so waits here
        self.recording = threading.Lock()  # as `gate`, but never by who only waited there: tells whether there is one
        self.replays: tuple[weakref.ref[threading.Lock], ...] = ()  # of each request
        self._adding = threading.Lock()

    def add(self) -> Turn:
        """Return the turn of one more request; it counts as long as somebody has it."""
        replay = threading.Lock()
        with self._adding:
            self.replays = (*(each for each in self.replays if each() is not None), weakref.ref(replay))
        return Turn(self, replay)


class Turn:
    """Runs of one request, which has one at a time. Not to be asked inside another run of the same thread, in a signal's handler say."""

    __slots__ = ("_gate", "_recording", "_replay", "_turns")

    def __init__(self, turns: Turns, replay: threading.Lock) -> None:
        self._turns, self._gate, self._recording = turns, turns.gate, turns.recording
        self._replay = replay  # held while it replays

    def replay(self, run: Callable[[], object]) -> None:
        """Call `run` beside other replays. The request was recorded here before, so that each recording since knows of it."""
        while True:
            with self._replay:
                # Looked at while `_replay` is held, for which a recording waits once it can be seen here: one of both sees the other.
                if not self._recording.locked():
                    run()
                    return
            with self._gate:
                pass

    def record(self, run: Callable[[], object]) -> None:
        """Call `run` when nobody replays or records; who comes to replay meanwhile waits until it is done."""
        with self._gate, self._recording:
            for each in self._turns.replays:
                replay = each()
                if replay is not None:
                    with replay:  # until it has left; it does not come back as long as `_recording` is held
                        pass
            run()


class Recordings(threading.local):
    """Runs of one session by each thread: ONNX Runtime records a graph for each anew, in its third run there (CUDA's provider, 1.31)."""

    RUNS = 4  # one more than are needed: to take a replay for a recording costs a wait
    left = RUNS  # runs of the calling thread that may yet record; counted down by those that do not fail
