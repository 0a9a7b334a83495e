"""Real networks on real data: top-1 accuracy on held-out digits in every precision, and the ranking that an embedding gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from aivmm.errors import Unsupported
from aivmm.models.lowering import lower
from aivmm.models.lowering_recipes import Recipe, recipes
from aivmm.models.prepare import prepare
from tests.models.digits import Array, cnn, digits, embedding, mlp

pytest.importorskip("sklearn", reason="scikit-learn comes with NNCF")

_EVERY: dict[str, Recipe] = {
    each.name: each
    for precision in ("int8", "int4", "fp16")
    for category in ("CNN", "recommender", "language transformer")
    for each in recipes(precision, category)
}


def prepared(folder: Path, make: Callable[[Path], Path], batch: int) -> Path:
    source, target = folder / f"{make.__name__}.onnx", folder / f"{make.__name__}-{batch}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, that sixty rounds are not the end
        if not source.exists():
            make(source)
    prepare(source, target, batch=batch)
    return target


def scores(model: Path, images: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"image": images})
    return np.asarray(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


def lowered(model: Path, recipe: Recipe) -> Path:
    images = digits().train[:160]
    batch = 797
    samples = [{"image": np.resize(images[start:], (batch, 1, 8, 8)).astype(np.float32)} for start in (0, 80)]
    return lower(model, model.with_name(f"{model.stem}-{recipe.name}.onnx"), recipe, samples).path


@pytest.mark.parametrize("make", [cnn, mlp])
def test_top1_on_held_out_digits_in_every_precision(folder: Path, make: Callable[[Path], Path]) -> None:
    data = digits()
    model = prepared(folder, make, len(data.test))
    plain = float(np.mean(scores(model, data.test).argmax(axis=1) == data.test_labels))
    assert plain > 0.93, "the network learnt its digits"
    found, refused = {}, {}
    for name, recipe in _EVERY.items():
        if recipe.kind == "static" and name not in ("nncf-mixed-7bit", "ort-minmax-7bit", "ort-percentile"):
            continue  # the others are the same to accuracy on so small a network, and calibrate for long
        try:
            found[name] = float(np.mean(scores(lowered(model, recipe), data.test).argmax(axis=1) == data.test_labels))
        except Unsupported as error:
            refused[name] = str(error)
    assert {"nncf-mixed-7bit", "ort-minmax-7bit", "ort-half"} <= set(found)
    assert len(found) >= (5 if make is cnn else 10), refused
    for name, share in found.items():
        within = 0.05 if _EVERY[name].precision == "int4" else 0.02
        assert share > plain - within, f"{name} loses {plain - share:.3f} of top-1"
    assert all(reason and "\n" not in reason for reason in refused.values()), refused


def test_an_embedding_ranks_as_before(folder: Path) -> None:
    data = digits()
    model = prepared(folder, embedding, len(data.test))
    before = ranked(scores(model, data.test))
    assert precision_at_10(before, data.test_labels) > 0.85, "neighbours show the same digit"
    made = lowered(model, _EVERY["nncf-mixed-7bit"])
    after = ranked(scores(made, data.test))
    overlap = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(before, after, strict=True)])
    assert overlap > 0.75
    assert precision_at_10(after, data.test_labels) > precision_at_10(before, data.test_labels) - 0.02


def ranked(vectors: Array) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -np.inf)
    return np.argsort(-alike, axis=1)[:, :10]


def precision_at_10(ranks: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(labels[ranks] == labels[:, None]))
