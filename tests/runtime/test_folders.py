"""Where caches lie, said without the library on Linux, and by its rules; and folders that go with the process that made them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from aivmm.runtime.folders import PrivateFolder, cache_folder


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


_FORKS = """
import os, sys
from aivmm.runtime.folders import PrivateFolder
kept = PrivateFolder()
if os.fork() == 0:
    kept.cleanup()
    sys.exit(0)
os.wait()
print(kept.name, os.path.isdir(kept.name))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_process_leaves_the_folders_of_its_parent_which_removes_them() -> None:
    said = subprocess.run([sys.executable, "-c", _FORKS], capture_output=True, text=True, check=True, timeout=60).stdout
    name, _, there = said.strip().rpartition(" ")
    assert there == "True" and not Path(name).exists()


def test_a_private_folder_goes_with_its_last_reference() -> None:
    folder = PrivateFolder()
    name = Path(folder.name)
    (name / "some").write_text("thing")
    del folder
    assert not name.exists()
