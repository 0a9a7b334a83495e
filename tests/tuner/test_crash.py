"""A driver that kills its process: it costs one probe, and is not tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.probes.records import Failed
from tests.probes.conftest import python_path
from tests.tuner.harness import TINY, Place

# A plug-in: ONNX Runtime under another name, whose sessions of more than two threads kill their process at the third run.
BACKEND = """
import os, signal
from dataclasses import replace

from aivmm.runtime.backend import Baseline
from aivmm.runtime.config import Config, Knob
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.target import Target


class Fragile:
    name = "fragile"

    def __init__(self):
        self._real = OnnxRuntime()

    def targets(self):
        return [replace(each, runtime="fragile") for each in self._real.targets() if isinstance(each, Target) and each.name == "CPU"]

    def knobs(self, target):
        return (Knob("intra_op_num_threads", "int", "some of them are fatal", low=1, high=6, default=1),)

    def baselines(self, targets, objective):
        return [Baseline(name=f"{each} default", target=each, config=Config()) for each in targets if each.runtime == "fragile"]

    def compile(self, model, target, config):
        made = self._real.compile(model, replace(target, runtime="onnxruntime"), config)
        return Deadly(made) if (config.get("intra_op_num_threads") or 1) > 2 else made


class Deadly:
    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def new_request(self):
        return DeadlyRequest(self._real.new_request())


class DeadlyRequest:
    def __init__(self, real):
        self._real, self._left = real, 3

    def __getattr__(self, name):
        return getattr(self._real, name)

    def run(self):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        self._real.run()
"""


@pytest.fixture
def fragile(tmp_path: Path) -> str:
    """The folder with the plug-in, installed as a distribution is."""
    folder = tmp_path / "plug-ins"
    (folder / "fragile-1.0.dist-info").mkdir(parents=True)
    (folder / "fragile_backend.py").write_text(BACKEND)
    (folder / "fragile-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    (folder / "fragile-1.0.dist-info" / "entry_points.txt").write_text("[aivmm.backends]\nfragile = fragile_backend:Fragile\n")
    return python_path(folder)


@pytest.mark.slow
def test_a_setting_that_crashes_the_driver_costs_one_probe_and_is_not_tried_again(place: Place, tiny: Path, fragile: str) -> None:
    arguments = ("tune", tiny, *TINY, "--backend", "fragile", "--budget", "6s", "--trials", "3", "--top", "1", "--json")
    done = place.aivmm(*arguments, PYTHONPATH=fragile)
    assert done.code == 0, done.err
    failures = done.json["probes"]["failed"]
    assert failures >= 1
    assert done.json["plan"]["stages"][0]["config"].get("intra_op_num_threads", 1) <= 2
    with Database.open(place.db) as database:
        failed = [each for each in database.outcomes(kind="model") if isinstance(each, Failed)]
        assert len(failed) == failures
        assert all(each.key.config.get("intra_op_num_threads") > 2 and "SIGSEGV" in each.reason for each in failed)
    done = place.aivmm(*arguments, PYTHONPATH=fragile)
    assert done.code == 0, done.err
    assert done.json["probes"]["measured"] == 0
    with Database.open(place.db) as database:
        assert len([each for each in database.outcomes(kind="model", all=True) if isinstance(each, Failed)]) == failures
