"""Workloads from the command line with real runtimes: two models served at once, and mixes that this machine cannot serve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aivmm
from aivmm.errors import UsageError
from aivmm.planner.candidates import Candidate, Draft
from aivmm.planner.workload import Demand, Option, divide
from aivmm.probes.arrays import save_arrays
from aivmm.runtime.config import Config
from aivmm.runtime.cpu import usable_cores
from aivmm.runtime.family import open_family
from aivmm.runtime.many import Engines
from aivmm.tuner.entry import run
from aivmm.tuner.ladder import Ladder, text_of
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.progress import Silent
from aivmm.tuner.served import WorkloadTuner, _proven_s, require_alone
from aivmm.tuner.serving import Trial, seen_of
from aivmm.tuner.serving_words import Words
from aivmm.tuner.shapes import Wanted
from aivmm.tuner.workload_file import Wish
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference, token_model, write_model
from tests.planner.test_search import target as made_up
from tests.tuner.harness import ONE_RUNTIME, SMALL, Finished, Place

FEASIBLE = """
[tokens]
priority = 1
latency = "10s"
rate = "5/s"
dim = { rows = 8 }

[chain]
priority = 2
"""
HOPELESS = FEASIBLE.replace('latency = "10s"', 'latency = "1ns"')


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place.at(tmp_path_factory.mktemp("workload"))
    write_model(made.work / "tokens.onnx", token_model("rows"))
    write_model(made.work / "chain.onnx", chain_model())
    (made.work / "w.toml").write_text(FEASIBLE)
    (made.work / "hopeless.toml").write_text(HOPELESS)
    return made


@pytest.fixture(scope="module")
def tuned(place: Place) -> Any:
    """A workload of two models. Look, do not touch."""
    done = place.aivmm("tune", "chain.onnx", "tokens.onnx", "--workload", "w.toml", *ONE_RUNTIME, *SMALL, "--json")
    assert done.code == 0, done.err
    return done.json


@pytest.mark.slow
def test_the_summary_tells_of_each_model_in_the_order_of_priority(place: Place, tuned: Any) -> None:
    assert tuned["kind"] == "workload"
    assert tuned["plan"] == {"path": "workload.aivmm", "models": ["tokens", "chain"]}
    tokens, chain = tuned["models"]
    assert (tokens["name"], tokens["priority"], tokens["limits"]["latency_s"], tokens["limits"]["rate_per_s"]) == ("tokens", 1, 10, 5)
    for each in (tokens, chain):
        assert each["holds"]
        assert each["seen"]["latency_s"] > 0
        assert each["seen"]["slowdown"] > 0
        assert each["plan"]["threads"] >= 1
        assert each["alone"]["measured"]["median_s"] > 0
        assert each["plan"]["text"] in tuned["verdict"]
    assert tuned["tried"]
    assert "every limit holds" in tuned["verdict"]


@pytest.mark.slow
def test_one_bundle_gives_an_engine_for_each_name(place: Place, tuned: Any) -> None:
    with aivmm.load_plan(place.work / tuned["plan"]["path"]) as engines:
        assert isinstance(engines, Engines)
        for name, model, feeds in (
            ("chain", chain_model(), {"x": normal(2, 32)}),
            ("tokens", token_model(8), {"x": normal(1, 8, 16), "mask": np.ones((1, 8), np.int64)}),
        ):
            found = engines[name].run(feeds)
            for output, value in reference(model, feeds).items():
                np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_bundle_keeps_what_was_asked_and_what_was_seen(place: Place, tuned: Any) -> None:
    with open_family(place.work / "workload.aivmm") as opened:
        assert opened.family.verdict == tuned["verdict"]
        promise = opened.family.models[0].promise
        assert promise is not None
        assert (promise.priority, promise.latency_s, promise.rate_per_s) == (1, 10, 5)
        assert promise.seen["latency_s"].value == tuned["models"][0]["seen"]["latency_s"]
        stages = [stage for plan in opened.plans.values() for stage in plan.stages]
        assert all(stage.replicas >= 1 and stage.config["intra_op_num_threads"] >= 1 for stage in stages)


@pytest.mark.slow
def test_the_report_has_a_row_for_each_model(place: Place, tuned: Any) -> None:
    text = (place.work / tuned["report"]).read_text()
    assert text.count('<tr><th scope="row">') == 2
    for name in ("report-0.html", "report-1.html"):
        assert f'href="{name}"' in text
        assert (place.work / "workload.aivmm" / name).is_file()


@pytest.mark.slow
def test_a_limit_that_nothing_can_hold_ends_with_3_and_says_which_and_why(place: Place, tuned: Any) -> None:
    done: Finished = place.aivmm(
        "tune", "chain.onnx", "tokens.onnx", "--workload", "hopeless.toml", "-o", "h.aivmm", *ONE_RUNTIME, *SMALL, "--json"
    )
    assert done.code == 3, done.err
    found = done.json
    assert found["plan"] is None
    assert "tokens (priority 1) cannot be served: its median is limited to 1 ns, and not even alone on" in found["verdict"]
    assert found["tried"] == []  # what no machine of one model holds is not tried with two
    assert not (place.work / "h.aivmm").exists()
    assert Path(found["report"]).is_file()
    for each in found["models"]:
        assert Path(each["alone"]["report"]).is_file() and each["alone"]["plan"]["path"] is None
    assert [(each["holds"], each["seen"]) for each in found["models"]] == [(None, None)] * 2


# --- dividing and serving, without the tuning before it


def tuner(folder: Path, *demands: Demand, targets: Sequence[str] = (ONNXRUNTIME,)) -> WorkloadTuner:
    """Return a tuner that has the options of `demands` already: on each target with one thread and with two."""
    wishes = [Wish(model=f"{each.name}.onnx", demand=each) for each in demands]
    made = WorkloadTuner(TuneOptions(model="a.onnx"), wishes, Silent(), try_s=0.3, prove_s=0.3, alone_s=0.1)
    save_arrays(folder / "x.npz", {"x": normal(2, 32)})
    save_arrays(folder / "y.npz", reference(chain_model(), {"x": normal(2, 32)}))
    for demand in demands:
        ladder = made.ladders[demand.name] = Ladder(demand.name, folder, sample=folder / "x.npz", reference=folder / "y.npz")
        ladder.units["cpu"] = 2
        for target, threads in product(targets, (1, 2)):
            name = f"{demand.name}-{target}-{threads}".replace(":", "-")
            knob = "intra_op_num_threads" if target == ONNXRUNTIME else "INFERENCE_NUM_THREADS"
            part = Part(target, settings=((knob, threads),))
            option = Option(name=name, model=demand.name, device="cpu", threads=threads, service_s=1e-3 / threads)
            ladder.options.append(option)
            ladder.bundles[name] = make_bundle(folder / f"{name}.aivmm", chain_model(), [part], conditions=False)
            ladder.texts[name] = f"{target}, {threads} threads"
    return made


def test_two_models_are_served_at_once_on_both_runtimes(tmp_path: Path) -> None:
    demands = (Demand(name="a", priority=1, latency_s=10.0, rate_per_s=30), Demand(name="b", priority=2))
    chosen, tried = tuner(tmp_path, *demands, targets=(ONNXRUNTIME, OPENVINO)).divided(tmp_path)
    assert not chosen.failed
    assert list(chosen.seen) == ["a", "b"]
    assert all(each.count > 0 and each.slowdown > 0 for each in chosen.seen.values())
    assert len(tried) >= 2
    assert any(sum(option.units for option in each.division.options.values()) <= 2 for each in tried)


@pytest.mark.parametrize(("load", "told"), [(0.05, False), (0.75, True)])
def test_who_else_kept_the_machine_busy_while_all_were_served_is_told(tmp_path: Path, load: float, told: bool) -> None:
    made = tuner(tmp_path, Demand(name="a"))
    made.options = replace(made.options, output=tmp_path / "w.aivmm")
    (division,) = divide(made.demands, made.ladders["a"].options, {"cpu": 2})
    busy = Trial(division=division, seen={"a": seen_of(made.demands[0], answer(), 0.999)}, load_cores=load * usable_cores())
    outcome = made._infeasible(("why",), [], busy, [], 0.0)
    assert any("other processes kept" in each for each in outcome.notes) is told


def test_a_limit_that_does_not_hold_is_found_by_serving_whatever_was_expected(tmp_path: Path) -> None:
    """The options say a millisecond; the limit of a nanosecond is held by no call, and both models' answers are still counted."""
    demands = (Demand(name="a", priority=1, latency_s=1e-9), Demand(name="b", priority=2))
    made = tuner(tmp_path, *demands)
    chosen, tried = made.divided(tmp_path)
    assert chosen.broken == ("a",)
    assert all(each.broken for each in tried)
    assert chosen.seen["b"].count > 0
    assert made.ladders["a"].options


