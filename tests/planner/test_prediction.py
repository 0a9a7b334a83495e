"""Errors of predictions on a recorded data set: they must not grow. `benchmarks/prediction.py --data` records it and what is accepted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import batches
from benchmarks.prediction import COMPUTED, PLANNED, code, kept, middle, record, report, tiers

RECORDED = json.loads((Path(__file__).parent / "prediction.json").read_text())
FOUND = tiers(RECORDED)


@pytest.mark.parametrize("tier", RECORDED["accepted"])
def test_the_median_error_of_a_tier_has_not_grown(tier: str) -> None:
    """A tenth of a percent is rounding; whoever makes predictions better records the better figure."""
    assert middle(FOUND[tier]) <= RECORDED["accepted"][tier] + 0.001


def test_what_was_recorded_by_other_code_is_not_mixed_with_what_this_records(tmp_path: Path) -> None:
    ours, others = tmp_path / "parts-a.json", tmp_path / "plans-b-2.json"
    ours.write_text(json.dumps({"commit": code(), "found": [1]}))
    assert kept(ours) == [1]
    for held in ({"commit": "0" * 40, "found": [1]}, [1], {"model": "of an earlier version"}):
        others.write_text(json.dumps(held))
        with pytest.raises(SystemExit, match="--state"):
            record(["demo:b"], tmp_path, 0.0, [2])


def test_only_what_this_code_computes_is_accepted() -> None:
    """Of an end-to-end row both numbers are recorded, so no change of the code could fail on it."""
    assert all(tier.startswith(COMPUTED) for tier in RECORDED["accepted"])


def test_the_recorded_data_covers_what_is_predicted() -> None:
    modelled = [tier for tier in RECORDED["accepted"] if tier.startswith("modelled")]
    interpolated = [tier for tier in RECORDED["accepted"] if tier.startswith("interpolated")]
    assert len(modelled) >= 2 and len(interpolated) >= 2
    assert len(RECORDED["parts"]) >= 3


def test_every_tier_is_reported() -> None:
    text = "\n".join(report(RECORDED))
    assert all(f"| {tier} |" in text for tier in FOUND)


def test_a_cut_plan_is_judged_by_the_sum_of_its_segments_beside_what_was_told() -> None:
    told = {"model": "m", "plan": "cut plan of 2", "forced": True, "predicted": 1.0, "sigma": 0.02, "measured": 1.0, "proven": 1.0}
    row = {**told, "planned": 1.2, "believed": 1.5, "assembled": True, "proven_low": 0.99, "proven_high": 1.01}
    found = tiers({"parts": [], "plans": [row, {**row, "plan": "openvino:CPU default", "forced": False, "assembled": False}]})
    assert found["cut plans, as told"] == [0.0, 0.0] and found[PLANNED] == [pytest.approx(0.2)] * 2
    assert found[f"{PLANNED}, all of it in other chains"] == [pytest.approx(0.2)]
    assert found["cut plans, sum believed before their own chain was timed"] == [pytest.approx(0.5)] * 2


def wholes() -> list[dict[str, Any]]:
    """Return the whole models of the recorded data as `--only batches` records them."""
    places = [(row["model"], row["targets"]) for row in RECORDED["parts"]]
    return [{"model": model, "targets": {target: place["whole"] for target, place in targets.items()}} for model, targets in places]


def test_batches_alone_are_judged_as_they_are_among_the_tiers() -> None:
    found = batches.errors_of(batches.interpolated, wholes())
    assert [abs(each) for each in found] == pytest.approx(FOUND["interpolated: a batch left out"])
    text = "\n".join(batches.report(wholes(), []))
    assert all(f"| {form} |" in text for form in batches.FORMS) and "Measured again" not in text
    assert f"| {middle(FOUND['interpolated: a batch left out']):.1%} |" in text


def test_two_passes_differ_by_the_shape_of_the_curve_and_not_by_the_speed_of_the_machine() -> None:
    first = [{"model": "m", "targets": {"t": {"1": 1.0, "2": 2.0, "4": 4.0}}}]
    slower = [{"model": "m", "targets": {"t": {"1": 1.5, "2": 3.0, "4": 6.0}}}]
    bent = [{"model": "m", "targets": {"t": {"1": 1.0, "2": 2.2, "4": 4.0}}}]
    assert batches.apart(first, slower) == pytest.approx([0.0])
    assert batches.apart(first, bent) == pytest.approx([math.log(1.1)])
    assert batches.apart(first, [{"model": "another", "targets": first[0]["targets"]}]) == []


def test_a_form_that_one_model_alone_speaks_for_is_not_chosen_for_it() -> None:
    """What is in proportion between neighbours of each model but one is told by that form for all."""
    straight = {str(batch): 1.0 + batch for batch in (1, 2, 4, 8)}
    rows = [{"model": name, "targets": {"t": straight}} for name in "abc"]
    power = {"model": "d", "targets": {"t": {str(batch): float(batch) ** 0.5 for batch in (1, 2, 4, 8)}}}
    found = batches.chosen_by_others([*rows, power])
    assert found[:6] == pytest.approx([0.0] * 6, abs=1e-9) and min(map(abs, found[6:])) > 0.01
