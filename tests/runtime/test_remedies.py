"""What to do about an accelerator that is not found."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from aivmm.runtime.remedies import opencl_shows, remedy

LOADER = "libOpenCL.so.1: cannot open shared object file: No such file or directory"


def test_a_missing_loader_names_its_package(tmp_path: Path) -> None:
    reason, advice = remedy("GPU", LOADER, tmp_path)
    assert reason == "libOpenCL.so.1 is missing"
    assert advice.startswith("install ocl-icd-libopencl1") and "intel-opencl-icd" in advice


def test_drivers_that_show_no_gpu_are_named(tmp_path: Path) -> None:
    vendors = tmp_path / "etc/OpenCL/vendors"
    vendors.mkdir(parents=True)
    (vendors / "pocl.icd").write_text("libpocl.so")
    reason, advice = remedy("GPU", "no such device (found: none)", tmp_path)
    assert reason == "no such device (found: none)" and "pocl.icd" in advice


@pytest.mark.parametrize(("kind", "place"), [("GPU", "dev/dri/renderD128"), ("NPU", "dev/accel/accel0")])
def test_a_device_that_this_user_may_not_open_is_the_remedy(kind: str, place: str, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    node = tmp_path / place
    node.parent.mkdir(parents=True)
    node.write_text("")
    node.chmod(0)
    assert "group render" in remedy(kind, "no such device", tmp_path)[1]


def test_an_npu_without_a_driver_gets_the_drivers_name(tmp_path: Path) -> None:
    assert "intel-level-zero-npu" in remedy("NPU", "no such device (found: none)", tmp_path)[1]


def test_what_opencl_shows_is_told_as_it_shows_it_to_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opencl_shows("libNoSuchOpenCL.so.1") == ""
    seen = opencl_shows()
    monkeypatch.setenv("OCL_ICD_VENDORS", "/opt/vendors")
    _, advice = remedy("GPU", "no such device (found: none)", tmp_path)
    assert "OCL_ICD_VENDORS=/opt/vendors" in advice and seen in advice
    assert seen == "" or seen == "no platform" or re.search(r"\((no GPU|\d+ GPUs?)\)", seen)
