"""Whole tunes for throughput whose best plan runs several things at once: on made-up devices that take their time, and on this CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aivmm.db.database import Database
from aivmm.probes.records import Measured
from tests.making import chain_model, write_model
from tests.probes.conftest import python_path
from tests.tuner.harness import Place

LAYERS, WIDTH = 8, 64
FLOPS = 2 * 2 * WIDTH * WIDTH * LAYERS  # of the matrix products, for two rows
WEIGHTS = 4 * LAYERS * WIDTH * WIDTH
THROUGHPUT = ("--backend", "cards", "--objective", "throughput", "--batch", "1", "--trials", "2")
PLUG_IN = """
from aivmm.runtime.null import NullBackend
from aivmm.runtime.null_device import NullDevice

class Cards(NullBackend):
    name = "cards"

ONE = Cards([{devices}])  # one for the whole process, as devices are

def backend():
    return ONE
"""


def card(name: str, seconds: float, *, memory: float = 100.0, kind: str = "gpu", **figures: float) -> str:
    """Return a device that takes so long for the whole model and has memory for so many of it."""
    fields = {
        "name": name,
        "kind": kind,
        "flops_per_s": 1e12,  # but for what the model is made of: hand-overs are measured with others
        "efficiency": {"MatMul": FLOPS / seconds / 1e12},
        "bytes_per_s": 1e12,
        "memory_bytes": int(memory * WEIGHTS) + 20_000,
        "launch_s": 0.0,
        "cores": 1,
        "max_streams": 1,
        "real_time": True,
        **figures,
    }
    return f"NullDevice({', '.join(f'{key}={value!r}' for key, value in fields.items())})"


def installed(folder: Path, *devices: str) -> str:
    """Install a runtime with these devices as a distribution is; return its PYTHONPATH."""
    (folder / "cards-1.0.dist-info").mkdir(parents=True)
    (folder / "cards_backend.py").write_text(PLUG_IN.format(devices=", ".join(devices)))
    (folder / "cards-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: cards\nVersion: 1.0\n")
    (folder / "cards-1.0.dist-info" / "entry_points.txt").write_text("[aivmm.backends]\ncards = cards_backend:backend\n")
    return python_path(folder)


def tuned(place: Place, *devices: str, budget: str = "5s", more: tuple[str, ...] = ()) -> Any:
    """Tune a chain of layers for throughput on these devices alone."""
    model = write_model(place.folder / "chain.onnx", chain_model(width=WIDTH, layers=LAYERS))
    path = installed(place.folder / "plug-ins", *devices)
    done = place.aivmm("tune", model, *THROUGHPUT, "--budget", budget, *more, "--json", PYTHONPATH=path)
    assert done.code == 0, done.err
    return done


@pytest.mark.slow
def test_two_cards_take_half_of_the_requests_each(place: Place) -> None:
    done = tuned(place, card("GPU.0", 0.02), card("GPU.1", 0.02))
    plan = done.json["plan"]
    (stage,) = plan["stages"]
    assert {stage["target"], *(each["target"] for each in stage["copies"])} == {"cards:GPU.0", "cards:GPU.1"}, done.err
    assert stage["share"] == pytest.approx(0.5, abs=0.1)
    best = min(each["median_s"] for each in done.json["baselines"])
    assert done.json["measured"]["throughput_per_s"] * best > 1.5
    assert "at once, in their place" in done.err


def test_replicas_with_fewer_threads_each_are_found_by_the_search_and_run(place: Place) -> None:
    """Half of the work is on one thread whatever a call is given, and a compiled model answers one call at a time."""
    cpu = card("CPU", 0.04, kind="cpu", cores=2, serial=0.5, thread_overhead=0.0)
    done = tuned(place, cpu, more=("--trials", "4"))
    (stage,) = done.json["plan"]["stages"]
    assert (stage["replicas"], stage["config"]["threads"]) == (2, 1), done.err
    (baseline,) = [each for each in done.json["baselines"] if each["median_s"]]
    assert done.json["measured"]["throughput_per_s"] * baseline["median_s"] > 1.3  # 1.5 by the formula
    with Database.open(place.db) as database:
        run = database.run(None)
        trials = database.trials(run.id, study_name="search")
        measured = [each for each, _ in database.run_outcomes(run.id) if isinstance(each, Measured) and each.key.kind == "model"]
        assert database.check() == []
    assert {each.replicas for each in trials if each.asked} >= {1, 2}
    assert {each.key.replicas for each in measured} >= {1, 2}
    page = (place.work / done.json["report"]).read_text(encoding="utf-8")
    assert "in 2 replicas" in page
    environment = {"PYTHONPATH": python_path(place.folder / "plug-ins")}
    again = place.aivmm("tune", place.folder / "chain.onnx", *THROUGHPUT, "--budget", "5s", "--trials", "4", "--json", **environment)
    assert again.code == 0, again.err
    assert again.json["probes"]["measured"] == 0 and again.json["plan"]["stages"][0]["replicas"] == 2
    shown = place.aivmm("bench", again.json["plan"]["path"], "--duration", "1s", "--json", **environment)
    assert shown.code == 0, shown.err


@pytest.mark.slow
def test_a_limit_that_no_card_keeps_alone_is_kept_by_two(place: Place) -> None:
    done = tuned(place, card("GPU.0", 0.02), card("GPU.1", 0.02), more=("--constraint", "throughput>=70/s"))
    (stage,) = done.json["plan"]["stages"]
    assert stage["copies"], done.err
    assert done.json["measured"]["throughput_per_s"] >= 70


@pytest.mark.slow
def test_a_model_that_fits_on_no_card_is_a_pipeline_over_two(place: Place) -> None:
    """The processor takes it whole and is slow; a card has memory for five of eight layers."""
    done = tuned(place, card("CPU", 0.05, kind="cpu"), card("GPU.0", 0.02, memory=0.65), card("GPU.1", 0.02, memory=0.65), budget="40s")
    plan = done.json["plan"]
    assert plan["mode"] == "pipelined", done.err
    assert [stage["target"] for stage in plan["stages"]].count("cards:CPU") <= 1
    assert {stage["target"] for stage in plan["stages"]} >= {"cards:GPU.0", "cards:GPU.1"}
    for stage in plan["stages"]:
        first, last = stage["blocks"]
        assert stage["target"] == "cards:CPU" or last - first + 1 <= 5
    (baseline,) = [each for each in done.json["baselines"] if each["median_s"]]
    assert done.json["measured"]["throughput_per_s"] * baseline["median_s"] > 1.5
    with Database.open(place.db) as database:
        trials = database.trials(database.run(None).id, study_name="pipeline")
    assert sorted(each.depth for each in trials) == [1, 2, 3, 4]
    values = {each.depth: each.value for each in trials if each.value is not None}
    assert values[plan["depth"]] <= 1.02 * min(values.values())
    stored = json.loads((place.work / plan["path"] / "plan.json").read_text(encoding="utf-8"))
    assert stored["execution"] == {"mode": "pipelined", "depth": plan["depth"], "batching": None}
    assert "requests at once for each stage of the pipeline" in done.err


@pytest.mark.slow
def test_a_card_that_mostly_copies_takes_several_copies(place: Place) -> None:
    done = tuned(place, card("GPU.0", 0.004, copy_s=0.006))
    (stage,) = done.json["plan"]["stages"]
    assert stage["replicas"] > 1, done.err
    (baseline,) = done.json["baselines"]
    assert done.json["measured"]["throughput_per_s"] * baseline["median_s"] > 1.3


@pytest.mark.slow
def test_where_a_second_copy_has_no_room_halves_of_the_model_are_in_two_replicas_each(place: Place) -> None:
    """A card computes for 20 ms and copies for 8, and has memory for one model: of halves, two have room, and one copies meanwhile."""
    figures = {"memory": 1.2, "copy_s": 0.004}
    done = tuned(place, card("GPU.0", 0.02, **figures), card("GPU.1", 0.02, **figures), budget="40s")
    plan = done.json["plan"]
    assert plan["mode"] == "pipelined", done.err
    assert sorted((stage["target"], stage["replicas"]) for stage in plan["stages"]) == [("cards:GPU.0", 2), ("cards:GPU.1", 2)]
    best = min(each["median_s"] for each in done.json["baselines"] if each["median_s"])
    assert done.json["measured"]["throughput_per_s"] * best > 2.1, "more than two cards with a model each"
