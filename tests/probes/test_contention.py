"""Stages of a bundle timed alone and beside each other, in the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

from aivmm.probes.arrays import save_arrays
from aivmm.probes.client import Worker
from aivmm.probes.contention import _pair, _twins
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal


def test_each_stage_is_timed_alone_and_beside_each_other_one(tmp_path: Path) -> None:
    parts = [Part(OPENVINO, 0, 1), Part(ONNXRUNTIME, 2, 3), Part(OPENVINO, 4)]
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), parts, conditions=False)
    save_arrays(tmp_path / "x.npz", {"x": normal(2, 32)})
    asked = {"actors": [[0, 0], [1, 0], [2, 0]], "pairs": [[a, b] for a in range(3) for b in range(3) if a != b]}
    worker = Worker("contention")
    try:
        answer = worker.call("contention", limit_s=120, bundle=str(bundle), inputs=str(tmp_path / "x.npz"), seconds=0.05, **asked)
    finally:
        worker.close()
    assert len(answer["pairs"]) == 6
    for each in answer["pairs"]:
        assert len(each["alone"]) >= 4
        assert len(each["together"]) >= 4
        assert min(each["alone"] + each["together"]) > 0


def test_twins_that_leave_each_other_alone_are_not_slowed_by_the_stalls_that_each_has(tmp_path: Path) -> None:
    """Of five calls one takes thirty times as long, alone as together: a mean beside a median would call that a factor of six."""

    def step() -> Callable[[], None]:
        turns = count()

        def run() -> None:
            time.sleep(0.03 if next(turns) % 5 == 0 else 0.001)

        return run

    alone, together = _twins([step()], [step()], 2.0)
    assert len(alone) == len(together) == 8
    assert median(together) < 2 * median(alone)


def test_what_the_one_loses_to_stalls_beside_the_other_is_in_the_factor(tmp_path: Path) -> None:
    """Beside the other each fifth call waits for it: four fifths of the calls do not, and so a median would call that nothing."""
    running = threading.Event()

    def beside() -> None:
        running.set()
        time.sleep(0.001)
        running.clear()

    turns = count()

    def slowed() -> None:
        waits = next(turns) % 5 == 0 and running.is_set()
        time.sleep(0.03 if waits else 0.001)

    alone, together = _pair([slowed], [beside], 1.0)
    assert len(alone) == len(together) == 8
    assert 3 < median(together) / median(alone) < 9
