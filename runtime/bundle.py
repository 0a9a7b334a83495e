"""The plan bundle on disk: a folder (or the same tree in one zip) that comes from a stranger until it is checked.

Nothing in a bundle is executable Python or a pickle. Every file but `plan.json` is listed there with its SHA-256; `report.html` beside it
may be unlisted, since people put it there to read and the engine never opens it, and so may `signature.json`, which signs `plan.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os.path import isdir, isfile, join  # where the first answer waits: a path's methods take three to eight times as long when first asked
from pathlib import Path, PurePosixPath
from types import TracebackType

from aivmm.errors import BundleError, UsageError
from aivmm.runtime.folders import PrivateFolder
from aivmm.runtime.plan import Plan, parse_plan, require_keys_once
from aivmm.runtime.reading import Reading, file_sha256
from aivmm.runtime.signing import MAX_SIGNATURE_BYTES, SIGNATURE_FILE, Key, require_signature

PLAN_FILE = "plan.json"
FAMILY_FILE = "family.json"  # in its place where a bundle holds several plans; see `aivmm.runtime.family`
REPORT_FILE = "report.html"
UNLISTED = frozenset({REPORT_FILE, SIGNATURE_FILE})  # may lie beside the plan without being listed in it
_MAX_PLAN_BYTES = 64 << 20
First = Callable[[bytes], Callable[[], object] | None]


def nothing(text: bytes) -> None:
    """Have nothing done first."""


class Bundle:
    """An opened and checked bundle. A zip is unpacked into a private temporary folder, which `close` removes."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        unpacked: PrivateFolder | None = None,
        reading: Reading | None = None,
        text: bytes | None = None,
        shared: bool = False,
        size: int = 0,
    ) -> None:
        """Take what `open` found. A `shared` reading is somebody else's to end; `size` is that of all files in bytes, where it is known."""
        self.folder = folder
        self.size = size
        self.plan = plan
        self._unpacked = unpacked
        self._reading = reading
        self._text = text
        self._shared = shared

    @property
    def digest(self) -> str:
        """The SHA-256 of the plan's text, which names the contents of all files: it lists their own."""
        return hashlib.sha256(self._text or self.plan.to_json().encode()).hexdigest()  # to write it anew takes milliseconds

    @classmethod
    def open(
        cls, path: str | Path, *, signed_by: Key | Sequence[Key] | None = None, read_later: bool = False, first: First = nothing
    ) -> Bundle:
        """Open and check the bundle at `path`. `signed_by`: public keys (PEM), one of which must have signed it.

        With `read_later` the contents of the files are not checked yet, and no file may be used before `verify` returned. `first` is told
        the plan's text before anything else is made of it, and returns what the thread that will read, which is started by then, is to do
        first, if anything.

        Raises:
            BundleError: missing, damaged, changed, unsafe, newer than this version, or not signed as required.
            UsageError: a key cannot be read.
        """
        path = Path(path)
        try:
            bundle = cls._open(path, signed_by, first)
            if not read_later:
                try:
                    bundle.verify()
                except BaseException:  # not handled, only cleaned up: nobody else could close it
                    bundle.close()
                    raise
            return bundle
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror or error})") from error

    @classmethod
    def _open(cls, path: Path, signed_by: Key | Sequence[Key] | None, first: First) -> Bundle:
        folder, unpacked = unpack(path)
        reading = Reading()
        try:
            if first is not nothing:
                reading.get_ready()
            text = read_root(folder, PLAN_FILE, path, signed_by=signed_by)
            if first is not nothing:
                reading.do_first(first(text))
            plan = parse_plan(text, join(path, PLAN_FILE), keys_later=True)
            size = check_listing(folder, plan.files, root=PLAN_FILE, shown=path)
            keys = partial(require_keys_once, text, join(path, PLAN_FILE))
            reading.of(folder, plan.files, plan.model_files(), path, size=size, besides=keys)
            return cls(folder, plan, unpacked=unpacked, reading=reading, text=text, size=size)
        except BaseException:  # not handled, only cleaned up: nothing else knows of the folder
            reading.end()
            if unpacked is not None:
                unpacked.cleanup()
            raise

    def file(self, name: str) -> Path:
        """Return the path of a listed file."""
        if name not in self.plan.files:
            raise BundleError(f"{name!r} is not a file of this bundle")
        return Path(join(self.folder, *name.split("/")))

    def start_reading(self, jobs: Iterable[Callable[[], object]] = ()) -> None:
        """Have the contents of the files checked on a thread meanwhile, unless that has begun, after some `jobs`; see `Reading.start`."""
        if self._reading is not None:
            self._reading.start(jobs)

    def runtime_awake(self) -> bool:
        """Say whether nothing is done `first` any more; see `open`."""
        return self._reading is None or self._reading.first_done

    def verify(self) -> None:
        """Return when all files are known to be those that the plan lists.

        Raises:
            BundleError: one was changed, cannot be read, or holds compiled code.
        """
        if self._reading is not None:
            self._reading.wait()

    @property
    def hashing(self) -> dict[str, float]:
        """The seconds it took to read and hash the files, and those of them that loading had to wait for; 0 where someone else did it."""
        reading = self._reading
        return {"hash_s": reading.seconds if reading else 0.0, "hash_wait_s": reading.waited_s if reading else 0.0}

    def close(self) -> None:
        """Remove what was unpacked."""
        if self._reading is not None and not self._shared:
            self._reading.end()
        if self._unpacked is not None:
            self._unpacked.cleanup()
            self._unpacked = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def is_family(path: str | Path) -> bool:
    """Say whether what lies at `path` looks like a bundle of several plans. Nothing is checked yet."""
    if isdir(path):
        return isfile(join(path, FAMILY_FILE))
    from aivmm.runtime.unzip import holds  # here, as below: a folder need not wait for what zips need

    return holds(Path(path), FAMILY_FILE)


