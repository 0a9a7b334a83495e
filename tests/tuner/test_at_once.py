"""Whole tunes for throughput whose best plan runs several things at once: on made-up devices that take their time, and on this CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.making import chain_model, write_model
from tests.probes.conftest import python_path
from tests.tuner.harness import Place

LAYERS, WIDTH = 8, 64
FLOPS = 2 * 2 * WIDTH * WIDTH * LAYERS  # of the matrix products, for two rows
WEIGHTS = 4 * LAYERS * WIDTH * WIDTH
PLUG_IN = """
from aivmm.runtime.null import NullBackend, NullDevice

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
    arguments = ("--backend", "cards", "--objective", "throughput", "--batch", "1", "--trials", "2", "--budget", budget, *more, "--json")
    done = place.aivmm("tune", model, *arguments, PYTHONPATH=path)
    assert done.code == 0, done.err
    return done


def test_two_cards_take_half_of_the_requests_each(place: Place) -> None:
    done = tuned(place, card("GPU.0", 0.02), card("GPU.1", 0.02))
    plan = done.json["plan"]
    (stage,) = plan["stages"]
    assert {stage["target"], *(each["target"] for each in stage["copies"])} == {"cards:GPU.0", "cards:GPU.1"}, done.err
    assert stage["share"] == pytest.approx(0.5, abs=0.1)
    best = min(each["median_s"] for each in done.json["baselines"])
    assert done.json["measured"]["throughput_per_s"] * best > 1.5
    assert "at once, in their place" in done.err


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


@pytest.mark.slow
def test_a_card_that_mostly_copies_takes_several_copies(place: Place) -> None:
    done = tuned(place, card("GPU.0", 0.004, copy_s=0.006))
    (stage,) = done.json["plan"]["stages"]
    assert stage["replicas"] > 1, done.err
    (baseline,) = done.json["baselines"]
    assert done.json["measured"]["throughput_per_s"] * baseline["median_s"] > 1.3
