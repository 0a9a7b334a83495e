"""The plan bundle on disk: a folder (or the same tree in one zip) that comes from a stranger until it is checked.

Nothing in a bundle is executable Python or a pickle. Every file but `plan.json` is listed there with its SHA-256; `report.html` beside it
is the one file that may be unlisted, since people put it there to read and the engine never opens it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType

from aivmm.errors import BundleError, UsageError
from aivmm.runtime.plan import Plan, parse_plan

PLAN_FILE = "plan.json"
IGNORED = frozenset({"report.html"})
_MAX_PLAN_BYTES = 64 << 20
_MAX_ZIP_RATIO = 200  # weights barely compress; a ratio beyond this is a bomb
_MAX_ZIP_FILES = 10_000
# What `zipfile` raises for damaged archives besides its own BadZipFile: it lets those of its decompressors and of `struct` through.
_UNPACKING = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError, LookupError, RuntimeError, OverflowError,
)  # fmt: skip


class Bundle:
    """An opened and checked bundle. A zip is unpacked into a private temporary folder, which `close` removes."""

    def __init__(self, folder: Path, plan: Plan, *, unpacked: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.folder = folder
        self.plan = plan
        self._unpacked = unpacked

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open and check the bundle at `path`.

        Raises:
            BundleError: missing, damaged, changed, unsafe, or newer than this version.
        """
        path = Path(path)
        try:
            return cls._open(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror or error})") from error

    @classmethod
    def _open(cls, path: Path) -> Bundle:
        if path.is_dir():
            return cls(path, _check(path))
        if not path.exists():
            raise BundleError(f"{path} does not exist", advice="make one with aivmm-tune MODEL -o PATH")
        if not path.is_file() or not zipfile.is_zipfile(path):
            raise BundleError(f"{path} is neither a bundle folder nor a zip of one")
        unpacked = tempfile.TemporaryDirectory(prefix="aivmm-")
        try:
            folder = Path(unpacked.name)
            _unzip(path, folder)
            return cls(folder, _check(folder, shown=path), unpacked=unpacked)
        except BaseException:  # not handled, only cleaned up: nothing else knows of the folder
            unpacked.cleanup()
            raise

    def file(self, name: str) -> Path:
        """Return the path of a listed file."""
        if name not in self.plan.files:
            raise BundleError(f"{name!r} is not a file of this bundle")
        return self.folder / PurePosixPath(name)

    def close(self) -> None:
        """Remove what was unpacked."""
        if self._unpacked is not None:
            self._unpacked.cleanup()
            self._unpacked = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _check(folder: Path, *, shown: Path | None = None) -> Plan:
    """Return the checked plan of the bundle in `folder`. `shown` is what its user calls it, when that is a zip."""
    shown = shown or folder
    plan_path = folder / PLAN_FILE
    if not plan_path.is_file() or plan_path.is_symlink():
        raise BundleError(f"{shown} holds no {PLAN_FILE}", advice="is this a folder that aivmm-tune wrote?")
    if plan_path.stat().st_size > _MAX_PLAN_BYTES:
        raise BundleError(f"{shown / PLAN_FILE} is larger than {_MAX_PLAN_BYTES >> 20} MiB")
    plan = parse_plan(plan_path.read_bytes(), str(shown / PLAN_FILE))
    for name in plan.files:
        _check_name(name, shown)
    present = _walk(folder, shown)
    unlisted = sorted(present - set(plan.files) - {PLAN_FILE} - IGNORED)
    if unlisted:
        raise BundleError(f"{shown} holds {unlisted[0]!r}, which its plan does not list", advice="remove it, or tune again")
    missing = sorted(set(plan.files) - present)
    if missing:
        raise BundleError(f"{shown} lacks {missing[0]!r}", advice="copy the bundle again, whole")
    for name, expected in plan.files.items():
        if file_sha256(folder / PurePosixPath(name)) != expected:
            raise BundleError(
                f"{shown / name} was changed: its SHA-256 is not the one in the plan", advice="copy the bundle again, or tune again"
            )
    return plan


def _check_name(name: str, shown: Path) -> None:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or any(each in name for each in "\\:\0") or str(path) != name or ".." in path.parts:
        raise BundleError(f"{shown} lists {name!r}, which is not a plain path inside the bundle")


