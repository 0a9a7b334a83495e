"""Unpacks a bundle that is one zip, which comes from a stranger: no bomb, and nothing outside the folder.

A module of its own, imported for a zip only: whoever loads a folder need not wait for what zips need.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from aivmm.errors import BundleError
from aivmm.runtime.folders import PrivateFolder

_MAX_ZIP_RATIO = 200  # weights barely compress; a ratio beyond this is a bomb
_MAX_ZIP_FILES = 10_000
# What `zipfile` raises for damaged archives besides its own BadZipFile: it lets those of its decompressors and of `struct` through.
_UNPACKING = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError, LookupError, RuntimeError, OverflowError,
)  # fmt: skip


def holds(archive: Path, name: str) -> bool:
    """Say whether what lies at `archive` is a zip with that file in it. Nothing is checked."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            return name in zipped.namelist()
    except (OSError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile):
        return False  # whatever is wrong with it, opening it will say


def unzip(archive: Path, *, check_name: Callable[[str, Path], None]) -> PrivateFolder:
    """Return a private temporary folder with what the zip at `archive` holds. `check_name` raises for paths that are not to be written.

    Raises:
        BundleError: it is no zip, damaged, too large, or there is no folder or no room to unpack it.
    """
    if not archive.is_file() or not zipfile.is_zipfile(archive):
        raise BundleError(f"{archive} is neither a bundle folder nor a zip of one")
    try:
        unpacked = PrivateFolder()
    except OSError as error:
        raise BundleError(
            f"{archive} is a zip, and there is no folder to unpack it to ({error.strerror or error})",
            advice="set TMPDIR to a folder that may be written, or unpack it beforehand: aivmm plan export PLAN -o FOLDER",
        ) from error
    try:
        _unzip(archive, Path(unpacked.name), check_name)
    except BaseException:  # not handled, only cleaned up: nothing else knows of the folder
        unpacked.cleanup()
        raise
    return unpacked


def _unzip(archive: Path, folder: Path, check_name: Callable[[str, Path], None]) -> None:
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [each for each in zipped.infolist() if not each.is_dir()]
            if len(members) > _MAX_ZIP_FILES:
                raise BundleError(f"{archive} holds {len(members)} files, more than {_MAX_ZIP_FILES}")
            packed = max(1, archive.stat().st_size)
            total = sum(each.file_size for each in members)
            if total > packed * _MAX_ZIP_RATIO:
                raise BundleError(f"{archive} would unpack to more than {_MAX_ZIP_RATIO} times its size")
            if total > (free := shutil.disk_usage(folder).free):
                problem = f"{archive} unpacks to {total >> 20} MiB, and the folder for that has {free >> 20} MiB left"
                raise BundleError(problem, advice="set TMPDIR to a folder with more room")
            for member in members:
                check_name(member.filename, archive)
                target = folder / PurePosixPath(member.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, target.open("xb") as sink:
                    _copy_at_most(source, sink, member.file_size, archive)
    except _UNPACKING as error:
        raise BundleError(f"{archive} cannot be unpacked ({error})") from error


def _copy_at_most(source: object, sink: object, size: int, archive: Path) -> None:
    left = size
    while chunk := source.read(1 << 20):  # type: ignore[attr-defined]
        left -= len(chunk)
        if left < 0:  # the header lied about the size
            raise BundleError(f"{archive} holds more data than it declares")
        sink.write(chunk)  # type: ignore[attr-defined]
