"""A lower precision is tried when it is named or when real data is there, is judged on held-out data, and never slips in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import aivmm
from aivmm.db.database import Database
from aivmm.probes.lab import Lab, Loaded
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner import measure
from tests.models.hostile import HOSTILE, hostile
from tests.tuner.conftest import Tuned
from tests.tuner.harness import ONE_RUNTIME, TINY, Finished, Place, reference, relative_l2

FEW = ("--budget", "8s", "--trials", "3", "--top", "1", "--json", "-q")
METRIC = """
import numpy as np

def agreement(samples, outputs):
    print("this is no part of the answer")
    return float(np.mean([np.argmax(output["output"]) == sample["label"] for sample, output in zip(samples, outputs)]))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    """A place with a labelled data set and a metric of the user's own."""
    place = Place.at(tmp_path_factory.mktemp("precision"))
    images = np.random.default_rng(5).standard_normal((40, 3, 16, 16)).astype(np.float32)
    labels = [int(np.argmax(reference(tiny, {"input": image[None]})["output"])) for image in images]
    np.savez(place.work / "labelled.npz", input=images, label=np.array(labels))
    (place.work / "mine.py").write_text(METRIC)
    return place


@pytest.fixture(scope="module")
def lowered(shared: Place, tiny: Path) -> Finished:
    """A finished tune that allows int8 alone."""
    return shared.aivmm("tune", tiny, *TINY, *LOWERED, *FEW, "-o", "low.aivmm")


LOWERED = ("--precisions", "int8", "--dataset", "labelled.npz", "--metric", "mine:agreement", "--constraint", "metric>=0.5")


def test_a_model_lowered_with_a_data_set_is_judged_by_the_users_metric_and_runs(shared: Place, tiny: Path, lowered: Finished) -> None:
    assert (lowered.code, lowered.err) == (0, "")
    found = lowered.json
    assert [stage["precision"].partition(":")[0] for stage in found["plan"]["stages"]] == ["int8"]
    assert found["accuracy"]["metric"] == "metric" and found["accuracy"]["data"] == "real"
    assert 0.5 <= found["accuracy"]["value"] <= 1.0 and found["accuracy"]["limit"] == 0.5
    assert "int8" in found["verdict"] and found["verdict"].count("Your metric is") == 1 == found["verdict"].count("held-out samples")
    assert "your metric" in found["precision"]["sentence"]
    forms = {(each["target"], each["precision"].partition(":")[0]): each for each in found["precision"]["tried"]}
    assert all(each["accuracy"]["metric"] >= 0.5 for (_, precision), each in forms.items() if precision == "int8" and not each["problem"])
    (plan,) = [each for each in found["precision"]["tried"] if each["is_plan"]]
    assert plan["file_bytes"] < forms["onnxruntime:CPU", "default (fp32)"]["file_bytes"]
    assert plan["peak_memory_bytes"] > 1e7
    with Database.open(str(shared.db)) as database:
        stored = [each.accuracy.get(plan["target"], {}) for each in database.lowerings()]
    assert any("peak_memory_bytes" in each for each in stored) and not any("metric" in each for each in stored)
    assert all(not each["eligible"] for each in found["baselines"]), "nobody allowed fp32"

    plan = json.loads((shared.work / "low.aivmm" / "plan.json").read_text())
    kinds = {
        node.op_type for node in onnx.load(str(shared.work / "low.aivmm" / plan["stages"][0]["model"]), load_external_data=False).graph.node
    }
    assert "QuantizeLinear" in kinds
    assert all("QLinear" not in kind for kind in kinds)
    with aivmm.load_plan(shared.work / "low.aivmm") as engine:
        fresh = {"input": np.random.default_rng(12).standard_normal((1, 3, 16, 16)).astype(np.float32)}
        error = relative_l2(engine.run(fresh), reference(tiny, fresh))
    assert 1e-6 < error < 0.2  # lowered in truth, and not to nonsense


@pytest.mark.slow
def test_the_same_again_lowers_and_measures_nothing(shared: Place, tiny: Path, lowered: Finished) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (shared.folder / "cache" / "lowered").iterdir() if path.suffix != ".lock"}
    again = shared.aivmm("tune", tiny, *TINY, *LOWERED, *FEW, "-o", "low.aivmm")
    assert again.code == lowered.code == 0
    assert again.json["probes"]["measured"] == 0 and again.json["probes"]["reused"] > 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_a_limit_on_the_metric_that_nothing_meets_gives_no_plan(shared: Place, tiny: Path) -> None:
    done = shared.aivmm("tune", tiny, *TINY, *LOWERED[:-1], "metric>=1.5", *FEW, *ONE_RUNTIME, "-o", "none.aivmm")
    assert done.code == 3
    assert done.json["plan"] is None and "metric is" in done.json["verdict"]
    assert not (shared.work / "none.aivmm").exists()


