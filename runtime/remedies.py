"""What to do about an accelerator that OpenVINO does not find: from its own words, and from the files that Linux shows."""

from __future__ import annotations

import os
from pathlib import Path

# A library that is missing, as the loader names it, and the Debian package that has it.
_PACKAGES = {
    "libOpenCL.so.1": "ocl-icd-libopencl1",
    "libze_loader.so.1": "libze1",
    "libtbb.so.12": "libtbb12",
}
_INTEL_GPU = "install Intel's compute runtime (Debian: intel-opencl-icd)"
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
    if not drivers:
        return _INTEL_GPU
    return f"{_INTEL_GPU}; the OpenCL drivers that are registered ({', '.join(drivers)}) show no GPU"


def _opens(node: Path) -> bool:
    return os.access(node, os.R_OK | os.W_OK)
