"""The worker process: `python -m aivmm.probes.worker PARENT_PID`. It does what cannot be trusted, one request at a time.

Requests come as lines of JSON on standard input, answers go as lines of JSON to what was standard output. Whatever native code prints to
standard output goes to standard error instead. It ends when its parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any

from aivmm.errors import AivmmError

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until standard input ends."""
    answers, requests = _take_over_output(), _take_over_input()
    _die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends us when it is done
    from aivmm.probes.operations import OPERATIONS, State

    gc.disable()  # a collection in the middle of a timed block would be measured; workers live for minutes and hold little
    state = State()
    for line in requests:
        request = json.loads(line)
        operation = request.pop("operation")
        if operation == "hello":
            answer: dict[str, Any] = {"result": {"pid": os.getpid()}}
        else:
            answer = _answer(OPERATIONS[operation], state, request)
        answers.write(_encoded(answer))
        answers.flush()
    # Not sys.exit: drivers hang in their destructors, and there is nothing left to save.
    os._exit(0)


def _answer(function: Callable[..., dict[str, Any]], state: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": function(state, **request)}
    except AivmmError as error:
        return {"error": {"kind": _kind(error), "message": error.message, "advice": error.advice}}
    except MemoryError as error:
        return {"error": {"kind": "Unsupported", "message": f"out of memory ({error})"}}
    except Exception:  # noqa: BLE001 - the parent raises it again, with this traceback
        return {"error": {"kind": "bug", "traceback": traceback.format_exc()}}


def _encoded(answer: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(answer)
    except (TypeError, ValueError):  # a plug-in's setting that is no JSON, say
        text = json.dumps({"error": {"kind": "bug", "traceback": traceback.format_exc()}})
    return text.encode() + b"\n"


def _kind(error: AivmmError) -> str:
    known = ("Unsupported", "UsageError", "ModelError")
    return next((each.__name__ for each in type(error).__mro__ if each.__name__ in known), "UsageError")


def _take_over_output() -> IO[bytes]:
    """Keep the real standard output for answers, and let everything else that writes to it write to standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _take_over_input() -> IO[bytes]:
    """Keep the real standard input for requests: whatever else reads it finds it empty, instead of waiting for and eating one."""
    requests = os.fdopen(os.dup(0), "rb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return requests


def _die_with(parent: int) -> None:
    """Make sure that we end with our parent, even when it is killed while we hang in native code."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it died before the call above
        return
    import psutil

    def watch() -> None:
        with contextlib.suppress(psutil.Error):
            psutil.Process(parent).wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
