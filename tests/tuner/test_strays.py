"""A plan whose accelerator leaves nodes to the CPU says which, and what they cost: in the plan, on the terminal and in the report."""

from __future__ import annotations

import json

import pytest

from tests.runtime.test_strays import det_model
from tests.tuner.harness import Place


@pytest.mark.slow
def test_a_plan_says_which_nodes_its_card_leaves_to_the_cpu_and_what_they_cost(place: Place) -> None:
    (place.work / "det.onnx").write_bytes(det_model())
    done = place.aivmm("tune", "det.onnx", "--backend", "null", "--targets", "null:GPU", "--budget", "2s", "--trials", "2")
    assert done.code == 0, done.err
    plan = json.loads((place.work / "det.aivmm/plan.json").read_text())
    assert plan["expected"]["stray_nodes"]["value"] == 1 and plan["expected"]["stray_copies"]["value"] == 2
    assert plan["expected"]["stray_s"]["value"] > 2e-5  # two copies of 10 µs at least
    for text in (plan["verdict"], " ".join(done.out.split())):
        assert "1 node runs on the CPU (Det determinant), with 2 copies to and from it" in text
    report = (place.work / "det.aivmm/report.html").read_text()
    assert "1 of 3 nodes are not on null:GPU.0 but on the CPU: determinant" in report and "Nodes left on the CPU" in report