def unpack(path: Path) -> tuple[Path, PrivateFolder | None]:
    """Return the folder of the bundle at `path`, nothing in it checked yet, and the temporary one that it is when `path` is a zip."""
    if isdir(path):
        return path, None
    if not path.exists():
        raise BundleError(f"{path} does not exist", advice="make one with aivmm-tune MODEL -o PATH")
    from aivmm.runtime.unzip import unzip

    unpacked = unzip(path, check_name=_check_name)
    return Path(unpacked.name), unpacked


def read_root(folder: Path, root: str, shown: Path, *, signed_by: Key | Sequence[Key] | None = None) -> bytes:
    """Return the bytes of the file that lists all others; with `signed_by` only when its signature is by one of these keys."""
    text = _read_beside(folder, root, _MAX_PLAN_BYTES, shown)
    if text is None:
        several = root == PLAN_FILE and (folder / FAMILY_FILE).is_file()
        advice = "it holds several plans: load it with aivmm.load_plan" if several else "is this a folder that aivmm-tune wrote?"
        raise BundleError(f"{shown} holds no {root}", advice=advice)
    if signed_by is not None:  # before anything that a stranger wrote is looked into
        require_signature(text, _read_beside(folder, SIGNATURE_FILE, MAX_SIGNATURE_BYTES, shown), signed_by, str(shown))
    return text


def check_listing(folder: Path, files: Mapping[str, str], *, root: str, shown: Path) -> int:
    """Return the size in bytes of the files in `folder`; contents are not looked at.

    Raises:
        BundleError: it does not hold the file `root` and what `files` lists, and nothing else.
    """
    for name in files:
        _check_name(name, shown)
    present = _walk(folder, shown, free=frozenset({REPORT_FILE}) - set(files))
    unlisted = sorted(name for name in present.keys() - set(files) - {root} if not _may_be_unlisted(name, root))
    if unlisted:
        raise BundleError(f"{shown} holds {unlisted[0]!r}, which its plan does not list", advice="remove it, or tune again")
    missing = sorted(set(files) - present.keys())
    if missing:
        raise BundleError(f"{shown} lacks {missing[0]!r}", advice="copy the bundle again, whole")
    return sum(present.values())


def unlisted_in(folder: Path, root: str) -> list[str]:
    """Return the files that lie beside `root` without being listed in it, of those that may."""
    return sorted(each.name for each in folder.iterdir() if each.is_file() and _may_be_unlisted(each.name, root))


def _may_be_unlisted(name: str, root: str) -> bool:
    """Say whether a file may lie beside `root` without being listed in it: what is only for people to read, and the signature."""
    return name in UNLISTED or (root == FAMILY_FILE and bool(re.fullmatch(r"report-[0-9]{1,4}\.html", name)))