def test_more_models_than_cores_share_them(tmp_path: Path) -> None:
    chosen, _ = tuner(tmp_path, *(Demand(name=name) for name in "abc")).divided(tmp_path)
    assert not chosen.failed
    assert chosen.division.level == 2


# --- why not, in words, from made-up measurements


def answer(*, latency_s: float = 0.01, alone_s: float = 0.01, offered: int = 600, served: int = 600) -> dict[str, Any]:
    together = {"latencies_s": [latency_s] * served, "durations_s": [latency_s] * served, "offered": offered, "served": served}
    return {
        "accuracy": {"cosine": 1.0, "relative_l2": 0.0},
        "problem": "",
        "together": {**together, "seconds": 5.0, "error": ""},
        "alone": {"durations_s": [alone_s] * 10},
    }


def words_of(option: Option, demand: Demand, *, proven_s: float = float("inf")) -> Words:
    ladder = Ladder(option.model, Path(), options=[option], texts={option.name: "one thread"}, units={"cpu": 2}, proven_s=proven_s)
    return Words(demands=[demand], ladders={option.model: ladder})


@pytest.mark.parametrize("limit", ["latency_s", "p99_s"])
def test_only_a_limit_below_every_call_that_was_ever_seen_is_refused_unserved(limit: str) -> None:
    """Calls typically take 10 ms, and one of 6 was seen: a quiet machine may hold 7."""
    option = Option(name="a1", model="a", device="cpu", threads=1, service_s=0.010, least_s=0.006)

    def why(limit_s: float, **more: float) -> str:
        demand = Demand(name="a", **{limit: limit_s})
        return words_of(option, demand, **more).impossible(demand)

    assert why(0.007) == "" == why(0.011)
    assert "limited to 5 ms, and not even alone on the whole machine was any call shorter than 6 ms" in why(0.005)
    assert why(0.005, proven_s=0.004) == ""  # what its tuning proved was faster
    assert words_of(replace(option, least_s=0.0), Demand(name="a", latency_s=1e-9)).impossible(Demand(name="a", latency_s=1e-9)) == ""


