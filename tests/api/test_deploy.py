"""`aivmm.deploy`: which kept plans are reused, and what happens when none is. Plans are real; making one is left out but for one test."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import aivmm
from aivmm.deployment import Deployment, run
from aivmm.errors import BundleError, Infeasible, Unsupported, UsageError
from aivmm.once import alone
from aivmm.result import TuneResult
from aivmm.runtime.bundle import Bundle
from aivmm.runtime.family import Bucket, Dimension, Served
from aivmm.runtime.many import ShapedEngine
from aivmm.runtime.plan import Accuracy, Number
from aivmm.runtime.reading import file_sha256
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, make_family, normal, token_model, write_model
from tests.tuner.harness import write_tiny

MODEL = chain_model(width=16)
EXPECTED = {"median_s": Number(value=5e-3, low=4e-3, high=6e-3, source="measured")}


class Tuner:
    """Stands where tuning would be: writes a bundle of the parts that it is given for each time that it is asked."""

    def __init__(self, *parts: Part) -> None:
        self._parts = list(parts)
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *, output: Path, targets: Sequence[str]) -> TuneResult:
        self.asked.append(tuple(targets))
        made = make_bundle(output.with_name(f"made-{len(self.asked)}"), MODEL, [self._parts.pop(0)], expected=EXPECTED)
        shutil.rmtree(output, ignore_errors=True)
        made.rename(output)
        return TuneResult(plan_path=output, report_path=output, run_id="", database="", summary={})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "chain.onnx"
    path.write_bytes(MODEL.SerializeToString())
    return path


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> Callable[..., Deployment]:
    def make(**changes: Any) -> Deployment:
        given = {"model": str(model), "objective": "latency", "constraints": (), "targets": (), "store": tmp_path / "store"}
        return Deployment(**{**given, **changes})

    return make


def kept(deployment: Deployment, *, target: str = ONNXRUNTIME, change: Callable[[Any], object] = lambda plan: None, **fields: Any) -> Path:
    deployment.place.parent.mkdir(parents=True, exist_ok=True)
    bundle = make_bundle(deployment.place, MODEL, [Part(target)], **{"expected": EXPECTED, **fields})
    plan = json.loads((bundle / "plan.json").read_text())
    change(plan)
    (bundle / "plan.json").write_text(json.dumps(plan))
    return bundle


def test_a_kept_plan_is_reused_and_answers(asked: Callable[..., Deployment]) -> None:
    kept(asked())
    with run(asked(), tune=None, on_drift=None) as engine:
        assert engine.run({"x": normal(2, 16)})["y"].shape == (2, 16)
        assert engine.validity.grade == "exact"


def test_an_unknown_demo_is_named_with_those_there_are(asked: Callable[..., Deployment]) -> None:
    """It used to be a plan "made for another model", as if there were one for it."""
    with pytest.raises(UsageError, match=r"unknown demo model 'demo:nope'; known: demo:squeezenet, "):
        aivmm.deploy("demo:nope", plan=kept(asked()), may_tune=False)


def test_reusing_costs_less_than_a_second_beyond_loading(asked: Callable[..., Deployment]) -> None:
    kept(asked())
    run(asked(), tune=None, on_drift=None).close()
    started = time.thread_time()  # of this thread: what others do to the machine is not its fault
    engine = run(asked(), tune=None, on_drift=None)
    took = time.thread_time() - started
    engine.close()
    assert took < 1.0


@pytest.mark.parametrize(
    ("constraints", "fields"),
    [
        (("latency<7ms",), {}),
        (("latency<1s, targets in (onnxruntime)",), {}),
        (("device_memory<1GB",), {"expected": EXPECTED | {"device_memory_bytes": Number(value=5e8, source="measured")}}),
        (("p99<20ms",), {"constraints": ["p99<20ms"]}),  # proven by what the plan was made for
        (("cosine>=0.99",), {"accuracy": Accuracy(metric="cosine", value=0.9999, limit=0.999, data="real", reference="r")}),
    ],
)
def test_a_plan_is_reused_when_its_numbers_keep_the_constraints(
    asked: Callable[..., Deployment], constraints: tuple[str, ...], fields: dict[str, Any]
) -> None:
    kept(asked(), **fields)  # kept for no constraints at all
    run(asked(constraints=constraints), tune=None, on_drift=None).close()


@pytest.mark.parametrize(
    ("changes", "change", "reason"),
    [
        ({"constraints": ("latency<5.5ms",)}, lambda p: None, "latency is 6 ms"),  # by the upper end of its interval
        ({"constraints": ("p99<1s",)}, lambda p: None, "says nothing of p99"),
        ({}, lambda p: p.update(objective="throughput"), "made for throughput"),
        ({}, lambda p: p["model"].update(sha256="0" * 64), "made for another model"),
        ({}, lambda p: p["environments"][0].update(driver="other"), "proven under other conditions"),
        ({}, lambda p: p["environments"].clear(), "proven under other conditions"),
        ({}, lambda p: p["stages"][0].update(target="openvino:GPU.7"), "GPU.7 is not available"),
        ({}, lambda p: p.update(schema=99), "has schema 99"),
        ({}, lambda p: p["files"].update({"segments/weights.bin": "0" * 64}), "was changed"),
    ],
)
def test_a_plan_that_does_not_fit_is_named_with_the_reason_and_made_anew(
    asked: Callable[..., Deployment], changes: dict[str, Any], change: Callable[[Any], object], reason: str
) -> None:
    path = kept(asked(), change=change)
    with pytest.raises((UsageError, BundleError), match=reason):
        run(asked(plan=path, **changes), tune=None, on_drift=None)
    tuner = Tuner(Part(ONNXRUNTIME))
    run(asked(**changes), tune=tuner, on_drift=None).close()
    assert tuner.asked == [()]
    run(asked(), tune=None, on_drift=None).close()  # what was made is kept


def test_only_plans_on_the_targets_that_are_asked_for_are_reused(asked: Callable[..., Deployment]) -> None:
    path = kept(asked(), target=OPENVINO)
    run(asked(plan=path, targets=("openvino",)), tune=None, on_drift=None).close()
    with pytest.raises(UsageError, match="it runs on openvino:CPU; let deploy tune"):
        run(asked(plan=path, targets=("onnxruntime",)), tune=None, on_drift=None)


def test_options_have_plans_of_their_own(asked: Callable[..., Deployment]) -> None:
    kept(asked(options={"dims": {"seq": 8}}))
    with pytest.raises(UsageError, match="no kept plan fits"):
        run(asked(options={"dims": {"seq": 16}}), tune=None, on_drift=None)


def test_a_plan_is_kept_for_the_order_in_which_hardware_is_wanted_and_for_objectives_however_spelled(model: Path, tmp_path: Path) -> None:
    def deployed(**options: Any) -> Any:
        return aivmm.deploy(model, store=tmp_path / "store", may_tune=False, **options)

    with pytest.raises(UsageError, match="there is none") as refused:
        deployed(objective="latency, p99", prefer="*:NPU, *:CPU")
    place = Path(str(refused.value).removeprefix("no kept plan fits: ").partition(": ")[0])
    place.parent.mkdir(parents=True)
    make_bundle(place, MODEL, [Part(ONNXRUNTIME)], expected=EXPECTED, objective="latency,p99")
    plan = json.loads((place / "plan.json").read_text())
    plan["model"]["sha256"] = file_sha256(model)
    (place / "plan.json").write_text(json.dumps(plan))
    deployed(objective="latency,p99", prefer=["*:NPU", "*:CPU"]).close()
    for options in ({"objective": "latency,p99"}, {"objective": "latency,p99", "prefer": "*:CPU"}, {"prefer": "*:NPU,*:CPU"}):
        with pytest.raises(UsageError, match="there is none"):
            deployed(**options)


def test_where_a_target_does_not_start_the_others_are_tuned_for(asked: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aivmm.deployment._targets_here", lambda patterns: [OPENVINO, ONNXRUNTIME])
    tuner = Tuner(Part(OPENVINO, settings=(("NO_SUCH_SETTING", 1),)), Part(ONNXRUNTIME))
    with run(asked(), tune=tuner, on_drift=None) as engine:
        assert engine.stages[0].target == ONNXRUNTIME
    assert tuner.asked == [(), (ONNXRUNTIME,)]


def test_when_no_target_is_left_the_reason_is_given(asked: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aivmm.deployment._targets_here", lambda patterns: [OPENVINO])
    with pytest.raises(Unsupported, match="NO_SUCH_SETTING"):
        run(asked(), tune=Tuner(Part(OPENVINO, settings=(("NO_SUCH_SETTING", 1),))), on_drift=None)


def test_weights_in_other_files_are_a_part_of_the_model(asked: Callable[..., Deployment], tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    own = onnx.ModelProto.FromString(MODEL.SerializeToString())  # saving it so changes it
    onnx.save_model(own, path, save_as_external_data=True, location="large.bin", size_threshold=0)
    deployment = asked(model=str(path))
    kept(deployment, change=lambda plan: plan["model"].update(sha256=deployment._sha256_with_weights))
    run(asked(model=str(path)), tune=None, on_drift=None).close()
    weights = bytearray((tmp_path / "large.bin").read_bytes())
    weights[0] ^= 1
    (tmp_path / "large.bin").write_bytes(weights)
    with pytest.raises(UsageError, match="made for another model"):
        run(asked(model=str(path)), tune=None, on_drift=None)


# --- several shapes


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tokens.onnx", token_model("rows"))


@pytest.fixture
def family(tmp_path: Path, tokens: Path) -> Path:
    """A bundle for 4 and 16 rows of the tokens."""
    places: list[tuple[str, int]] = [("x", 1), ("mask", 1)]
    buckets = [Bucket(name=f"rows={rows}", plan=f"plans/{index}.json", extents={"rows": rows}) for index, rows in enumerate((4, 16))]
    served = Served(name="tokens", buckets=buckets, dimensions=[Dimension(name="rows", places=places, padding="zero")])
    made = {}
    for rows in (4, 16):
        made[f"{rows}"] = make_bundle(tmp_path / f"{rows}.aivmm", token_model(rows), [Part(ONNXRUNTIME)], expected=EXPECTED)
        plan = json.loads((made[f"{rows}"] / "plan.json").read_text())
        plan["model"]["sha256"] = file_sha256(tokens)
        (made[f"{rows}"] / "plan.json").write_text(json.dumps(plan))
    return make_family(tmp_path / "family.aivmm", made, models=[served])


def deployed(tokens: Path, family: Path, **options: Any) -> Any:
    return aivmm.deploy(tokens, plan=family, may_tune=False, **options)


def test_a_plan_of_several_shapes_is_reused_for_these_shapes(tokens: Path, family: Path) -> None:
    told: list[Any] = []
    with deployed(tokens, family, dims={"rows": [16, 4]}, constraints="latency<7ms", on_drift=told.append) as engine:
        assert isinstance(engine, ShapedEngine)
        assert engine.run({"x": normal(1, 3, 16), "mask": np.ones((1, 3), np.int64)})["pooled"].shape == (1, 1, 16)
        assert {each.on_drift for each in engine.engines.values()} == {engine.engines["rows=4"].on_drift} != {None}
    deployed(tokens, family, shapes={"x": [(1, 4, 16), (1, 16, 16)], "mask": [(1, 4), (1, 16)]}).close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dims": {"rows": 4}}, "it was made for rows=4,16"),
        ({"dims": {"rows": [4, 16, 64]}}, "it was made for rows=4,16"),
        ({"shapes": {"x": (1, 8, 16)}}, "its input 'x' has the shape 1x4x16, 1x16x16"),
        ({"dims": {"rows": [4, 16]}, "other_shapes": "dynamic"}, "it refuses other shapes"),
        ({"dims": {"rows": [4, 16]}, "constraints": "latency<5ms"}, "latency is 6 ms"),
    ],
)
def test_a_plan_of_other_shapes_is_not(tokens: Path, family: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        deployed(tokens, family, **options)


def test_a_workload_is_no_plan_of_one_model(tokens: Path, tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "4.aivmm", token_model(4), [Part(ONNXRUNTIME)], expected=EXPECTED)
    with pytest.raises(UsageError, match="serves several models"):
        deployed(tokens, make_family(tmp_path / "w.aivmm", {"tokens": made}, kind="workload"))


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_a_model_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be read .*; give the path of an \.onnx file"):
        aivmm.deploy(tmp_path / name, store=tmp_path / "store", may_tune=False)


def test_a_store_that_cannot_be_written_is_named(model: Path) -> None:
    with pytest.raises(UsageError, match=r"plans cannot be kept in .*; name a folder with store="):
        aivmm.deploy(model, store="/proc/plans", quiet=True)


def test_a_place_that_cannot_hold_the_bundle_is_told_in_words_of_python(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").touch()
    with pytest.raises(UsageError, match=r"the folder holds other things; name another bundle with plan=\.\.\."):
        aivmm.deploy(model, plan=tmp_path / "other", quiet=True)


def test_of_two_that_ask_at_once_one_tunes_and_the_other_uses_its_plan(
    asked: Callable[..., Deployment], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "lock"))
    tuner = Tuner(Part(ONNXRUNTIME))  # it has one plan to give

    def tune(**given: Any) -> TuneResult:
        until = time.monotonic() + 60
        while "waiting for its plan" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        return tuner(**given)

    with ThreadPoolExecutor(2) as threads:
        engines = [each.result() for each in [threads.submit(run, asked(), tune=tune, on_drift=None) for _ in range(2)]]
    for engine in engines:
        with engine:
            assert engine.run({"x": normal(2, 16)})["y"].shape == (2, 16)
    assert len(tuner.asked) == 1 and caplog.text.count("waiting for its plan") == 1


def test_after_one_that_failed_the_next_may_tune(asked: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "lock"))

    def failing(**_: Any) -> TuneResult:
        raise UsageError("no")

    with pytest.raises(UsageError, match=r"^no$"):
        run(asked(), tune=failing, on_drift=None)
    with run(asked(), tune=Tuner(Part(ONNXRUNTIME)), on_drift=None) as engine:
        assert engine.run({"x": normal(2, 16)})["y"].shape == (2, 16)


@pytest.mark.parametrize(("others", "tunings"), [({}, 1), ({"constraints": ("latency<1s",)}, 2), ({"effort": (600,)}, 2)])
def test_who_waits_for_a_tuning_that_fails_fails_as_it_does_unless_something_else_is_asked(
    asked: Callable[..., Deployment], caplog: pytest.LogCaptureFixture, tmp_path: Path, others: dict[str, Any], tunings: int
) -> None:
    tried: list[int] = []

    def failing(**_: Any) -> TuneResult:
        tried.append(len(tried))
        until = time.monotonic() + 60
        while "waiting for its plan" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        raise Infeasible(f"no plan in tuning {tried[-1]}", advice="ask for less")

    place = tmp_path / "m.aivmm"
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, asked(plan=place), tune=failing, on_drift=None)
        while not tried:
            time.sleep(0.01)
        second = threads.submit(run, asked(plan=place, **others), tune=failing, on_drift=None)
        errors = [each.exception() for each in (first, second)]
    assert [type(each) for each in errors] == [Infeasible, Infeasible] and len(tried) == tunings
    assert [str(each) for each in errors] == ["no plan in tuning 0; ask for less", f"no plan in tuning {tunings - 1}; ask for less"]


@pytest.mark.parametrize("as_user", ["TMPDIR", "a link", "dots"])
def test_a_plan_has_one_lock_whatever_its_path_is_called_and_where_temporary_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, as_user: str
) -> None:
    (tmp_path / "real").mkdir()
    place = tmp_path / "real" / "m.aivmm"
    spelled = place
    if as_user == "a link":
        (tmp_path / "link").symlink_to(tmp_path / "real")
        spelled = tmp_path / "link" / "m.aivmm"
    elif as_user == "dots":
        spelled = tmp_path / "real" / ".." / "real" / "m.aivmm"

    def second() -> None:
        with alone(spelled, "m", ""):
            pass

    with alone(place, "m", ""):
        if as_user == "TMPDIR":
            monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "other" / "lock"))
        waiting = threading.Thread(target=second)
        waiting.start()
        until = time.monotonic() + 60
        while "waiting for its plan" not in caplog.text and waiting.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert waiting.is_alive()
    waiting.join()


def test_where_nothing_can_lie_beside_a_plan_its_lock_is_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "temporary" / "lock"))
    (tmp_path / "file").touch()
    with alone(tmp_path / "file" / "m.aivmm", "m", ""):
        assert [each.suffix for each in (tmp_path / "temporary").iterdir()] == [".lock"]
    assert "cannot lock" in caplog.text and "others" not in caplog.text


@pytest.mark.slow
def test_deploy_tunes_once_and_then_reuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIVMM_CACHE", str(tmp_path / "cache"))
    model = write_tiny(tmp_path / "tiny.onnx") or tmp_path / "tiny.onnx"
    given: dict[str, Any] = {"constraints": "latency<10s", "dims": {"side": 16}, "targets": "onnxruntime", "store": tmp_path / "store"}
    tuning = {"db": tmp_path / "p.db", "budget_s": 5, "trials": 1, "quiet": True}
    with aivmm.deploy(model, **given, **tuning) as first:
        made = first.plan.created_at
    (bundle,) = (tmp_path / "store").glob("*/*.aivmm")
    with aivmm.deploy(model, **given, may_tune=False) as second, Bundle.open(bundle) as opened:
        assert second.plan.created_at == made == opened.plan.created_at


def test_a_zip_in_the_place_of_the_plan_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "m.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"m\.zip: it is a file, and not a bundle's folder"):
        aivmm.deploy("demo:squeezenet", plan=tmp_path / "m.zip", may_tune=False)
