"""Ctrl-C: once to finish with what there is, twice to stop now."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

LINE = "finishing: the best plan so far will be proven and written; press Ctrl-C again to stop now"


class Interrupts:
    """While entered, the first SIGINT only sets `asked`; the second raises KeyboardInterrupt in the main thread, as do all later ones.

    What loops asks `asked` between two probes: nothing that is being measured is disturbed, and workers ignore the signal themselves.
    Outside the main thread no handler can be installed: there `asked` stays False, and Ctrl-C does what it did before. A program that
    ignores SIGINT (as `nohup` and `&` in scripts arrange) is left alone as well.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._count = 0
        self._words: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None
        self._before: Callable[[int, FrameType | None], object] | int | signal.Handlers | None = None

    @property
    def asked(self) -> bool:
        """True when the user has asked for an end."""
        return self._count > 0

    def __enter__(self) -> Interrupts:
        self._before = None
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
            return self
        self._teller = threading.Thread(target=self._say, name="aivmm-interrupts", daemon=True)
        self._teller.start()
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
        if self._teller is not None:
            self._words.put(None)
            self._teller.join(timeout=1.0)
            self._teller = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            raise KeyboardInterrupt
        # Whatever lock the main thread holds just now, a display's say, it would hold for ever if we asked for it here: another thread
        # prints. SimpleQueue is the one queue whose put may be interrupted by itself.
        self._words.put(LINE)

    def _say(self) -> None:
        while (text := self._words.get()) is not None:
            self._tell(text)
