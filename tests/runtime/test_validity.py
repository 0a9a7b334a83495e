"""What runs where the machine is another than the one that the plan was proven on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aivmm
from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.validity import grade_stages
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal

MODEL = chain_model(width=16)
X = {"x": normal(2, 16)}


def bundle_with(tmp_path: Path, change: Callable[[dict[str, Any]], object], fallbacks: list[str], target: str = OPENVINO) -> Path:
    bundle = make_bundle(tmp_path / "m.aivmm", MODEL, [Part(target)], fallbacks=[[Part(each)] for each in fallbacks], conditions=False)
    made = make_bundle(tmp_path / "conditions.aivmm", MODEL, [Part(OPENVINO)])
    plan = json.loads((bundle / "plan.json").read_text())
    plan["environments"] = json.loads((made / "plan.json").read_text())["environments"]
    change(plan["environments"][0])
    (bundle / "plan.json").write_text(json.dumps(plan))
    return bundle


def elsewhere(conditions: dict[str, Any]) -> None:
    conditions.update(device_model="Pentium")


def upgraded(conditions: dict[str, Any]) -> None:
    conditions.update(runtime_version="1.0")


def same(conditions: dict[str, Any]) -> None:
    pass


def outcomes(engine: aivmm.Engine) -> list[tuple[str, str]]:
    return [(each["name"], each["outcome"]) for each in engine.stats()["attempts"]]


@pytest.mark.parametrize("policy", ["warn", "error", "fallback"])
@pytest.mark.parametrize(("change", "grade"), [(same, "exact"), (upgraded, "compatible")])
def test_where_the_settings_fit_the_plan_itself_runs(tmp_path: Path, policy: str, change: Any, grade: str) -> None:
    with aivmm.load_plan(bundle_with(tmp_path, change, [ONNXRUNTIME]), on_mismatch=policy) as engine:
        assert engine.validity.grade == grade
        assert outcomes(engine) == [("the plan", "runs")]
        assert engine.stages[0].target == OPENVINO


def test_by_default_a_plan_runs_elsewhere_and_says_so(tmp_path: Path) -> None:
    with aivmm.load_plan(bundle_with(tmp_path, elsewhere, [ONNXRUNTIME])) as engine:
        assert outcomes(engine) == [("the plan", "runs")]
        assert engine.stats()["differences"][f"{OPENVINO}.device_model"]["plan"] == "Pentium"
        assert "'Pentium' in the plan" in engine.events[0] and len(engine.events) == 1


def test_error_refuses_a_plan_elsewhere_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"retune: openvino:CPU.device_model: .* here, 'Pentium' in the plan.*; tune again") as caught:
        aivmm.load_plan(bundle_with(tmp_path, elsewhere, [ONNXRUNTIME]), on_mismatch="error")
    assert "\n" not in str(caught.value)


def test_error_takes_no_fallback_for_a_target_that_is_missing(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, same, [ONNXRUNTIME], target="openvino:GPU.7")
    with pytest.raises(Unsupported, match=r"openvino:GPU\.7"):
        aivmm.load_plan(bundle, on_mismatch="error")


def test_fallback_runs_the_first_fallback_that_can_and_reports_each_attempt(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, elsewhere, ["openvino:GPU.7", ONNXRUNTIME])
    with aivmm.load_plan(bundle, on_mismatch="fallback") as engine:
        assert outcomes(engine) == [("the plan", "passed over"), ("fallback 0", "failed"), ("fallback 1", "runs")]
        assert engine.stages[0].target == ONNXRUNTIME
        assert "GPU.7" in engine.stats()["attempts"][1]["reason"]
        assert any("running the fallback 'fallback 1' instead" in each for each in engine.events)
        assert engine.run(X)["y"].shape == (2, 16)


@pytest.mark.parametrize("fallbacks", [[], ["openvino:GPU.7"]])
def test_fallback_runs_the_plan_all_the_same_when_nothing_else_can(tmp_path: Path, fallbacks: list[str]) -> None:
    with aivmm.load_plan(bundle_with(tmp_path, elsewhere, fallbacks), on_mismatch="fallback") as engine:
        assert outcomes(engine)[-1] == ("the plan", "runs")
        assert "running the plan all the same" in engine.events
        assert engine.validity.grade == "retune"


def test_an_unknown_policy_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'ignore' is unknown; choose from warn, error, fallback"):
        aivmm.load_plan(tmp_path / "missing.aivmm", on_mismatch="ignore")


def test_a_plan_that_records_nothing_of_its_target_asks_for_tuning(tmp_path: Path) -> None:
    with aivmm.load_plan(make_bundle(tmp_path / "m.aivmm", MODEL, [Part(ONNXRUNTIME)], conditions=False)) as engine:
        assert engine.validity.grade == "retune"
        assert all(there is None for _, there in engine.validity.differences.values())
        assert re.search(r"None in the plan; and \d more$", str(engine.validity))
        assert grade_stages([], [], {}).grade == "exact"
