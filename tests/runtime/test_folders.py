"""Where caches lie: said without the library on Linux, and by its rules."""

from __future__ import annotations

import sys
from pathlib import Path

import platformdirs
import pytest

from aivmm.runtime.folders import cache_folder


@pytest.mark.parametrize("named", [None, "", "/var/cache/mine", "/", "relative/folder", " /odd", "~/x"])
def test_the_cache_lies_where_platformdirs_says(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    monkeypatch.delenv("AIVMM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert cache_folder() == Path(platformdirs.user_cache_dir("aivmm", appauthor=False))


def test_the_cache_lies_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIVMM_CACHE", "some/where")
    assert cache_folder() == Path("some/where")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere platformdirs answers")
def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("AIVMM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(RuntimeError, match="home"):
        cache_folder()
