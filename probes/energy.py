"""Energy: joules between two readings of the hardware's own counters, or the reason why there are none.

RAPL (through Linux's powercap) counts what a CPU package uses, with the graphics and the NPU on the same chip, and where it tells the
memory; NVML what an NVIDIA card uses. The number of a target is complete only with all of its counters: a card's work costs its host too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from aivmm.errors import Unsupported
from aivmm.probes.conditions import nvidia_uids
from aivmm.probes.records import Caution
from aivmm.runtime.nvml import total_energy_j
from aivmm.runtime.target import Target

POWERCAP = Path("/sys/class/powercap")
SHORTEST_S = 2.0  # NVML's counter moves every 100 ms (seen on an H200), so a shorter window errs by more than 5 %
_MOST_W = 1000.0  # no package draws more: tells how long a window may be before a counter could have wrapped twice


class Counter(Protocol):
    """A counter of energy: monotone but for wrapping at `wraps_at_j`, where that is not None."""

    @property
    def name(self) -> str:
        """What it counts: "package-0", "card GPU-..."."""

    @property
    def wraps_at_j(self) -> float | None:
        """Where it starts again at 0."""

    def read_j(self) -> float:
        """Return joules since some moment in the past. Raises Unsupported with the reason."""


@dataclass(frozen=True, slots=True)
class Rapl:
    """One RAPL domain: a package, or the memory of one."""

    name: str
    folder: Path
    wraps_at_j: float | None

    def read_j(self) -> float:
        """Return the domain's joules."""
        return _micro(self.folder / "energy_uj")


