"""Energy: counters that wrap, counters that are missing, and what of it becomes a number."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from aivmm.errors import Unsupported
from aivmm.probes.energy import POWERCAP, Energy, EnergyMeter, counters, per_sample, used_j
from aivmm.runtime.nvml import nvidia_devices, process_memory_bytes, total_energy_j
from aivmm.runtime.target import Device, Target

CPU = Target(runtime="openvino", name="CPU", device=Device(kind="cpu", model="Intel"), runtime_version="1")
IGPU = Target(runtime="openvino", name="GPU.0", device=Device(kind="gpu", model="Intel(R) Graphics (iGPU)"), runtime_version="1")
DGPU = Target(runtime="openvino", name="GPU.1", device=Device(kind="gpu", model="Intel(R) Arc(TM) (dGPU)"), runtime_version="1")
NPU = Target(runtime="openvino", name="NPU", device=Device(kind="npu", model="Intel(R) AI Boost"), runtime_version="1")
CUDA = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="NVIDIA", uid="GPU-nobody"), runtime_version="1")


def domain(root: Path, folder: str, name: str, uj: int, most_uj: int = 262143328850) -> Path:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    (path / "max_energy_range_uj").write_text(f"{most_uj}\n")
    return path / "energy_uj"


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Powercap of two packages with memory and cores, plus what must not be counted twice."""
    root = tmp_path / "powercap"
    for package in (0, 1):
        domain(root, f"intel-rapl:{package}", f"package-{package}", 1_000_000)
        domain(root, f"intel-rapl:{package}:0", "core", 5_000_000)
        domain(root, f"intel-rapl:{package}:1", "dram", 2_000_000)
    domain(root, "intel-rapl-mmio:0", "package-0", 1_000_000)
    domain(root, "intel-rapl:2", "psys", 9_000_000)
    (root / "intel-rapl").mkdir()
    return root


def test_packages_and_memory_are_counted_once_each(server: Path) -> None:
    with EnergyMeter([CPU], root=server) as meter:
        (server / "intel-rapl:0/energy_uj").write_text("4000000\n")
        (server / "intel-rapl:1:1/energy_uj").write_text("2500000\n")
        for elsewhere in ("intel-rapl:0:0", "intel-rapl-mmio:0", "intel-rapl:2"):
            (server / elsewhere / "energy_uj").write_text("99000000\n")
    found = meter.energy
    assert found.joules == {"package-0": 3.0, "dram-0": 0.0, "package-1": 0.0, "dram-1": 0.5}
    assert found.total_j == 3.5 and found.reason == ""
    assert found.watts == pytest.approx(3.5 / found.seconds)


def test_a_counter_that_wraps_goes_on_from_where_it_was(tmp_path: Path) -> None:
    uj = domain(tmp_path, "intel-rapl:0", "package-0", 261_000_000_000, most_uj=262_000_000_000)
    with EnergyMeter([CPU], root=tmp_path) as meter:
        uj.write_text("2000000\n")
    assert meter.energy.total_j == pytest.approx(1000 + 2)


@pytest.mark.parametrize(
    ("before", "after", "wraps", "seconds", "joules"),
    [(1.0, 5.0, 100.0, 0.01, 4.0), (99.0, 3.0, 100.0, 0.01, 4.0), (7.0, 7.0, 100.0, 0.01, 0.0), (1.0, 5.0, None, 9e9, 4.0)],
)
def test_the_difference_of_two_readings(before: float, after: float, wraps: float | None, seconds: float, joules: float) -> None:
    assert used_j(before, after, wraps_at_j=wraps, seconds=seconds) == joules


def test_a_window_in_which_a_counter_may_have_wrapped_twice_has_no_number() -> None:
    with pytest.raises(Unsupported, match="500 s are too long for a counter that starts again every 65000 J"):
        used_j(1.0, 2.0, wraps_at_j=65000.0, seconds=500.0)
    with pytest.raises(Unsupported, match="set back"):
        used_j(2.0, 1.0, wraps_at_j=None, seconds=1.0)


