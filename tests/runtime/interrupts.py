"""Ctrl-C at each instruction of Python's, one after the other: what it must leave behind is tested without waiting for it to hit."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any


@contextmanager
def interrupts(handler: Callable[..., object]) -> Iterator[None]:
    """Have `handler` called for Ctrl-C. On the main thread."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted_at(step: int, call: Callable[[], object], of: Callable[[CodeType], bool]) -> bool:
    """Call, and have Ctrl-C come before the instruction `step` of the code that is meant; return whether it has so many.

    The interrupt is only made pending then, in C: it is raised where the interpreter next looks for one, and nowhere else.
    """
    traces = ctypes.PYFUNCTYPE(None, ctypes.py_object, ctypes.py_object, ctypes.py_object)
    pend: Any = traces(("PyErr_SetInterrupt", ctypes.pythonapi))
    nothing: Any = traces(("Py_IsInitialized", ctypes.pythonapi))
    steps, raised = 0, 0

    def once(*_: object) -> None:
        nonlocal raised
        raised += 1
        if raised == 1:
            raise KeyboardInterrupt

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if not of(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        if steps < step:
            return trace
        sys.settrace(nothing)
        above = frame.f_back
        while above is not None:  # a function of Python's, as this one is, would be where the interrupt is raised
            if above.f_trace is not None:
                above.f_trace = pend
            above = above.f_back
        return pend

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # from 3.12 on, who asks for instructions the first time in a process gets them the next time
    with interrupts(once):
        try:
            sys.settrace(trace)
            call()
            sys.settrace(before)  # what was pending last is raised behind this call
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
    assert bool(raised) == (steps >= step)
    return steps >= step
