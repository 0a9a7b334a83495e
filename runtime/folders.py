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
