"""The check of what lies in a bundle's files, beside the loading of its models: their SHA-256, and that no model holds compiled code."""

from __future__ import annotations

import _thread
import hashlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from time import perf_counter

import numpy as np

from aivmm.errors import BundleError
from aivmm.runtime.onnx_arity import short_of_inputs

_COMPILED = b"EPContext"  # the operator of ONNX Runtime that carries blobs, or reads them from a path of its own
_LARGE_BYTES = 32 << 20  # takes 20 ms to hash, or more
# A thread that has the interpreter keeps it up to 5 ms from who asks for it back. ONNX Runtime does so between reading a model, which takes
# it half a millisecond, and the rest of its work: so the other thread begins when that is over.
_PAUSE_S = 1e-3
# Hashed at a time. Before and after each the interpreter's lock is taken from who loads the plan meanwhile; larger ones do not stay in the
# cache of a core, and take new pages where the runtime asks for pages, too.
_PIECE_BYTES = 256 << 10
_CORE = 36  # of what stands behind a thread's name in its `stat`: the core it was on last (proc_pid_stat(5), field 39)


_What = tuple[Path, Mapping[str, str], frozenset[str], Path, Callable[[], object] | None]  # folder, files, models, shown, besides


class Reading:
    """The check of a bundle's contents, on a thread of its own: hashing and loading leave the interpreter to each other."""

    def __init__(self) -> None:
        """Prepare to read what `of` will name."""
        self.seconds = 0.0
        self.first_done = True
        self.waited_s = 0.0  # by those who had nothing else to do meanwhile
        # Until all is read and found good, and whatever ends the thread before.
        self._error: BundleError | None = BundleError("the bundle was closed before all of it was read")
        self._given_up = False
        self._starting = threading.Lock()
        self._started = False
        self._ready = False  # for what it is to do first
        self._pause = threading.Lock()  # held while there is reason to leave the interpreter to who loads
        self._pause.acquire()
        self._named = threading.Lock()  # held until it is known what is to be read, and may be
        self._named.acquire()
        self._let = False
        self._ended = threading.Lock()  # held until nothing is read any more. An event takes four times as long to make
        self._ended.acquire()
        self._began = 0.0  # to read
        self._jobs: deque[Callable[[], object]] = deque()
        self._what: _What | None = None
        self._told = threading.Lock()  # held while a thread that is ready is to be told what comes first
        self._first: Callable[[], object] | None = None
        self._heard = threading.Lock()  # held until it has heard
        self._heard.acquire()
        self._loader = 0  # the thread that loads, as the system calls it

    def get_ready(self) -> None:
        """Start the thread before it is known what it does first: half a millisecond goes by until another core has it."""
        self._told.acquire()
        self._ready = True
        self._loader = threading.get_native_id()
        self._start()

    def do_first(self, first: Callable[[], object] | None) -> None:
        """Have the thread that is ready do `first` before it reads: what a runtime does once in a process, without the interpreter.

        Whatever it raises is left for who asks the runtime for more.
        """
        self._first, self.first_done = first, first is None
        self._ready = False
        self._told.release()
        if first is not None:
            self._heard.acquire()  # else the thread would wait for the interpreter, and who loads has time

    def of(
        self,
        folder: Path,
        files: Mapping[str, str],
        models: Iterable[str],
        shown: Path,
        *,
        size: int,
        besides: Callable[[], object] | None = None,
    ) -> None:
        """Read `files` (digests by name) in `folder`; some are `models`. `shown` is what its user calls it, maybe a zip.

        `besides` is checked last: what was left of a plan's text. It raises BundleError.

        What has a large `size` in bytes is read as soon as it may be. Reading and loading would take turns with the interpreter, so that
        what is small waits until the runtimes begin their own work, beside which it is done soon.
        """
        self._error = BundleError(f"{shown} was closed before all of it was read")
        self._what = (folder, files, frozenset(models), shown, besides)
        if self._first is not None:
            with self._starting:
                self._let_read()
        if size >= _LARGE_BYTES:
            self.start(at_once=True)

    def start(self, jobs: Iterable[Callable[[], object]] = (), *, at_once: bool = False) -> None:
        """Start to read what was named, unless that was done before: in a moment, or `at_once`.

        `jobs` are done on the thread before, or between two pieces of a file, or not at all when all was read. They raise nothing, and
        whoever needs what they do does it himself.
        """
        self._jobs.extend(jobs)
        with self._starting:
            if at_once:
                self._end_pause()
            self._start()
            self._let_read()

    def _start(self) -> None:
        if not self._started:
            # Not `threading.Thread`, whose `start` waits until the new thread runs: half a millisecond in which nothing is loaded.
            _thread.start_new_thread(self._run, ())
            self._started = True

    def _let_read(self) -> None:
        if not self._let:
            self._let = True
            self._named.release()

    def _end_pause(self) -> None:
        if self._pause.locked():
            self._pause.release()

    def wait(self) -> None:
        """Return when all is read and found good.

        Raises:
            BundleError: a file is not what the plan says.
        """
        started = perf_counter()
        self.start(at_once=True)
        with self._ended:  # for a moment: others may wait, too
            pass
        self.waited_s += perf_counter() - max(started, self._began)
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Return when nothing is read any more, be it checked or not."""
        self._given_up = True
        with self._starting:
            self._end_pause()
            if self._ready:
                self.do_first(None)
            self._let_read()
            if self._started:
                with self._ended:
                    pass

    def _run(self) -> None:
        try:
            self._told.acquire()
            first = self._first
            if first is not None:
                self._heard.release()
                with suppress(BaseException):  # nobody waits for it, and all that follows has to be done, or who loads waits for ever
                    first()
                self.first_done = True
            self._named.acquire()
            if first is not None:
                leave_core_of(self._loader)
            else:
                self._pause.acquire(timeout=_PAUSE_S)
            self._work()
            if self._what is not None:
                self._read(*self._what)
        finally:
            self._ended.release()

    def _work(self) -> None:
        """Do the jobs that came by now."""
        while self._jobs and not self._given_up:
            self._jobs.popleft()()

    def _read(
        self, folder: Path, files: Mapping[str, str], models: frozenset[str], shown: Path, besides: Callable[[], object] | None
    ) -> None:
        self._began = started = perf_counter()
        try:
            for name, expected in files.items():
                if self._given_up:
                    return
                check_content(folder, name, expected, shown, self._work)
            for name in files:  # last: it is Python's work, and the runtime needs the interpreter at first more than later
                if self._given_up:
                    return
                if name in models:
                    refuse_compiled(folder / PurePosixPath(name), shown / name)
            if besides is not None:
                besides()
            self._error = None
        except BundleError as error:
            self._error = error
        except OSError as error:
            self._error = BundleError(f"{shown} cannot be read ({error.strerror or error})")
        except BaseException as error:  # noqa: BLE001 - raised by `wait`: what could not be checked is not good
            self._error = BundleError(f"{shown} cannot be checked ({type(error).__name__}: {' '.join(str(error).split())})")
            self._error.__cause__ = error
        finally:
            self.seconds = perf_counter() - started


def leave_core_of(thread: int) -> None:
    """Have the calling thread go on upon another core than the one that `thread` of this process was on last, where it may use another.

    A runtime that asks each core what it is (OpenVINO does) leaves the thread that woke it on the last of them, where the one that loads
    may be. Linux lets both take turns there for ten milliseconds and more while another core has nothing to do. Which cores a thread
    may use stays as it is.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    with suppress(OSError, ValueError, IndexError):  # without /proc, or where cores were taken away meanwhile
        core = int(Path(f"/proc/self/task/{thread}/stat").read_bytes().rpartition(b")")[2].split()[_CORE])
        cores = os.sched_getaffinity(0)
        if cores - {core}:
            os.sched_setaffinity(0, cores - {core})
            os.sched_setaffinity(0, cores)


def check_content(folder: Path, name: str, expected: str, shown: Path, between: Callable[[], None] = lambda: None) -> None:
    """Raise BundleError unless the file `name` has the SHA-256 `expected`. `between` is called between two pieces of it."""
    if file_sha256(folder / PurePosixPath(name), between) != expected:
        raise BundleError(
            f"{shown / name} was changed: its SHA-256 is not the one in the plan", advice="copy the bundle again, or tune again"
        )


def refuse_compiled(model: Path, shown: Path) -> None:
    """Raise BundleError for a model with a compiled form in it, which a device would execute as it stands, or with malformed nodes."""
    with model.open("rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                if mapped.find(_COMPILED) >= 0:
                    raise BundleError(f"{shown} holds compiled code ({_COMPILED.decode()})", advice="tune from the original model")
                short = short_of_inputs(mapped)
                if short:
                    raise BundleError(f"{shown} holds {short}", advice="tune from the original model")


def file_sha256(path: Path, between: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file, hexadecimal. `between` is called between two pieces of it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        piece = np.empty(min(_PIECE_BYTES, max(1, os.fstat(file.fileno()).st_size)), dtype=np.uint8).data
        while size := file.readinto(piece):
            digest.update(piece[:size])
            between()
    return digest.hexdigest()