def test_what_the_proof_timed_is_its_shortest_call_and_no_interval() -> None:
    """A slow mode during the proof has every interval above a limit that its fastest calls held."""
    slow = {"ci95_s": [0.009, 0.011], "least_s": 0.004}
    assert _proven_s({"measured": slow, "baselines": [{**slow, "least_s": 0.003}, {"ci95_s": None, "least_s": None}]}) == 0.003
    assert _proven_s({"measured": None, "baselines": [{"ci95_s": [0.009, 0.011]}]}) == math.inf


def test_only_a_rate_beyond_the_shortest_calls_of_all_replicas_is_refused_unserved() -> None:
    option = Option(name="a2", model="a", device="cpu", threads=1, service_s=0.010, least_s=0.005, replicas=2)
    assert words_of(option, Demand(name="a")).impossible(Demand(name="a", rate_per_s=410)) == ""  # three of a hundred may be late
    assert "415/s arrive" in words_of(option, Demand(name="a")).impossible(Demand(name="a", rate_per_s=415))


def test_who_was_never_answered_counts_among_those_who_waited() -> None:
    """Two of a hundred are left: few enough to be under way at the end, and more than the hundredth part that may be late."""
    demand = Demand(name="a", latency_s=0.02, p99_s=0.03, rate_per_s=100)
    assert seen_of(demand, answer(offered=300, served=298), 0.999).broken == ()
    lost = seen_of(demand, answer(offered=1000, served=985), 0.999)
    assert lost.broken == ("p99 never answered, limit 30 ms",) and lost.p99_s is None
    assert lost.latency_s == 0.01


def test_a_limit_that_few_requests_kept_is_said_to_rest_on_them() -> None:
    demand = Demand(name="a", p99_s=0.03, rate_per_s=100)
    told, division = words(demand)
    for served, said in ((100, "; kept, p99 by 100 requests only."), (600, "; kept.")):
        text = told.text(division.options["a"], seen_of(demand, answer(offered=served, served=served), 0.999))
        assert said in text


def test_what_a_machine_answers_at_most_is_that_of_its_widest_option() -> None:
    demand = Demand(name="a", rate_per_s=150, latency_s=0.02)
    told, division = words(demand)
    told.ladders["a"].options.append(Option(name="two", model="a", device="cpu", threads=1, service_s=0.016, replicas=2))
    told.ladders["a"].texts["two"] = "two replicas"
    broken = {"a": replace(seen_of(demand, answer(latency_s=0.04), 0.999))}
    (text,) = told.why_not(Trial(division=division, seen=broken))
    assert text.endswith("two replicas answers 125/s at most.")


