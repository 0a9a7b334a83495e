"""A tune whose plan takes pixels: everything that tells of the plan says so, and what is no pixel is refused."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pytest

import aivmm
from aivmm.errors import UsageError
from tests.tuner.harness import ONE_RUNTIME, TINY, Place, assert_as_promised, reference

ASKED = """
[tune]
input-contract = "narrow:uint8"

[tune.normalise]
input = "123.7,116.3,103.5/58.4,57.1,57.4"
"""
MEAN, SCALE = (np.float32(each).reshape(3, 1, 1) for each in ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)))
SAID = "input as uint8, 0 to 255 (normalised inside: (pixel - [123.7, 116.3, 103.5]) / [58.4, 57.1, 57.4])"


def test_a_plan_that_takes_pixels_says_so_everywhere_and_takes_nothing_else(place: Place, tiny: Path) -> None:
    (place.work / "aivmm.toml").write_text(ASKED)
    effort = ("--budget", "4s", "--trials", "1", "--top", "1")
    done = place.aivmm("tune", tiny, *TINY, *effort, *ONE_RUNTIME, "--json", "-o", "p.aivmm")
    assert done.code == 0, done.err
    bundle = place.work / "p.aivmm"
    numbers = {"mean": [123.7, 116.3, 103.5], "scale": [58.4, 57.1, 57.4]}
    assert done.json["taken"] == [{"name": "input", "model_dtype": "float32", "dtype": "uint8", "normalisation": numbers}]
    assert f"It takes {SAID} (--input-contract narrow:uint8)." in done.json["verdict"]
    assert html.escape(SAID) in (bundle / "report.html").read_text(encoding="utf-8")
    model = json.loads((bundle / "plan.json").read_text())["model"]
    assert model["taken"] == [{"name": "input", "model_dtype": "float32", "dtype": "uint8", **numbers}]
    assert SAID in place.aivmm("plan", "show", "p.aivmm").out
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16)).astype(np.uint8)
    floats = (x.astype(np.float32) - MEAN) / SCALE
    with aivmm.load_plan(bundle) as engine:
        assert [str(each) for each in engine.inputs] == ["input: uint8[1, 3, 16, 16]"]
        mine = engine.run({"input": x})
        with pytest.raises(UsageError, match="input 'input' has type float32, expected uint8; give whole numbers as they are"):
            engine.run({"input": floats})
    assert_as_promised(done.json["plan"]["stages"], mine, reference(tiny, {"input": floats}))
