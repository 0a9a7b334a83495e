"""What the parent sees of a worker from outside: the memory it holds, and how it ended."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil

from aivmm.errors import UsageError

_LONGEST_S, _SHORTEST_S = 1.0, 0.02  # between two looks
_FILL_BYTES_PER_S = 16e9  # as fast as threads can touch new memory
_RESERVE = 0.05  # the share of the memory that a worker may not take from everyone else
_LEAST_RESERVE_BYTES = 512 << 20
# What Windows gives as the exit status of a process that broke (ntstatus.h).
_WINDOWS = {
    0xC0000005: "access violation",
    0xC000001D: "illegal instruction",
    0xC0000094: "division by zero",
    0xC00000FD: "stack overflow",
    0xC0000374: "heap corruption",
    0xC0000409: "abort",
}


class MemoryWatch:
    """Says when a worker has used more memory during one request than the machine can spare.

    A limit on the address space (RLIMIT_AS) would be simpler, but GPU drivers reserve hundreds of gigabytes that they never touch. What
    is counted is what only swapping could take back: a model file that is mapped into memory is not.
    """

    def __init__(self, pid: int, *, most_bytes: int | None = None) -> None:
        self.pid = pid
        self.used_bytes = own_memory_bytes(pid)
        self.most_bytes = memory_limit_bytes(self.used_bytes) if most_bytes is None else most_bytes

    def look(self) -> float:
        """Return the seconds for which the worker may be left alone now; 0.0 when it has used too much."""
        self.used_bytes = own_memory_bytes(self.pid)
        left = self.most_bytes - self.used_bytes
        return 0.0 if left < 0 else min(_LONGEST_S, max(_SHORTEST_S, left / _FILL_BYTES_PER_S))

    @property
    def reason(self) -> str:
        """What to tell of a worker that used too much."""
        return f"used more than {self.most_bytes / 1e9:.1f} GB of memory and was stopped"


def own_memory_bytes(pid: int) -> int:
    """Return the memory in bytes that `pid` holds and that no file backs, swapped out or not; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123 - looked at again and again
            fields = dict(line.split(":", 1) for line in file if line.startswith(("RssAnon", "RssShmem", "VmSwap")))
        return sum(int(each.split()[0]) << 10 for each in fields.values())
    except (OSError, ValueError, IndexError):
        pass
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "private", info.rss))


def memory_limit_bytes(used_bytes: int) -> int:
    """Return how much memory a worker that holds `used_bytes` now may hold: all that is free less a reserve, or `AIVMM_WORKER_GB`.

    Raises:
        UsageError: the variable is no number of gigabytes.
    """
    given = os.environ.get("AIVMM_WORKER_GB")
    if given:
        try:
            gigabytes = float(given)
        except ValueError:
            gigabytes = math.nan
        if not 0 < gigabytes < math.inf:
            raise UsageError(
                f"AIVMM_WORKER_GB is {given!r}, which is no number of gigabytes", advice="set it to one such as 8, or unset it"
            )
        return int(gigabytes * 1e9)
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in group_memory():
        total, available = min(total, limit), min(available, limit - used)
    # A machine that is full already still lets a worker breathe, or nothing could be tuned on it at all.
    return used_bytes + max(_LEAST_RESERVE_BYTES, available - max(_LEAST_RESERVE_BYTES, int(_RESERVE * total)))


def group_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """Yield (limit, use) in bytes for each control group, of either version, that limits this process's memory.

    The files that the group has in the page cache and has not used lately do not count as used: they make room.
    """
    for folder in control_groups("memory", root, membership):
        for limit_file, use_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                limit = (folder / limit_file).read_text().strip()
                use = int((folder / use_file).read_text())
                cached = int(dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(cache_key, 0))
            except (OSError, ValueError):
                continue
            if limit.isdigit() and int(limit) < 1 << 60:  # version 1 writes nearly 2**63 for none
                yield int(limit), max(0, use - cached)


def control_groups(controller: str, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Yield the folders of the control groups that hold this process for one controller, its own first; none where there are none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        if controllers and not base.exists():
            base = root / controller
        group = base / path.lstrip("/")
        # Inside a container the group's path may name the host's tree; its own files are then at the root of the mount.
        inside = [folder for folder in (group, *group.parents) if folder != base and base in folder.parents]
        yield from (folder for folder in (*inside, base) if folder.is_dir())


def ending(code: int) -> str:
    """Say in words how a process ended, by its exit status."""
    if code in _WINDOWS:
        return f"crashed ({_WINDOWS[code]})"
    if code >= 0:
        return f"exited with status {code}"
    if code == -getattr(signal, "SIGKILL", 0):
        return "was killed (SIGKILL), as the system does when memory runs out"
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"crashed (signal {-code})"
