"""What was measured once is not measured again: by structure across models, and never across environments."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from aivmm.db.database import Database
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.profile import Profile, profile_model
from aivmm.tuner.progress import Silent
from tests.tuner.harness import TINY, Place, write_tiny


def write_scaled(path: Path, *, layers: int) -> Path:
    """Write the small network with other weights: another content of the same structure."""
    model = onnx.load(write_tiny(path, layers=layers))
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.25, weight.name))
    onnx.save(model, path)
    return path


def profiled(model: Path, database: Path) -> Profile:
    options = TuneOptions(model=str(model), db=str(database), dims={"side": 16}, backends=("onnxruntime",))
    return profile_model(options, Silent())


def test_two_models_that_share_blocks_share_their_measurements_whatever_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "lock"))
    file = tmp_path / "x.db"
    first = profiled(write_tiny(tmp_path / "one.onnx", layers=3), file)
    second = profiled(write_scaled(tmp_path / "two.onnx", layers=4), file)
    theirs, ours = first.subject.structure, second.subject.structure
    shared = {block.structure for block in theirs.blocks} & {block.structure for block in ours.blocks}
    assert shared
    assert not {block.content for block in theirs.blocks} & {block.content for block in ours.blocks}
    operators = {each.signature for each in theirs.operators} & {each.signature for each in ours.operators}
    assert second.counts.reused >= len(shared) + len(operators)
    with Database.open(file) as database:
        for structure in shared:
            stored = database.outcomes(kind="segment", subject=structure, all=True)
            assert len(stored) == 1, "measured twice"
            places = [block.index for block in ours.blocks if block.structure == structure]
            assert [second.blocks[place, "onnxruntime:CPU"] for place in places] == stored * len(places)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to give one up")
def test_with_a_core_less_nothing_is_reused_and_both_are_still_reported(tmp_path: Path) -> None:
    place, model = Place.at(tmp_path), write_tiny(tmp_path / "one.onnx")
    arguments = ("profile", model, *TINY, "--targets", "onnxruntime:CPU", "--json")
    first, again = (place.aivmm(*arguments).json["probes"] for _ in range(2))
    known = first["measured"] + first["refused"] + first["failed"]
    assert first["measured"] > 0 and (again["measured"], again["reused"]) == (0, known)
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})  # what is started from here on has it too
        fewer = place.aivmm(*arguments).json["probes"]
    finally:
        os.sched_setaffinity(0, cores)
    assert (fewer["reused"], fewer["measured"]) == (0, first["measured"])
    rows = place.aivmm("db", "query", "--json").json["probes"]
    assert len(rows) == 2 * known
    assert len({row["environment"] for row in rows}) == 2
    here = place.aivmm("db", "query", "--environment", "this", "--json").json["probes"]
    assert len(here) == known
