"""What to do about an accelerator that OpenVINO does not find: from its own words, and from the files that Linux shows."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# A library that is missing, as the loader names it, and the Debian package that has it.
_PACKAGES = {
    "libOpenCL.so.1": "ocl-icd-libopencl1",
    "libze_loader.so.1": "libze1",
    "libtbb.so.12": "libtbb12",
}
_INTEL_GPU = "install Intel's compute runtime (Debian: intel-opencl-icd)"
_OPENCL_PLACES = ("OCL_ICD_VENDORS", "OCL_ICD_FILENAMES")  # where a loader looks instead, or besides
_NO_PLATFORM, _NO_DEVICE = -1001, -1  # CL_PLATFORM_NOT_FOUND_KHR, CL_DEVICE_NOT_FOUND
_PLATFORM_NAME, _TYPE_GPU = 0x0902, 1 << 2  # CL_PLATFORM_NAME, CL_DEVICE_TYPE_GPU
_INTEL_NPU = "install the Intel NPU driver (intel-driver-compiler-npu, intel-fw-npu, intel-level-zero-npu)"


def remedy(kind: str, reason: str, root: Path = Path("/")) -> tuple[str, str]:
    """Return why OpenVINO lacks a device, in a few words, and what to do about it.

    `kind` is GPU or NPU, `reason` OpenVINO's own words, `root` where the system's own files lie.
    """
    for library, package in _PACKAGES.items():
        if f"{library}: cannot open" in reason:
            return f"{library} is missing", f"install {package}, then {_of_device(kind, root)}"
    return reason, _of_device(kind, root)


def _of_device(kind: str, root: Path) -> str:
    """Return what a device of this kind needs besides the loader, as far as the system's files tell."""
    if kind == "NPU":
        nodes = sorted(root.glob("dev/accel/accel*"))
        return f"allow this user to open {nodes[0]} (group render)" if nodes and not _opens(nodes[0]) else _INTEL_NPU
    if kind != "GPU":
        return ""
    nodes = sorted(root.glob("dev/dri/renderD*"))
    if nodes and not _opens(nodes[0]):
        return f"allow this user to open {nodes[0]} (group render)"
    drivers = [each.name for each in sorted(root.glob("etc/OpenCL/vendors/*.icd"))]
    elsewhere = [f"{name}={os.environ[name]}" for name in _OPENCL_PLACES if os.environ.get(name)]
    known = [*drivers, *elsewhere]
    if not known:
        return _INTEL_GPU
    seen = opencl_shows()
    what = f"show no GPU that OpenVINO takes: OpenCL shows {seen}" if seen else "show no GPU"
    return f"{_INTEL_GPU}; the OpenCL drivers that are registered ({', '.join(known)}) {what}"


def opencl_shows(library: str = "libOpenCL.so.1") -> str:
    """Return what OpenCL shows this process, as `NVIDIA CUDA (1 GPU), Portable Computing Language (no GPU)`; "" without the library.

    Another process of the same machine may be shown something else: drivers refuse for reasons of their own.
    """
    try:
        opencl = ctypes.CDLL(library)
    except OSError:
        return ""
    count = ctypes.c_uint()
    code = opencl.clGetPlatformIDs(0, None, ctypes.byref(count))
    if code or not count.value:
        return "no platform" if code in (0, _NO_PLATFORM) else f"error {code} instead of its platforms"
    platforms = (ctypes.c_void_p * count.value)()
    opencl.clGetPlatformIDs(count.value, platforms, None)
    return ", ".join(f"{_platform_name(opencl, each)} ({_gpus(opencl, each)})" for each in platforms)


def _platform_name(opencl: ctypes.CDLL, platform: int | None) -> str:
    name = ctypes.create_string_buffer(256)
    code = opencl.clGetPlatformInfo(ctypes.c_void_p(platform), _PLATFORM_NAME, ctypes.c_size_t(len(name)), name, None)
    return name.value.decode(errors="replace") if not code else "a platform without a name"


def _gpus(opencl: ctypes.CDLL, platform: int | None) -> str:
    count = ctypes.c_uint()
    code = opencl.clGetDeviceIDs(ctypes.c_void_p(platform), ctypes.c_uint64(_TYPE_GPU), 0, None, ctypes.byref(count))
    if code not in (0, _NO_DEVICE):
        return f"error {code} instead of its GPUs"
    return "no GPU" if code or not count.value else f"{count.value} GPU{'s' if count.value > 1 else ''}"


def _opens(node: Path) -> bool:
    return os.access(node, os.R_OK | os.W_OK)
