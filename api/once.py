"""One tuning at a time for one plan: who comes second waits, and uses what the first one made, or is told why it made none."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from aivmm.errors import AivmmError, BundleError, DatabaseError, Infeasible, ModelError, Unsupported, UsageError
from aivmm.probes.machine import lock_path

log = logging.getLogger("aivmm.deploy")

_KINDS = {each.__name__: each for each in (UsageError, ModelError, BundleError, DatabaseError, Infeasible, Unsupported)}


@dataclass(frozen=True, slots=True)
class Turn:
    """The time in which one may tune. `note` is where it says that it failed; `since` is when it began to wait, in seconds of the epoch."""

    asked: str  # what is asked for, to the last option: a tuning for anything else may do what this one could not
    note: Path | None
    since: float

    def failed(self, error: AivmmError) -> None:
        """Leave word, for those who wait, of why there is no plan."""
        if self.note is None:
            return
        told = {"asked": self.asked, "at": time.time(), "kind": type(error).__name__, "message": error.message, "advice": error.advice}
        try:
            self.note.write_text(json.dumps(told))
        except OSError as problem:
            log.warning("cannot write %s (%s): those who wait tune, too", self.note, problem)

    def failure(self) -> AivmmError | None:
        """Return why a tuning for the same failed while this one waited; None where none did."""
        try:
            told = json.loads(self.note.read_text()) if self.note is not None else {}
            if told.get("asked") != self.asked or told["at"] < self.since:
                return None
            return _KINDS.get(told["kind"], AivmmError)(str(told["message"]), advice=str(told["advice"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or cut off when its writer was killed
            return None

    def succeeded(self) -> None:
        """Take away what an earlier one said."""
        if self.note is not None:
            try:
                self.note.unlink(missing_ok=True)
            except OSError as problem:
                log.warning("cannot remove %s (%s)", self.note, problem)


@contextmanager
def alone(place: Path, model: str, asked: str) -> Iterator[Turn]:
    """Hold the lock of the plan at `place` among all threads and processes of this machine.

    Workers of a server start together: each of them would tune, and be in the way of what the others measure. Where nothing locks (a file
    system that does not, another user's file in the way), that is what happens, and the log says so. `model` is what the log calls it,
    `asked` tells one request from another.
    """
    since = time.time()
    lock = _locked(place, model)
    try:
        yield Turn(asked, None if lock is None else Path(lock.lock_file).with_suffix(".failed"), since)
    finally:
        if lock is not None:
            lock.release()


def _locked(place: Path, model: str) -> FileLock | None:
    for path in _lock_files(place):
        lock = FileLock(path, mode=0o666)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.warning("%s is being tuned for by another process or thread: waiting for its plan", model)
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            log.warning("cannot lock %s (%s)", path, error)
        else:
            return lock
    log.warning("others that start now tune for %s, too", model)
    return None


def _lock_files(place: Path) -> Iterator[Path]:
    """Yield where the lock of a plan may lie: beside it, however its path is spelled, else in the folder for temporary files.

    Other processes may have another folder for those. The machine's name is in it: on a shared folder others tune for themselves.
    """
    real = Path(os.path.realpath(place))
    yield real.with_name(f".{real.name}.{platform.node()}.lock")
    digest = hashlib.sha256(str(real).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    yield lock_path().with_name(f"aivmm-deploy-{digest}.lock")
