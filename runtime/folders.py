"""The user's folders: where caches and data live."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def data_folder() -> Path:
    """Return the folder for data worth keeping for years (the database). Not created here."""
    import platformdirs  # here and below: who names the folders need not wait for it

    return Path(platformdirs.user_data_dir("aivmm", appauthor=False))


def cache_folder() -> Path:
    """Return the folder for what can be made again (compiled blobs). `AIVMM_CACHE` overrides it. Not created here."""
    return Path(cache_path())


def cache_path() -> str:
    """Return the path of `cache_folder`."""
    named = os.environ.get("AIVMM_CACHE")
    if named:
        return named
    if sys.platform == "linux":  # what platformdirs says there, which takes as long to import as a plan to open
        named = os.environ.get("XDG_CACHE_HOME", "")
        return os.path.join(named if named.startswith("/") else Path.home() / ".cache", "aivmm")
    import platformdirs

    return str(platformdirs.user_cache_dir("aivmm", appauthor=False))


class PrivateFolder:
    """A temporary folder that only this user may read, removed by `cleanup`, with the last reference to this, or when the process ends.

    By the process that made it alone: one that was forked from that, and ends, leaves it where it is, which
    `tempfile.TemporaryDirectory` does not.
    """

    def __init__(self) -> None:
        """Make it, empty. Raises OSError where there is no place for it."""
        import tempfile
        import weakref

        self.name = tempfile.mkdtemp(prefix="aivmm-")
        self._remove = weakref.finalize(self, _remove, self.name, os.getpid())

    def cleanup(self) -> None:
        """Remove it with all that is in it, if it is still there."""
        self._remove()


def _remove(name: str, owner: int) -> None:
    import shutil

    if os.getpid() == owner:
        shutil.rmtree(name, ignore_errors=True)
