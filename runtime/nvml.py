"""NVIDIA's management library: which cards there are, and how one is doing. Absent drivers are a reason, not an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from aivmm.errors import Unsupported
from aivmm.runtime.target import Device

_IDLE = 0x01
# NVML's bits (nvml.h, nvmlClocksEventReasons): only those that mean that the card was slowed down, and by what.
_SLOWED_BY = {0x08: "hardware slowdown", 0x20: "software thermal limit", 0x40: "hardware thermal limit", 0x80: "power brake"}
# NVML's counters of time lost (nvmlPerfPolicyType_t). That of the board's own limit grows on an idle card as well, so it says nothing.
_LOST_TO = {0: "power", 1: "thermal"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardState:
    """One card at one moment; None where it does not tell. `lost_s` are counters: only their growth means something."""

    uid: str
    sm_mhz: int | None
    most_sm_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    idle: bool = False  # it has nothing to do, and its clocks may rest
    slowed_by: tuple[str, ...] = ()  # reasons that hold just now
    lost_s: tuple[tuple[str, float], ...] = ()  # seconds for which clocks were held down since the driver was loaded, by cause


@cache
def nvidia_devices() -> tuple[tuple[Device, ...], str]:
    """Return the NVIDIA cards in NVML's order, and, when there are none, the reason.

    A card that is divided (MIG) is listed as its instances: nothing runs on the whole of it.
    """
    try:
        with _nvml() as nvml:
            driver = nvml.nvmlSystemGetDriverVersion()
            found = tuple(each for index in range(nvml.nvmlDeviceGetCount()) for each in _devices(nvml, index, driver))
            return found, "" if found else "the NVIDIA driver sees no card"
    except Unsupported as error:
        return (), error.message


def card_state(uid: str) -> CardState:
    """Return how the card is doing.

    Raises:
        Unsupported: no driver, or no such card; with the reason.
    """
    with _card(uid) as (nvml, card):
        reasons = _asked(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, card) or 0
        power = _asked(nvml, nvml.nvmlDeviceGetPowerUsage, card)
        lost = {name: _asked(nvml, nvml.nvmlDeviceGetViolationStatus, card, policy) for policy, name in _LOST_TO.items()}
        return CardState(
            uid=uid,
            sm_mhz=_asked(nvml, nvml.nvmlDeviceGetClockInfo, card, nvml.NVML_CLOCK_SM),
            most_sm_mhz=_asked(nvml, nvml.nvmlDeviceGetMaxClockInfo, card, nvml.NVML_CLOCK_SM),
            temperature_c=_asked(nvml, nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000,
            idle=bool(reasons & _IDLE),
            slowed_by=tuple(text for bit, text in _SLOWED_BY.items() if reasons & bit),
            lost_s=tuple((name, each.violationTime / 1e9) for name, each in lost.items() if each is not None),
        )


def total_energy_j(uid: str) -> float:
    """Return the joules that the card has used since its driver was loaded. The counter moves every 100 ms.

    Raises:
        Unsupported: no driver, no such card, or one older than Volta; with the reason.
    """
    with _card(uid) as (nvml, card):
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1000


def process_memory_bytes(uid: str, pid: int) -> int:
    """Return the device memory in bytes that a process holds on the card; 0 when it does not use it.

    Raises:
        Unsupported: NVML does not tell; with the reason. In containers it names processes by the host's ids, or none at all.
    """
    with _card(uid) as (nvml, card):
        found = [*nvml.nvmlDeviceGetComputeRunningProcesses(card), *nvml.nvmlDeviceGetGraphicsRunningProcesses(card)]
        mine = [each.usedGpuMemory for each in found if each.pid == pid]
        if any(each is None for each in mine):
            raise Unsupported(
                "the NVIDIA driver does not tell how much memory a process holds (it never does on Windows' own driver model)"
            )
        if not mine and found:
            raise Unsupported(f"NVML lists no process {pid}; in a container it knows processes by the host's ids")
        return max(mine, default=0)  # one that computes and draws is listed twice


def card_memory_bytes(uid: str) -> int:
    """Return the bytes of the card's memory that are in use, whoever holds them.

    Raises:
        Unsupported: no driver, or no such card; with the reason.
    """
    with _card(uid) as (nvml, card):
        return int(nvml.nvmlDeviceGetMemoryInfo(card).used)


def card_users(uid: str) -> dict[int, int | None]:
    """Return the processes that compute on the card, by their ids, and the bytes that each holds there, None where that is not told.

    In a container the ids are the host's.

    Raises:
        Unsupported: no driver, no such card, or it does not tell; with the reason.
    """
    with _card(uid) as (nvml, card):
        return {each.pid: each.usedGpuMemory for each in nvml.nvmlDeviceGetComputeRunningProcesses(card)}


def is_nvidia(device: Device) -> bool:
    """Say whether a device is one of NVIDIA's cards, or an instance of one, as NVML knows them."""
    return device.uid.startswith(("GPU-", "MIG-"))


