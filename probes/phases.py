"""What a worker is doing just now, told to its parent, so that each phase of a request has a limit of its own."""

from __future__ import annotations

from collections.abc import Callable

RUN = "run"  # the model is compiled, and runs from here on

_listeners: list[Callable[[str], None]] = []


def listen(tell: Callable[[str], None]) -> None:
    """Let `tell` know of each phase that is entered from now on. A worker process has one listener: the way to its parent."""
    _listeners[:] = [tell]


def enter(phase: str) -> None:
    """Say that `phase` begins. Outside a worker nobody listens."""
    for tell in _listeners:
        tell(phase)
