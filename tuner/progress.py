"""What a user sees while a tuning works: a live line on a terminal, plain lines elsewhere, nothing with `-q`. Always on standard error."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_PLAIN_EVERY_S = 5.0  # a plain log says something at most this often within a phase


class Progress(Protocol):
    """What the conductor reports."""

    def phase(self, text: str) -> None:
        """A new phase starts."""

    def detail(self, text: str, *, best: str = "", left_s: float | None = None) -> None:
        """What is measured now, the best so far, and the seconds left of the budget, which may be spent: not all that is done is in it."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def close(self) -> None:
        """The work is over."""


class Silent:
    """Says nothing."""

    def phase(self, text: str) -> None:
        """Ignore."""

    def detail(self, text: str, *, best: str = "", left_s: float | None = None) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def close(self) -> None:
        """Nothing to do."""


class Plain:
    """Plain lines, for logs."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._last = 0.0

    def phase(self, text: str) -> None:
        """Print the phase."""
        self._print(text)

    def detail(self, text: str, *, best: str = "", left_s: float | None = None) -> None:
        """Print a detail now and then."""
        if time.perf_counter() - self._last >= _PLAIN_EVERY_S:
            self._print("  " + _joined(text, best, left_s))

    def note(self, text: str) -> None:
        """Print the note."""
        self._print(f"note: {text}")

    def close(self) -> None:
        """Nothing to do."""

    def _print(self, text: str) -> None:
        self._last = time.perf_counter()
        print(f"[{self._last - self._started:5.1f} s] {text}", file=sys.stderr, flush=True)


class Rich:
    """A live line with a spinner; phases and notes stay above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.perf_counter()
        self._phase = ""
        self._phase_started = self._started
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._live.start()

    def phase(self, text: str) -> None:
        """Leave a line for the phase that ends, and show the new one."""
        self._leave_line()
        self._phase, self._phase_started = text, time.perf_counter()
        self._show("")

    def detail(self, text: str, *, best: str = "", left_s: float | None = None) -> None:
        """Show the detail."""
        self._show(_joined(text, best, left_s))

    def note(self, text: str) -> None:
        """Leave a line for the note."""
        self._console.print(Text("  ! " + text, style="yellow"))

    def close(self) -> None:
        """Leave a line for the last phase and stop."""
        self._leave_line()
        self._phase = ""
        self._live.stop()

    def _leave_line(self) -> None:
        if self._phase:
            took = time.perf_counter() - self._phase_started
            self._console.print(Text.assemble((f"{took:6.1f} s  ", "dim"), self._phase))

    def _show(self, detail: str) -> None:
        # Text and not markup: what is shown may hold names from a model.
        row = Table.grid(padding=(0, 1))
        row.add_row(Spinner("line"), Text(self._phase), Text(detail, style="dim"))
        self._live.update(row)


def _joined(text: str, best: str, left_s: float | None) -> str:
    parts = [text, best]
    if left_s is not None:
        parts.append(f"{left_s:.0f} s of the budget left" if left_s >= 0.5 else "the budget is spent")
    return ", ".join(part for part in parts if part)


def make_progress(*, quiet: bool) -> Progress:
    """Return what fits: nothing, plain lines, or a live display."""
    if quiet:
        return Silent()
    console = Console(stderr=True)
    return Rich(console) if console.is_terminal else Plain()
