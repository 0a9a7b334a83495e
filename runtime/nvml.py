"""NVIDIA's management library: which cards there are. Absent drivers are a reason, not an error."""

from __future__ import annotations

from functools import cache

from aivmm.runtime.target import Device


@cache
def nvidia_devices() -> tuple[tuple[Device, ...], str]:
    """Return the NVIDIA cards in NVML's order, and, when there are none, the reason."""
    try:
        import pynvml
    except ImportError as error:
        return (), f"nvidia-ml-py is not installed ({error})"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), f"no NVIDIA driver ({error})"
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return tuple(_device(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())), ""
    except pynvml.NVMLError as error:
        return (), f"NVML failed ({error})"
    finally:
        pynvml.nvmlShutdown()


def _device(pynvml: object, index: int, driver: str) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    try:
        limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000  # type: ignore[attr-defined]
    except pynvml.NVMLError:  # type: ignore[attr-defined]
        limit = None  # virtual cards do not tell
    return Device(
        kind="gpu",
        model=pynvml.nvmlDeviceGetName(handle),  # type: ignore[attr-defined]
        uid=pynvml.nvmlDeviceGetUUID(handle),  # type: ignore[attr-defined]
        driver=driver,
        memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,  # type: ignore[attr-defined]
        power_limit_w=limit,
    )
