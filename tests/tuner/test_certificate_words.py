"""What the terminal says of how sure the planner is."""

from __future__ import annotations

from typing import Any

import pytest

from aivmm.planner.certificate import certify
from aivmm.planner.evidence import Estimate
from aivmm.tuner.printing import print_outcome

PARTS = (
    Estimate(seconds=3e-3, sigma=0.02, source="measured", because="in its place"),
    Estimate(seconds=1e-3, sigma=0.2, source="modelled", because="operators"),
)


def summary(certificate: dict[str, Any] | None) -> dict[str, Any]:
    counts = {"measured": 3, "reused": 0, "refused": 0, "failed": 0}
    return {"verdict": "v", "plan": {"path": "p"}, "report": "r", "probes": counts, "certificate": certificate, "baselines": []}


def test_the_certificate_is_a_sentence_of_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    found = certify(PARTS, objective="latency", looked=None, among="", why_no_bound="the model has one block")
    print_outcome(summary(found.as_json()), [], verbose=False)
    said = " ".join(capsys.readouterr().out.split())
    assert f"sure {found.sentence}" in said
    assert "expected to take 4 ms" in said and "75 % measured and 25 % modelled" in said and "the model has one block" in said


def test_where_nothing_was_foretold_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(summary(None), [], verbose=False)
    assert not any(line.startswith("sure") for line in capsys.readouterr().out.splitlines())
