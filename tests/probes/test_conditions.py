"""Conditions: what the system's files say, on this machine and on machines made of files, and what two looks mean for the numbers."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from aivmm.probes.conditions import CardWatch, Conditions, Sharing, cautions, core_speed, read
from aivmm.probes.records import Caution
from aivmm.runtime.config import Config
from aivmm.runtime.nvml import CardState, card_state, nvidia_devices
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.target import Device, Target
from tests.contract_models import onnx_model

CALM = Conditions(
    at_s=0.0, speed=1000.0, cpu_mhz=3000.0, capped_mhz=4000.0, most_mhz=4000.0, thermal_events=5, cores=8, periods=100, throttled=7
)
LATER = replace(CALM, at_s=10.0)
CARD = CardState(uid="GPU-1", sm_mhz=1900, most_sm_mhz=1980, temperature_c=50, power_w=300.0, lost_s=(("power", 4.0), ("thermal", 1.0)))


def complete(caution: Caution) -> bool:
    """Say whether advice to tune again ends with it, so that who gives it can say what is measured anew."""
    return bool(caution.advice) and "--fresh" not in caution.advice and "tune again" not in caution.advice.removesuffix("tune again")


def codes(before: Conditions, after: Conditions, *, load_cores: float = 0.0) -> list[str]:
    found = cautions(before, after, load_cores=load_cores)
    assert all(each.message and complete(each) for each in found)
    return [each.code for each in found]


def test_a_calm_machine_gives_no_caution() -> None:
    assert codes(CALM, LATER, load_cores=1.0) == []
    assert codes(Conditions(at_s=0.0), Conditions(at_s=1.0)) == []  # one that tells nothing


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"speed": 850.0, "cpu_mhz": 2500.0}, "clock-fell", "15% slower than at the beginning (3000 MHz before, 2500 MHz after)"),
        ({"speed": 850.0, "cpu_mhz": None}, "clock-fell", "15% slower than at the beginning"),
        ({"capped_mhz": 2000.0}, "clock-capped", "2000 of 4000 MHz"),
        ({"thermal_events": 6}, "thermal", "1 time"),
        ({"thermal_events": 9}, "thermal", "4 times"),
        ({"battery": True}, "on-battery", "battery"),
        ({"quota_cores": 1.5}, "quota-limited", "1.5 of 8 cores"),
        ({"throttled": 20, "periods": 150}, "throttled", "13 of 50 periods"),
    ],
)
def test_each_change_has_its_caution(changes: dict[str, float], code: str, words: str) -> None:
    after = replace(LATER, **changes)  # type: ignore[arg-type]
    (found,) = cautions(CALM, after)
    assert found.code == code and words in found.message and complete(found)


def test_a_clock_that_rises_a_small_step_and_a_counter_set_back_are_no_caution() -> None:
    assert codes(CALM, replace(LATER, speed=1200.0)) == []
    assert codes(CALM, replace(LATER, speed=950.0)) == []
    assert codes(CALM, replace(LATER, thermal_events=0, throttled=0, periods=0)) == []
    assert codes(CALM, replace(LATER, quota_cores=8.0)) == []


def test_unplugged_at_the_beginning_counts_too_and_load_has_a_threshold() -> None:
    assert codes(replace(CALM, battery=True), LATER) == ["on-battery"]
    assert codes(CALM, LATER, load_cores=1.3) == ["machine-busy"]


def test_a_card_that_was_held_down_says_by_what_and_for_how_long() -> None:
    before = replace(CALM, cards=(CARD,))
    held = replace(CARD, lost_s=(("power", 9.0), ("thermal", 1.1)), slowed_by=("hardware thermal limit",))
    (found,) = cautions(before, replace(LATER, cards=(held,)))
    assert found.code == "throttled" and "power limit for 50% of the time" in found.message
    hot = replace(CARD, lost_s=(("power", 4.0), ("thermal", 3.0)))
    assert codes(before, replace(LATER, cards=(hot,))) == ["thermal"]
    assert codes(before, replace(LATER, cards=(CARD,))) == []
    # One without counters, and one that was not there before.
    bare = replace(CARD, lost_s=(), slowed_by=("power brake",))
    assert codes(CALM, replace(LATER, cards=(bare,))) == ["throttled"]
    assert codes(CALM, replace(LATER, cards=(CARD,))) == []


def test_the_numbers_are_metrics_by_name() -> None:
    held = replace(CARD, power_w=310.0, slowed_by=("power brake",))
    found = replace(CALM, cards=(held,)).metrics("before")
    assert found == {
        "cpu_mhz_before": 3000.0,
        "cpu_speed_before": 1000.0,
        "sm_mhz[GPU-1]_before": 1900.0,
        "temperature_c[GPU-1]_before": 50.0,
        "power_w[GPU-1]_before": 310.0,
        "slowed[GPU-1: power brake]_before": 1.0,
    }
    assert Conditions(at_s=0.0).metrics("after") == {}


# --- reading ---


def write(root: Path, path: str, text: object) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


def laptop(root: Path) -> None:
    """Files as an Intel laptop has them: two cores of one package, four policies' worth of clocks."""
    for policy, khz in ((0, 800000), (1, 3400000)):
        write(root, f"sys/devices/system/cpu/cpufreq/policy{policy}/scaling_cur_freq", khz)
        write(root, f"sys/devices/system/cpu/cpufreq/policy{policy}/scaling_max_freq", 3500000)
        write(root, f"sys/devices/system/cpu/cpufreq/policy{policy}/cpuinfo_max_freq", 4200000)
        write(root, f"sys/devices/system/cpu/cpu{policy}/thermal_throttle/core_throttle_count", 3 + policy)
        write(root, f"sys/devices/system/cpu/cpu{policy}/thermal_throttle/package_throttle_count", 10)
        write(root, f"sys/devices/system/cpu/cpu{policy}/topology/physical_package_id", 0)


