"""The Python face, used as in anybody's script: no `__main__` guard, in a folder whose files have unlucky names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aivmm
from tests.tuner.harness import Place, assert_as_promised, reference, run, write_tiny

SCRIPT = """
import json
import sys

import numpy as np

import aivmm

model, inputs = sys.argv[1:]
result = aivmm.tune(
    model, output="plan.aivmm", dims={"side": 16}, inputs=inputs, constraints="latency<10s", targets=["openvino", "onnxruntime"],
    budget_s=6, trials=2, top=1, quiet=True,
)
frame = result.evidence
with result.load() as engine:
    outputs = engine.run({"input": np.ones((1, 3, 16, 16), dtype=np.float32)})
    stats = engine.stats()
print(json.dumps({
    "type": type(result).__name__,
    "text": str(result),
    "verdict": result.verdict,
    "plan": type(result.plan).__name__,
    "targets": result.plan.targets(),
    "model": result.plan.model.name,
    "constraints": result.plan.constraints,
    "plan_path": str(result.plan_path),
    "report_path": str(result.report_path),
    "report_exists": result.report_path.is_file(),
    "baselines": result.baselines,
    "summary": dict(result.summary),
    "evidence": {
        "kind": type(frame).__name__, "rows": len(frame), "medians": frame["median_s"].dropna().tolist(),
        "kinds": sorted(set(frame["kind"])), "targets": sorted(set(frame["target"])),
    },
    "all_evidence": len(aivmm.evidence(result.database, all=True)),
    "outputs": outputs["output"].tolist(),
    "runs": stats["runs"],
    "devices": [str(each) for each in aivmm.devices()],
}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with a model, real inputs, and files in its current folder that are called like what aivmm imports."""
    place = Place.at(tmp_path_factory.mktemp("face"))
    write_tiny(place.folder / "tiny.onnx")
    np.savez(place.folder / "in.npz", input=np.random.default_rng(2).random((2, 1, 3, 16, 16), dtype=np.float32))
    for name in ("onnx.py", "optuna.py", "openvino.py", "sqlalchemy.py", "logging.py"):
        (place.work / name).write_text("raise ImportError('a file of the current folder was imported')\n")
    for name in ("db", "reports", "models", "aivmm"):
        (place.work / name).mkdir()
        (place.work / name / "__init__.py").write_text("raise ImportError('a folder of the current folder was imported')\n")
    return place


@pytest.fixture(scope="module")
def told(place: Place) -> Any:
    """What the script printed."""
    script = place.folder / "script.py"
    script.write_text(SCRIPT)
    done = run(
        [sys.executable, str(script), str(place.folder / "tiny.onnx"), str(place.folder / "in.npz")], cwd=place.work, env=place.env()
    )
    assert (done.code, done.err) == (0, "")
    return done.json


def test_the_public_names_are_these() -> None:
    assert aivmm.__all__ == [
        "AivmmError",
        "BundleError",
        "DatabaseError",
        "Engine",
        "Engines",
        "Infeasible",
        "ModelError",
        "ShapedEngine",
        "TuneResult",
        "Unsupported",
        "UsageError",
        "__version__",
        "deploy",
        "devices",
        "evidence",
        "load_plan",
        "tune",
    ]
    assert dir(aivmm) == sorted(aivmm.__all__)
    assert all(getattr(aivmm, name) is not None for name in aivmm.__all__)


def test_a_name_that_is_not_public_is_missed_like_any_other() -> None:
    with pytest.raises(AttributeError, match=r"aivmm.*tuen"):
        aivmm.tuen  # noqa: B018


def test_every_error_is_one_that_a_user_can_fix() -> None:
    errors = [aivmm.BundleError, aivmm.DatabaseError, aivmm.Infeasible, aivmm.ModelError, aivmm.Unsupported, aivmm.UsageError]
    assert all(issubclass(each, aivmm.AivmmError) for each in errors)
    assert str(aivmm.UsageError("no such file", advice="give another")) == "no such file; give another"
    assert str(aivmm.Infeasible("Nothing does. A is nearest.", advice="see there")) == "Nothing does. A is nearest; see there"


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, json, aivmm; aivmm.load_plan; aivmm.tune; aivmm.devices; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True, text=True).stdout))
    assert (
        loaded & {"onnx", "optuna", "pandas", "matplotlib", "sqlalchemy", "nncf", "typer", "rich", "openvino", "onnxruntime", "scipy"}
        == set()
    )


def test_a_tune_returns_the_plan_the_verdict_and_the_report(told: Any, place: Place) -> None:
    assert (told["type"], told["plan"], told["model"]) == ("TuneResult", "Plan", "tiny")
    assert told["text"] == told["verdict"] == told["summary"]["verdict"]
    assert told["targets"] == list(dict.fromkeys(each["target"] for each in told["summary"]["plan"]["stages"]))
    assert told["constraints"] == ["latency<10s"]
    assert Path(told["plan_path"]).name == "plan.aivmm" and (place.work / "plan.aivmm" / "plan.json").is_file()
    assert told["report_exists"] and Path(told["report_path"]).name == "report.html"


def test_a_tune_returns_its_baselines(told: Any) -> None:
    baselines = {each["name"]: each for each in told["baselines"]}
    assert {"onnxruntime:CPU default", "openvino:CPU default"} <= baselines.keys()
    assert all(each["median_s"] > 0 for each in baselines.values())
    assert all(each["eligible"] or "cosine" in each["reason"] for each in baselines.values())  # a bf16 default may be over the limit
    assert told["summary"]["accuracy"]["data"] == "real"


def test_the_evidence_is_a_frame_of_this_runs_probes(told: Any) -> None:
    evidence = told["evidence"]
    assert evidence["kind"] == "DataFrame"
    assert evidence["rows"] == told["all_evidence"] >= 4
    assert "model" in evidence["kinds"]
    assert {"openvino:CPU", "onnxruntime:CPU"} <= set(evidence["targets"])
    assert all(0 < each < 10 for each in evidence["medians"])


def test_the_loaded_plan_answers_as_onnx_runtime_does(told: Any, place: Place) -> None:
    ones = {"input": np.ones((1, 3, 16, 16), dtype=np.float32)}
    outputs = {"output": np.array(told["outputs"])}
    assert_as_promised(told["summary"]["plan"]["stages"], outputs, reference(place.folder / "tiny.onnx", ones))
    assert told["runs"] == 1


def test_the_devices_are_the_targets_that_run_here(told: Any) -> None:
    assert {"openvino:CPU", "onnxruntime:CPU"} <= set(told["devices"])


def test_an_impossible_constraint_is_an_infeasible_that_names_what_binds_and_where_the_report_is(
    place: Place, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in place.env().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(aivmm.Infeasible, match="latency") as refused:
        aivmm.tune(
            place.folder / "tiny.onnx", output=place.folder / "none.aivmm", dims={"side": 16}, inputs=place.folder / "in.npz",
            constraints=["latency<1ns"], targets="onnxruntime", budget_s=3, trials=1, top=1, quiet=True,
        )  # fmt: skip
    report = place.folder / "none.report.html"
    assert str(report) in refused.value.advice and report.is_file()
    assert not (place.folder / "none.aivmm").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "speed"}, "speed.*latency"),
        ({"constraints": "latency<10"}, "unit"),
        ({"precisions": "fp13"}, "fp13.*fp32"),
        ({"batches": [0]}, "batch"),
        ({"trials": 0}, "trials"),
        ({"budget_s": -1}, "budget"),
    ],
)
def test_what_cannot_be_asked_for_is_a_usage_error_before_anything_starts(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(aivmm.UsageError, match=words):
        aivmm.tune(tmp_path / "model.onnx", db=tmp_path / "tune.db", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_an_error_and_makes_no_plan(tmp_path: Path) -> None:
    with pytest.raises(aivmm.AivmmError, match=r"missing\.onnx"):
        aivmm.tune(tmp_path / "missing.onnx", output=tmp_path / "plan.aivmm", db=tmp_path / "tune.db", quiet=True)
    assert not (tmp_path / "plan.aivmm").exists()


def test_a_missing_plan_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(aivmm.BundleError, match="nowhere"):
        aivmm.load_plan(tmp_path / "nowhere.aivmm")
