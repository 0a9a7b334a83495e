"""`aivmm doctor`: what works on this machine, what is missing for each class of device, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from aivmm.db.location import Location
from aivmm.errors import AivmmError
from aivmm.probes import conditions
from aivmm.probes.energy import counters
from aivmm.probes.hardware import Card, cards
from aivmm.probes.machine import BackgroundLoad, lock_path
from aivmm.runtime.folders import cache_folder
from aivmm.runtime.target import Target, Unavailable, matches
from aivmm.tuner.inventory import find_devices

State = Literal["ok", "absent", "missing", "warning", "broken"]
GIB = 1 << 30
_LOAD_S = 0.5  # how long the machine is watched for others' work
_LEAST_DISK = GIB
_LEAST_MEMORY = 2 * GIB


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `absent`: there is no such hardware, so there is nothing to do; `missing`: it could be made to work."""

    subject: str
    state: State
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """A kind of hardware, the targets that it serves, and how its cards are known on the bus: no `kind` where they are not told by it."""

    name: str
    patterns: tuple[str, ...]
    kind: str = ""
    vendor: str = ""


CLASSES = (
    DeviceClass("CPU", ("openvino:CPU", "onnxruntime:CPU")),
    DeviceClass("Intel GPU (iGPU, ARC)", ("openvino:GPU",), "gpu", "Intel"),
    DeviceClass("Intel NPU", ("openvino:NPU",), "npu", "Intel"),
    DeviceClass("NVIDIA GPU", ("onnxruntime:CUDA", "onnxruntime:TensorRT", "onnxruntime:NvTensorRtRtx"), "gpu", "NVIDIA"),
    DeviceClass("AMD GPU", ("onnxruntime:MIGraphX", "onnxruntime:ROCM"), "gpu", "AMD"),
    # These run where ONNX Runtime's build has their provider. An adapter may be of any vendor, and the others are no cards.
    DeviceClass("DirectX 12 adapter", ("onnxruntime:DirectML",)),
    DeviceClass("Qualcomm NPU", ("onnxruntime:QNN",)),
    DeviceClass("Apple GPU and Neural Engine", ("onnxruntime:CoreML",)),
)


def examine(db: str | None = None, backends: Sequence[str] | None = None) -> list[Finding]:
    """Look at everything: devices by class, the places where data is kept, and what measurements here would suffer from.

    Raises:
        UsageError: there is no backend of such a name.
    """
    targets, unavailable = find_devices(backends)
    return [
        *software(),
        *devices(targets, unavailable, cards()),
        *places(db),
        *measuring(targets),
    ]


def usable(findings: Iterable[Finding]) -> bool:
    """Say whether aivmm can work here: some target runs, and nothing is broken."""
    findings = list(findings)
    names = {each.name for each in CLASSES} | {"other"}
    return any(each.state == "ok" and each.subject in names for each in findings) and all(each.state != "broken" for each in findings)


def software() -> Iterator[Finding]:
    """Say what runs: versions of what results depend on."""
    found = ", ".join(f"{name} {_version(name)}" for name in ("openvino", "onnxruntime-gpu", "onnxruntime", "onnx") if _version(name))
    yield Finding(
        "software",
        "ok",
        f"aivmm {_version('aivmm')}, {found}; Python {platform.python_version()} on {platform.system()} {platform.machine()}",
    )


def devices(targets: Sequence[Target], unavailable: Sequence[Unavailable], plugged: Sequence[Card] | None) -> Iterator[Finding]:
    """Say of each class of device what runs on it, and of what does not run whether the hardware is here at all."""
    seen: set[str] = set()
    for each in CLASSES:
        mine = [target for target in targets if any(matches(pattern, str(target)) for pattern in each.patterns)]
        absent = [gone for gone in unavailable if any(matches(pattern, gone.target) for pattern in each.patterns)]
        seen |= {str(target) for target in mine} | {gone.target for gone in absent}
        for target in mine:
            yield _working(each.name, target)
        here = (
            None if plugged is None or not each.kind else [card for card in plugged if (card.kind, card.vendor) == (each.kind, each.vendor)]
        )
        if not mine and not absent and here:
            offers = "no backend offers it" if each.vendor != "AMD" else "this build of ONNX Runtime has no provider for it"
            yield Finding(
                each.name, "missing", f"{here[0]}: {offers}", "install a build of ONNX Runtime that has one, such as onnxruntime-migraphx"
            )
        for gone in absent:
            yield _lacking(each.name, gone, here)
    for target in targets:
        if str(target) not in seen:
            yield _working("other", target)
    for gone in unavailable:
        if gone.target not in seen:
            yield Finding("other", "missing", f"{gone.target}: {gone.reason}", gone.advice)


def places(db: str | None) -> Iterator[Finding]:
    """Say whether what is measured can be kept, and where."""
    yield _database(db)
    folder = cache_folder()
    held = _nearest(folder)
    if os.access(held, os.W_OK | os.X_OK):
        free = shutil.disk_usage(held).free
        low = free < _LEAST_DISK
        advice = "free some, or set AIVMM_CACHE to a folder on another disk" if low else ""
        yield Finding("cache", "warning" if low else "ok", f"{folder}, {free / GIB:.1f} GiB free", advice)
    else:
        yield Finding(
            "cache", "warning", f"{folder} cannot be written, so nothing is cached between runs", "set AIVMM_CACHE to a folder of yours"
        )
    yield _lock()


