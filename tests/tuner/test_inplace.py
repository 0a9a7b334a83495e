"""Segments timed in their place and alone: real runtimes, a real bundle, a real worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from aivmm.planner.candidates import Draft, Piece
from aivmm.probes.operations import save_arrays
from aivmm.runtime.config import Config
from aivmm.runtime.engine import Engine
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target
from aivmm.tuner.inplace import InPlace, chain_digest, probe_in_place
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal


def target(name: str) -> Target:
    return next(each for each in load_backend(name.partition(":")[0]).targets() if str(each) == name and isinstance(each, Target))


@pytest.fixture
def draft() -> Draft:
    pieces = (
        Piece(target=target(OPENVINO), config=Config(precision="fp32"), first=0, last=1),
        Piece(target=target(ONNXRUNTIME), config=Config(precision="fp32"), first=2, last=3),
    )
    return Draft(name="cut plan", pieces=pieces)


def test_each_segment_is_timed_between_its_neighbours_and_alone(tmp_path: Path, draft: Draft) -> None:
    bundle = make_bundle(tmp_path / "cut.aivmm", chain_model(width=64), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4, 7)])
    sample = tmp_path / "sample.npz"
    save_arrays(sample, {"x": normal(2, 64)})
    found = probe_in_place(draft, bundle, sample=sample)
    assert not isinstance(found, str), found
    assert [each.span for each in found] == [(0, 1, OPENVINO), (2, 3, ONNXRUNTIME)]
    assert all(len(each.placed.timed_s) >= 5 and len(each.alone.timed_s) >= 5 for each in found)
    assert all(f"blocks {each.piece.first} to {each.piece.last} on {each.piece.target}" in str(each) for each in found)
    assert found[0].engine_s == found[1].engine_s >= 0
    again = InPlace.recalled(found[0].piece, found[0].placed, found[0].alone, found[0].metrics())
    assert again == found[0]
    assert found[0].difference == pytest.approx(found[0].placed.median_s / found[0].alone.median_s - 1)


def test_wrong_numbers_are_a_reason(tmp_path: Path, draft: Draft) -> None:
    bundle = make_bundle(tmp_path / "cut.aivmm", chain_model(width=64), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4, 7)])
    sample, expected = tmp_path / "sample.npz", tmp_path / "expected.npz"
    save_arrays(sample, {"x": normal(2, 64)})
    with Engine.load(bundle) as engine:
        save_arrays(expected, {name: -array for name, array in engine.run({"x": normal(2, 64)}).items()})
    answer = probe_in_place(draft, bundle, sample=sample, expected=expected, cosine_limit=0.999)
    assert isinstance(answer, str) and "cosine" in answer


def test_a_bundle_that_does_not_load_is_a_reason(tmp_path: Path, draft: Draft) -> None:
    sample = tmp_path / "sample.npz"
    save_arrays(sample, {"x": normal(2, 64)})
    answer = probe_in_place(draft, tmp_path / "nowhere.aivmm", sample=sample)
    assert isinstance(answer, str) and answer


def test_the_same_segment_among_other_neighbours_is_another_measurement(draft: Draft) -> None:
    swapped = Draft(name="cut plan", pieces=(draft.pieces[1], draft.pieces[0]))
    assert chain_digest(draft, ["a", "b"]) != chain_digest(swapped, ["a", "b"])
    alone, placed = InPlace.keys(0, draft, ["a", "b"])
    assert alone != placed and alone.subject.startswith("a ") and placed.subject.startswith("a ")  # neither is a block's own key
