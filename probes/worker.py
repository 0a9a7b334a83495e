"""The worker process: `python -m aivmm.probes.worker PARENT_PID`. It does what cannot be trusted, one request at a time.

Requests come as lines of JSON on standard input, answers go as lines of JSON to what was standard output. Whatever native code prints to
standard output goes to standard error instead. It ends when its parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Any

from aivmm.errors import AivmmError
from aivmm.probes import phases

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until standard input ends."""
    answers, requests = _take_over_output(), _take_over_input()
    _die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends us when it is done
    _say_where_we_end()
    _be_the_first_to_go()
    from aivmm.probes.operations import OPERATIONS
    from aivmm.probes.runners import State

    gc.disable()  # a collection in the middle of a timed block would be measured; workers live for minutes and hold little
    state = State()
    for line in requests:
        request = json.loads(line)
        number, operation = request.pop("id"), request.pop("operation")

        def send(message: Mapping[str, Any], number: int = number) -> None:
            answers.write(_encoded({"id": number, **message}))
            answers.flush()

        def enter(phase: str, send: Callable[[Mapping[str, Any]], None] = send) -> None:
            send({"phase": phase})

        phases.listen(enter)
        if operation == "hello":
            answer: dict[str, Any] = {"result": {"pid": os.getpid()}}
        else:
            answer = _answer(OPERATIONS[operation], state, request)
        send(answer)
    # Not sys.exit: drivers hang in their destructors, and there is nothing left to save.
    os._exit(0)


def _answer(function: Callable[..., dict[str, Any]], state: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": function(state, **request)}
    except AivmmError as error:
        return {"error": {"kind": _kind(error), "message": error.message, "advice": error.advice}}
    except MemoryError as error:
        return {"error": {"kind": "Unsupported", "message": f"out of memory ({error})"}}
    except Exception as error:  # noqa: BLE001 - the parent raises it again, with this traceback
        return {"error": _broken(error)}


def _broken(error: Exception) -> dict[str, str]:
    """Describe an exception that should not have come: a plug-in's costs one probe, one of ours is a bug."""
    text = "".join(traceback.format_exception(error))
    last = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if _plug_in_modules() & {frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}:
        return {"kind": "plug-in", "message": f"failed in its plug-in ({last})", "traceback": text}
    return {"kind": "bug", "traceback": text}


def _plug_in_modules() -> set[str]:
    """Return the top-level modules of the installed plug-ins, less ours."""
    return {entry.module.partition(".")[0] for entry in entry_points(group="aivmm.backends")} - {"aivmm"}


def _encoded(answer: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(answer, default=_plain)
    except (TypeError, ValueError) as error:  # a plug-in's setting that is no JSON: ours are
        message = f"answered with something that cannot be sent ({error})"
        text = json.dumps({"id": answer["id"], "error": {"kind": "plug-in", "message": message, "traceback": traceback.format_exc()}})
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    """Return a NumPy scalar as Python's own; runtimes read settings back as such."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no JSON")


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


def _say_where_we_end() -> None:
    """Print the Python stack when we crash, and when our parent asks before it stops us: in native code, nothing else could."""
    faulthandler.enable(all_threads=False)
    if sys.platform != "win32":
        faulthandler.register(signal.SIGUSR1)


def _be_the_first_to_go() -> None:
    """Ask the system to end us, and not the user's programs, should memory run out faster than our parent looks."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


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
