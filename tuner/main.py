"""The console scripts. Kept apart from the commands, so that a broken or partial installation still answers in one line."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading

INTERRUPTED = 130  # exit status, as shells have it: 128 and the number of the signal


def main(arguments: list[str] | None = None) -> None:
    """Run `aivmm`; exits. Without `arguments` the process is ours, and ends with this."""
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None:
        atexit.register(_end_if_interrupted)  # the first to be registered is the last to be called
    try:
        status = _run(given)
    except (KeyboardInterrupt, ImportError) as error:  # while modules are read
        if not _interrupted(error):
            raise
        status = INTERRUPTED
        _stop_at_once_from_now_on()
        print("aivmm: interrupted", file=sys.stderr)
        if "--json" in given:
            print('{"schema": 1, "error": {"message": "interrupted", "advice": ""}}')
    if status == INTERRUPTED:
        _stop_at_once_from_now_on()
        with contextlib.suppress(OSError):  # whoever reads has read enough
            sys.stdout.flush()
    raise SystemExit(status)


def _stop_at_once_from_now_on() -> None:
    """All is cleaned up: who presses Ctrl-C once more while Python ends wants no traceback of that, and the status is what it is."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop)


def _stop(*_: object) -> None:
    os._exit(INTERRUPTED)


def _end_if_interrupted() -> None:
    """End here, before modules and native libraries are taken down: that takes a while, and Ctrl-C in it would kill with another status."""
    if signal.getsignal(signal.SIGINT) is _stop:
        os._exit(INTERRUPTED)


def _interrupted(error: BaseException | None) -> bool:
    """Say whether Ctrl-C is at the root of an error: native modules make an ImportError of what interrupts their first import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _run(given: list[str]) -> int:
    try:
        from aivmm.tuner.cli import run
    except ImportError as error:
        if _interrupted(error):
            raise
        name = error.name or str(error)
        if name.startswith("aivmm"):
            raise  # a bug of ours
        print(
            f"aivmm: the package {name!r} is missing, so nothing can be tuned; install all of aivmm with: pip install aivmm",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    return run(given)


def main_tune() -> None:
    """Run `aivmm-tune`, which is `aivmm tune`."""
    atexit.register(_end_if_interrupted)
    main(["tune", *sys.argv[1:]])
