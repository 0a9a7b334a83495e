"""What the host's CPU offers to this process: model, instruction sets, and the cores that may really be used."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from aivmm.runtime.target import Device

# The ones that decide which kernels a runtime picks; hundreds of others would only make fingerprints brittle.
_DECISIVE = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "neon", "asimd", "asimdhp", "asimddp", "sve", "sve2", "i8mm", "bf16",
)  # fmt: skip


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPU quota in cores that control groups grant this process, or None where there is none.

    Reads version 2 (`cpu.max` of the group and of each of its parents: the tightest counts) and version 1 (`cpu.cfs_quota_us`).
    """
    quotas = (_quota_of(folder, first_version=first) for folder, first in _groups(root, membership))
    return min((each for each in quotas if each is not None), default=None)


def throttling_files(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> tuple[str, ...]:
    """Return the files that say for how long a CPU quota stopped this process: those of its groups that have one."""
    limited = (folder for folder, first in _groups(root, membership) if _quota_of(folder, first_version=first) is not None)
    return tuple(f"{folder}/cpu.stat" for folder in limited)


def throttled_s(file: str) -> float | None:
    """Return for how many seconds processors were withheld, all of them added up, by a file that `throttling_files` names; None where it
    does not say."""
    units = {"throttled_usec": 1e-6, "throttled_time": 1e-9}  # version 2, version 1
    try:
        pairs = [line.split() for line in (_start_of(file) or "").splitlines()]
        return next((int(value) * units[name] for name, value in pairs if name in units), None)
    except (OSError, ValueError):
        return None


def _groups(root: Path, membership: Path) -> Iterator[tuple[str, bool]]:
    """Yield the folders of the control groups that this process is in, parents too, and whether they are of version 1."""
    try:
        lines = (_start_of(str(membership)) or "").splitlines()
    except OSError:
        return
    for line in [each for each in lines if "cpu" in each or "::" in each]:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not path or (controllers and "cpu" not in controllers.split(",")):
            continue
        # Inside a container the group's path may name the host's tree; its own limits are then at the root of the mount.
        folder = f"{root}/{controllers}" if controllers else str(root)
        for name in ("", *filter(None, path.split("/"))):
            folder = f"{folder}/{name}" if name else folder
            yield folder, bool(controllers)


def _quota_of(folder: str, *, first_version: bool) -> float | None:
    try:
        text = _start_of(f"{folder}/{'cpu.cfs_quota_us' if first_version else 'cpu.max'}")
        if text is None or text.startswith(("max", "-1")):
            return None
        if first_version:
            text = f"{text} {_start_of(f'{folder}/cpu.cfs_period_us')}"
        limit, period = text.split()
        cores = float(limit) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None


def _start_of(path: str, until: bytes = b"") -> str | None:
    """Return a file of the kernel's as far as the first `until`, or None where there is none. Some write a page for each core there is."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    text = b""
    try:
        while not (until and until in text) and (piece := os.read(descriptor, 4096)):
            text += piece
    finally:
        os.close(descriptor)
    return (text.partition(until)[0] if until else text).decode(errors="replace")


def usable_cores() -> int:
    """Return how many logical cores this process can keep busy: affinity, capped by the control-group quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cgroup_quota()
    return max(1, min(allowed, math.ceil(quota) if quota else allowed))


@cache
def cpu_device() -> Device:
    """Return the host's CPU as a device. The core count is read once: a process does not outlive a change of its quota by much."""
    return Device(
        kind="cpu",
        model=_model_name(),
        memory_bytes=None,
        instruction_sets=_instruction_sets(),
        cores=usable_cores(),
    )


def _model_name() -> str:
    return _told("model name", "Hardware", "Model") or platform.processor() or platform.machine() or "unknown CPU"


def _instruction_sets() -> tuple[str, ...]:
    flags = f" {_told('flags', 'Features')} "
    return tuple([name for name in _DECISIVE if f" {name} " in flags])


def _told(*keys: str) -> str:
    """Return what `/proc/cpuinfo` says of the first processor under the first of `keys` that it has; empty where it has none."""
    text = _cpuinfo()
    for key in keys:
        value = text.partition(f"\n{key}\t")[2].partition("\n")[0].strip("\t :")
        if value:
            return value
    return ""


@cache
def _cpuinfo() -> str:
    try:
        return "\n" + (_start_of("/proc/cpuinfo", until=b"\n\n") or "")
    except OSError:
        return ""


def host_memory_bytes() -> int:
    """Return the host's physical memory in bytes."""
    import psutil  # here: who runs a plan need not wait for it

    return int(psutil.virtual_memory().total)
