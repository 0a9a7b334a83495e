"""What the host's CPU offers to this process: model, instruction sets, and the cores that may really be used."""

from __future__ import annotations

import math
import os
import platform
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
    try:
        lines = (_start_of(str(membership)) or "").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not path or (controllers and "cpu" not in controllers.split(",")):
            continue
        # Inside a container the group's path may name the host's tree; its own limits are then at the root of the mount.
        folder = f"{root}/{controllers}" if controllers else str(root)
        for name in ("", *filter(None, path.split("/"))):
            folder = f"{folder}/{name}" if name else folder
            quota = _quota_of(folder, first_version=bool(controllers))
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_of(folder: str, *, first_version: bool) -> float | None:
    try:
        text = _start_of(f"{folder}/{'cpu.cfs_quota_us' if first_version else 'cpu.max'}")
        if first_version and text is not None:
            text = f"{text} {_start_of(f'{folder}/cpu.cfs_period_us')}"
        if text is None:
            return None
        limit, period = text.split()
        cores = None if limit in ("max", "-1") else float(limit) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores is not None and cores > 0 else None


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
    info = _cpuinfo()
    for key in ("model name", "Hardware", "Model"):
        if info.get(key):
            return info[key]
    return platform.processor() or platform.machine() or "unknown CPU"


def _instruction_sets() -> tuple[str, ...]:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(name for name in _DECISIVE if name in flags)


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = _start_of("/proc/cpuinfo", until=b"\n\n") or ""
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def host_memory_bytes() -> int:
    """Return the host's physical memory in bytes."""
    import psutil  # here: who runs a plan need not wait for it

    return int(psutil.virtual_memory().total)