@dataclass(frozen=True, slots=True)
class Card:
    """An NVIDIA card's own counter."""

    name: str
    uid: str
    wraps_at_j: float | None = None  # 64 bits of millijoules

    def read_j(self) -> float:
        """Return the card's joules."""
        return total_energy_j(self.uid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """What a window of `seconds` used. `joules` has each counter that could be read, `missing` the reason for each that could not."""

    seconds: float
    joules: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_j(self) -> float | None:
        """All of it in joules; None when a counter is missing: a part of it compares with nothing."""
        return None if self.missing or not self.joules else sum(self.joules.values())

    @property
    def watts(self) -> float | None:
        """The mean power."""
        return None if self.total_j is None else self.total_j / self.seconds

    @property
    def reason(self) -> str:
        """Why there is no total; "" when there is one."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.missing.items())

    def cautions(self) -> tuple[Caution, ...]:
        """Return the reasons to doubt the number."""
        if self.total_j is None or self.seconds >= SHORTEST_S:
            return ()
        return (
            Caution(
                code="energy-short",
                message=f"energy was counted over {self.seconds:.2f} s only, and a GPU's counter moves every 0.1 s",
                advice=f"count over {SHORTEST_S:.0f} s or more",
            ),
        )


class EnergyMeter:
    """Counts while entered: `with EnergyMeter(targets) as meter: ...`, then `meter.energy`.

    Needs no privileges where it tells nothing: what cannot be read is a reason in the result. `root` is where powercap lies.
    """

    energy: Energy

    def __init__(self, targets: Iterable[Target], *, root: Path = POWERCAP) -> None:
        self._counters, self._missing = counters(targets, root=root)
        self._before: dict[str, float] = {}
        self._started = 0.0

    def __enter__(self) -> EnergyMeter:
        for each in self._counters:
            try:
                self._before[each.name] = each.read_j()
            except Unsupported as error:
                self._missing[each.name] = str(error)
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        seconds = time.perf_counter() - self._started
        joules: dict[str, float] = {}
        for each in self._counters:
            if each.name in self._before:
                try:
                    joules[each.name] = used_j(self._before[each.name], each.read_j(), wraps_at_j=each.wraps_at_j, seconds=seconds)
                except Unsupported as reason:
                    self._missing[each.name] = str(reason)
        self.energy = Energy(seconds=seconds, joules=joules, missing=dict(self._missing))


def used_j(before_j: float, after_j: float, *, wraps_at_j: float | None, seconds: float) -> float:
    """Return the joules between two readings of one counter that starts again at 0 after `wraps_at_j`.

    Raises:
        Unsupported: the window is so long that it could have wrapped twice, or a counter that never wraps went back.
    """
    if wraps_at_j is None:
        if after_j < before_j:
            raise Unsupported("the counter was set back while it was used")
        return after_j - before_j
    if seconds > wraps_at_j / _MOST_W:
        raise Unsupported(f"{seconds:.0f} s are too long for a counter that starts again every {wraps_at_j:.0f} J")
    return after_j - before_j if after_j >= before_j else after_j - before_j + wraps_at_j


def per_sample(energy: Energy, samples: int, *, idle: Energy | None = None) -> dict[str, float]:
    """Return `energy_j`, the joules of one sample as drawn, and with `idle` (the same counters, the machine doing nothing) also
    `energy_above_idle_j`, what running one adds. The first is what a battery or a bill sees of a machine that does nothing else; the second
    compares settings on a machine that is on anyway. Empty where a counter is missing.

    Raises:
        ValueError: no sample.
    """
    if samples < 1:
        raise ValueError(f"{samples} samples used no energy")
    if energy.total_j is None:
        return {}
    found = {"energy_j": energy.total_j / samples, "power_w": energy.total_j / energy.seconds}
    if idle is not None and idle.watts is not None and idle.joules.keys() == energy.joules.keys():
        found["energy_above_idle_j"] = max(0.0, energy.total_j - idle.watts * energy.seconds) / samples
    return found


def counters(targets: Iterable[Target], *, root: Path = POWERCAP) -> tuple[list[Counter], dict[str, str]]:
    """Return the counters that together see what the targets use, and why others are missing, by name.

    The CPU's are always among them. A graphics or neural unit of Intel's counts with the package that it is a part of; what is known to be
    a separate card without a counter of ours is missing.
    """
    targets = list(targets)
    found, missing = _rapl(root)
    for uid in nvidia_uids(targets):
        found.append(Card(name=f"card {uid}", uid=uid))
    for target in targets:
        nvidia = target.device.uid.startswith(("GPU-", "MIG-"))
        # Chips that share the package share the host's memory; a card has its own, and its runtime says how much.
        if target.device.kind in ("gpu", "npu", "other") and not nvidia and not _in_package(target):
            missing[str(target)] = "no energy counter of this device is known"
    return found, missing


def _in_package(target: Target) -> bool:
    return target.runtime == "openvino" and (target.device.kind == "npu" or "igpu" in target.device.model.lower())


def _rapl(root: Path) -> tuple[list[Counter], dict[str, str]]:
    """Return the packages' counters and those of their memory. Their other parts (core, uncore) are counted with the package."""
    found: list[Counter] = []
    if not root.is_dir():
        return [], {"cpu package": f"{root} does not exist: this system, or virtual machine, has no RAPL counters"}
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
        except OSError:
            continue
        if name.startswith("package") or name == "dram":
            package = folder.name.split(":")[1]
            try:
                wraps_at_j = _micro(folder / "max_energy_range_uj")
                _micro(folder / "energy_uj")
            except Unsupported as error:
                return [], {"cpu package": str(error)}
            found.append(Rapl(name=name if name != "dram" else f"dram-{package}", folder=folder, wraps_at_j=wraps_at_j))
    if not any(each.name.startswith("package") for each in found):
        return [], {"cpu package": f"{root} has no package domain (modprobe intel_rapl_msr, where the processor has one)"}
    return found, {}


def _micro(path: Path) -> float:
    """Return what a file counts in millionths.

    Raises:
        Unsupported: it cannot be read, with advice where there is some.
    """
    try:
        return int(path.read_text()) / 1e6
    except PermissionError:
        raise Unsupported(f"{path} is readable by root only", advice=f"sudo chmod a+r {path.parent.parent}/intel-rapl*/energy_uj") from None
    except (OSError, ValueError) as error:
        raise Unsupported(f"{path} cannot be read ({error})") from None