def measuring(targets: Sequence[Target]) -> Iterator[Finding]:
    """Say what would spoil measurements here and now, and what cannot be measured."""
    before, load = conditions.read(targets), BackgroundLoad(())
    time.sleep(_LOAD_S)
    cores = load.read(())
    found = conditions.cautions(before, conditions.read(targets), load_cores=cores)
    for caution in found:
        yield Finding("conditions", "warning", caution.message, caution.advice)
    if not found:
        yield Finding("conditions", "ok", f"{before.cores} cores, {cores:.1f} of them busy with other work")
    counted, missing = counters(targets)
    if counted:
        yield Finding("energy", "ok", "counted by " + ", ".join(each.name for each in counted))
    for name, reason in missing.items():
        yield Finding("energy", "absent" if "does not exist" in reason or "no energy counter" in reason else "missing", f"{name}: {reason}")
    free = _free_memory()
    if free is not None and free < _LEAST_MEMORY:
        yield Finding(
            "memory", "warning", f"{free / GIB:.1f} GiB free", "close something: a model is loaded several times while it is tuned"
        )


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings as the one JSON object."""
    rows = [{"subject": each.subject, "state": each.state, "detail": each.detail, "advice": each.advice} for each in findings]
    return {"schema": 1, "usable": usable(findings), "findings": rows}


def _working(name: str, target: Target) -> Finding:
    device = target.device
    parts = [device.model, *([f"{device.cores} cores"] if device.cores else []), *([f"driver {device.driver}"] if device.driver else [])]
    memory = f"{device.memory_bytes / GIB:.0f} GiB" if device.memory_bytes and device.kind != "cpu" else ""
    told = {"compute_capability": "compute capability {}", "DEVICE_ARCHITECTURE": "{}", "NPU_COMPILER_VERSION": "compiler {}"}
    parts += [text.format(device.properties[each]) for each, text in told.items() if each in device.properties]
    parts += ["an instance of a divided card (MIG)"] if device.properties.get("mig") else []
    parts += [device.uid] if device.uid.startswith(("GPU-", "MIG-")) else []  # which of several like cards it is, as nvidia-smi -L has it
    parts += [f"limited to {device.power_limit_w:.0f} W"] if device.power_limit_w else []
    return Finding(name, "ok", f"{target}: {', '.join([*parts, *([memory] if memory else [])])}; {', '.join(target.precisions)}")


def _lacking(name: str, gone: Unavailable, here: Sequence[Card] | None) -> Finding:
    """Tell a card without its software from no card: for the latter there is nothing to install."""
    if here is None:  # the system does not tell, or it is the CPU
        return Finding(name, "missing", f"{gone.target}: {gone.reason}", gone.advice)
    if not here:
        return Finding(name, "absent", f"{gone.target}: no such device on the PCI bus ({gone.reason})")
    drivers = ", ".join(sorted({card.driver for card in here if card.driver})) or "no kernel driver has it"
    return Finding(name, "missing", f"{gone.target}: {here[0]} is here ({drivers}), but {gone.reason}", gone.advice)


def _database(db: str | None) -> Finding:
    from aivmm.db.database import Database

    try:
        place = Location.of(db)
        if place.path is not None and not place.path.exists():
            held = place.path.parent
            if not (held.is_dir() and os.access(held, os.W_OK | os.X_OK)):
                return Finding("database", "broken", f"{place.shown}: the folder cannot be written", "set AIVMM_DB or give --db PATH")
            return Finding("database", "ok", f"{place.shown}, made by the first run")
        with Database.open(db, make=False) as database:
            problems = database.check()
    except AivmmError as error:
        return Finding("database", "broken", error.message, error.advice)
    if problems:
        return Finding(
            "database", "broken", f"{place.shown}: {len(problems)} problems, the first: {problems[0]}", "aivmm db check lists them"
        )
    return Finding("database", "ok", f"{place.shown}, checked")


def _lock() -> Finding:
    try:
        path = lock_path()
    except AivmmError as error:
        return Finding("lock", "broken", error.message, error.advice)
    lock = FileLock(path, timeout=0, mode=0o666)
    try:
        with lock:
            return Finding("lock", "ok", f"{path} is free")
    except Timeout:
        return Finding("lock", "warning", "another aivmm is measuring on this machine now", "a tune started now waits for it")
    except OSError as error:
        return Finding("lock", "broken", f"cannot lock {path} ({error.strerror or error})", "set AIVMM_LOCK to a file that you may write")


def _nearest(folder: Path) -> Path:
    """Return the nearest folder that exists: the one that decides whether `folder` could be made."""
    return next((each for each in (folder, *folder.parents) if each.is_dir()), folder)


def _free_memory() -> int | None:
    import psutil

    try:
        return int(psutil.virtual_memory().available)
    except (OSError, RuntimeError):
        return None


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:  # PackageNotFoundError
        return ""


def _encodable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def mark(state: State) -> str:
    """Return the sign of a state, in letters where the terminal's encoding has no signs."""
    signs = {"ok": "✓", "absent": "–", "missing": "○", "warning": "!", "broken": "✗"}
    words = {"ok": "ok", "absent": "-", "missing": "o", "warning": "!", "broken": "x"}
    return signs[state] if _encodable(signs[state]) else words[state]
