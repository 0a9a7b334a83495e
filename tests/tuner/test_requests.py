"""What can be asked of a tune besides the fastest plan for one image: cuts, targets, real inputs, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import aivmm
from aivmm.db.database import Database
from aivmm.models.prepare import prepare
from tests.tuner.harness import MODELS, TINY, Place, assert_as_promised, default_precision, reference, relative_l2


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place whose database grows from test to test; what each request finds there only saves it time."""
    return Place.at(tmp_path_factory.mktemp("requests"))


@pytest.mark.slow
def test_a_forced_cut_of_real_inputs_runs_right_in_the_precision_allowed(shared: Place, tiny: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(11).random((3, 1, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "images.npz", input=images)
    done = shared.aivmm(
        "tune", tiny, "--shape", "input=1x3x16x16", "--inputs", tmp_path / "images.npz", "--min-segments", "2", "--precisions", "fp32",
        "--budget", "6s", "--trials", "1", "--json", "-q", "-o", "cut.aivmm",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert found["accuracy"]["data"] == "real"
    stages = found["plan"]["stages"]
    assert len(stages) >= 2
    assert stages[0]["blocks"][0] == 0
    assert [each["blocks"][0] for each in stages[1:]] == [each["blocks"][1] + 1 for each in stages[:-1]]
    with aivmm.load_plan(shared.work / "cut.aivmm") as engine:
        assert len(engine.stages) == len(stages)
        for image in images:
            assert relative_l2(engine.run({"input": image}), reference(tiny, {"input": image})) <= 1e-4
        fresh = {"input": np.random.default_rng(12).standard_normal((1, 3, 16, 16)).astype(np.float32)}
        assert relative_l2(engine.run(fresh), reference(tiny, fresh)) <= 1e-4
    assert "segments" in found["verdict"]
    # One interval, wherever it is told; and beside what was told the sums that it can be held against.
    assert found["certificate"]["interval_s"] == pytest.approx(found["predicted"]["interval_s"])
    with Database.open(shared.db) as database:
        cut = next(each.metrics for each in database.proofs(database.runs(1)[0].id) if each.name == "cut plan")
    assert cut["planned_ratio"] > 0 and cut["believed_ratio"] > 0 and cut["planned_assembled"] in (0, 1)
    allowed = {each["name"]: each["eligible"] for each in found["baselines"]}
    assert allowed["openvino:CPU default"] == allowed["openvino:AUTO"] == (default_precision("openvino:CPU") == "fp32")
    assert allowed["onnxruntime:CPU default"]


@pytest.mark.slow
def test_throughput_chooses_a_batch_of_those_allowed(shared: Place, tiny: Path) -> None:
    done = shared.aivmm(
        "tune",
        tiny,
        *TINY,
        "--targets",
        "onnxruntime",
        "--objective",
        "throughput",
        "--batch",
        "1,4",
        "--budget",
        "8s",
        "--trials",
        "4",
        "--top",
        "1",
        "--json",
        "-o",
        "many.aivmm",
    )
    assert done.code == 0, done.err
    found = done.json
    assert found["objective"] == "throughput"
    assert found["plan"]["batch"] in (1, 4)
    measured = found["measured"]
    at_once = found["plan"]["batch"] * found["plan"]["callers"]
    assert measured["throughput_per_s"] == pytest.approx(at_once / measured["median_s"])
    with Database.open(shared.db) as database:
        run = database.run(None)
        assert {each.batch for each in database.trials(run.id)} <= {1, 4}
        # By its name: a baseline that wins is the plan, and has that for its role.
        assert any(each.callers > 1 for each in database.proofs(run.id) if each.name.startswith("onnxruntime:CPU default"))
    batch = found["plan"]["batch"]
    inputs = {"input": np.random.default_rng(1).standard_normal((batch, 3, 16, 16)).astype(np.float32)}
    with aivmm.load_plan(shared.work / "many.aivmm") as engine:
        assert relative_l2(engine.run(inputs), reference(tiny, inputs)) <= 1e-4


@pytest.mark.slow
def test_targets_that_a_constraint_leaves_out_are_neither_measured_nor_used(place: Place, tiny: Path) -> None:
    done = place.aivmm(
        "tune", tiny, *TINY, "--constraint", "targets in (onnxruntime:CPU), latency<10s", "--constraint", "cosine>=0.9999",
        "--budget", "4s", "--trials", "2", "--top", "1", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert {each["target"] for each in found["plan"]["stages"]} == {"onnxruntime:CPU"}
    assert {each["target"] for each in found["baselines"]} == {"onnxruntime:CPU"}
    assert found["accuracy"]["limit"] == 0.9999
    with Database.open(place.db) as database:
        assert {each.key.target for each in database.outcomes(kind="model")} == {"onnxruntime:CPU"}


NEEDS: dict[str, list[str]] = {
    "ultraface_rfb_320": [],
    "silero_vad_16k_op15": [],
    "magika_v3_3": [],
    "super_resolution": [],
}  # options a model has to be given


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NEEDS)
def test_a_real_model_is_tuned_and_its_plan_answers_as_onnx_runtime_does(place: Place, name: str) -> None:
    model = MODELS / f"{name}.onnx"
    if not model.exists():
        pytest.skip(f"{model.name} is not beside the repository, in ../shared/models")
    done = place.aivmm("tune", model, *NEEDS[name], "--budget", "20s", "--json")
    if name == "super_resolution" and done.code == 2:
        assert len(done.error_lines) == 1
        return
    assert done.code == 0, done.err
    assert [each["name"] for each in done.json["baselines"] if each["eligible"] and each["verdict"] == "slower"] == []
    generator = np.random.default_rng(5)
    with aivmm.load_plan(place.work / f"{name}.aivmm") as engine:
        inputs = {}
        for spec in engine.inputs:
            shape = tuple(extent or 1 for extent in spec.shape)
            whole = np.dtype(spec.dtype).kind in "iu"
            if name.startswith("silero") and spec.name == "sr":
                inputs[spec.name] = np.full(shape, 16000, dtype=spec.dtype)
            else:
                inputs[spec.name] = (
                    generator.integers(0, 2, shape).astype(spec.dtype)
                    if whole
                    else (0.1 * generator.standard_normal(shape)).astype(spec.dtype)
                )
        outputs = engine.run(inputs)
    if name == "super_resolution":  # names no operator set, so ONNX Runtime reads it only as aivmm prepares it
        prepare(model, place.folder / "prepared.onnx")
        model = place.folder / "prepared.onnx"
    assert_as_promised(done.json["plan"]["stages"], outputs, reference(model, inputs))
