"""Operators of a lowered model can be given back; what breaks a model is found by its noise, which adds up where it is small."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import Unsupported
from aivmm.models.graph import analyse
from aivmm.models.lowering import base_of, lower
from aivmm.models.lowering_cache import lower_cached
from aivmm.models.lowering_parts import Part, Taken, mixed, touched
from aivmm.models.lowering_recipes import Recipe, named, part_of, recipes
from aivmm.models.prepare import prepare
from aivmm.planner.precision import best_parts
from tests.models.hostile import hostile
from tests.models.test_lowering import Array, Feed, by_onnxruntime, convolutions, feeds

_STATIC = {each.name: each for each in (*recipes("int8", "CNN"), *recipes("int8", "language transformer"))}


def prepared(source: Path) -> Path:
    target = source.with_name(f"{source.stem}-prepared.onnx")
    prepare(source, target, batch=1)
    return target


def references(model: Path, samples: list[Feed]) -> list[Feed]:
    return [{"y": by_onnxruntime(model, each)} for each in samples]


def error(actual: Array, expected: Array) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(convolutions(tmp_path_factory.mktemp("parts") / "convolutions.onnx"))


@pytest.fixture(scope="module", params=["ort-minmax", "nncf-mixed-7bit"])
def lowered(request: pytest.FixtureRequest, convolutional: Path) -> tuple[Recipe, Path]:
    recipe = _STATIC[request.param]
    return recipe, lower(convolutional, convolutional.with_name(f"{recipe.name}.onnx"), recipe, feeds(convolutional)).path


def test_with_nothing_kept_back_the_mixture_is_the_lowered_model(convolutional: Path, lowered: tuple[Recipe, Path]) -> None:
    import onnx_ir as ir

    recipe, whole = lowered
    path = whole.with_suffix(".mixed.onnx")
    ir.save(mixed(base_of(convolutional, recipe), ir.load(whole), ()), path)
    for feed in feeds(convolutional, 3, seed=4):
        # ONNX Runtime's quantizer rounds the output too, to 0.012; a mixture has its outputs as they are computed.
        assert error(by_onnxruntime(path, feed), by_onnxruntime(whole, feed)) < 0.01


def test_with_everything_kept_back_the_mixture_is_the_model_itself(convolutional: Path, lowered: tuple[Recipe, Path]) -> None:
    import onnx_ir as ir

    recipe, whole = lowered
    base = base_of(convolutional, recipe)
    names = touched(base, ir.load(whole))
    path = whole.with_suffix(".plain.onnx")
    ir.save(mixed(base, ir.load(whole), names), path)
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(path).graph.node}
    for feed in feeds(convolutional, 2, seed=4):
        np.testing.assert_allclose(by_onnxruntime(path, feed), by_onnxruntime(convolutional, feed), rtol=1e-4, atol=1e-5)


def test_a_way_that_replaces_operators_cannot_be_mixed(convolutional: Path, tmp_path: Path) -> None:
    recipe = next(each for each in recipes("int8", "recommender") if each.name == "ort-dynamic")
    source = prepared(hostile(tmp_path / "hostile.onnx", width=32))
    whole = lower(source, tmp_path / "dynamic.onnx", recipe, []).path
    with pytest.raises(Unsupported, match="replaces operators"), Taken(source, whole, recipe):
        pass


def parts_of(source: Path, whole: Path, recipe: Recipe, samples: list[Feed]) -> tuple[list[Part], float]:
    blocks = [(block.first, block.last) for block in analyse(source).blocks]
    with Taken(source, whole, recipe) as taken:
        found = list(taken.parts(blocks, samples, references(source, samples), most=12, limit_s=60))
        assert taken.complete
        return found, taken.noise((), samples, references(source, samples))


def test_the_noise_of_parts_sums_up_to_that_of_the_whole(convolutional: Path, lowered: tuple[Recipe, Path]) -> None:
    recipe, whole = lowered
    parts, noise = parts_of(convolutional, whole, recipe, feeds(convolutional, 8, seed=3))
    assert len(parts) > 1 and all(part.noise > 0 for part in parts)
    assert 0.5 < sum(part.noise for part in parts) / noise < 2


def test_the_hostile_block_is_found_and_kept_and_the_rest_is_lowered(tmp_path: Path) -> None:
    source = prepared(hostile(tmp_path / "hostile.onnx"))
    samples, cache = feeds(source, 6), tmp_path / "cache"
    recipe = _STATIC["nncf-mixed-7bit"]
    whole = lower_cached(source, cache, recipe, samples, content="hostile").path
    parts, noise = parts_of(source, whole, recipe, samples)
    worst = max(parts, key=lambda part: part.noise)
    assert "hostile" in worst.nodes and noise > 0.05

    allowed = 2 * (1 - 0.99)  # the relative error's square that a cosine of 0.99 allows
    chosen = best_parts([part.noise for part in parts], [1.0] * len(parts), allowed)
    kept = {name for index, part in enumerate(parts) if index not in chosen.parts for name in part.nodes}
    assert "hostile" in kept and len(chosen.parts) >= len(parts) - 2

    made = lower_cached(source, cache, part_of(recipe, sorted(kept)), samples, content="hostile")
    assert 0 < made.nodes < lower_cached(source, cache, recipe, samples, content="hostile").nodes
    fresh = feeds(source, 6, seed=9)
    expected = [each["y"] for each in references(source, fresh)]
    assert max(map(error, [by_onnxruntime(made.path, each) for each in fresh], expected)) < math.sqrt(allowed)
    assert max(map(error, [by_onnxruntime(whole, each) for each in fresh], expected)) > math.sqrt(allowed), "the whole would have done"


def test_a_part_is_known_again_by_its_name_and_options() -> None:
    part = part_of(_STATIC["nncf-mixed-7bit"], ["b", "a"])
    assert part == part_of(_STATIC["nncf-mixed-7bit"], ["a", "b"]) == named(part.name, dict(part.options))
    assert part.variant.startswith("int8:nncf-mixed-7bit-but-") and part.plain == ("a", "b")
    assert part.digest() not in (_STATIC["nncf-mixed-7bit"].digest(), part_of(_STATIC["nncf-mixed-7bit"], ["a"]).digest())


@pytest.mark.parametrize(
    "options",
    [
        {"of": "nncf-mixed-7bit"},
        {"of": "nobody", "plain": "[]"},
        {"of": "nncf-mixed-7bit", "plain": "{"},
        {"of": "nncf-mixed-7bit", "plain": '["x"]'},
    ],
)
def test_a_part_that_was_written_by_hand_is_nobody(options: dict[str, str]) -> None:
    assert named("nncf-mixed-7bit-but-00000000", dict(options)) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1), st.floats(0, 10)), min_size=1, max_size=9), st.floats(1e-3, 2))
def test_the_parts_chosen_are_the_best_there_are(parts: list[tuple[float, float]], most: float) -> None:
    noises, gains = [noise for noise, _ in parts], [gain for _, gain in parts]
    chosen = best_parts(noises, gains, most)
    assert chosen.noise <= most * (1 + 1e-6)
    best = max(
        sum(gain for bit, gain in enumerate(gains) if mask >> bit & 1)
        for mask in range(2 ** len(parts))
        if sum(noise for bit, noise in enumerate(noises) if mask >> bit & 1) <= most
    )
    assert chosen.gain == pytest.approx(best, rel=1e-6, abs=1e-6)
