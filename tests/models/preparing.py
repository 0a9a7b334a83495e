"""Small models to prepare, and what is asked of them afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import ModelError, UsageError
from aivmm.models.prepare import prepare
from aivmm.models.records import ModelFacts

F, I64 = TensorProto.FLOAT, TensorProto.INT64
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
Dims = list[int | str | None]
Feed = dict[str, Any]


def info(name: str, shape: Dims | None, kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).normal(size=shape).astype(np.float32), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto] | None = None,
    *,
    opset: int = 17,
    ir: int = 8,
    **more: Any,
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [], **more.pop("graph", {}))
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", [])]
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir, **more).SerializeToString())
    return path


def one(folder: Path, shape: Dims | None, *, op: str = "Relu", kind: int = F, name: str = "x") -> Path:
    return save(folder, [helper.make_node(op, [name], ["y"])], [info(name, shape, kind)], [info("y", None, kind)])


def run(path: Path, feed: Feed) -> list[npt.NDArray[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed))


def ready(source: Path, **options: Any) -> tuple[ModelFacts, onnx.ModelProto]:
    target = source.with_name("prepared.onnx")
    facts = prepare(source, target, **options)
    return facts, onnx.load(target)


def shapes(facts: ModelFacts) -> dict[str, tuple[int | None, ...]]:
    return {spec.name: spec.shape for spec in (*facts.inputs, *facts.outputs)}


def noted(facts: ModelFacts, *words: str) -> bool:
    return any(all(word in note for word in words) for note in facts.notes)


def agrees(source: Path, feed: Feed, **options: Any) -> ModelFacts:
    """Prepare and compare with what the original answers."""
    facts, _ = ready(source, **options)
    for mine, theirs in zip(run(source.with_name("prepared.onnx"), feed), run(source, feed), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    return facts


def refused(source: Path, kind: type[UsageError | ModelError] = UsageError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        ready(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