@pytest.mark.slow
def test_eight_real_samples_let_int8_join_and_synthetic_ones_do_not(shared: Place, tiny: Path, tuned: Tuned) -> None:
    np.savez(shared.work / "eight.npz", input=np.random.default_rng(6).standard_normal((16, 1, 3, 16, 16)).astype(np.float32))
    done = shared.aivmm("tune", tiny, *TINY, "--inputs", "eight.npz", *FEW, *ONE_RUNTIME, "-o", "joined.aivmm")
    assert done.code == 0, done.err
    assert "int8" in precisions_tried(shared)
    assert "fp32" in precisions_tried(tuned.place) and "int8" not in precisions_tried(tuned.place)


def precisions_tried(place: Place) -> set[str | None]:
    """Return the precisions that the newest run of a place searched."""
    with Database.open(str(place.db)) as database:
        return {trial.config.family for trial in database.trials(database.runs()[0].id)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--service-level", "fast"), "unknown service level 'fast'; choose from interactive (objective latency"),
        (("--inputs", "eight.npz", "--dataset", "labelled.npz"), "--inputs and --dataset both give samples"),
        (("--constraint", "metric>=0.9"), "name your function with --metric"),
        (("--metric", "mine:missing"), "mine"),
        (("--metric", "nowhere:f"), "nowhere"),
        (("--dataset", "nowhere.npz"), "nowhere.npz"),
        (("--dataset", "mine.py"), "mine.py"),
    ],
)
def test_what_does_not_fit_is_one_line(
    shared: Place, tiny: Path, in_process: Callable[..., Finished], options: tuple[str, ...], said: str
) -> None:
    done = in_process(shared, "tune", tiny, *TINY, *FEW, *options)
    assert done.code == 2
    assert len(done.error_lines) == 1 and said in done.error_lines[0]
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_int8_calibrated_on_made_up_inputs_says_so(shared: Place, tiny: Path) -> None:
    done = shared.aivmm(
        "tune", tiny, *TINY, "--precisions", "int8", "--constraint", "cosine>=0.5", *FEW, *ONE_RUNTIME, "-o", "made-up.aivmm"
    )
    assert done.code == 0, done.err
    assert done.json["accuracy"]["data"] == "synthetic"
    assert "int8 was calibrated and judged on synthetic inputs alone: bring --dataset" in done.json["verdict"]


@pytest.mark.slow
def test_a_service_level_says_what_it_stands_for(shared: Place, tiny: Path) -> None:
    done = shared.aivmm("tune", tiny, *TINY, "--service-level", "interactive", *FEW[:-2], *ONE_RUNTIME, "-v", "-o", "level.aivmm")
    assert done.code == 0, done.err
    assert "service level interactive: objective latency, p99<=100ms" in " ".join(done.out.split())
    plan = json.loads((shared.work / "level.aivmm" / "plan.json").read_text())
    assert (plan["objective"], plan["constraints"]) == ("latency", ["p99<=100ms"])


@pytest.mark.slow
def test_the_plan_is_judged_on_all_that_was_held_out(shared: Place, tiny: Path) -> None:
    images = np.random.default_rng(7).standard_normal((800, 3, 16, 16)).astype(np.float32)
    np.savez(shared.work / "many.npz", input=images)
    limit = ("--constraint", "top1_agreement>=0.5", "--precisions", "int8", "--dataset", "many.npz", "--budget", "40s")
    done = shared.aivmm("tune", tiny, *TINY, *limit, *FEW[2:], *ONE_RUNTIME, "-o", "many.aivmm")
    assert done.code == 0, done.err
    assert "top-1 agreement" in done.json["precision"]["sentence"]
    assert done.json["precision"]["sentence"].endswith("on 500 held-out samples.")


