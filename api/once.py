"""One tuning at a time for one plan: who comes second waits, and uses what the first one made."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from aivmm.probes.machine import lock_path

log = logging.getLogger("aivmm.deploy")


@contextmanager
def alone(place: Path, model: str) -> Iterator[None]:
    """Hold the lock of the plan at `place` among all threads and processes of this machine.

    Workers of a server start together: each of them would tune, and be in the way of what the others measure. Where the file system does
    not lock, or another user's file is in the way, that is what happens, and the log says so. `model` is what the log calls it.
    """
    digest = hashlib.sha256(str(place.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    lock = FileLock(lock_path().with_name(f"aivmm-deploy-{digest}.lock"), mode=0o666)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s is being tuned for by another process or thread: waiting for its plan", model)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        log.warning("cannot lock %s (%s): others that start now tune for %s too", lock.lock_file, error, model)
    try:
        yield
    finally:
        lock.release()