def _walk(folder: Path, shown: Path) -> set[str]:
    """Return the files below `folder`. Links of both kinds are refused: the runtimes read hard-linked external data without a question."""
    found: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=False):
        for each in (*folders, *files):
            path = Path(root) / each
            status = path.lstat()
            name = path.relative_to(folder).as_posix()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{shown} holds {name!r}, which is a link or a special file")
            if status.st_nlink > 1 and name not in IGNORED:
                raise BundleError(
                    f"{shown} holds {name!r}, which is hard-linked from elsewhere", advice="copy the bundle instead of linking it"
                )
            found.add(name)
    return found


def _unzip(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [each for each in zipped.infolist() if not each.is_dir()]
            if len(members) > _MAX_ZIP_FILES:
                raise BundleError(f"{archive} holds {len(members)} files, more than {_MAX_ZIP_FILES}")
            packed = max(1, archive.stat().st_size)
            if sum(each.file_size for each in members) > packed * _MAX_ZIP_RATIO:
                raise BundleError(f"{archive} would unpack to more than {_MAX_ZIP_RATIO} times its size")
            for member in members:
                _check_name(member.filename, archive)
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


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bundle(destination: Path, plan: Plan, files: Mapping[str, Path]) -> Path:
    """Write a bundle at `destination`, whole or not at all. `plan.files` is filled in here from `files` (name in the bundle -> source).

    An earlier bundle there is replaced; a folder that is not a bundle is left alone.

    Raises:
        UsageError: the destination cannot be written, or is something else than a bundle.
    """
    destination = destination.absolute()
    check_destination(destination)
    try:
        return _write(destination, plan, files)
    except OSError as error:
        raise UsageError(
            f"cannot write the plan to {destination}: {error.strerror or error}", advice="choose another with -o DIR"
        ) from error


def _write(destination: Path, plan: Plan, files: Mapping[str, Path]) -> Path:
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        listed: dict[str, str] = {}
        for name, source in sorted(files.items()):
            _check_name(name, destination)
            target = staging / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            listed[name] = file_sha256(target)
        text = plan.model_copy(update={"files": listed}).to_json()
        parse_plan(text, PLAN_FILE)  # what we write, we can read
        (staging / PLAN_FILE).write_text(text, encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp makes private folders; a bundle is for sharing
        _swap_in(staging, destination)
    except BaseException:  # not handled, only cleaned up: whole or not at all
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return destination


def _swap_in(staging: Path, destination: Path) -> None:
    """Put `staging` in the place of `destination`. What was there stays there unless the new one is in place."""
    if not destination.exists():
        staging.rename(destination)
        return
    # A sibling, since a folder that may not be written can be renamed where it is but not moved into another.
    retired = Path(tempfile.mkdtemp(prefix=f".{destination.name}-old-", dir=destination.parent))
    retired.rmdir()
    destination.rename(retired)
    try:
        staging.rename(destination)
    except BaseException:  # not handled: the old bundle goes back first
        retired.rename(destination)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def check_destination(destination: Path) -> None:
    """Raise UsageError unless a bundle can be written at `destination`; asked before an hour is spent on measuring."""
    parent = destination.absolute().parent
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise UsageError(f"cannot write the plan to {destination}: it exists and is not a folder", advice="choose another with -o DIR")
    if destination.is_dir() and any(destination.iterdir()) and not _is_all_ours(destination):
        raise UsageError(f"cannot write the plan to {destination}: the folder holds other things", advice="choose another with -o DIR")
    if not parent.is_dir():
        raise UsageError(
            f"cannot write the plan to {destination}: {parent} does not exist", advice="create it, or choose another with -o DIR"
        )
    try:
        probe = tempfile.mkdtemp(prefix=".aivmm-", dir=parent)
    except OSError as error:
        raise UsageError(
            f"cannot write the plan to {destination}: {error.strerror or error}", advice="choose another with -o DIR"
        ) from error
    Path(probe).rmdir()


def _is_all_ours(folder: Path) -> bool:
    """Say whether `folder` holds a bundle, of any version and perhaps incomplete, and nothing else: replacing it then destroys nothing."""
    try:
        plan = json.loads((folder / PLAN_FILE).read_bytes())
        files = set(plan["files"]) if "schema" in plan else set()
        present = {each.relative_to(folder).as_posix() for each in folder.rglob("*") if not each.is_dir() or each.is_symlink()}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(files) and present <= files | {PLAN_FILE} | IGNORED
