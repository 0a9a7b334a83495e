"""A whole tune from the command line: what it prints, writes, keeps and reuses."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aivmm
from aivmm.db.database import Database
from aivmm.probes.compare import compare
from aivmm.probes.records import Measured
from aivmm.runtime.reading import file_sha256
from tests.tuner.conftest import Tuned
from tests.tuner.harness import (
    LIMIT_S,
    ONE_RUNTIME,
    SMALL,
    TINY,
    Finished,
    Place,
    assert_as_promised,
    default_precision,
    listing,
    reference,
    run,
)

VERDICTS = {"faster", "slower", "same", "ambiguous"}


def is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def test_the_json_of_a_tune_has_the_keys_and_types_that_the_design_promises(tuned: Tuned, tiny: Path) -> None:
    found = tuned.summary
    promised = {
        "schema",
        "model",
        "plan",
        "report",
        "objective",
        "measured",
        "predicted",
        "certificate",
        "baselines",
        "accuracy",
        "probes",
        "wall_s",
        "verdict",
    }
    assert promised <= found.keys()
    assert found["schema"] == 1
    assert found["model"] == {"path": str(tiny), "sha256": file_sha256(tiny), "category": "CNN"}
    assert found["objective"] == "latency"
    assert found["plan"]["batch"] == 1
    assert found["plan"]["stages"]
    for stage in found["plan"]["stages"]:
        assert stage["target"] in ("openvino:CPU", "onnxruntime:CPU", "openvino:AUTO")
        assert isinstance(stage["precision"], str) and isinstance(stage["config"], dict)
    assert found["plan"]["stages"][0]["blocks"][0] == 0
    assert is_number(found["predicted"]["median_s"]) and is_number(found["predicted"]["ratio_to_reference"])
    assert found["predicted"]["reference"] in {each["name"] for each in found["baselines"]}
    assert is_number(found["predicted"]["reference_proven_s"]) and found["predicted"]["sentence"].count(" proven") >= 1
    assert all(is_number(found["probes"][name]) for name in ("measured", "reused", "refused", "failed"))
    assert found["accuracy"] == {"metric": "cosine", "value": pytest.approx(1.0, abs=1e-4), "limit": 0.999, "data": "synthetic"}
    assert 0 < found["wall_s"] < LIMIT_S
    assert "\n" not in found["verdict"] and found["verdict"].startswith(found["plan"]["stages"][0]["target"])
    # A runtime's default may compute in bf16 without a word; the verdict has that word.
    silent = any(each["precision"] == "default" and default_precision(each["target"]) != "fp32" for each in found["plan"]["stages"])
    assert ("by default here" in found["verdict"]) == silent


def test_a_promise_is_judged_by_the_ratio_to_the_reference_of_the_same_proof(tuned: Tuned) -> None:
    found = tuned.summary["predicted"]
    reference = next(each for each in tuned.summary["baselines"] if each["name"] == found["reference"])
    assert found["reference_proven_s"] == pytest.approx(reference["median_s"])
    assert found["by_reference_s"] == pytest.approx(found["median_s"] * found["reference_proven_s"] / found["reference_s"])
    if found["proven_ratio"] is None:  # the reference itself won
        assert found["ratio_to_reference"] == pytest.approx(1.0) and found["kept"] is None
        return
    low, high = found["ratio_interval"]
    assert low <= found["ratio_to_reference"] <= high
    with Database.open(tuned.place.db) as database:
        proofs = {each.name: each.samples for each in database.proofs(database.runs()[-1].id)}
        plan = next(each.samples for each in database.proofs(database.runs()[-1].id) if each.role == "plan")
    beside = proofs[found["reference"]]
    assert plan is not None and beside is not None
    # By medians of rounds, as the search's scores are, whatever the verdict goes by on a busy machine.
    assert found["proven_ratio"] == pytest.approx(compare(plan, beside).ratio)
    assert found["kept"] is not False or not low <= found["proven_ratio"] <= high


def test_the_measured_numbers_agree_with_each_other(tuned: Tuned) -> None:
    measured = tuned.summary["measured"]
    low, high = measured["ci95_s"]
    assert 0 < low <= measured["median_s"] <= high
    assert measured["throughput_per_s"] == pytest.approx(1 / measured["median_s"])
    assert isinstance(measured["samples"], int) and measured["samples"] > 0
    assert measured["p99_s"] is None or measured["p99_s"] >= measured["median_s"] * 0.5


def test_loading_from_the_cache_is_measured_shown_and_kept(tuned: Tuned) -> None:
    measured = tuned.summary["measured"]
    with Database.open(tuned.place.db) as database:
        run_id = database.runs()[-1].id
        kept = [each.metrics["load_cached_s"] for each in database.proofs(run_id) if "load_cached_s" in each.metrics]
    if measured["load_cached_s"] is None:  # what OpenVINO resolves at load is not kept, and what loads for seconds not loaded again
        reason = measured["not_measured"]["load from cache"]
        assert kept == [] and ("nothing compiled for openvino:AUTO can be kept" in reason or "loading takes" in reason)
        return
    assert measured["load_cached_s"] > 0 and "load from cache" not in measured["not_measured"]
    assert "Load from cache" in (tuned.plan / "report.html").read_text(encoding="utf-8")
    assert kept == [measured["load_cached_s"]]


def test_the_certificate_is_in_json_plan_and_report_alike(tuned: Tuned) -> None:
    found = tuned.summary["certificate"]
    assert found["objective_s"] == pytest.approx(tuned.summary["predicted"]["median_s"])
    assert found["bound_s"] is None or found["bound_s"] <= found["objective_s"]
    assert sum(found["rests_on"].values()) == pytest.approx(1)
    assert 0 <= found["segments_measured"] <= found["segments_possible"]
    assert json.loads((tuned.plan / "plan.json").read_text())["certificate"] == found
    assert html.escape(found["sentence"]) in (tuned.plan / "report.html").read_text()


def test_what_is_expected_of_a_plan_says_whether_it_was_measured(tuned: Tuned) -> None:
    with Database.open(tuned.place.db) as database:
        proofs = {each.name: each.metrics for each in database.proofs(database.runs()[-1].id)}
    shares = {name: metrics["predicted_measured"] for name, metrics in proofs.items() if "predicted_measured" in metrics}
    assert shares["openvino:CPU default"] == shares["openvino:CPU LATENCY hint"] == 1  # which resolves to the default
    assert shares["openvino:AUTO"] == 0  # nobody timed it
    assert proofs["openvino:AUTO"]["predicted_sigma"] > proofs["openvino:CPU default"]["predicted_sigma"]


def test_every_baseline_is_there_with_its_verdict(tuned: Tuned) -> None:
    baselines = {each["name"]: each for each in tuned.summary["baselines"]}
    assert {"onnxruntime:CPU default", "openvino:CPU default", "openvino:CPU LATENCY hint", "openvino:AUTO"} <= baselines.keys()
    for each in baselines.values():
        assert {"name", "target", "config", "median_s", "ci95_s", "ratio_to_plan", "eligible", "verdict"} <= each.keys()
        # A default that computes in bf16 (AMX, AVX512_BF16) may be over the accuracy limit.
        assert each["eligible"] is True or "cosine" in each["reason"], each["reason"]
        assert each["verdict"] in VERDICTS
        assert each["ci95_s"][0] <= each["median_s"] <= each["ci95_s"][1]
        if each["verdict"] == "faster":
            assert each["ratio_to_plan"] > 1  # the baseline takes longer than the plan
        if each["verdict"] == "slower":
            assert each["ratio_to_plan"] < 1
    assert baselines["openvino:CPU LATENCY hint"]["config"] == {"PERFORMANCE_HINT": "LATENCY"}


def test_the_plan_is_not_slower_than_any_eligible_baseline(tuned: Tuned) -> None:
    assert [each["name"] for each in tuned.summary["baselines"] if each["eligible"] and each["verdict"] == "slower"] == []


def test_progress_that_goes_to_no_terminal_is_plain_lines_with_their_time(tuned: Tuned) -> None:
    lines = tuned.done.err.splitlines()
    assert len(lines) >= 4
    assert [line for line in lines if not re.match(r"\[ *\d+\.\d s\] ", line)] == []
    assert "\x1b" not in tuned.done.err and "\r" not in tuned.done.err
    assert "proving" in tuned.done.err


def test_the_plan_loads_and_answers_as_onnx_runtime_does(tuned: Tuned, tiny: Path) -> None:
    inputs = {"input": np.random.default_rng(7).standard_normal((1, 3, 16, 16)).astype(np.float32)}
    with aivmm.load_plan(tuned.plan) as engine:
        outputs = engine.run(inputs)
        assert engine.validity.grade == "exact"
        assert engine.events == []
        assert engine.stats()["runs"] == 1
    assert_as_promised(tuned.summary["plan"]["stages"], outputs, reference(tiny, inputs))


def test_the_plan_file_holds_what_was_printed(tuned: Tuned) -> None:
    from aivmm.runtime.bundle import Bundle

    with Bundle.open(tuned.plan) as bundle:
        plan = bundle.plan
    printed = tuned.summary
    assert plan.verdict == printed["verdict"]
    assert plan.model.sha256 == printed["model"]["sha256"]
    assert plan.expected["median_s"].value == printed["measured"]["median_s"]
    assert plan.expected["median_s"].source == "measured"
    assert plan.accuracy is not None and plan.accuracy.value == printed["accuracy"]["value"]
    assert [each.target for each in plan.stages] == [each["target"] for each in printed["plan"]["stages"]]
    assert {each.target for each in plan.environments} >= {each.target for each in plan.stages}


def test_a_plan_brings_a_fallback_on_the_other_runtime(tuned: Tuned) -> None:
    from aivmm.runtime.bundle import Bundle

    with Bundle.open(tuned.plan) as bundle:
        used = {each.target.partition(":")[0] for each in bundle.plan.stages}
        spare = {stage.target.partition(":")[0] for each in bundle.plan.fallbacks for stage in each.stages}
    assert used | spare == {"openvino", "onnxruntime"}


def test_the_report_lies_in_the_bundle_names_the_plan_and_needs_no_network(tuned: Tuned) -> None:
    report = tuned.place.work / tuned.summary["report"]
    assert report == tuned.plan / "report.html"
    text = report.read_text(encoding="utf-8")
    assert "tiny" in text and tuned.summary["plan"]["stages"][0]["target"] in text
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text) == []


def test_nothing_but_the_plan_is_left_in_the_current_folder(tuned: Tuned, again: Finished) -> None:
    assert again.code == 0
    assert [each.name for each in tuned.place.work.iterdir()] == ["tiny.aivmm"]


def test_the_database_is_sound_and_holds_raw_samples_with_their_environment(tuned: Tuned) -> None:
    with Database.open(tuned.place.db) as database:
        assert database.check() == []
        outcomes = [each for each in database.outcomes(kind="model") if isinstance(each, Measured)]
        assert len(outcomes) >= 4
        assert all(len(each.samples.timed_s) >= 3 and each.key.environment for each in outcomes)
        assert {each.key.target for each in outcomes} >= {"openvino:CPU", "onnxruntime:CPU"}


def test_the_run_is_recorded_as_complete_with_its_summary(tuned: Tuned, again: Finished) -> None:
    with Database.open(tuned.place.db) as database:
        newest = database.run(None)
        assert newest.status == "complete"
        assert newest.summary["verdict"] == again.json["verdict"]
        assert newest.finished_at is not None and newest.finished_at <= datetime.now(UTC)
        assert "tune" in newest.command
        assert database.plan(newest.id) is not None
        assert {each.role for each in database.proofs(newest.id)} >= {"plan", "baseline"}


def test_the_search_tries_as_many_points_as_it_was_told_and_the_second_run_none(tuned: Tuned, again: Finished) -> None:
    assert again.code == 0
    with Database.open(tuned.place.db) as database:
        second, first = (database.trials(each.id) for each in (database.run(None), database.runs()[-1]))
    # A baseline leaves the precision to the runtime. Where that is not fp32, the default's twin in fp32 is a baseline too.
    baselines = {each["name"] for each in tuned.summary["baselines"]}
    ours = [each for each in first if each.config.settings or f"{each.target} {each.config.precision}" not in baselines]
    searched = [each for each in ours if not each.reused and each.config.precision]
    assert len(searched) == 3
    assert len({(each.target, each.config.key()) for each in searched}) == 3
    assert [each for each in second if not each.reused] == []
    assert {(each.target, each.config.key()) for each in searched} <= {(each.target, each.config.key()) for each in second}


def test_the_same_command_again_measures_nothing_but_the_proof(tuned: Tuned, again: Finished) -> None:
    assert again.code == 0
    assert again.json["probes"]["measured"] == 0
    with Database.open(tuned.place.db) as database:
        stored = [each for each, _ in database.run_outcomes(database.runs()[-1].id) if isinstance(each, Measured)]
    # The reference is measured in each race, and reused once; looks at cut plans in their place are recalled, each of them.
    assert again.json["probes"]["reused"] >= len({each.key for each in stored}) > 0
    assert len(stored) == tuned.summary["probes"]["measured"]
    assert again.json["measured"]["samples"] > 0
    assert again.json["model"] == tuned.summary["model"]


def test_a_repeated_run_says_that_what_it_uses_was_measured_on_a_busy_machine(
    tuned: Tuned, tiny: Path, place: Place, in_process: Callable[..., Finished]
) -> None:
    shutil.copy(tuned.place.db, place.db)
    busy = {"code": "machine-busy", "message": "other processes kept 1.6 of 2 cores busy", "advice": "close them"}
    with closing(sqlite3.connect(place.db)) as connection, connection:
        connection.execute("UPDATE probe SET cautions = ? WHERE state = 'measured'", (json.dumps([busy]),))
    found = in_process(place, "tune", tiny, *TINY, *SMALL, "--json")
    assert found.code == 0, found.err
    assert found.json["probes"]["measured"] == 0
    assert "what an earlier run measured is used again, and" in found.err
    assert f"disturbed ({busy['message']}): --fresh measures all of it again" in found.err


def test_quiet_says_nothing_on_standard_error(again: Finished) -> None:
    assert again.err == ""


def test_fresh_measures_again_and_the_words_for_people_are_the_result(tuned: Tuned, tiny: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "work").mkdir()
    shutil.copy(tuned.place.db, place.db)
    # --trials 1 makes another request; what was measured before would be reused all the same.
    done = place.aivmm("tune", tiny, *TINY, "--budget", "4s", "--trials", "1", "--fresh", "-v", "-q", *ONE_RUNTIME, "-o", "p.aivmm")
    assert (done.code, done.err) == (0, "")
    with Database.open(place.db) as database:
        probes = database.run(None).summary["probes"]
        assert database.run(None).summary["verdict"].split(".")[0] in " ".join(done.out.split())
    assert probes["measured"] > 0 and probes["reused"] == 0
    assert "onnxruntime:CPU default" in done.out
    assert "openvino" not in done.out  # --targets leaves it out, as a baseline too
    assert f"probes  {probes['measured']} measured, 0 reused from the database" in done.out
    assert "p.aivmm" in done.out and "aivmm.load_plan" in done.out


def test_a_constraint_that_nothing_meets_exits_with_3_names_what_binds_and_still_reports(tuned: Tuned, tiny: Path, place: Place) -> None:
    shutil.copy(tuned.place.db, place.db)  # what is known saves time; the place of the finished tune is looked at by others
    done = place.aivmm(
        "tune", tiny, *TINY, *ONE_RUNTIME, "--budget", "4s", "--trials", "1", "--json", "--constraint", "latency<1ns", "-o", "none.aivmm"
    )
    assert done.code == 3, done.err
    found = done.json
    assert found["plan"] is None and found["measured"] is None
    assert "latency" in found["verdict"] and "1 ns" in found["verdict"]
    assert all(each["eligible"] is False for each in found["baselines"])
    report = place.work / found["report"]
    assert "latency" in report.read_text(encoding="utf-8")
    assert list(listing(place.work)) == [report.name]
    with Database.open(place.db) as database:
        assert database.run(None).status == "infeasible"


def test_a_dry_run_says_what_it_would_measure_and_writes_nothing(place: Place, tiny: Path) -> None:
    done = place.aivmm("tune", tiny, *TINY, "--dry-run", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["dry_run"] is True and found["schema"] == 1
    assert "input: float32[1, 3, 16, 16]" in found["inputs"]
    assert {"openvino:CPU", "onnxruntime:CPU"} <= set(found["targets"])
    assert "onnxruntime:CPU default" in found["baselines"]
    assert found["blocks"] >= 2 and found["operators"] >= 3
    assert found["on_top"].startswith("tens of seconds for the proof")
    assert (found["objective"], found["constraints"]) == ("latency", [])
    assert 'not asked for, and so assumed: --objective latency, --constraint "cosine>=0.999"' in done.err
    assert found["knobs"]["onnxruntime:CPU"]
    assert listing(place.work) == {}
    if place.db.exists():
        with Database.open(place.db) as database:
            assert list(database.outcomes(all=True)) == []


@pytest.mark.parametrize(("targets", "batches"), [("null:GPU.0", "1,4,16,32,64,128"), ("null:CPU,null:GPU.0", "1,2,4,8,16,32")])
def test_the_batches_that_are_assumed_are_those_of_the_targets(
    place: Place, in_process: Callable[..., Finished], targets: str, batches: str
) -> None:
    asked = ("--backend", "null", "--targets", targets, "--objective", "throughput", "--dry-run", "--json")
    done = in_process(place, "tune", "demo:recommender", *asked)  # quick to compute on the null backend
    assert done.code == 0, done.err
    assert f"--batch {batches}" in done.err and ",".join(map(str, done.json["batches"])) == batches


def test_the_demos_are_listed_by_their_prefix(place: Place) -> None:
    text, as_json = place.aivmm("tune", "demo:"), place.aivmm("tune", "demo:", "--json")
    assert (text.code, text.err, as_json.code) == (0, "", 0)
    names = [line.split()[0] for line in text.out.splitlines()]
    assert names == list(as_json.json["demos"])
    assert {
        "demo:squeezenet",
        "demo:resnet50",
        "demo:densenet121",
        "demo:shufflenet",
        "demo:encoder",
        "demo:lstm",
        "demo:recommender",
    } <= set(names)


def test_devices_lists_what_runs_and_why_the_rest_does_not(place: Place) -> None:
    done = place.aivmm("devices", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    targets = {each["target"]: each for each in found["targets"]}
    for name in ("openvino:CPU", "onnxruntime:CPU"):
        assert targets[name]["precisions"][0] == "fp32"
        assert targets[name]["kind"] == "cpu" and targets[name]["cores"] >= 1
        assert targets[name]["device"] and targets[name]["runtime_version"]
    assert all(each["reason"] for each in found["unavailable"])


def test_devices_for_people_names_every_target_in_full(place: Place) -> None:
    done = place.aivmm("devices", COLUMNS="80")
    assert (done.code, done.err) == (0, "")
    assert "openvino:CPU" in done.out and "onnxruntime:CPU" in done.out


def test_run_answers_as_the_engine_does_and_writes_its_outputs(tuned: Tuned, tiny: Path, tmp_path: Path) -> None:
    inputs = {"input": np.random.default_rng(3).standard_normal((1, 3, 16, 16)).astype(np.float32)}
    np.savez(tmp_path / "in.npz", **inputs)
    done = tuned.place.aivmm("run", tuned.plan, "--inputs", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--repeat", "3", "--json")
    assert done.code == 0, done.err
    assert done.json["runs"] == 3 and done.json["median_s"] > 0
    assert done.json["outputs"][0]["shape"] == [1, 10]
    with np.load(tmp_path / "out.npz") as written:
        assert_as_promised(tuned.summary["plan"]["stages"], dict(written), reference(tiny, inputs))


def test_run_for_people_needs_no_inputs(tuned: Tuned) -> None:
    done = tuned.place.aivmm("run", "tiny.aivmm")
    assert (done.code, done.err) == (0, "")
    assert re.match(r"tiny on \S+ \(exact\): [\d.]+ (ms|µs)\n", done.out) and "output: float32[1, 10]" in done.out


def test_a_report_is_rendered_again_from_the_database(tuned: Tuned, tmp_path: Path) -> None:
    done = tuned.place.aivmm("report", "tiny", "-o", tmp_path / "again.html", "--json")
    assert done.code == 0, done.err
    assert done.json["report"] == str(tmp_path / "again.html")
    text = (tmp_path / "again.html").read_text(encoding="utf-8")
    assert "openvino:CPU" in text and "onnxruntime:CPU" in text
    with Database.open(tuned.place.db) as database:
        assert done.json["run"] == database.run("tiny").id


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"], ["devices", "-h"], ["run", "-h"], ["report", "-h"]])
def test_help_is_an_answer_on_standard_output(place: Place, arguments: list[str]) -> None:
    done = place.aivmm(*arguments)
    assert (done.code, done.err) == (0, "")
    assert "Usage" in done.out


def test_the_options_of_the_design_exist(place: Place) -> None:
    text = place.aivmm("tune", "--help", COLUMNS="200").out
    options = "--output --db --objective --constraint --targets --precisions --batch --shape --dim --inputs --budget --trials"
    options += " --min-segments --top --seed --fresh --retry-failed --dry-run --json --quiet --verbose"
    assert [each for each in options.split() if each not in text] == []


def test_the_console_scripts_are_the_command_line(place: Place) -> None:
    scripts = Path(sys.executable).parent
    tune = next((scripts / name for name in ("aivmm-tune", "aivmm-tune.exe") if (scripts / name).exists()), None)
    if tune is None:
        pytest.skip("the console scripts are not installed beside this Python")
    done = run([str(tune), "demo:", "--json"], cwd=place.work, env=place.env())
    assert done.code == 0 and "demo:squeezenet" in done.json["demos"]
    # What the files of the current folder are called must not matter.
    (place.work / "onnx.py").write_text("raise RuntimeError('this is not the onnx that was meant')\n")
    (place.work / "db").mkdir()
    done = run([str(tune), str(place.work / "missing.onnx")], cwd=place.work, env=place.env())
    assert done.code == 2 and "missing.onnx" in done.err