@pytest.mark.parametrize(
    ("precision", "default", "said"),
    [
        (None, "bf16", "toy:CPU, default settings, bf16 by default"),
        (None, "fp32", "toy:CPU, default settings"),
        (None, None, "toy:CPU, default settings"),
        ("fp32", "bf16", "toy:CPU, default settings"),
    ],
)
def test_a_precision_that_nobody_asked_for_is_said(precision: str | None, default: str | None, said: str) -> None:
    candidate = Candidate(target=made_up(), config=Config(precision=precision))
    assert text_of(Draft.whole("a", candidate, 1), default) == said


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"prefer": ("openvino",)}, "--prefer"),
        ({"other_shapes": "dynamic"}, "--other-shapes"),
        ({"input_contract": "narrow"}, "--input-contract"),
        ({"cut_around": ("Resize",)}, "--cut-around"),
        ({"min_segments": 2}, "--min-segments"),
    ],
)
def test_options_that_speak_of_one_model_are_refused(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} is for one model, not for a workload"):
        require_alone(TuneOptions(model="a.onnx", **changes), [Wanted(name="")])


def test_a_model_file_that_is_missing_is_told_before_anything_is_tuned(tmp_path: Path) -> None:
    there, gone = write_model(tmp_path / "chain.onnx", chain_model()), tmp_path / "gone.onnx"
    (tmp_path / "w.toml").write_text("[chain]")
    phases: list[str] = []
    progress = Silent()
    progress.phase = phases.append  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"gone\.onnx"):
        models = [str(there), str(gone)]
        run(TuneOptions(model=models[0]), [Wanted(name="")], models, tmp_path / "w.toml", progress, command="")
    assert phases == []


def words(*demands: Demand, alone_s: float = 0.01) -> tuple[Words, Any]:
    ladders = {}
    for demand in demands:
        option = Option(name=demand.name, model=demand.name, device="cpu", threads=1, service_s=alone_s)
        ladders[demand.name] = Ladder(demand.name, Path(), options=[option], texts={demand.name: "here"}, units={"cpu": 2})
    division = divide(demands, [each.options[0] for each in ladders.values()], {"cpu": 2})[0]
    return Words(demands=demands, ladders=ladders), division


def test_of_a_model_that_was_never_served_it_is_not_known_whether_its_limits_hold() -> None:
    demand = Demand(name="a", latency_s=0.02)
    told, division = words(demand)
    assert told._model(demand, None, None)["holds"] is None
    for latency_s, holds in ((0.01, True), (0.04, False)):
        served = Trial(division=division, seen={"a": seen_of(demand, answer(latency_s=latency_s), 0.999)})
        assert told._model(demand, served, None)["holds"] is holds


def test_limits_are_judged_by_what_was_seen() -> None:
    demand = Demand(name="a", latency_s=0.02, p99_s=0.03, rate_per_s=100)
    assert seen_of(demand, answer(), 0.999).broken == ()
    assert seen_of(demand, answer(), 0.999).p99_s == 0.01
    slow = seen_of(demand, answer(latency_s=0.04), 0.999)
    assert [each.split()[0] for each in slow.broken] == ["median", "p99"]
    assert slow.slowdown == pytest.approx(4)
    late = seen_of(demand, answer(served=500), 0.999)
    assert late.broken == ("500 of 600 requests answered in time at 100/s",)
    few = seen_of(demand, answer(offered=100, served=100), 0.999)
    assert few.p99_s is None
    wrong = {**answer(), "accuracy": {"cosine": 0.9, "relative_l2": 0.5}}
    assert "cosine" in seen_of(demand, wrong, 0.999).broken[0]
    assert seen_of(demand, {**answer(), "together": {**answer()["together"], "error": "boom"}}, 0.999).broken == ("boom",)
    assert "no request was answered" in seen_of(demand, answer(served=0), 0.999).broken[0]


@pytest.mark.parametrize(
    ("limit_s", "rate_per_s", "said"),
    [
        (0.005, None, "Not even alone on the whole machine: its fastest plan takes 10 ms (here)."),
        (
            0.02,
            None,
            "Alone its fastest plan takes 10 ms (here), but first is served first, and calls take 4.00 times as long beside them.",
        ),
        (0.02, 200.0, "Not even alone on the whole machine: here answers 100/s at most."),
    ],
)
def test_who_cannot_be_served_is_told_with_what_stands_in_its_way(limit_s: float, rate_per_s: float | None, said: str) -> None:
    demands = (Demand(name="first"), Demand(name="late", priority=2, latency_s=limit_s, rate_per_s=rate_per_s))
    told, division = words(*demands)
    seen = {"first": seen_of(demands[0], answer(), 0.999), "late": seen_of(demands[1], answer(latency_s=0.04), 0.999)}
    (text,) = told.why_not(Trial(division=division, seen=seen))
    assert text.startswith("late (priority 2) cannot be served: median 40 ms, limit ")
    assert text.endswith(said)
    assert told.why_not(Trial(division=division, seen={}, error="boom")) == ("Serving the models at once failed: boom.",)
    kept = {**seen, "late": replace(seen["late"], broken=())}
    assert Trial(division=division, seen=kept).failed is False