def test_a_laptop_tells_its_clocks_and_its_heat(tmp_path: Path) -> None:
    laptop(tmp_path)
    found = read(root=tmp_path)
    assert (found.cpu_mhz, found.capped_mhz, found.most_mhz) == (3400.0, 3500.0, 4200.0)
    assert found.thermal_events == 3 + 4 + 10  # a package's count is the same for all of its cores
    assert found.quota_cores is None and found.throttled is None and "cpu.stat" in found.absent["throttled"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_tells_its_quota_and_how_often_it_ran_out(tmp_path: Path, version: int) -> None:
    if version == 2:
        write(tmp_path, "proc/self/cgroup", "0::/")
        write(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000")
        write(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 1\nnr_periods 40\nnr_throttled 9\nthrottled_usec 1234")
    else:
        write(tmp_path, "proc/self/cgroup", "2:cpu:/docker/0123")
        write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000")
        write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
        write(tmp_path, "sys/fs/cgroup/cpu/cpu.stat", "nr_periods 40\nnr_throttled 9\nthrottled_time 1234")
    found = read(root=tmp_path)
    assert (found.quota_cores, found.periods, found.throttled) == (1.5, 40, 9)


def test_a_machine_that_tells_nothing_gives_reasons(tmp_path: Path) -> None:
    found = read(root=tmp_path)
    assert found.cpu_mhz is None and found.thermal_events is None
    assert {"cpu_mhz", "capped_mhz", "most_mhz", "thermal_events", "throttled"} <= found.absent.keys()
    assert all(found.absent.values())


def test_files_with_rubbish_are_reasons(tmp_path: Path) -> None:
    laptop(tmp_path)
    write(tmp_path, "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq", "<unknown>")
    write(tmp_path, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "")
    found = read(root=tmp_path)
    assert found.capped_mhz is None and found.thermal_events is None
    assert "<unknown>" in found.absent["capped_mhz"]


def test_this_machine_tells_a_number_or_a_reason_for_everything() -> None:
    found = read()
    assert found.speed and found.speed > 1
    assert found.cores >= 1
    for name in ("cpu_mhz", "capped_mhz", "most_mhz", "thermal_events", "throttled"):
        assert (getattr(found, name) is None) == bool(found.absent.get(name)), name
    assert found.cpu_mhz is None or 100 < found.cpu_mhz < 10_000
    assert cautions(found, replace(found, at_s=found.at_s + 1)) == cautions(found, found)


def test_a_core_s_speed_is_a_number_and_the_affinity_stays_as_it_was() -> None:
    before = os.sched_getaffinity(0) if sys.platform == "linux" else None
    assert core_speed() > 10
    assert before is None or os.sched_getaffinity(0) == before


def test_a_slow_core_beside_other_load_is_laid_to_the_load() -> None:
    assert codes(CALM, replace(LATER, speed=600.0), load_cores=3.0) == ["machine-busy"]


def test_a_card_without_a_driver_is_a_reason() -> None:
    if nvidia_devices()[0]:
        pytest.skip("this machine has a card")
    card = Device(kind="gpu", model="NVIDIA H200", uid="GPU-1")
    found = read([Target(runtime="onnxruntime", name="CUDA:0", device=card, runtime_version="1")])
    assert found.cards == () and "driver" in found.absent["cards[GPU-1]"]


def card(sm_mhz: int, *, celsius: int = 50, idle: bool = False, slowed_by: tuple[str, ...] = ()) -> CardState:
    return CardState(uid="GPU-1", sm_mhz=sm_mhz, most_sm_mhz=1980, temperature_c=celsius, power_w=300.0, idle=idle, slowed_by=slowed_by)


def test_a_card_is_looked_at_while_it_is_measured() -> None:
    watch = CardWatch([])
    for state in (card(1980), card(1965, celsius=61), card(345, idle=True), card(1950)):
        watch.take(state)
    assert watch.metrics() == {"sm_mhz[GPU-1]_during": 1965.0, "temperature_c[GPU-1]_during": 61.0, "power_w[GPU-1]_during": 300.0}
    assert watch.cautions() == ()


def test_what_slows_a_card_down_is_stored_as_the_share_of_looks_that_saw_it() -> None:
    watch = CardWatch([])
    for state in (card(1980), card(1500, slowed_by=("power brake",)), card(1980), card(1980)):
        watch.take(state)
    assert watch.metrics()["slowed[GPU-1: power brake]_during"] == 0.25


def test_a_clock_that_moves_and_a_card_that_is_slowed_down_are_cautions() -> None:
    watch = CardWatch([])
    for state in (card(1980), card(1200, slowed_by=("software thermal limit",))):
        watch.take(state)
    assert [each.code for each in watch.cautions()] == ["gpu-clock-moved", "thermal"]
    assert "between 1200 and 1980 MHz" in watch.cautions()[0].message and all(map(complete, watch.cautions()))


def test_others_on_the_card_are_a_caution() -> None:
    shared = replace(LATER, sharing=(Sharing(uid="GPU-1", processes=2, held_bytes=3_200_000_000),))
    (caution,) = cautions(CALM, shared)
    assert caution.code == "card-shared" and "2 other processes" in caution.message and "3.2 GB" in caution.message
    assert codes(shared, LATER) == ["card-shared"], "they may have left meanwhile"


@pytest.mark.gpu
def test_a_process_that_is_not_ours_is_seen_on_a_real_card(tmp_path: Path) -> None:
    target = OnnxRuntime().find("CUDA:0")
    assert isinstance(target, Target)
    assert read([target]).sharing == ()
    code = "import time; from aivmm.runtime.onnxruntime import OnnxRuntime as O; O().targets(); print(1, flush=True); time.sleep(60)"
    # Started by a shell that ends at once, so that it is nobody's child here.
    script = tmp_path / "stranger.sh"
    script.write_text(f"{sys.executable} -c '{code}' > {tmp_path}/out 2> {tmp_path}/err & echo $!")
    pid = int(subprocess.run(["sh", str(script)], capture_output=True, text=True, check=True).stdout)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "out").read_text() and time.monotonic() < end:
            time.sleep(0.1)
        (sharing,) = read([target]).sharing
        assert sharing.processes == 1 and sharing.held_bytes > 0
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.gpu
def test_a_run_returns_when_the_card_is_done() -> None:
    """What is left to wait for after a run is next to nothing of what the run took; 200 products of matrices take milliseconds."""
    extent, nodes = 2048, [helper.make_node("MatMul", ["x", "x"], ["t0"])]
    nodes += [helper.make_node("MatMul", [f"t{number}", "x"], [f"t{number + 1}"]) for number in range(200)]
    nodes.append(helper.make_node("ReduceMax", ["t200"], ["y"], keepdims=0))
    model = onnx_model(nodes, [("x", TensorProto.FLOAT, (extent, extent))], [("y", TensorProto.FLOAT, ())])
    backend = OnnxRuntime()
    target = backend.find("CUDA:0")
    assert isinstance(target, Target)
    request = backend.compile(model.SerializeToString(), target, Config()).new_request()
    request.bind("x", np.zeros((extent, extent), dtype=np.float32))
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    ran, waited = [], []
    for _ in range(10):
        started = time.perf_counter()
        request.run()
        done = time.perf_counter()
        assert driver.cuCtxSynchronize() == 0
        ran.append(done - started)
        waited.append(time.perf_counter() - done)
    assert min(waited) < 0.05 * min(ran)


@pytest.mark.gpu
def test_a_real_card_tells_its_clock_and_temperature() -> None:
    devices, reason = nvidia_devices()
    assert devices, reason
    state = card_state(devices[0].uid)
    assert state.sm_mhz and state.most_sm_mhz and state.sm_mhz <= state.most_sm_mhz
    assert state.temperature_c and 10 < state.temperature_c < 110


def test_what_to_do_about_a_slower_core_hangs_on_whether_its_clock_fell() -> None:
    slower = replace(LATER, speed=500.0)
    for mhz, words in ((3000.0, "shares the host"), (1500.0, "cool down"), (None, "cool down")):
        (found,) = cautions(CALM, replace(slower, cpu_mhz=mhz), load_cores=0.0)
        assert found.code == "clock-fell" and words in found.advice
