"""The user's folders: where caches and data live."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the folder for data worth keeping for years (the database). Not created here."""
    return Path(platformdirs.user_data_dir("aivmm", appauthor=False))


def cache_folder() -> Path:
    """Return the folder for what can be made again (compiled blobs). `AIVMM_CACHE` overrides it. Not created here."""
    return Path(os.environ.get("AIVMM_CACHE") or platformdirs.user_cache_dir("aivmm", appauthor=False))
