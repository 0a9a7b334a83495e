"""Loads mutated bundles one after another in this process, which is watched: `python loading_strangers.py SOUND ROOM FIRST COUNT`.

Prints a line of JSON for each: the seed before it is loaded (so that who waits knows which one ended the process), what came of it, and
what was opened where nothing has to be opened. Python's own opens are seen by an audit hook, those of the runtimes by inotify on the
secrets.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import aivmm
from tests.runtime.mutating import SECRET, mutate

_ACCESS, _MODIFY, _OPEN = 0x1, 0x2, 0x20
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_CHANGING = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"}
_RUNNING = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "ctypes.dlopen", "socket.connect"}
_RUNNING |= {"pickle.find_class"}
_DRIVERS = ("libnvidia-ml.so.1", "libcuda.so.1")  # looked for where a plan names a GPU of that maker


def absolute(path: Any, folder: Any = -1) -> Path:
    """Return a path as it is named, links not followed; `folder` is the descriptor that it is relative to, if there is one."""
    named = Path(os.fsdecode(path))
    base = Path(f"/proc/self/fd/{folder}").readlink() if isinstance(folder, int) and folder >= 0 else Path.cwd()
    return Path(os.path.normpath(base / named))


class Watch:
    """What is opened, changed or started while a bundle is loaded."""

    def __init__(self) -> None:
        self.on = False
        self.bundle = self.temporary = Path()
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False  # what is done in here is not to be seen
        try:
            if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
                path = absolute(arguments[0])
                writes = bool(arguments[2] & _WRITING) if isinstance(arguments[2], int) else "r" not in str(arguments[1])
                if writes and self.temporary not in (path, *path.parents):
                    self.found.append(f"writes {path}")
                if path.name == SECRET and self.temporary not in path.parents:  # a zip may hold a file of that name
                    self.found.append(f"reads {path}")
            elif event in _CHANGING:
                path = absolute(arguments[0], arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod") else -1)
                if self.temporary not in path.parents:
                    self.found.append(f"{event} {path}")
            elif event in _RUNNING and arguments[0] not in _DRIVERS:
                self.found.append(f"{event} {arguments[0]!r:.100}")
        finally:
            self.on = True


class Notices:
    """inotify on files: also the opens of native code, through whichever link. One queue for all: to close one takes the kernel 10 ms."""

    def __init__(self, *paths: Path) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._queue = self._library.inotify_init1(os.O_NONBLOCK)
        if self._queue < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        for each in paths:
            self.add(each)

    def add(self, path: Path) -> None:
        """Watch one more file, until it is deleted."""
        if self._library.inotify_add_watch(self._queue, os.fsencode(path), _ACCESS | _MODIFY | _OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def events(self) -> list[str]:
        """Return what was done to the files since this was asked last."""
        try:
            data = os.read(self._queue, 1 << 16)
        except BlockingIOError:
            return []
        names = {_ACCESS: "read", _MODIFY: "written", _OPEN: "opened"}
        found, at = [], 0
        while at < len(data):
            _, mask, _, length = struct.unpack_from("iIII", data, at)
            found += [name for bit, name in names.items() if mask & bit]
            at += 16 + length
        return found


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def attempt(path: Path) -> str:
    """Load and run what lies at `path`, and say what came of it."""
    try:
        with aivmm.load_plan(path) as engine:
            inputs = {
                each.name: np.zeros([extent or 1 for extent in each.shape], each.dtype) for each in engine.inputs if each.dtype != "string"
            }
            engine.run(inputs)
        return "ran"
    except aivmm.AivmmError as error:
        return "refused: " + str(error)


def main(sound: Path, room: Path, first: int, count: int) -> None:
    watch, secrets = Watch(), Notices(room / SECRET)
    attempt(sound)  # imports and first-use files of the runtimes
    for seed in range(first, first + count):
        name, path = mutate(sound, room / str(seed), seed)
        print(json.dumps({"seed": seed, "mutation": name}), flush=True)
        secrets.add(room / str(seed) / SECRET)
        secrets.events()  # what the mutation itself did, and the end of the last one
        watch.bundle, watch.temporary, watch.found = path, Path(tempfile.gettempdir()), []
        before = names(room / str(seed))
        watch.on = True
        try:
            said = attempt(path)
        except Exception:  # noqa: BLE001 - it is told to who started this process, and judged there
            said = "raised: " + traceback.format_exc()
        finally:
            watch.on = False
        found = [*watch.found, *(f"secret {event}" for event in secrets.events())]
        if names(room / str(seed)) != before:
            found.append("files beside the bundle")
        left = [each for each in names(Path(tempfile.gettempdir())) if each != "cache"]
        print(json.dumps({"seed": seed, "said": said, "found": found, "left": left}), flush=True)
        shutil.rmtree(room / str(seed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
