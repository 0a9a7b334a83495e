"""Segments on their way into a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from aivmm.models.graph import analyse, cut_further
from aivmm.models.prepare import prepare
from aivmm.tuner.emit import Emitter
from tests.making import onnx_model, write_model


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
