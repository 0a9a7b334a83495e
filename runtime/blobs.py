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
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
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

_FORMAT = 5
_MAGIC = b"aivmm compiled stage\n"
_PAGE = 4096
# What a column of a check sum has to itself: no number of pages, so that a page that moved moves to other columns; as many as a core keeps
# close, so that it is as fast as memory. Every 64 rows, of a megabyte, have sums of their own.
_WORDS = 2056
_ROWS = 64
# Up to this size a file is read while its runtime is got ready. More of it, read at the speed of memory, holds up who does that (a plug-in
# is loaded in 13 ms instead of 8 beside 80 MB).
_AHEAD_BYTES = 16 << 20
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
        self._foreseen: dict[str, tuple[Buffer, Weights | None, float]] = {}
        try:
            self._root = os.path.join(os.path.abspath(root or cache_path()), "blobs")
        except RuntimeError:  # a user whom the password file does not know, as containers have them
            self._problem("there is no home folder; set AIVMM_CACHE to a folder to keep compiled stages in")

    def foresee(self, most: int, until: Callable[[], bool]) -> None:
        """Map and check what is kept of this bundle, the `most` files used last, before it is known which of them will be wanted.

        For who has to wait for a runtime before he knows; `until` says that it is there. Weights that are left then, and those of large
        files, are checked later. What is odd is looked at again, and told, when it is wanted.
        """
        if self._root is None:
            return
        folder = os.path.join(self._root, self._digest[:32])
        with contextlib.suppress(OSError):
            entries = [(each.stat(follow_symlinks=False).st_mtime, each.path) for each in os.scandir(folder) if each.name.endswith(".blob")]
            for _, path in sorted(entries, reverse=True)[:most]:
                with contextlib.suppress(OSError, _Odd):
                    self._foreseen[path] = found = self._whole(path)
                    if found[1] is not None and len(found[0]) <= _AHEAD_BYTES:
                        found[1].right(until)

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
        meanwhile: Callable[[Iterable[Callable[[], object]]], None] = lambda jobs: None,
    ) -> Executable:
        """Return the stage from the cache, or compile it and keep it there. `verified` waits until the bundle's files are known to be good.

        `meanwhile` starts what can go on while the runtime takes back what was in the cache: some jobs, which `load` does itself when it
        has to wait for them, and what else its owner has.

        Raises:
            BundleError: `verified` did.
            Unsupported: as `Backend.compile`.
        """
        keeper = _keeper(backend, target)
        if self._root is None or keeper is None:
            verified()
            return backend.compile(model, target, config)
        path = self._path(model, target, config)
        blob, weights = self._read(path)
        if blob is not None:
            meanwhile([*([weights.right] if weights else []), partial(keeper.look_ahead, model)])
            try:
                executable = keeper.import_blob(blob, model, target, config)
            except Unsupported as refusal:
                self._problem(f"compiled again: {refusal}")
            else:
                if weights is None or weights.right():
                    self.hits += 1
                    return executable
                executable.close()
                self._problem(f"compiled again: {os.path.basename(path)} is damaged: its weights do not have the sum that its head states")
        verified()  # a stranger's file goes to no runtime before that
        try:
            executable = keeper.compile_to_export(model, target, config)
        except Unsupported:
            return backend.compile(model, target, config)  # and if it was not for the export, this says so
        if isinstance(executable, ExportsBlob):
            try:
                exported = executable.export_blob()
                self._write(path, exported, keeper.weights_in(exported))
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

    def _read(self, path: str) -> tuple[Buffer | None, Weights | None]:
        """Return the payload of a file that is ours, None where there is none, and its weights where these are not checked yet."""
        try:
            payload, weights, used = self._foreseen.pop(path) if path in self._foreseen else self._whole(path)
        except FileNotFoundError:
            return None, None
        except (OSError, _Odd) as error:
            self._problem(f"compiled again: {_words(error)}")
            return None, None
        if time.time() - used > _USED_S:
            with contextlib.suppress(OSError):
                os.utime(path)  # used now: the last to be removed
        return payload, weights

    def _whole(self, path: str) -> tuple[Buffer, Weights | None, float]:
        """Return the payload of a file, its weights when these are not checked yet, and when it was last used; raise OSError or _Odd unless
        it is ours and whole."""
        assert self._root is not None
        for folder in (self._root, os.path.dirname(path)):
            _require_ours(os.lstat(folder), folder, stat.S_ISDIR)
        descriptor = os.open(path, os.O_RDONLY | _AS_IT_IS)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            _require_ours(status, path, stat.S_ISREG)
            return (*_payload(file, os.path.basename(path), status.st_size), status.st_mtime)

    def _write(self, name: str, payload: bytes, weights: tuple[int, int] = (0, 0)) -> None:
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
                array = np.frombuffer(payload, dtype=np.uint8)
                part = _pages(weights, len(array))
                file.write(_head(path.name, array, part, _check_sum(array[slice(*part)])))
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


