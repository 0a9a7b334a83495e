"""NVIDIA cards as CUDA numbers them, and CUDA's libraries wherever pip put them (docs/decisions/0039).

CUDA numbers cards by its own rules (the fastest first, and only those that CUDA_VISIBLE_DEVICES leaves), NVML by their place on the bus: a
`device_id` means CUDA's number, so cards are matched by their UUIDs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from aivmm.errors import Unsupported
from aivmm.runtime.nvml import nvidia_devices
from aivmm.runtime.target import Device

_NO_DRIVER = "no NVIDIA driver"
_NO_DEVICE = "no CUDA-capable device"  # what CUDA says where it may see none: nothing else that it says comes from `_VISIBLE`
_VISIBLE = "CUDA_VISIBLE_DEVICES"
EXTRA_ADVICE = 'pip install "aivmm[cuda]"'
TENSORRT_ADVICE = 'pip install "tensorrt-cu13<11"'  # the provider of onnxruntime-gpu 1.31 links against libnvinfer.so.10

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# In the order in which they need each other. Those that the provider loads by name later have to be there by then too.
_LIBRARIES = {
    "linux": ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn"),
    "win32": ("cudart64", "nvrtc64", "cublasLt64", "cublas64", "curand64", "cufft64", "cudnn64"),
}
_TENSORRT = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)


@cache
def cuda_devices() -> tuple[tuple[Device, ...], str]:
    """Return the cards that CUDA shows this process, each at its number, and, when there are none, the reason."""
    try:
        driver = _driver()
        found = tuple(_card(driver, number) for number in range(_count(driver)))
    except Unsupported as error:
        return (), _why_none(error.message)
    return found, "" if found else f"CUDA shows no card{_hidden()}"


def driver_advice(reason: str, libraries: str = "") -> str:
    """Return what to do where `cuda_devices` gives no card for `reason`; `libraries` is the advice on what is needed besides a driver."""
    if _VISIBLE in reason:
        return f"unset {_VISIBLE}, or name cards in it as nvidia-smi -L lists them"
    if reason.startswith(_NO_DRIVER):
        then = f", then {libraries}" if libraries else ""
        return f"install the NVIDIA driver (a container has its host's: start it with --gpus all){then}"
    return "see what nvidia-smi says; after the driver was updated the machine has to be restarted"


def _why_none(problem: str) -> str:
    """Say which half is missing: NVML may see the cards that CUDA cannot use, or was told not to."""
    seen, _ = nvidia_devices()
    return f"{problem}, though NVML sees {seen[0].model}{_hidden() if _NO_DEVICE in problem else ''}" if seen else problem


def _hidden() -> str:
    visible = os.environ.get(_VISIBLE)
    return f" ({_VISIBLE} is {visible!r})" if visible is not None else ""


@cache
def libraries_loaded(*, tensorrt: bool = False) -> tuple[str, ...]:
    """Load the CUDA libraries that lie in wheels, so that a provider finds them by name; return the files that were loaded.

    Without it `LD_LIBRARY_PATH` would have to name a folder of each wheel before Python starts. `onnxruntime.preload_dlls` looks in one
    place only, beside onnxruntime itself, and prints on standard output. What no wheel has is left to the system's own search.
    """
    loaded = []
    for stem in (*_LIBRARIES.get(sys.platform, ()), *(_TENSORRT if tensorrt else ())):
        for path in _files_of(stem):
            try:
                _load(path)
            except OSError:
                continue  # one that does not load is tried in its other places, and missed by the provider at the latest
            loaded.append(str(path))
            break
    return tuple(loaded)


def cuda_major() -> str:
    """Return the version of CUDA that this build of ONNX Runtime links against: "13"."""
    from onnxruntime.capi import build_and_package_info

    return str(getattr(build_and_package_info, "cuda_version", "")).partition(".")[0] or "13"


def missing_library(provider: Path) -> str:
    """Return the name of the first library that a provider's own library cannot be loaded for; "" when it can, or none is said."""
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        name, _, problem = str(error).partition(": ")
        return name if "cannot open shared object" in problem and str(provider) not in name else ""
    return ""


def same_card(uuid: str, other: str) -> bool:
    """Say whether two ids are of one card, however they are written: NVML's "GPU-1e64…", the plain digits of CUDA and OpenCL."""
    return bool(uuid) and _digits(uuid) == _digits(other)


def _digits(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-").replace("-", "")


def _files_of(stem: str) -> Iterator[Path]:
    """Yield the files of one library in the wheels that are installed: `nvidia/*/lib`, on Windows `nvidia/*/bin`, and TensorRT's own."""
    names = (f"{stem}_*.dll", f"{stem}.dll") if sys.platform == "win32" else (f"lib{stem}.so.*",)
    for folder in _folders():
        for name in names:
            yield from sorted(folder.glob(name))


@cache
def _folders() -> tuple[Path, ...]:
    found: list[Path] = []
    for package, inside in (("nvidia", ("*/lib", "*/bin", "*/bin/*")), ("tensorrt_libs", (".",))):
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            continue
        for root in spec.submodule_search_locations or () if spec else ():
            found += [folder for pattern in inside for folder in sorted(Path(root).glob(pattern)) if folder.is_dir()]
    return tuple(found)


def _load(path: Path) -> None:
    if sys.platform == "win32":
        os.add_dll_directory(str(path.parent))
    ctypes.CDLL(str(path))


@cache
def _driver() -> Any:
    """Return CUDA's driver library, initialised.

    Raises:
        Unsupported: there is none, or it does not start.
    """
    try:
        library = ctypes.CDLL(_DRIVER)
    except OSError:
        raise Unsupported(f"{_NO_DRIVER} ({_DRIVER} is missing)") from None
    _ask(library, "cuInit", 0)
    return library


def _count(library: Any) -> int:
    count = ctypes.c_int()
    _ask(library, "cuDeviceGetCount", ctypes.byref(count))
    return count.value


def _card(library: Any, number: int) -> Device:
    """Return the card with CUDA's number: as NVML knows it, or where NVML does not, as CUDA does."""
    uuid = (ctypes.c_ubyte * 16)()
    # Of a MIG instance the second version says the instance's own id. Drivers older than CUDA 11.4 have only the first.
    _ask(library, "cuDeviceGetUuid_v2" if hasattr(library, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid", uuid, number)
    digits = bytes(uuid).hex()
    major, minor = (_attribute(library, number, each) for each in _CAPABILITY)
    for device in nvidia_devices()[0]:
        if same_card(device.uid, digits):
            return replace(device, properties={**device.properties, "compute_capability": f"{major}.{minor}"})
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _ask(library, "cuDeviceGetName", name, len(name), number)
    _ask(library, "cuDeviceTotalMem_v2", ctypes.byref(total), number)
    return Device(
        kind="gpu",
        model=name.value.decode(errors="replace"),
        uid=f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}",
        memory_bytes=total.value,
        properties={"compute_capability": f"{major}.{minor}"},
    )


def _attribute(library: Any, number: int, attribute: int) -> int:
    value = ctypes.c_int()
    _ask(library, "cuDeviceGetAttribute", ctypes.byref(value), attribute, number)
    return value.value


def _ask(library: Any, function: str, *arguments: Any) -> None:
    code = getattr(library, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(text))
        raise Unsupported(f"CUDA's driver failed ({(text.value or b'').decode() or code} in {function})")
