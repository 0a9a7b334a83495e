"""On a machine that others keep busy the terminal says so beside the verdict."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aivmm.runtime.cpu import usable_cores
from tests.runtime.test_strays import det_model
from tests.tuner.harness import Place


@pytest.mark.slow  # it keeps from its cores whatever runs beside it
def test_a_verdict_from_a_busy_machine_is_told_to_be_one(place: Place) -> None:
    (place.work / "det.onnx").write_bytes(det_model())
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
    try:
        done = place.aivmm("tune", "det.onnx", "--backend", "null", "--targets", "null:GPU", "--budget", "2s", "--trials", "2")
    finally:
        for each in others:
            each.kill()
            each.wait()
    assert done.code == 0, done.err
    assert "note: while the plan was proven, other processes kept" in " ".join(done.err.split())
