"""Bundles as files: sign one, and write one as a zip or as a folder. What is written is what was checked."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from aivmm.errors import BundleError, UsageError
from aivmm.runtime.bundle import FAMILY_FILE, PLAN_FILE, Bundle, is_family, unlisted_in, write_folder
from aivmm.runtime.family import Family, open_family
from aivmm.runtime.plan import Plan
from aivmm.runtime.signing import SIGNATURE_FILE, Key, sign, signers

_WHEN = (1980, 1, 1, 0, 0, 0)  # of every member of a zip: equal bundles make equal zips


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checked bundle, of one plan or of several, on disk."""

    path: Path  # as its user calls it
    folder: Path
    root: str  # the file that lists all others
    files: Mapping[str, str]  # name -> SHA-256
    plans: Mapping[str, Plan]  # by the name of its file
    family: Family | None

    @property
    def signers(self) -> list[str]:
        """The ids of the keys that `signature.json` names; nothing is verified."""
        path = self.folder / SIGNATURE_FILE
        return signers(path.read_bytes(), str(self.path / SIGNATURE_FILE)) if path.is_file() else []

    @property
    def all_files(self) -> list[str]:
        """The names of all files: the root, those that it lists, and those that may lie beside it."""
        return [self.root, *sorted(self.files), *sorted(unlisted_in(self.folder, self.root))]

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum((self.folder / PurePosixPath(name)).stat().st_size for name in self.all_files)


@contextmanager
def opened(path: str | Path, *, signed_by: Key | Sequence[Key] | None = None) -> Iterator[Opened]:
    """Open and check the bundle at `path`, a folder or a zip of one, of one plan or of several.

    Raises:
        BundleError: missing, damaged, changed, unsafe, newer than this version, or not signed as required.
        UsageError: a key cannot be read.
    """
    if is_family(path):
        with open_family(path, signed_by=signed_by) as family:
            files = family.family.files
            yield Opened(path=Path(path), folder=family.folder, root=FAMILY_FILE, files=files, plans=family.plans, family=family.family)
        return
    with Bundle.open(path, signed_by=signed_by) as bundle:
        plans = {PLAN_FILE: bundle.plan}
        yield Opened(path=Path(path), folder=bundle.folder, root=PLAN_FILE, files=bundle.plan.files, plans=plans, family=None)


def sign_bundle(path: Path, key: Key, *, passphrase: bytes | None = None) -> str:
    """Sign the bundle at `path` with a private key, and return the key's id. It is checked first; other keys' signatures stay.

    Raises:
        BundleError: the bundle is damaged or unsafe.
        UsageError: the key cannot be used, or the bundle cannot be written.
    """
    with opened(path) as bundle:
        beside = bundle.folder / SIGNATURE_FILE
        earlier = beside.read_bytes() if beside.is_file() else None
        made = sign((bundle.folder / bundle.root).read_bytes(), key, earlier=earlier, passphrase=passphrase)
        with _told(path):
            if path.is_dir():
                _write_whole(beside, partial(_write_text, made.to_json()))
            else:
                _write_text(made.to_json(), beside)
                _write_whole(path, partial(_zip, bundle))
        return made.signatures[-1].key


def export_zip(path: Path, destination: Path) -> Path:
    """Write the bundle at `path` as one zip at `destination`, and return that. Weights are stored as they are: they barely compress.

    Raises:
        BundleError: the bundle is damaged or unsafe.
        UsageError: the destination cannot be written, or is something else than a zip of a bundle.
    """
    if destination.exists() and not (zipfile.is_zipfile(destination) and _holds_bundle(destination)):
        raise UsageError(f"cannot write {destination}: it exists and is no bundle", advice="choose another with -o")
    with opened(path) as bundle, _told(destination):
        _write_whole(destination, partial(_zip, bundle))
    return destination


def export_folder(path: Path, destination: Path) -> Path:
    """Write the bundle at `path` as a folder at `destination`, and return that.

    Raises:
        BundleError: the bundle is damaged or unsafe.
        UsageError: the destination cannot be written, or is something else than a bundle.
    """
    with opened(path) as bundle:
        if destination.exists() and destination.samefile(bundle.folder):
            raise UsageError(f"{path} is that folder already", advice="choose another with -o")

        def texts(listed: dict[str, str]) -> dict[str, str]:
            if listed != dict(bundle.files):
                raise BundleError(f"{path} was changed while it was copied", advice="try again")
            return {name: (bundle.folder / name).read_bytes().decode() for name in (bundle.root, *beside)}  # newlines as they are

        beside = unlisted_in(bundle.folder, bundle.root)
        return write_folder(destination, {name: bundle.folder / PurePosixPath(name) for name in bundle.files}, texts)


def _write_text(text: str, path: Path) -> None:
    path.write_bytes(text.encode())


def _zip(bundle: Opened, destination: Path) -> None:
    with zipfile.ZipFile(destination, "w", zipfile.ZIP_STORED) as archive:
        for name in bundle.all_files:
            member = zipfile.ZipInfo(name, _WHEN)
            member.external_attr = 0o644 << 16
            source = bundle.folder / PurePosixPath(name)
            member.file_size = source.stat().st_size
            with source.open("rb") as file, archive.open(member, "w") as sink:
                shutil.copyfileobj(file, sink, 1 << 20)


def _holds_bundle(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return bool({PLAN_FILE, FAMILY_FILE} & set(archive.namelist()))


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name, and move it to its place: whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
    os.close(descriptor)
    unfinished = Path(name)
    try:
        write(unfinished)
        unfinished.chmod(0o644)  # mkstemp makes private files; a bundle is for sharing
        unfinished.replace(path)
    except BaseException:  # not handled, only cleaned up
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def _told(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {destination}: {error.strerror or error}", advice="choose another with -o") from error
