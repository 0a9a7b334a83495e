"""A small process that outlives us by a moment: when we are killed, it ends what our workers themselves have started.

A worker dies with its parent because it asks the kernel for that, but the kernel forgets the wish in whatever the worker forks. So each
worker leads a process group, and the guard, which reads from a pipe that only we hold open, ends the groups when that pipe ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

_CODE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
groups = set()
for line in sys.stdin.buffer:
    group = int(line)
    groups.add(group) if group > 0 else groups.discard(-group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""

_lock = threading.Lock()
_pipe: int | None = (
    None  # where the guard is told; a number and no file, since it stays open until the kernel closes it with all else of ours
)


def watch(pid: int) -> None:
    """End the process group that `pid` leads when this process ends, however it ends. Does nothing on Windows, which has no such groups."""
    _tell(pid)


def forget(pid: int) -> None:
    """Leave the group alone again: it has ended, and its number may be given to somebody else."""
    _tell(-pid)


def _tell(number: int) -> None:
    global _pipe
    if sys.platform == "win32":
        return
    with _lock, contextlib.suppress(OSError):  # without a guard, only what a worker has forked would outlive us
        if _pipe is None:
            _pipe = _start()
        os.write(_pipe, b"%d\n" % number)


def _start() -> int:
    """Start the guard, and return the pipe's end for us alone: no process that we start inherits it."""
    theirs, ours = os.pipe()
    try:
        # In a session of its own: what ends the whole group of a terminal must not end the one who cleans up.
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except BaseException:  # not handled, only cleaned up: without a guard nobody else closes its end
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    # Never waited for: it ends after us, and a warning about that would help nobody.
    guard.returncode = 0
    return ours
