"""Bundles, spoilt and packed."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aivmm.errors import BundleError
from aivmm.runtime.bundle import Bundle

links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")


def zipped(folder: Path, destination: Path, *, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """Pack a bundle."""
    with zipfile.ZipFile(destination, "w", compression) as archive:
        for each in sorted(folder.rglob("*")):
            archive.write(each, each.relative_to(folder).as_posix())
    return destination


def refused(path: Path, match: str | None = None) -> None:
    """Open what has to be refused, in one line, without leaving anything behind."""
    before = snapshot(path.parent)
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(path).close()
    assert "\n" not in str(caught.value)
    assert snapshot(path.parent) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return all that lies below a folder."""
    return {str(each): each.read_bytes() if each.is_file() else None for each in sorted(folder.rglob("*"))}


def edit_plan(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what `plan.json` says, behind the back of its writer."""
    plan = json.loads((bundle / "plan.json").read_text())
    change(plan)
    (bundle / "plan.json").write_text(json.dumps(plan))


def list_as(bundle: Path, name: str) -> None:
    """List one more file, with the digest of a file that does exist."""
    edit_plan(bundle, lambda plan: plan["files"].update({name: next(iter(plan["files"].values()))}))


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
