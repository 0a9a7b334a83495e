"""Energy and device memory of what was raced: real workers, and a powercap tree whose counters grow as the kernel's do."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from aivmm.planner.constraints import parse
from aivmm.planner.objectives import parse_objectives
from aivmm.probes import energy, wire
from aivmm.probes.arrays import save_arrays
from aivmm.probes.client import Worker
from aivmm.probes.race import Contestant
from aivmm.runtime.config import Config
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Device, Target
from aivmm.tuner.joules import absent, asks_for_energy, counts_cards_only, device_memory, energy_metrics, why_no_energy
from tests.making import chain_model, normal, write_model
from tests.tuner.harness import Place

WATTS = 20.0


@pytest.fixture
def target() -> Target:
    return next(each for each in load_backend("onnxruntime").targets() if str(each) == "onnxruntime:CPU" and isinstance(each, Target))


@contextmanager
def package(root: Path) -> Iterator[Path]:
    """A package that draws 20 W for as long as this is open: its counter stands where it would whenever it is read."""
    folder = root / "intel-rapl:0"
    folder.mkdir(parents=True)
    (folder / "name").write_text("package-0\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    counter, began, read = folder / "energy_uj", time.perf_counter(), energy._micro
    counter.write_text("0\n")

    def counted(path: Path) -> float:
        if path == counter:
            counter.write_text(f"{int(1e6 * WATTS * (time.perf_counter() - began))}\n")
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, "_micro", counted)
        yield root


def test_a_sample_costs_the_power_times_its_share_of_the_time(tmp_path: Path, target: Target) -> None:
    model, inputs = write_model(tmp_path / "chain.onnx", chain_model()), tmp_path / "inputs.npz"
    save_arrays(inputs, {"x": normal(2, 32)})
    with package(tmp_path / "powercap") as root, Worker("energy") as worker:
        config = wire.config_out(Config(precision="fp32"))
        worker.call("compile", limit_s=60, name="m", model=str(model), target=wire.target_out(target), config=config, inputs=str(inputs))
        found = energy_metrics(Contestant("m", worker, batch=4), {target}, seconds=0.5, root=root)
        period_s = min(worker.call("timed", limit_s=60, name="m", seconds=0.05)["durations"])
    assert found["power_w"] == pytest.approx(WATTS, rel=0.2)
    assert found["energy_j"] >= 0.5 * WATTS * period_s / 4  # a median, against the best of another run
    assert found["energy_j"] < WATTS * 0.5
    assert why_no_energy({target}, root=root) == "" and absent({target}, found) == {}


def test_without_a_counter_there_is_a_reason_and_no_number(tmp_path: Path, target: Target) -> None:
    nowhere = tmp_path / "nowhere"
    with Worker("energy") as worker:
        assert energy_metrics(Contestant("m", worker), {target}, root=nowhere) == {}
    assert "has no RAPL counters" in why_no_energy({target}, root=nowhere)


def test_a_cpu_has_no_memory_of_its_own_and_an_unknown_card_says_so(target: Target) -> None:
    arc = Target(runtime="openvino", name="GPU.1", device=Device(kind="gpu", model="Intel(R) Arc(TM) (dGPU)"), runtime_version="1")
    assert device_memory(1, {target}) == (0, "")
    assert device_memory(1, {target, arc}) == (None, "openvino:GPU.1 does not tell how much of its memory a process holds")


def test_devices_made_of_arithmetic_count_for_themselves_and_the_same_each_time(tmp_path: Path) -> None:
    cpu, gpu = (each for each in load_backend("null").targets() if isinstance(each, Target))
    model, inputs = write_model(tmp_path / "chain.onnx", chain_model()), tmp_path / "inputs.npz"
    save_arrays(inputs, {"x": normal(2, 32)})
    found, seconds = {}, {}
    with Worker("energy") as worker:
        for threads in (1, 4):
            config = wire.config_out(Config.of({"threads": threads}, precision="fp32"))
            name = f"{threads} threads"
            worker.call("compile", limit_s=60, name=name, model=str(model), target=wire.target_out(cpu), config=config, inputs=str(inputs))
            found[threads] = energy_metrics(Contestant(name, worker, batch=2), {cpu})
            assert energy_metrics(Contestant(name, worker, batch=2), {cpu}) == pytest.approx(found[threads])
            seconds[threads] = worker.call("timed", limit_s=60, name=name, seconds=0.01)["durations"]
    assert found[4]["energy_j"] > found[1]["energy_j"] > 0 and found[4]["power_w"] == pytest.approx(25.0)
    assert all(len(set(map(float, each))) == 1 or max(each) == pytest.approx(min(each)) for each in seconds.values())
    assert found[1]["energy_j"] == pytest.approx(found[1]["power_w"] * seconds[1][0] / 2)
    assert why_no_energy({cpu, gpu}) == "" and absent({cpu}, {}) == {}


def test_where_a_processor_is_counted_or_no_card_is_the_cards_alone_do_not_do(tmp_path: Path, target: Target) -> None:
    nobody = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="NVIDIA", uid="GPU-nobody"), runtime_version="1")
    assert not counts_cards_only([target], root=tmp_path / "nowhere")
    assert not counts_cards_only([target, nobody], root=tmp_path / "nowhere"), "its card does not answer"
    with package(tmp_path / "powercap") as root:
        assert not counts_cards_only([target, nobody], root=root)


@pytest.mark.gpu
def test_a_real_cards_sample_costs_what_its_counter_counted(tmp_path: Path) -> None:
    card = next(each for each in load_backend("onnxruntime").targets() if isinstance(each, Target) and str(each) == "onnxruntime:CUDA:0")
    model, inputs = write_model(tmp_path / "chain.onnx", chain_model()), tmp_path / "inputs.npz"
    save_arrays(inputs, {"x": normal(2, 32)})
    nowhere = tmp_path / "nowhere"
    with Worker("energy") as worker:
        config = wire.config_out(Config())
        worker.call("compile", limit_s=120, name="m", model=str(model), target=wire.target_out(card), config=config, inputs=str(inputs))
        found = energy_metrics(Contestant("m", worker, batch=4), {card}, seconds=2.0, root=nowhere)
    assert "energy_j" not in found, "the host is not counted, so there is no total"
    assert 10 < found["card_power_w"] < 1.2 * (card.device.power_limit_w or 1000)
    assert found["card_energy_j"] > 0
    assert counts_cards_only([card], root=nowhere)


@pytest.mark.parametrize(
    ("objectives", "limits", "asks"),
    [
        ("latency", "latency<1s", False),
        ("latency,energy", "latency<1s", True),
        ("latency", "energy<1mJ", True),
        ("latency", "latency<1s, power<=15W", True),
    ],
)
def test_a_search_counts_energy_where_it_is_a_goal_or_limited(objectives: str, limits: str, asks: bool) -> None:
    assert asks_for_energy(parse_objectives(objectives), parse(limits)) is asks


@pytest.mark.slow
def test_a_limit_on_energy_that_no_baseline_keeps_is_kept_by_what_the_search_finds(tmp_path: Path) -> None:
    """The search was blind to it: the null CPU draws less with fewer threads, and what was proven was the fastest alone."""
    place = Place.at(tmp_path)
    write_model(place.work / "chain.onnx", chain_model(width=256, rows=4, layers=8))
    done = place.aivmm("tune", "chain.onnx", "--backend", "null", "--trials", "12", "--constraint", "energy<1.6mJ", "--json")
    assert done.code == 0, done.err
    found = json.loads((place.work / "chain.aivmm" / "plan.json").read_text())
    assert found["expected"]["energy_j"]["value"] < 1.6e-3
    assert not any(each["eligible"] for each in done.json["baselines"])


@pytest.mark.slow
def test_the_plan_for_energy_is_what_draws_the_least_however_slow(tmp_path: Path) -> None:
    """It left the race as hopelessly slow, and the plan drew 8 % more."""
    place = Place.at(tmp_path)
    write_model(place.work / "chain.onnx", chain_model(width=256, rows=4, layers=8))
    done = place.aivmm("tune", "chain.onnx", "--backend", "null", "--trials", "12", "--objective", "energy", "--json")
    assert done.code == 0, done.err
    found = json.loads((place.work / "chain.aivmm" / "plan.json").read_text())["expected"]["energy_j"]["value"]
    with closing(sqlite3.connect(place.db)) as connection:
        rows = connection.execute("SELECT metrics FROM trial WHERE state = 'complete'").fetchall()
    assert found <= min(json.loads(each)["energy"] for (each,) in rows) * 1.03
