"""Segments on their way into a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aivmm.models.graph import analyse, cut_further
from aivmm.models.prepare import prepare
from aivmm.planner.candidates import Draft, Piece
from aivmm.runtime.config import Config
from aivmm.runtime.engine import Engine
from aivmm.runtime.target import Target
from aivmm.tuner.emit import Emitter, Other
from tests.conftest import targets_like
from tests.making import normal, onnx_model, reference, write_model


def test_segments_that_are_alike_keep_the_names_of_their_own_tensors(tmp_path: Path) -> None:
    """Two nodes of one kind without weights have the same content; a file for both would read and write the tensors of one of them."""
    names = ["x", "a", "b", "c", "y"]
    kinds = ["Tanh", "Exp", "Tanh", "Exp"]
    nodes = [helper.make_node(kind, [names[at]], [names[at + 1]], name=f"n{at}") for at, kind in enumerate(kinds)]
    shape = (2, 8)
    source = write_model(tmp_path / "source.onnx", onnx_model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)]))
    path = tmp_path / "model.onnx"
    facts = prepare(source, path)
    structure = analyse(path)
    structure = cut_further(path, structure, [cut.position for cut in structure.cut_points])
    assert len(structure.blocks) == 4 and structure.blocks[0].content == structure.blocks[2].content
    emitter = Emitter(path, facts, structure, tmp_path / "segments", version="test")
    segments = [emitter.segment(index, index) for index in range(4)]
    emitter.close()
    assert len({each.path for each in segments}) == 4
    edges = [(graph.input[0].name, graph.output[0].name) for graph in (onnx.load(each.path).graph for each in segments)]
    assert edges == [("x", "a"), ("a", "b"), ("b", "c"), ("c", "y")]
    assert np.dtype(segments[0].inputs[0].dtype) == np.float32


def batched_model(batch: int) -> onnx.ModelProto:
    """Return x [batch, 32] to y, the same work for each row: a weight as long as the batch, and one in each branch of an If."""
    rows = np.tile(normal(1, 32, seed=1), (batch, 1))
    branches = {}
    for name, seed in (("then_branch", 2), ("else_branch", 3)):
        constant = helper.make_node("Constant", [], [f"{name}_w"], value=numpy_helper.from_array(normal(32, 32, seed=seed)))
        matmul = helper.make_node("MatMul", ["a", f"{name}_w"], [f"{name}_y"])
        branches[name] = helper.make_graph(
            [constant, matmul], name, [], [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, (batch, 32))]
        )
    nodes = [
        helper.make_node("Add", ["x", "rows"], ["shifted"]),
        helper.make_node("MatMul", ["shifted", "w"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], **branches),
    ]
    weights = {"rows": rows, "w": normal(32, 32, seed=4), "zero": np.array(0, np.float32)}
    shape = (batch, 32)
    return onnx_model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)], weights)


def test_a_plan_and_its_alternative_at_another_batch_read_their_own_weights(tmp_path: Path) -> None:
    """At batch 16 `rows` is large enough to lie in the file of weights, and moves all that comes after it."""
    ((target, *_), _) = targets_like("onnxruntime:CPU")
    emitters, drafts = {}, {}
    for batch in (1, 16):
        path = tmp_path / f"model-{batch}.onnx"
        facts = prepare(write_model(tmp_path / f"source-{batch}.onnx", batched_model(batch)), path)
        structure = analyse(path)
        emitters[batch] = Emitter(path, facts, structure, tmp_path / f"segments-{batch}", version="test")
        drafts[batch] = whole(f"batch {batch}", target, len(structure.blocks), batch)
    other = Other(draft=drafts[16], objective="throughput", expected={}, emitter=emitters[16])
    plan = emitters[1].write(drafts[1], tmp_path / "m.aivmm", objective="latency", alternatives=[other])
    for each in emitters.values():
        each.close()
    for batch, goal in ((1, None), (16, "throughput")):
        x = {"x": normal(batch, 32, seed=5)}
        with Engine.load(tmp_path / "m.aivmm", alternative=goal) as engine:
            np.testing.assert_allclose(engine.run(x)["y"], reference(batched_model(batch), x)["y"], rtol=1e-4, atol=1e-5)
    (weights,) = (tmp_path / "m.aivmm" / name for name in plan.files if name.endswith(".bin"))
    assert weights.stat().st_size < 2 * 3 * 32 * 32 * 4, "equal weights are there twice"


def whole(name: str, target: Target, blocks: int, batch: int) -> Draft:
    return Draft(name=name, pieces=(Piece(target=target, config=Config(precision="fp32"), first=0, last=blocks - 1),), batch=batch)