@pytest.mark.slow
def test_one_hostile_block_stays_as_it_was_and_the_mixed_plan_wins(tmp_path_factory: pytest.TempPathFactory) -> None:
    """int8 as a whole is far over the limit, fp32 reads four times as many weights: the plan is neither."""
    place = Place.at(tmp_path_factory.mktemp("hostile"))
    model = hostile(place.work / "hostile.onnx", width=2048)
    asked = ("--precisions", "fp32,int8", "--constraint", "cosine>=0.99", "--budget", "60s", "--json", "-q", "-o", "mixed.aivmm")
    done = place.aivmm("tune", model, *asked)
    assert done.code == 0, done.err
    (stage,) = done.json["plan"]["stages"]
    assert stage["precision"].startswith("int8:") and "-but-" in stage["precision"]
    assert done.json["accuracy"]["value"] >= 0.99
    tried = done.json["precision"]["tried"]
    whole = [each for each in tried if each["precision"].startswith("int8:") and "-but-" not in each["precision"]]
    assert whole and all(each["problem"] for each in whole), "int8 as a whole is over the limit"
    assert all(each["verdict"] == "faster" for each in done.json["baselines"] if each["eligible"]), "the plan beats fp32"
    with aivmm.load_plan(place.work / "mixed.aivmm") as engine:
        fresh = {"x": np.random.default_rng(12).standard_normal((1, 2048)).astype(np.float32)}
        assert relative_l2(engine.run(fresh), reference(model, fresh)) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_no_plan_is_over_its_limit_whatever_int8_does_to_a_model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = Place.at(tmp_path_factory.mktemp("broken"))
    model = hostile(place.work / "broken.onnx", kind)
    asked = (
        "--precisions",
        "int8",
        "--constraint",
        "cosine>=0.999",
        "--budget",
        "12s",
        "--trials",
        "2",
        "--json",
        "-q",
        "-o",
        "plan.aivmm",
    )
    done = place.aivmm("tune", model, *asked)
    if done.code == 3:
        assert done.json["plan"] is None and not (place.work / "plan.aivmm").exists()
        assert done.json["precision"]["tried"], "the front is shown all the same"
        return
    assert done.code == 0, done.err
    fresh = {"x": np.random.default_rng(21).standard_normal((1, 64)).astype(np.float32)}
    with aivmm.load_plan(place.work / "plan.aivmm") as engine:
        made, expected = engine.run(fresh), reference(model, fresh)
    assert done.json["accuracy"]["value"] >= 0.999
    assert relative_l2(made, expected) < 2 * (2 * (1 - 0.999)) ** 0.5  # on inputs that nobody saw


@pytest.mark.slow
def test_a_lowered_model_that_was_compiled_to_be_judged_is_raced_as_it_is(
    in_process: Callable[..., Finished], shared: Place, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, str]] = []
    load = Lab.load

    def told(lab: Lab, model: Path, target: Target, config: Config, **more: Any) -> Loaded:
        if config.lowered and not config.settings:
            loaded.append((str(target), str(config.precision)))
        return load(lab, model, target, config, **more)

    def raced(*arguments: Any, **more: Any) -> int:
        at_races.append(list(loaded))
        return race(*arguments, **more)

    at_races: list[list[tuple[str, str]]] = []
    race = measure.race
    monkeypatch.setattr(Lab, "load", told)
    monkeypatch.setattr(measure, "race", raced)
    done = in_process(shared, "tune", tiny, *TINY, *LOWERED, *FEW, *ONE_RUNTIME, "--fresh", "-o", "once.aivmm")
    assert done.code == 0, done.err
    first = next(each for each in at_races if each)  # what had been loaded when the lowered models raced first
    assert len(first) == len(set(first))


def test_int8_is_measured_where_it_is_computed_in_fp32_and_the_notes_say_so(
    in_process: Callable[..., Finished], shared: Place, tiny: Path, lowered: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: ONNX Runtime's CPU stands in for a provider without integer kernels. The model is lowered by now."""
    assert lowered.code == 0
    monkeypatch.setattr("aivmm.planner.precision._WITHOUT_INTEGER_KERNELS", ("CPU",))
    asked = ("--precisions", "fp32,int8", "--dataset", "labelled.npz", "--constraint", "cosine>=0.5", "--json", "--fresh")
    short = ("--budget", "2s", "--trials", "1", "--top", "1")
    done = in_process(shared, "tune", tiny, *TINY, *asked, *short, *ONE_RUNTIME, "-o", "dequantized.aivmm")
    assert done.code == 0, done.err
    int8 = {each["precision"] for each in done.json["precision"]["tried"] if each["precision"].startswith("int8")}
    assert len(int8) == 1, "one way that is within the limit is enough"
    (variant,) = int8
    assert f"onnxruntime:CPU has no kernels for {variant}: it dequantizes and computes in fp32, in " in " ".join(done.err.split())
