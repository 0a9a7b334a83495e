"""Real networks, trained here in a second on scikit-learn's digits (1,797 handwritten ones, real data), written as ONNX by hand.

Fitting needs no gradient code of ours: the CNN's filters are the centroids of patches (Coates, Ng and Lee, 2011), its head a logistic
regression; the MLP and the embedding are scikit-learn's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]
_TRAINED_ON = 1000


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] from 0 to 1, and what they show."""

    train: Array
    train_labels: npt.NDArray[np.int64]
    test: Array
    test_labels: npt.NDArray[np.int64]


@cache
def digits() -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(3).permutation(len(data.target))
    images = (data.images[order, None] / 16.0).astype(np.float32)
    labels = data.target[order].astype(np.int64)
    return Digits(images[:_TRAINED_ON], labels[:_TRAINED_ON], images[_TRAINED_ON:], labels[_TRAINED_ON:])


def _written(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, npt.ArrayLike], outputs: int) -> Path:
    tensors = [
        numpy_helper.from_array(np.asarray(value, None if np.asarray(value).dtype == np.int64 else np.float32), name)
        for name, value in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", outputs])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def mlp(path: Path) -> Path:
    """Write an MLP of 64, 128, 64 and 10."""
    from sklearn.neural_network import MLPClassifier

    data = digits()
    fitted = MLPClassifier((128, 64), max_iter=60, random_state=1, early_stopping=False, tol=1e-3, n_iter_no_change=5)
    fitted.fit(data.train.reshape(len(data.train), 64), data.train_labels)
    nodes, weights, last = [helper.make_node("Flatten", ["image"], ["flat"])], {}, "flat"
    for index, (matrix, bias) in enumerate(zip(fitted.coefs_, fitted.intercepts_, strict=True)):
        weights |= {f"w{index}": matrix, f"b{index}": bias}
        final = index == len(fitted.coefs_) - 1
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"], name=f"dense{index}"))
        nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], ["scores" if final else f"g{index}"]))
        if not final:
            nodes.append(helper.make_node("Relu", [f"g{index}"], [f"r{index}"]))
            last = f"r{index}"
    return _written(path, nodes, weights, 10)


def cnn(path: Path) -> Path:
    """Write a CNN: 32 filters of 3x3, Relu, mean pooling to 3x3, a linear head."""
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression

    data = digits()
    patches = np.lib.stride_tricks.sliding_window_view(data.train[:, 0], (3, 3), axis=(1, 2)).reshape(-1, 9)
    patches = patches[np.random.default_rng(0).permutation(len(patches))[:6000]]
    centred = patches - patches.mean(axis=1, keepdims=True)
    centroids = KMeans(32, n_init=1, random_state=0, max_iter=30).fit(centred).cluster_centers_
    filters = centroids - centroids.mean(axis=1, keepdims=True)
    filters /= np.linalg.norm(filters, axis=1, keepdims=True) + 1e-6
    features = _pooled(data.train, filters)
    head = LogisticRegression(max_iter=300).fit(features, data.train_labels)
    nodes = [
        helper.make_node("Conv", ["image", "filters", "shift"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("AveragePool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["scores"], name="head", transB=1),
    ]
    weights = {"filters": filters.reshape(32, 1, 3, 3), "shift": np.full(32, -0.1), "w": head.coef_, "b": head.intercept_}
    return _written(path, nodes, weights, 10)


def _pooled(images: Array, filters: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    windows = np.lib.stride_tricks.sliding_window_view(images[:, 0], (3, 3), axis=(1, 2)).reshape(len(images), 6, 6, 9)
    made = np.maximum(windows @ filters.T - 0.1, 0)  # [n, 6, 6, 32]
    pooled = made.reshape(len(images), 3, 2, 3, 2, 32).mean(axis=(2, 4))
    return np.asarray(pooled.transpose(0, 3, 1, 2).reshape(len(images), -1))


def embedding(path: Path) -> Path:
    """Write an embedding of 9 dimensions: hidden units of the MLP, projected so that digits of a kind lie together (LDA)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.neural_network import MLPClassifier

    data = digits()
    flat = data.train.reshape(len(data.train), 64)
    fitted = MLPClassifier((128,), max_iter=40, random_state=2, tol=1e-3, n_iter_no_change=5).fit(flat, data.train_labels)
    hidden = np.maximum(flat @ fitted.coefs_[0] + fitted.intercepts_[0], 0)
    lda = LinearDiscriminantAnalysis(n_components=9, solver="eigen", shrinkage=0.1).fit(hidden, data.train_labels)
    projection = lda.scalings_[:, :9]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w0", "b0"], ["g"], name="hidden"),
        helper.make_node("Relu", ["g"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["scores"], name="projection"),
    ]
    weights = {"w0": fitted.coefs_[0], "b0": fitted.intercepts_[0], "w1": projection / np.abs(projection).max()}
    return _written(path, nodes, weights, 9)
