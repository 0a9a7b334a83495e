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
    """Has each recording wait until all replays have left, and each replay while there is a recording; by turns, where both never end."""

    def __init__(self) -> None:
        self.line = threading.Lock()  # held by who is the next to record
        self.gate = threading.Lock()  # held by who records; those who came to replay meanwhile wait here
        self.recording = threading.Lock()  # as `gate`, but never by who only waited there: tells whether there is a recording
        self.requests: tuple[weakref.ref[Turn], ...] = ()
        self._adding = threading.Lock()

    def add(self) -> Turn:
        """Return the turn of one more request; it counts as long as somebody has it."""
        turn = Turn(self)
        with self._adding:
            self.requests = (*(each for each in self.requests if each() is not None), weakref.ref(turn))
        return turn

    def pass_by(self, lock: str) -> None:
        """Wait until no request holds its lock of that name any more that holds it now."""
        for each in self.requests:
            turn = each()
            if turn is not None:
                with getattr(turn, lock):
                    pass


class Turn:
    """Runs of one request, which has one at a time. Not to be asked inside another run of the same thread, in a signal's handler say."""

    __slots__ = ("__weakref__", "_gate", "_recording", "_turns", "replays", "waits")

    def __init__(self, turns: Turns) -> None:
        self._turns, self._gate, self._recording = turns, turns.gate, turns.recording
        self.replays = threading.Lock()  # held while it does
        self.waits = threading.Lock()  # held by a replay that had to wait, until it is done

    def replay(self, run: Callable[[], object]) -> None:
        """Call `run` beside other replays. The request was recorded here before, so that each recording since knows of it."""
        with self.replays:
            # Looked at while `replays` is held, for which a recording waits once it can be seen here: one of both sees the other.
            if not self._recording.locked():
                run()
                return
        with self.waits:  # for which the next recording waits: each caller's thread has four, and new threads might come for ever
            while True:
                with self._gate:
                    pass
                with self.replays:
                    if not self._recording.locked():
                        run()
                        return

    def record(self, run: Callable[[], object]) -> None:
        """Call `run` when nobody replays or records; who comes to replay meanwhile waits until it is done."""
        turns = self._turns
        with turns.line:
            turns.pass_by("waits")
            with self._gate, self._recording:
                turns.pass_by("replays")  # none comes back as long as `_recording` is held
                run()


class Recordings(threading.local):
    """Runs of one session by each thread: ONNX Runtime records a graph for each anew, in its third run there (CUDA's provider, 1.31)."""

    RUNS = 4  # one more than are needed: to take a replay for a recording costs a wait
    left = RUNS  # runs of the calling thread that may yet record; counted down by those that do not fail
