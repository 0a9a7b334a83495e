"""Which targets a search takes up: a card is judged by what its promising settings make of it, not by its defaults alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.constraints import parse
from aivmm.planner.objectives import parse_objectives
from aivmm.planner.room import Room
from aivmm.runtime.backend import Baseline
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target
from aivmm.tuner.explore import Explorer
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.worth import Standing, keeps, speed_decides, try_cards
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


def test_what_serves_many_callers_is_measured_in_fp32_too_where_its_default_is_lower() -> None:
    amx = replace(CPU, precisions=("bf16", "fp32"))
    hint = Config.of({"PERFORMANCE_HINT": "THROUGHPUT"})
    given = [
        Baseline(name="null:CPU default", target=amx, config=Config()),
        Baseline(name="null:CPU LATENCY hint", target=amx, config=Config.of({"PERFORMANCE_HINT": "LATENCY"})),
        Baseline(name="null:CPU THROUGHPUT hint", target=amx, config=hint, callers=16),
    ]
    options = TuneOptions(model="m", objective="throughput", precisions=("fp32",))
    work = SimpleNamespace(options=options, subject=SimpleNamespace(base_batch=1), targets=[amx], progress=None, tell_race=None)
    explorer = Explorer(cast(Any, work), searched_before=False)
    explorer._default_precisions[str(amx)] = "bf16"
    # One caller in fp32 takes 3.2 times as long as a card's best, many of them a third less: not hopeless.
    score = {1: 3.2, 16: 0.7}
    explorer.measurer = cast(
        Any,
        SimpleNamespace(
            effective_config=lambda each: {},
            measure=lambda wanted, **_: {each.key: rated(score[each.callers]) for each in wanted},
        ),
    )
    explorer.known = {}
    usable = [(each, explorer._candidate(each)) for each in given]
    twins = explorer._twins(usable)
    assert [(each.name, each.callers, each.config.precision) for each, _ in twins] == [
        ("null:CPU fp32", 1, "fp32"),
        ("null:CPU THROUGHPUT hint, fp32", 16, "fp32"),
    ]
    assert twins[1][1].config == replace(hint, precision="fp32")
    best, allowed = explorer._best_ratios([*usable, *twins])
    assert best == {amx: 0.7} and allowed == {amx}


def rated(ratio: float) -> Score:
    return Score(ratio=ratio, low=ratio, high=ratio, median_s=ratio / 1e3, metrics={"throughput": 1 / ratio, "latency": ratio})


def test_what_a_card_shows_is_what_the_others_are_measured_by() -> None:
    known = standing(cpu=1.0, card=5.4)
    assert known.behind(CARD) == pytest.approx(5.4) and known.behind(CPU) == 1.0
    known.learn(CARD, 0.1)
    assert known.behind(CARD) == 1.0 and known.behind(CPU) == pytest.approx(10.0)
    assert CPU not in known.worth_lowering()  # no time is spent on lowering a model for it
    known.learn(CARD, 0.3)
    assert known.best[CARD] == 0.1


def test_where_another_objective_counts_a_card_is_only_brought_in() -> None:
    for objectives, drive in (("latency,throughput", "throughput"), ("throughput,latency", "throughput"), ("memory", "latency")):
        assert not speed_decides(parse_objectives(objectives), drive, ())
    assert speed_decides(parse_objectives("throughput"), "throughput", parse("latency<=5ms,targets in (onnxruntime:*)"))
    assert not speed_decides(parse_objectives("throughput"), "throughput", parse("p99<=5ms"))  # which a search does not see
    known = standing("throughput", cpu=1.0, card=5.4)
    known.decisive = False
    known.learn(CARD, 0.1)  # at batch 64, while the CPU is ahead one call at a time
    assert known.behind(CPU) == 1.0 and known.behind(CARD) == pytest.approx(0.1)
    assert known.worth_lowering() == [CPU, CARD]


def _points(*, precisions: tuple[str, ...] = ("fp32", "bf16")) -> list[Candidate]:
    return [
        Candidate(target=CARD, config=Config(precision=precision), batch=batch, callers=callers)
        for batch, callers in ((64, 4), (128, 8), (32, 8))
        for precision in precisions
    ]


Asked = list[tuple[int, str | None]]  # batch, precision


def _tried(outcomes: dict[tuple[int, str], Score | Rejection], limit: str = "") -> tuple[Standing, Asked, set[Target]]:
    """Try a card whose points come out so, by (batch, precision); return the standing, what was measured in order, and who was tried."""
    known: dict[str, tuple[Candidate, Score | Rejection]] = {}
    asked: Asked = []

    def measure(wanted: Sequence[Candidate]) -> None:
        for each in wanted:
            asked.append((each.batch, each.config.precision))
            known[each.key] = each, outcomes[each.batch, str(each.config.precision)]

    found, limits = standing("throughput", cpu=1.0, card=5.4), parse(limit) if limit else ()
    tried = try_cards(found, _points(), known=known, measure=measure, room=Room(), may_be=lambda each, score: keeps(limits, each, score))
    return found, asked, tried


def _score(ratio: float, latency_s: float) -> Score:
    return Score(ratio=ratio, low=ratio, high=ratio, median_s=latency_s, metrics={"latency": latency_s})


def test_both_tries_are_of_different_loads() -> None:
    found, asked, tried = _tried({(64, "fp32"): _score(0.2, 0.06), (128, "fp32"): _score(0.1, 0.1)})
    assert asked == [(64, "fp32"), (128, "fp32")] and tried == {CARD}
    assert found.best[CARD] == 0.1 and found.behind(CPU) == pytest.approx(10)


def test_what_is_refused_gives_way_to_a_load_that_may_fit() -> None:
    full = Rejection(state="refused", reason="CUDA error: out of memory")
    small = {(32, "fp32"): _score(0.2, 0.03), (32, "bf16"): _score(0.1, 0.03)}
    found, asked, _ = _tried({(64, "fp32"): full, (128, "fp32"): full, (64, "bf16"): full, **small})
    assert asked == [(64, "fp32"), (128, "fp32"), (32, "fp32"), (64, "bf16"), (32, "bf16")]  # bf16 at 128 has no room, which is known
    assert found.best[CARD] == 0.1
    nothing, _, tried = _tried({(batch, precision): full for batch in (64, 128, 32) for precision in ("fp32", "bf16")})
    assert not tried and nothing.best[CARD] == 5.4


def test_what_breaks_a_limit_puts_nobody_out() -> None:
    found, _, tried = _tried({(64, "fp32"): _score(0.2, 0.06), (128, "fp32"): _score(0.1, 0.1)}, limit="latency<=5ms")
    assert tried == {CARD} and found.best[CARD] == 5.4 and found.behind(CPU) == 1.0


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


@pytest.mark.slow
def test_a_card_that_is_slow_with_its_defaults_and_fast_with_its_settings_is_the_plan(place: Place) -> None:
    target, said = _tuned(place, graph=0.05, default_s=0.05)
    assert target == "cards:GPU.0", said
    assert "cards:CPU was not searched: its defaults take" in said


@pytest.mark.slow
def test_a_card_whose_settings_do_not_help_is_left(place: Place) -> None:
    target, said = _tuned(place, graph=0.9, default_s=0.05)
    assert target == "cards:CPU", said
    assert "cards:GPU.0 was not searched: its defaults and promising settings take" in said