class Weights:
    """The part of a payload that an import reads as numbers only: checked beside it, where all else is checked before."""

    def __init__(self, part: Buffer, sum_: str) -> None:
        """Take the bytes, and the sum that they should have."""
        self._sum = sum_
        self._adding: _Adding | None = _Adding(part)
        self._right = False
        self._lock = threading.Lock()

    def right(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Say whether they have it, as far as that is known when `until` says so. Others wait, and go on from there."""
        with self._lock:
            if self._adding is not None and self._adding.work(until):
                self._right = self._adding.hexdigest() == self._sum
                self._adding = None
            return self._right


def _pages(part: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the whole pages in a part of a payload, from and to, nothing where they are few."""
    start, stop = -(-part[0] // _PAGE) * _PAGE, min(part[1], size) // _PAGE * _PAGE
    return (start, stop) if start >= 0 and stop - start > _SMALL_BYTES else (0, 0)


def _head(name: str, payload: Buffer, weights: tuple[int, int] = (0, 0), sum_: str = "") -> bytes:
    """Return the page that states what follows it, with the `sum_` that the pages of its `weights` have."""
    start, stop = weights
    rest = np.concatenate([payload[:start], payload[stop:]]) if stop else payload
    text = f"{name}\n{len(payload)} bytes\n{_check_sum(rest)}\n"
    if stop:
        text += f"{start} to {stop}: {sum_}\n"
    return (_MAGIC + text.encode()).ljust(_PAGE, b"\0")


_STATED = re.compile(rb"\n([0-9]{1,18}) to ([0-9]{1,18}): ([0-9a-f]{64})\n")  # of weights


def _payload(file: FileIO, name: str, size: int) -> tuple[Buffer, Weights | None]:
    """Return what follows the head of a file of `size` bytes, when the head says just that, and the weights in it, not checked yet."""
    if size <= _PAGE:
        raise _Odd(f"{name} is damaged: no head, or nothing behind it")
    if size <= _SMALL_BYTES:
        whole = aligned_bytes(size)
        if file.readinto(whole.data) != size:
            raise _Odd(f"{name} was read in part")
    else:
        # Private: OpenVINO takes only what may be written to, and what it writes must not reach the file.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        if sys.platform == "linux" and size <= _AHEAD_BYTES:
            with contextlib.suppress(OSError):  # all pages at once: a fault waits for who maps memory at the same time, as a loader does
                mapped.madvise(_POPULATE_READ)
        whole = np.frombuffer(mapped, dtype=np.uint8)
    payload, page = whole[_PAGE:], whole[:_PAGE].tobytes()
    stated = _STATED.search(page)
    part, sum_ = (_pages((int(stated[1]), int(stated[2])), len(payload)), stated[3].decode()) if stated else ((0, 0), "")
    if page != _head(name, payload, part, sum_):
        raise _Odd(f"{name} is damaged: its head does not fit what follows it")
    return payload, Weights(payload[slice(*part)], sum_) if part[1] else None


def _check_sum(payload: Buffer) -> str:
    """Return a digest that any flipped bit, lost or moved page changes, at the speed of memory: SHA-256, of large ones over columns' sums.

    Not for strangers, who could make two pages of one sum: what a stranger may have written is not read at all.
    """
    if len(payload) <= _SMALL_BYTES:
        return hashlib.sha256(payload.data).hexdigest()
    adding = _Adding(payload)
    adding.work()
    return adding.hexdigest()


class _Adding:
    """A check sum of what is large, block by block."""

    def __init__(self, payload: Buffer) -> None:
        block = _ROWS * _WORDS * 8
        self._blocks = payload[: len(payload) // block * block].view(np.uint64).reshape(-1, _ROWS, _WORDS)
        self._rest = payload[self._blocks.nbytes :]
        self._done = 0
        self._digest = hashlib.sha256()

    def work(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Go on until all is added up or `until` says so; say whether all is."""
        while self._done < len(self._blocks):
            if until():
                return False
            self._digest.update(np.add.reduce(self._blocks[self._done], axis=0).data)
            self._done += 1
        return True

    def hexdigest(self) -> str:
        """Return the sum of all."""
        whole = self._digest.copy()
        whole.update(self._rest.data)
        return whole.hexdigest()


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
