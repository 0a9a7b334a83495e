"""Lanes are shared out among copies by weight; an engine runs one plan on several targets at once, each with its part of the requests."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.errors import BundleError
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Copy, Execution, parse_plan
from aivmm.runtime.sharing import shared_out
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference

WEIGHT = st.floats(1e-3, 1e3)


def copy_on(target: str, **fields: object) -> Copy:
    return Copy(model="made.onnx", target=target, precision="fp32", **fields)  # type: ignore[arg-type]


def test_equal_copies_take_turns() -> None:
    assert shared_out([1.0, 1.0, 1.0], 7) == [0, 1, 2, 0, 1, 2, 0]


def test_a_copy_of_three_times_the_weight_gets_three_lanes_of_four_evenly_dealt() -> None:
    order = shared_out([3.0, 1.0], 8)
    assert Counter(order) == {0: 6, 1: 2}
    assert max(len(run) for run in "".join(map(str, order)).split("1")) <= 3


def test_the_slowest_copy_gets_a_lane_all_the_same_and_too_few_lanes_are_an_error() -> None:
    assert Counter(shared_out([1000.0, 1.0], 4)) == {0: 3, 1: 1}
    with pytest.raises(ValueError, match="1 lanes do not serve 2 copies"):
        shared_out([1.0, 1.0], 1)


@given(st.lists(WEIGHT, min_size=1, max_size=6), st.integers(0, 30))
def test_each_copy_has_what_its_weight_asks_for_within_a_lane_or_one(weights: list[float], more: int) -> None:
    lanes = len(weights) + more
    counts = Counter(shared_out(weights, lanes))
    assert sum(counts.values()) == lanes
    ideal = [weight / sum(weights) * lanes for weight in weights]
    for index, part in enumerate(ideal):
        assert counts[index] >= 1
        # Above its part only by the lane that rounds up, or by the one that each has.
        assert counts[index] <= max(1.0, part + 1)
    heavier = sorted(range(len(weights)), key=weights.__getitem__)
    assert all(counts[one] <= counts[other] for one, other in itertools.pairwise(heavier) if weights[one] < weights[other])


@pytest.mark.parametrize("mode", ["sequential", "pipelined"])
def test_one_plan_on_two_runtimes_at_once_answers_right_and_counts_each_copy(tmp_path: Path, mode: str) -> None:
    model = chain_model()
    parts = [
        Part(OPENVINO, 0, 3, weight=2.0, copies=(copy_on(ONNXRUNTIME, replicas=2),)),
        Part(ONNXRUNTIME, 4, replicas=2),
    ]
    bundle = make_bundle(tmp_path / "m.aivmm", model, parts, callers=4, execution=Execution(mode=mode), conditions=True)  # type: ignore[arg-type]
    with Engine.load(bundle) as engine:
        assert engine.plan.targets() == (OPENVINO, ONNXRUNTIME)
        assert engine.validity.grade == "exact"
        shape = engine.inputs[0].shape
        inputs = [{engine.inputs[0].name: normal(*(each or 1 for each in shape), seed=seed)} for seed in range(40)]
        for feeds, found in zip(inputs, engine.stream(inputs), strict=True):
            for name, value in reference(model, feeds).items():
                np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)
        first = engine.stats()["stages"][0]
        assert [each["target"] for each in first["copies"]] == [OPENVINO, ONNXRUNTIME]
        lanes = [each["lanes"] for each in first["copies"]]
        assert sum(lanes) == engine.stats()["lanes"] and lanes[0] == lanes[1]  # weight 2 beside two replicas of weight 1
        assert sum(each["count"] for each in first["copies"]) == 40
        assert all(each["count"] for each in first["copies"])


def test_a_plan_of_copies_survives_its_file_and_an_unlisted_model_file_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO, copies=(copy_on(ONNXRUNTIME, weight=0.5),))])
    with Engine.load(bundle) as engine:
        plan = engine.plan
    assert parse_plan(plan.to_json(), "plan.json") == plan
    text = (bundle / "plan.json").read_text()
    model = plan.stages[0].copies[0].model
    after = f'",\n          "target": "{ONNXRUNTIME}"'
    changed = text.replace(f'"model": "{model}{after}', f'"model": "x.onnx{after}')
    assert changed != text
    (bundle / "plan.json").write_text(changed)
    with pytest.raises(BundleError, match=r"'x\.onnx' is not listed"):
        Engine.load(bundle)
