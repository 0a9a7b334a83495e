"""The cores that may really be used: control-group files as the kernel writes them, and affinity."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from aivmm.runtime import cpu
from aivmm.runtime.cpu import cgroup_quota, cpu_device, host_memory_bytes, throttled_s, throttling_files, usable_cores


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def member(root: Path, *lines: str) -> Path:
    file = root.parent / "membership"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_version_2_grants_limit_over_period(root: Path) -> None:
    group(root, "app", cpu__max="150000 100000")
    assert cgroup_quota(root, member(root, "0::/app")) == 1.5


def test_version_2_takes_the_tightest_of_the_group_and_its_parents(root: Path) -> None:
    group(root, "", cpu__max="900000 100000")
    group(root, "slice", cpu__max="200000 100000")
    group(root, "slice/app", cpu__max="400000 100000")
    assert cgroup_quota(root, member(root, "0::/slice/app")) == 2.0


def test_no_limit_is_none(root: Path) -> None:
    group(root, "app", cpu__max="max 100000")
    assert cgroup_quota(root, member(root, "0::/app")) is None


def test_inside_a_container_the_limit_at_the_mounts_root_counts(root: Path) -> None:
    group(root, "", cpu__max="300000 100000")
    assert cgroup_quota(root, member(root, "0::/docker/on-the-host")) == 3.0


def test_version_1_reads_the_cpu_controller_and_no_other(root: Path) -> None:
    group(root, "cpu,cpuacct/app", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(root, "memory/app", cpu__cfs_quota_us="1000", cpu__cfs_period_us="100000")
    lines = ("12:memory:/app", "5:cpuset:/app", "4:cpu,cpuacct:/app", "1:name=systemd:/app")
    assert cgroup_quota(root, member(root, *lines)) == 0.5


def test_version_1_without_a_limit_is_none(root: Path) -> None:
    group(root, "cpu/app", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cgroup_quota(root, member(root, "4:cpu:/app")) is None


def test_a_machine_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize("text", ["", "max", "100000", "a b", "100000 0", "100000 x", "-5 100000", "1 2 3", "0 100000"])
def test_a_limit_that_makes_no_sense_is_no_limit(root: Path, text: str) -> None:
    group(root, "app", cpu__max=text)
    assert cgroup_quota(root, member(root, "0::/app")) is None


@pytest.mark.parametrize("line", ["", "nonsense", "0:", "4:cpu", "::", "0::/../../../etc"])
def test_a_membership_that_makes_no_sense_is_no_limit(root: Path, line: str) -> None:
    assert cgroup_quota(root, member(root, line)) is None


def test_throttling_is_read_of_groups_that_have_a_quota(root: Path) -> None:
    group(root, "", cpu__max="max 100000", cpu__stat="usage_usec 7\nnr_throttled 1\nthrottled_usec 9000000")
    group(root, "slice", cpu__max="200000 100000", cpu__stat="usage_usec 7\nnr_throttled 3\nthrottled_usec 1500000")
    group(root, "slice/app", cpu__max="400000 100000", cpu__stat="nr_throttled 1\nthrottled_usec 200000")
    files = throttling_files(root, member(root, "0::/slice/app"))
    assert [throttled_s(each) for each in files] == pytest.approx([1.5, 0.2])


def test_throttling_is_read_in_version_1_too(root: Path) -> None:
    group(root, "cpu/app", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000", cpu__stat="nr_throttled 5\nthrottled_time 2500000000")
    (file,) = throttling_files(root, member(root, "4:cpu:/app"))
    assert throttled_s(file) == pytest.approx(2.5)


@pytest.mark.parametrize("text", ["", "throttled_usec", "throttled_usec x", "a b c"])
def test_throttling_that_makes_no_sense_is_none(root: Path, text: str) -> None:
    group(root, "app", cpu__max="150000 100000", cpu__stat=text)
    (file,) = throttling_files(root, member(root, "0::/app"))
    assert throttled_s(file) is None and throttled_s(str(root / "missing")) is None


def test_usable_cores_are_between_one_and_the_machines() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity can be set on Linux only")
def test_affinity_limits_the_cores() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from aivmm.runtime.cpu import usable_cores, cpu_device; print(usable_cores(), cpu_device().cores)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_the_cpu_is_described() -> None:
    device = cpu_device()
    assert device.kind == "cpu" and device.model and device.cores == usable_cores()
    assert host_memory_bytes() > 1 << 28


X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu avx avx2 fma avx512f avx512_vnni amx_tile
vmx flags\t: vnmi avx512_fp16

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd asimdhp sve bf16x\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("text", "model", "sets"),
    [
        (X86, "Intel(R) Xeon(R) Processor", ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "amx_tile")),
        (ARM, None, ("asimd", "asimdhp", "sve")),
        (ARM + "Model\t\t: Raspberry Pi 5\n", "Raspberry Pi 5", ("asimd", "asimdhp", "sve")),
        ("", None, ()),
    ],
)
def test_the_kernels_words_of_the_first_processor_are_read(
    monkeypatch: pytest.MonkeyPatch, text: str, model: str | None, sets: tuple[str, ...]
) -> None:
    monkeypatch.setattr(cpu, "_start_of", lambda path, until=b"": text.encode().partition(until)[0].decode())
    cpu._cpuinfo.cache_clear()
    cpu_device.cache_clear()
    try:
        assert cpu._model_name() == (model or platform.processor() or platform.machine())
        assert cpu._instruction_sets() == sets
    finally:
        cpu._cpuinfo.cache_clear()
        cpu_device.cache_clear()
