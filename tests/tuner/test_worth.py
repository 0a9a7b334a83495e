"""Which targets a search takes up: a card is judged by what its promising settings make of it, not by its defaults alone."""

from __future__ import annotations

import pytest

from aivmm.runtime.target import Device, Target
from aivmm.tuner.worth import Standing
from tests.making import chain_model, write_model
from tests.tuner.harness import Place
from tests.tuner.test_at_once import LAYERS, WIDTH, card, installed

CPU = Target(runtime="null", name="CPU", device=Device(kind="cpu", model="a CPU"), runtime_version="1")
CARD = Target(runtime="null", name="GPU.0", device=Device(kind="gpu", model="a card", memory_bytes=1 << 36), runtime_version="1")
OTHER = Target(runtime="null", name="NPU", device=Device(kind="npu", model="an NPU"), runtime_version="1")


def standing(drive: str = "latency", **ratios: float) -> Standing:
    named = {"cpu": CPU, "card": CARD, "other": OTHER}
    best = {named[name]: ratio for name, ratio in ratios.items()}
    return Standing(best=best, allowed=set(best), drive=drive, prefer=())


def test_a_card_is_tried_as_far_as_settings_reach() -> None:
    assert standing(cpu=1.0, card=5.4).to_try([1]) == [CARD]
    assert standing(cpu=1.0, card=9.0).to_try([1]) == []
    assert standing(cpu=1.0, other=3.0).to_try([1]) == []  # no memory of its own
    assert standing(card=1.0).to_try([1]) == []  # nothing to decide
    assert standing("throughput", cpu=1.0, card=28.0).to_try([1]) == []
    assert standing("throughput", cpu=1.0, card=28.0).to_try([1, 32]) == [CARD]  # larger batches are ahead of it


def test_what_a_card_shows_is_what_the_others_are_measured_by() -> None:
    known = standing(cpu=1.0, card=5.4)
    assert known.behind(CARD) == pytest.approx(5.4) and known.behind(CPU) == 1.0
    known.learn(CARD, 0.1)
    assert known.behind(CARD) == 1.0 and known.behind(CPU) == pytest.approx(10.0)
    assert CPU not in known.worth_lowering()  # no time is spent on lowering a model for it
    known.learn(CARD, 0.3)
    assert known.best[CARD] == 0.1


def _tuned(place: Place, graph: float, default_s: float) -> tuple[str, str]:
    """Tune for latency on a processor of 10 ms a call and a card; return the plan's target and what was said."""
    model = write_model(place.folder / "chain.onnx", chain_model(width=WIDTH, layers=LAYERS))
    figures = {"choices": {"launch": {"each": 1.0, "graph": graph}}, "promising": {"launch": "graph"}}
    cpu = card("CPU", 0.01, kind="cpu")
    path = installed(place.folder / "plug-ins", cpu, card("GPU.0", default_s, **figures))
    options = ("--backend", "cards", "--objective", "latency", "--trials", "1", "--budget", "4s", "--json")
    done = place.aivmm("tune", model, *options, PYTHONPATH=path)
    assert done.code == 0, done.err
    return done.json["plan"]["stages"][0]["target"], done.err


def test_a_card_that_is_slow_with_its_defaults_and_fast_with_its_settings_is_the_plan(place: Place) -> None:
    target, said = _tuned(place, graph=0.05, default_s=0.05)
    assert target == "cards:GPU.0", said
    assert "cards:CPU was not searched: its defaults take" in said


@pytest.mark.slow
def test_a_card_whose_settings_do_not_help_is_left(place: Place) -> None:
    target, said = _tuned(place, graph=0.9, default_s=0.05)
    assert target == "cards:CPU", said
    assert "cards:GPU.0 was not searched: its defaults and promising settings take" in said
