"""Keeping standard output for results: native libraries that print there whatever they are told."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def native_stdout_to_stderr() -> Iterator[None]:
    """Send what native code prints to standard output to standard error instead.

    HiGHS 1.12 prints a line of debugging that no option silences (jump-dev/HiGHS.jl#312), which would break `--json`. Other threads that
    print in the meantime are sent there too.
    """
    try:
        kept = os.dup(1)
    except OSError:  # standard output is closed, and nothing can reach it
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        # The C library keeps what was printed to a pipe in a buffer of its own, to be written whenever it likes.
        (ctypes.cdll.ucrtbase if sys.platform == "win32" else ctypes.CDLL(None)).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