def _read_beside(folder: Path, name: str, most: int, shown: Path) -> bytes | None:
    """Return the bytes of `plan.json` or `signature.json`, or None where it is no plain file. Read once: what is checked is used."""
    path = join(folder, name)
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    if status.st_nlink > 1:
        raise BundleError(f"{shown} holds {name!r}, which is hard-linked from elsewhere", advice="copy the bundle instead of linking it")
    with open(path, "rb") as file:
        text = file.read(min(most, status.st_size) + 1)  # room is made for all that is asked for; what grew meanwhile is cut, and refused
    if len(text) > most:
        raise BundleError(f"{shown / name} is larger than {_size(most)}")
    return text


def _size(number: int) -> str:
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


def _check_name(name: str, shown: Path) -> None:
    # An empty part: an absolute path, a slash at the end, or two in a row.
    if any(each in name for each in "\\:\0") or any(part in ("", ".", "..") for part in name.split("/")):
        raise BundleError(f"{shown} lists {name!r}, which is not a plain path inside the bundle")


def _walk(folder: Path, shown: Path, *, free: frozenset[str]) -> dict[str, int]:
    """Return the files below `folder` with their sizes in bytes.

    Links of both kinds are refused: the runtimes read hard-linked external data without a question.
    Those that are `free` are opened by nobody, so they may be hard links.
    """
    found: dict[str, int] = {}
    pending = [""]
    while pending:
        inside = pending.pop()
        for entry in list(os.scandir(join(folder, inside))):
            name = inside + entry.name
            status = os.lstat(entry.path)  # an entry's own has no count of links on Windows
            if stat.S_ISDIR(status.st_mode):
                pending.append(f"{name}/")
                continue
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{shown} holds {name!r}, which is a link or a special file")
            if status.st_nlink > 1 and name not in free:
                raise BundleError(
                    f"{shown} holds {name!r}, which is hard-linked from elsewhere", advice="copy the bundle instead of linking it"
                )
            found[name] = status.st_size
    return found


def write_bundle(destination: Path, plan: Plan, files: Mapping[str, Path]) -> Path:
    """Write a bundle at `destination`, whole or not at all. `plan.files` is filled in here from `files` (name in the bundle -> source).

    An earlier bundle there is replaced; a folder that is not a bundle is left alone.

    Raises:
        UsageError: the destination cannot be written, or is something else than a bundle.
    """

    def texts(listed: dict[str, str]) -> dict[str, str]:
        text = plan.replaced(files=listed).to_json()
        parse_plan(text, PLAN_FILE)  # what we write, we can read
        return {PLAN_FILE: text}

    return write_folder(destination, files, texts)


def write_folder(destination: Path, files: Mapping[str, Path], texts: Callable[[dict[str, str]], Mapping[str, str]]) -> Path:
    """Write `files` (name in the bundle -> source) and what `texts` makes of their SHA-256 at `destination`; see `write_bundle`."""
    destination = destination.absolute()
    check_destination(destination)
    try:
        return _write(destination, files, texts)
    except OSError as error:
        raise UsageError(
            f"cannot write the plan to {destination}: {error.strerror or error}", advice="choose another with -o DIR"
        ) from error


def _write(destination: Path, files: Mapping[str, Path], texts: Callable[[dict[str, str]], Mapping[str, str]]) -> Path:
    import shutil  # here, as below: who loads a plan writes none
    import tempfile

    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        listed: dict[str, str] = {}
        for name, source in sorted(files.items()):
            _check_name(name, destination)
            target = staging / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            listed[name] = file_sha256(target)
        for name, text in texts(listed).items():
            (staging / PurePosixPath(name)).parent.mkdir(parents=True, exist_ok=True)
            (staging / PurePosixPath(name)).write_bytes(text.encode())
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
    import shutil
    import tempfile

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
    import tempfile

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
    root = FAMILY_FILE if (folder / FAMILY_FILE).is_file() else PLAN_FILE
    try:
        plan = json.loads((folder / root).read_bytes())
        files = set(plan["files"]) if "schema" in plan else set()
        present = {each.relative_to(folder).as_posix() for each in folder.rglob("*") if not each.is_dir() or each.is_symlink()}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(files) and all(each in files or each == root or _may_be_unlisted(each, root) for each in present)