def test_without_counters_there_is_a_reason_and_no_number(tmp_path: Path) -> None:
    with EnergyMeter([CPU], root=tmp_path / "none") as meter:
        pass
    assert meter.energy.total_j is None and meter.energy.watts is None and "does not exist" in meter.energy.reason
    assert per_sample(meter.energy, 10) == {}
    domain(tmp_path, "intel-rapl:0", "psys", 1)
    assert "no package domain" in counters([CPU], root=tmp_path)[1]["cpu package"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_a_counter_for_root_alone_says_how_to_open_it(server: Path) -> None:
    (server / "intel-rapl:0/energy_uj").chmod(0)
    found = counters([CPU], root=server)
    assert found[0] == [] and "readable by root only; sudo chmod a+r" in found[1]["cpu package"]


def test_one_that_vanishes_meanwhile_is_missing(server: Path) -> None:
    with EnergyMeter([CPU], root=server) as meter:
        (server / "intel-rapl:1/energy_uj").unlink()
    assert meter.energy.total_j is None and "package-1" in meter.energy.missing and "package-0" in meter.energy.joules


def test_what_shares_the_package_is_counted_with_it_and_a_card_of_its_own_is_missing(server: Path) -> None:
    for target in (IGPU, NPU):
        found, missing = counters([target], root=server)
        assert [each.name for each in found] == ["package-0", "dram-0", "package-1", "dram-1"] and missing == {}
    assert counters([DGPU], root=server)[1] == {"openvino:GPU.1": "no energy counter of this device is known"}


def test_a_card_without_a_driver_leaves_no_total(server: Path) -> None:
    if nvidia_devices()[0]:
        pytest.skip("this machine has a card")
    with EnergyMeter([CUDA], root=server) as meter:
        pass
    assert meter.energy.total_j is None and "driver" in meter.energy.missing["card GPU-nobody"]
    with pytest.raises(Unsupported, match="driver"):
        process_memory_bytes("GPU-nobody", os.getpid())


def test_the_energy_of_a_sample_with_and_without_what_the_machine_draws_anyway() -> None:
    busy = Energy(seconds=2.0, joules={"package-0": 50.0})
    idle = Energy(seconds=4.0, joules={"package-0": 20.0})
    assert per_sample(busy, 100) == {"energy_j": 0.5, "power_w": 25.0}
    assert per_sample(busy, 100, idle=idle) == {"energy_j": 0.5, "power_w": 25.0, "energy_above_idle_j": 0.4}
    assert per_sample(idle, 100, idle=busy)["energy_above_idle_j"] == 0.0
    other = Energy(seconds=4.0, joules={"package-0": 20.0, "card": 1.0})
    assert "energy_above_idle_j" not in per_sample(busy, 100, idle=other)  # other counters: no difference means anything
    with pytest.raises(ValueError, match="0 samples"):
        per_sample(busy, 0)


def test_a_short_window_is_doubted_and_a_missing_number_is_not() -> None:
    assert [each.code for each in Energy(seconds=0.2, joules={"a": 1.0}).cautions()] == ["energy-short"]
    assert Energy(seconds=5.0, joules={"a": 1.0}).cautions() == ()
    assert Energy(seconds=0.2, joules={}, missing={"a": "gone"}).cautions() == ()


def test_this_machine_tells_joules_or_a_reason() -> None:
    with EnergyMeter([CPU]) as meter:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            pass
    if meter.energy.total_j is None:
        assert meter.energy.reason and str(POWERCAP) in meter.energy.reason
    else:
        assert 0 < meter.energy.total_j < 300


@pytest.mark.gpu
def test_a_real_card_counts_upwards() -> None:
    devices, reason = nvidia_devices()
    assert devices, reason
    before = total_energy_j(devices[0].uid)
    time.sleep(0.5)
    assert 0 < total_energy_j(devices[0].uid) - before < 1000