def is_started() -> bool:
    """Say whether the library is in use by now: to start it takes 0.1 s."""
    return _started.cache_info().currsize > 0


@cache
def _started() -> Any:
    """Return the library, initialised for as long as the process lives: that takes 0.1 s, and readings are taken between measurements.

    Raises:
        Unsupported: it is missing, or there is no driver.
    """
    try:
        import pynvml
    except ImportError as error:
        raise Unsupported(f"nvidia-ml-py is not installed ({error})") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unsupported(f"no NVIDIA driver ({error})") from error
    return pynvml


@contextmanager
def _nvml() -> Iterator[Any]:
    """Give the library.

    Raises:
        Unsupported: it is missing or fails, in whatever is done inside too.
    """
    pynvml = _started()
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise Unsupported(f"NVML failed ({error})") from error


@contextmanager
def _card(uid: str) -> Iterator[tuple[Any, Any]]:
    with _nvml() as nvml:
        yield nvml, nvml.nvmlDeviceGetHandleByUUID(uid)


def _asked(nvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """Return what NVML answers, or None when this card does not tell."""
    try:
        return ask(*arguments)
    except nvml.NVMLError:
        return None


def _devices(nvml: Any, index: int, driver: str) -> Iterator[Device]:
    """Yield a card, or where it is divided, its instances."""
    card = nvml.nvmlDeviceGetHandleByIndex(index)
    if not (_asked(nvml, nvml.nvmlDeviceGetMigMode, card) or (0,))[0]:
        yield _device(nvml, card, card, driver)
        return
    for place in range(_asked(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, card) or 0):
        instance = _asked(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, place)
        if instance is not None:
            yield _device(nvml, instance, card, driver)


def _device(nvml: Any, handle: Any, card: Any, driver: str) -> Device:
    """Describe a card or an instance of one; what only whole cards have is the `card`'s."""
    limit = _asked(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, card)  # virtual cards do not tell
    return Device(
        kind="gpu",
        model=nvml.nvmlDeviceGetName(handle),
        uid=nvml.nvmlDeviceGetUUID(handle),
        driver=driver,
        memory_bytes=nvml.nvmlDeviceGetMemoryInfo(handle).total,
        power_limit_w=None if limit is None else limit / 1000,
        properties=_properties(nvml, card, divided=handle is not card),
    )


def _properties(nvml: Any, card: Any, *, divided: bool) -> dict[str, str | int | float | bool]:
    capability = _asked(nvml, nvml.nvmlDeviceGetCudaComputeCapability, card)
    bus = _asked(nvml, nvml.nvmlDeviceGetPciInfo, card)
    cuda = _asked(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    corrects = _asked(nvml, nvml.nvmlDeviceGetEccMode, card)
    found: dict[str, str | int | float | bool | None] = {
        "compute_capability": None if capability is None else f"{capability[0]}.{capability[1]}",
        "mig": divided,
        "pci_address": None if bus is None else _text(bus.busId),
        "cuda_driver": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        "ecc": None if corrects is None else bool(corrects[0]),
        "most_sm_mhz": _asked(nvml, nvml.nvmlDeviceGetMaxClockInfo, card, nvml.NVML_CLOCK_SM),
    }
    return {name: value for name, value in found.items() if value is not None}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
