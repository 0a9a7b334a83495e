"""Compiled stages in the user's cache folder, so that a plan is compiled once a machine. Decision 0018 says what is trusted, and why.

A file is named by all that its content depends on: the bundle, the stage's model, target and config, and the target's environment (device,
driver, runtime version, instruction sets, ...). It is written whole under another name and moved into place, so that whoever dies while
writing leaves nothing that anyone reads. What is read must lie in folders that only this user (or root) may write to, and must have the
check sum that its head states. Anything odd means compiling again: a cache is never a reason for a plan not to run.

The payload starts at a page of its own and is mapped, not read: processes share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import stat
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, cast

import numpy as np

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Backend, Buffer, Executable, ExportsBlob, ImportsBlob, aligned_bytes
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.folders import cache_path
from aivmm.runtime.target import Target

log = logging.getLogger("aivmm.blobs")
_AS_IT_IS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

_FORMAT = 4
_MAGIC = b"aivmm compiled stage\n"
_PAGE = 4096
# What a column of a check sum has to itself: no number of pages, so that a page that moved moves to other columns; as many as a core keeps
# close, so that it is as fast as memory. Every 64 rows, of a megabyte, have sums of their own.
_WORDS = 2056
_ROWS = 64
_POPULATE_READ = 22  # MADV_POPULATE_READ, which Linux has from 5.14 on and Python has no name for
MOST_BYTES = 8 << 30  # the cache's size, beyond which the files that were not used for longest are removed
_SMALL_BYTES = 1 << 20  # up to here SHA-256 and reading are as fast as getting ready for anything else
_USED_S = 3600.0  # how exactly a file says when it was last used: to note it takes as long as to read a small one
_ABANDONED_S = 3600.0  # a file half written that is older than this was left by a process that died


class BlobCache:
    """The compiled stages of one bundle. Never raises for the state of the cache: `problems` says what was wrong."""

    def __init__(self, bundle_digest: str, *, root: Path | None = None) -> None:
        """Look below `root`, by default the user's cache folder. `bundle_digest` names the bundle by its content."""
        self.hits = 0
        self.stored = 0
        self.problems: list[str] = []
        self._root: str | None = None
        self._digest = bundle_digest
        self._foreseen: dict[str, tuple[Buffer, float]] = {}
        try:
            self._root = os.path.join(os.path.abspath(root or cache_path()), "blobs")
        except RuntimeError:  # a user whom the password file does not know, as containers have them
            self._problem("there is no home folder; set AIVMM_CACHE to a folder to keep compiled stages in")

    def foresee(self, most: int) -> None:
        """Map and check what is kept of this bundle, the `most` files used last, before it is known which of them will be wanted.

        For who has to wait for a runtime before he knows. What is odd is looked at again, and told, when it is wanted.
        """
        if self._root is None:
            return
        folder = os.path.join(self._root, self._digest[:32])
        with contextlib.suppress(OSError):
            entries = [(each.stat(follow_symlinks=False).st_mtime, each.path) for each in os.scandir(folder) if each.name.endswith(".blob")]
            for _, path in sorted(entries, reverse=True)[:most]:
                with contextlib.suppress(OSError, _Odd):
                    self._foreseen[path] = self._whole(path)

    def forget(self) -> None:
        """Let go of what was foreseen and not wanted."""
        self._foreseen.clear()

    def load(
        self,
        backend: Backend,
        model: Path,
        target: Target,
        config: Config,
        *,
        verified: Callable[[], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Executable:
        """Return the stage from the cache, or compile it and keep it there. `verified` waits until the bundle's files are known to be good.

        `meanwhile` starts what can go on while the runtime takes back what was in the cache.

        Raises:
            BundleError: `verified` did.
            Unsupported: as `Backend.compile`.
        """
        keeper = _keeper(backend, target)
        if self._root is None or keeper is None:
            verified()
            return backend.compile(model, target, config)
        path = self._path(model, target, config)
        blob = self._read(path)
        if blob is not None:
            meanwhile()
            try:
                executable = keeper.import_blob(blob, model, target, config)
            except Unsupported as refusal:
                self._problem(f"compiled again: {refusal}")
            else:
                self.hits += 1
                return executable
        verified()  # a stranger's file goes to no runtime before that
        try:
            executable = keeper.compile_to_export(model, target, config)
        except Unsupported:
            return backend.compile(model, target, config)  # and if it was not for the export, this says so
        if isinstance(executable, ExportsBlob):
            try:
                self._write(path, executable.export_blob())
            except (Unsupported, OSError) as error:
                self._problem(f"not kept: {_words(error)}")
        return executable

    def stats(self) -> dict[str, Any]:
        """Return how many stages came from the cache, how many went into it, and what was wrong with it."""
        return {"hits": self.hits, "stored": self.stored, "problems": list(self.problems)}

    def _path(self, model: Path, target: Target, config: Config) -> str:
        assert self._root is not None
        depends = (_FORMAT, model.name, config.precision, config.settings, environment_of(target))  # which names the target
        key = hashlib.sha256(repr(depends).encode()).hexdigest()[:32]
        return os.path.join(self._root, self._digest[:32], f"{key}.blob")

    def _read(self, path: str) -> Buffer | None:
        """Return the payload of a file that is ours and whole, mapped where it is large; None where there is none."""
        try:
            payload, used = self._foreseen.pop(path) if path in self._foreseen else self._whole(path)
        except FileNotFoundError:
            return None
        except (OSError, _Odd) as error:
            self._problem(f"compiled again: {_words(error)}")
            return None
        if time.time() - used > _USED_S:
            with contextlib.suppress(OSError):
                os.utime(path)  # used now: the last to be removed
        return payload

    def _whole(self, path: str) -> tuple[Buffer, float]:
        """Return the payload of a file and when it was last used; raise OSError or _Odd unless it is ours and whole."""
        assert self._root is not None
        for folder in (self._root, os.path.dirname(path)):
            _require_ours(os.lstat(folder), folder, stat.S_ISDIR)
        descriptor = os.open(path, os.O_RDONLY | _AS_IT_IS)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            _require_ours(status, path, stat.S_ISREG)
            return _payload(file, os.path.basename(path), status.st_size), status.st_mtime

    def _write(self, name: str, payload: bytes) -> None:
        assert self._root is not None
        path = Path(name)
        path.parent.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                _require_ours(folder.lstat(), folder, stat.S_ISDIR)
            except _Odd as error:
                raise OSError(str(error)) from error
        import tempfile  # here: where all stages are kept nothing is written

        descriptor, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_head(path.name, np.frombuffer(payload, dtype=np.uint8)))
                file.write(payload)
            Path(partial).replace(path)
        except BaseException:  # not handled, only cleaned up
            with contextlib.suppress(OSError):
                Path(partial).unlink()
            raise
        self.stored += 1
        prune(path.parent.parent, keep=path)

    def _problem(self, text: str) -> None:
        self.problems.append(text)
        log.info("cache of compiled stages: %s", text)


def _keeper(backend: Backend, target: Target) -> ImportsBlob | None:
    """Return the backend where it keeps compiled stages of a target. Not by `isinstance`, which takes 40 µs when it is first asked."""
    if not hasattr(backend, ImportsBlob.keeps_blobs.__name__):
        return None
    keeper = cast(ImportsBlob, backend)
    return keeper if keeper.keeps_blobs(target) else None


class _Odd(Exception):
    """A file or folder of the cache that is not used, and why."""


def _require_ours(status: os.stat_result, path: str | Path, kind: Callable[[int], bool]) -> None:
    """Raise _Odd unless nobody else than this user and root may have written it."""
    if not kind(status.st_mode):
        raise _Odd(f"{path} is a link or a special file")
    if os.name != "posix":
        return  # a user's folders on Windows are closed to others by their access lists
    if status.st_uid not in (os.geteuid(), 0):
        raise _Odd(f"{path} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Odd(f"{path} may be written to by other users")


def _head(name: str, payload: Buffer) -> bytes:
    """Return the page that states what follows it."""
    text = f"{name}\n{len(payload)} bytes\n{_check_sum(payload)}\n"
    return (_MAGIC + text.encode()).ljust(_PAGE, b"\0")


def _payload(file: FileIO, name: str, size: int) -> Buffer:
    """Return what follows the head of a file of `size` bytes, when the head says just that."""
    if size <= _PAGE:
        raise _Odd(f"{name} is damaged: no head, or nothing behind it")
    if size <= _SMALL_BYTES:
        whole = aligned_bytes(size)
        if file.readinto(whole.data) != size:
            raise _Odd(f"{name} was read in part")
    else:
        # Private: OpenVINO takes only what may be written to, and what it writes must not reach the file.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # all pages at once: each fault waits for who maps memory at the same time, as a loader does
                mapped.madvise(_POPULATE_READ)
        whole = np.frombuffer(mapped, dtype=np.uint8)
    payload = whole[_PAGE:]
    if whole[:_PAGE].tobytes() != _head(name, payload):
        raise _Odd(f"{name} is damaged: its head does not fit what follows it")
    return payload


def _check_sum(payload: Buffer) -> str:
    """Return a digest that any flipped bit, lost or moved page changes, at the speed of memory: SHA-256, of large ones over columns' sums.

    Not for strangers, who could make two pages of one sum: what a stranger may have written is not read at all.
    """
    if len(payload) <= _SMALL_BYTES:
        return hashlib.sha256(payload.data).hexdigest()
    block = _ROWS * _WORDS * 8
    whole = payload[: len(payload) // block * block].view(np.uint64).reshape(-1, _ROWS, _WORDS)
    digest = hashlib.sha256(np.add.reduce(whole, axis=1, dtype=np.uint64).data)
    digest.update(payload[whole.size * 8 :].tobytes())
    return digest.hexdigest()


def prune(root: Path, *, suffix: str = ".blob", keep: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
    """Remove what dying processes left half written, and the `suffix` files used longest ago until `most_bytes` are left; `keep` stays."""
    found: list[tuple[float, int, Path]] = []
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path.suffix == suffix and stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime, status.st_size, path))
            elif path.suffix == ".partial" and time.time() - status.st_mtime > _ABANDONED_S:
                path.unlink()
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            return
        if path != keep:
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # unless others are in it


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
