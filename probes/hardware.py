"""What hardware is plugged in, whether or not a driver knows it: "no such device" may mean a missing driver or a missing card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_VENDORS = {0x8086: "Intel", 0x10DE: "NVIDIA", 0x1002: "AMD", 0x17CB: "Qualcomm"}
# Base classes of PCI: 03 displays (0380 and 0302 are those without a screen), 12 processing accelerators, where NPUs are.
# PCI Code and ID Assignment Specification 1.18, chapter 1.
_KINDS: dict[int, Literal["gpu", "npu"]] = {0x03: "gpu", 0x12: "npu"}


@dataclass(frozen=True, slots=True)
class Card:
    """A device on the PCI bus that can compute. `driver` is the kernel's driver that has it, empty when none has."""

    kind: Literal["gpu", "npu"]
    vendor: str
    ids: str  # vendor and device, in hexadecimal, as lspci writes them
    address: str
    driver: str = ""

    def __str__(self) -> str:
        return f"{self.vendor} {self.kind.upper()} [{self.ids}] at {self.address}"


def cards(root: Path = Path("/")) -> tuple[Card, ...] | None:
    """Return what on the PCI bus can compute, from known vendors; None where the system does not tell (it is Linux that does).

    `root` is where the system's own files lie.
    """
    folder = root / "sys/bus/pci/devices"
    if not folder.is_dir():
        return None
    return tuple(_found(folder))


def _found(folder: Path) -> Iterator[Card]:
    for each in sorted(folder.iterdir()):
        try:
            kind = _KINDS.get(int((each / "class").read_text(), 16) >> 16)
            vendor, device = (int((each / name).read_text(), 16) for name in ("vendor", "device"))
        except (OSError, ValueError):
            continue
        if kind and vendor in _VENDORS:
            driver = each / "driver"
            name = driver.resolve().name if driver.is_symlink() else ""
            yield Card(kind=kind, vendor=_VENDORS[vendor], ids=f"{vendor:04x}:{device:04x}", address=each.name, driver=name)
