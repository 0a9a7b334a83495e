"""The machine while it is measured: one measurement at a time, and what else is going on."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from aivmm.errors import UsageError
from aivmm.probes.records import Caution

_QUIET_S = 0.004  # a process whose CPU time stands still this long has stopped spinning
QUIET_LIMIT_S = 0.25
_THREAD_CLOCK = 6  # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED of the kernel's posix-timers.h: with ~tid above, the clock of one thread
_BUSY = 0.15  # of the cores that we may use, kept busy by others


def lock_path() -> Path:
    """Return the file of the machine-wide measuring lock. It belongs to the machine and not to a user or a database.

    Raises:
        UsageError: there is no folder for it.
    """
    named = os.environ.get("AIVMM_LOCK")
    if named:
        return Path(named)
    try:
        return Path(tempfile.gettempdir()) / "aivmm-measuring.lock"
    except FileNotFoundError as error:
        raise UsageError(
            "no folder for temporary files can be written, and what is measured locks the machine there",
            advice="set AIVMM_LOCK to a file that you may write, or TMPDIR to a folder",
        ) from error


@contextmanager
def measuring(timeout_s: float = 600.0) -> Iterator[float]:
    """Hold the machine-wide lock, so that one measurement runs at a time whoever started it. Yields the seconds waited.

    Raises:
        UsageError: someone else measured for all of `timeout_s`.
    """
    started = time.perf_counter()
    lock = FileLock(lock_path(), timeout=timeout_s, mode=0o666)
    try:
        lock.acquire(poll_interval=0.02)
    except Timeout as error:
        raise UsageError(
            f"another aivmm has been measuring on this machine for {timeout_s:.0f} s",
            advice=f"wait for it to end, or remove {lock_path()} if none runs",
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot lock {lock_path()} ({error.strerror or error})", advice="set AIVMM_LOCK to a file that you may write"
        ) from error
    try:
        yield time.perf_counter() - started
    finally:
        lock.release()


def freeze(pid: int) -> bool:
    """Stop the process `pid` where it is until `thaw`; False when this system has no safe way to.

    A worker that waits for its next block must not spin, and waiting until it has stopped takes 33 ms after each block of ONNX Runtime.
    Linux only: there a frozen worker still dies with its parent (PR_SET_PDEATHSIG), elsewhere it would be left behind.
    """
    if sys.platform != "linux" or pid <= 0:
        return False
    try:
        os.kill(pid, signal.SIGSTOP)
    except OSError:
        return False  # it is gone: whoever calls it next will find out
    return True


def thaw(pid: int) -> None:
    """Let a frozen process go on; nothing happens to one that runs."""
    if sys.platform == "linux" and pid > 0:
        with suppress(OSError):
            os.kill(pid, signal.SIGCONT)


def wait_until_quiet(pid: int) -> float:
    """Wait until the process `pid` burns no CPU time any more; return the seconds waited.

    ONNX Runtime's threads spin for 33 ms after a call and nearly double the latency of whoever runs next.
    """
    started = time.perf_counter()
    before = _cpu_seconds(pid)
    while time.perf_counter() - started < QUIET_LIMIT_S:
        time.sleep(_QUIET_S)
        now = _cpu_seconds(pid)
        if now - before < _QUIET_S / 2:
            break
        before = now
    return time.perf_counter() - started


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process in seconds; from the scheduler's nanosecond account where Linux keeps it, else from clock ticks."""
    try:
        total = 0
        with os.scandir(f"/proc/{pid}/task") as tasks:  # a thread may end while they are listed
            for task in tasks:
                with open(f"{task.path}/schedstat") as file:  # noqa: PTH123 - called thousands of times while others wait
                    total += int(file.read().split()[0])
        return total / 1e9
    except (OSError, IndexError, ValueError):
        pass
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def threads_s() -> dict[int, float]:
    """Return the CPU seconds of this process's threads but the calling one, by thread; nothing where the system does not tell them.

    From the clocks of the threads, up to now: the scheduler's account in /proc is as old as its last tick.
    """
    own, found = threading.get_native_id(), dict[int, float]()
    if sys.platform != "linux":
        return found
    for task in map(int, os.listdir("/proc/self/task")):  # noqa: PTH208 - called while others wait
        if task != own:
            with suppress(OSError):  # it has ended
                found[task] = time.clock_gettime(~task << 3 | _THREAD_CLOCK)
    return found


def is_runnable(thread: int) -> bool:
    """Say whether a thread of this process runs, or would if it had a core; False where the system does not tell."""
    try:
        with open(f"/proc/self/task/{thread}/stat", "rb") as file:  # noqa: PTH123 - called while others wait
            return file.read().rpartition(b")")[2].split(maxsplit=1)[0] == b"R"
    except (OSError, IndexError):  # it has ended
        return False


class BackgroundLoad:
    """How many of the cores that we may use processes other than ours kept busy, between construction and `read`."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._started = time.perf_counter()
        self._busy = _busy_seconds()
        self._ours = sum(_cpu_seconds(pid) for pid in (os.getpid(), *pids) if pid)

    def read(self, pids: Iterable[int]) -> float:
        """Return the average number of cores that were busy with something else than this process and `pids`."""
        elapsed = max(1e-3, time.perf_counter() - self._started)
        ours = sum(_cpu_seconds(pid) for pid in (os.getpid(), *pids) if pid) - self._ours
        return max(0.0, (_busy_seconds() - self._busy - max(0.0, ours)) / elapsed)


def _busy_seconds() -> float:
    """Return for how long the cores that this process may use have been busy, summed: what goes on on others is beside the point."""
    cores = psutil.cpu_times(percpu=True)
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(len(cores))
    return sum(
        getattr(cores[core], name, 0.0)
        for core in ours
        if core < len(cores)
        for name in ("user", "system", "nice", "irq", "softirq", "steal")
    )


def on_battery() -> bool:
    """Say whether the machine runs on battery."""
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError):
        return False
    return battery is not None and battery.power_plugged is False


def is_busy(load_cores: float, cores: int) -> bool:
    """Say whether so many cores kept busy by others, of the `cores` that we may use, spoil what is measured."""
    return load_cores > _BUSY * cores


def machine_cautions(load_cores: float, cores: int) -> tuple[Caution, ...]:
    """Return the reasons to doubt what was measured under `load_cores` of foreign load on a machine of `cores`."""
    found = []
    if is_busy(load_cores, cores):
        found.append(
            Caution(
                code="machine-busy",
                message=f"other processes kept {load_cores:.1f} of {cores} cores busy",
                advice="close them and tune again",
            )
        )
    if on_battery():
        found.append(Caution(code="on-battery", message="the machine ran on battery", advice="plug it in and tune again"))
    return tuple(found)


def peak_memory_bytes(pid: int | None = None) -> int:
    """Return the peak resident memory of a process in bytes (of this one when no `pid` is given); 0 when the system does not tell."""
    try:
        with open(f"/proc/{pid or 'self'}/status") as file:  # noqa: PTH123 - not a path of a user
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    info = psutil.Process(pid).memory_info()
    return int(getattr(info, "peak_wset", 0))
