"""The console scripts. Kept apart from the commands, so that a broken or partial installation still answers in one line."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run `aivmm`; exits."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        from aivmm.tuner.cli import run
    except ImportError as error:
        name = error.name or str(error)
        if name.startswith("aivmm"):
            raise  # a bug of ours
        print(
            f"aivmm: the package {name!r} is missing, so nothing can be tuned; install all of aivmm with: pip install aivmm",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    raise SystemExit(run(given))


def main_tune() -> None:
    """Run `aivmm-tune`, which is `aivmm tune`."""
    main(["tune", *sys.argv[1:]])
