"""Errors of predictions on a recorded data set: they must not grow. `benchmarks/prediction.py --data` records it and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.prediction import middle, report, tiers

RECORDED = json.loads((Path(__file__).parent / "prediction.json").read_text())
FOUND = tiers(RECORDED)


@pytest.mark.parametrize("tier", RECORDED["accepted"])
def test_the_median_error_of_a_tier_has_not_grown(tier: str) -> None:
    """A tenth of a percent is rounding; whoever makes predictions better records the better figure."""
    assert middle(FOUND[tier]) <= RECORDED["accepted"][tier] + 0.001


def test_the_recorded_data_covers_what_is_predicted() -> None:
    modelled = [tier for tier in RECORDED["accepted"] if tier.startswith("modelled")]
    interpolated = [tier for tier in RECORDED["accepted"] if tier.startswith("interpolated")]
    assert len(modelled) >= 2 and len(interpolated) >= 2
    assert len(RECORDED["parts"]) >= 3


def test_every_tier_is_reported() -> None:
    text = "\n".join(report(RECORDED))
    assert all(f"| {tier} |" in text for tier in FOUND)
