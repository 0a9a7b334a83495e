"""The console scripts. Kept apart from the commands, so that a broken or partial installation still answers in one line."""

from __future__ import annotations

import signal
import sys
import threading

INTERRUPTED = 130  # exit status, as shells have it: 128 and the number of the signal


def main(arguments: list[str] | None = None) -> None:
    """Run `aivmm`; exits."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status = _run(given)
    except (KeyboardInterrupt, ImportError) as error:  # while modules are read
        if not _interrupted(error):
            raise
        print("aivmm: interrupted", file=sys.stderr)
        if "--json" in given:
            print('{"schema": 1, "error": {"message": "interrupted", "advice": ""}}')
        status = INTERRUPTED
    if status == INTERRUPTED and threading.current_thread() is threading.main_thread():
        # All is cleaned up: who presses it once more while Python ends wants no traceback of that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise SystemExit(status)


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
    main(["tune", *sys.argv[1:]])
