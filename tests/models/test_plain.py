"""What a runtime reads wrongly is written plainly before it gets there: prepared, cut or whole, on both runtimes, through our backends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import aivmm
from aivmm.errors import ModelError
from aivmm.models.prepare import prepare
from aivmm.models.records import ModelFacts
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes.runners import ExecutableRunner
from aivmm.runtime.config import Config
from aivmm.runtime.finding import find_target
from aivmm.runtime.registry import load_backend
from tests.making import ONNXRUNTIME, OPENVINO, Part, make_bundle

F, B = TensorProto.FLOAT, TensorProto.BOOL
X = np.array([[1, -2, 3], [4, 5, -6]], np.float32)
Arrays = Mapping[str, np.ndarray[Any, Any]]


def info(name: str, shape: Sequence[int | str] = (2, 3), kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def body(name: str, nodes: Sequence[onnx.NodeProto], output: str) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [info(output)])


def save(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, Any] | None = None,
    sparse: Sequence[onnx.SparseTensorProto] = (),
) -> Path:
    made = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), made)
    graph.sparse_initializer.extend(sparse)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def run(target: str, path: Path, values: Arrays) -> dict[str, Any]:
    runtime, _, device = target.partition(":")
    backend = load_backend(runtime)
    executable = backend.compile(path, find_target(backend, device), Config(precision="fp32"))
    try:
        return ExecutableRunner(executable, values, 1).outputs(values)
    finally:
        executable.close()


def check_all_cuts(path: Path, feeds: Arrays, expected: Arrays, *, targets: Sequence[str] = (ONNXRUNTIME, OPENVINO)) -> ModelFacts:
    """Prepare, and compare the whole and each cut with `expected` on each target."""
    prepared = path.with_name("prepared.onnx")
    facts = prepare(path, prepared)
    with Slicer(prepared) as slicer:
        count = len(slicer.prepared.nodes)
        for target in targets:
            for cuts in ([], *([at] for at in range(1, count)), range(1, count)):
                values, store = dict(feeds), WeightStore(path.with_name("weights"))
                for first, end in itertools.pairwise([0, *cuts, count]):
                    slicer.write(first, end - 1, path.with_name("part.onnx"), weights=store)
                    values |= run(target, path.with_name("part.onnx"), values)
                for name, value in expected.items():
                    np.testing.assert_allclose(values[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} on {target} cut at {list(cuts)}")
    return facts


def noted(facts: ModelFacts, words: str) -> bool:
    return any(words in note for note in facts.notes)


@pytest.mark.parametrize("flag", [True, False])
def test_a_branch_may_read_what_is_an_output_too(tmp_path: Path, flag: bool) -> None:
    """OpenVINO handed out `a` for `q`, of the model and of each segment that ends behind the If."""
    inner = helper.make_node(
        "If", ["flag"], ["deep"], then_branch=body("t", [helper.make_node("Neg", ["b"], ["n"])], "n"), else_branch=body("e", [], "a")
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node(
            "If",
            ["flag"],
            ["q"],
            then_branch=body("then", [inner, helper.make_node("Add", ["deep", "a"], ["s"])], "s"),
            else_branch=body("else", [helper.make_node("Exp", ["b"], ["z"])], "z"),
        ),
        helper.make_node("Mul", ["q", "b"], ["y"]),
    ]
    path = save(tmp_path, nodes, [info("x"), info("flag", (), B)], [info("a"), info("y")])
    a = np.maximum(X, 0)
    b = 1 / (1 + np.exp(-a))
    facts = check_all_cuts(path, {"x": X, "flag": np.array(flag)}, {"a": a, "y": (a - b if flag else np.exp(b)) * b})
    assert noted(facts, "1 outputs that branches or bodies read too are copied")
    assert noted(facts, "1 outputs of branches that were values around them")


def test_a_dropout_does_not_rename_the_inputs_of_a_segment(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Dropout", ["x"], ["a", "mask"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Dropout", ["b", "ratio", "off"], ["c"]),
        helper.make_node("Dropout", ["c"], ["y"]),
    ]
    path = save(tmp_path, nodes, [info("x")], [info("c"), info("y")], {"ratio": np.float32(0.5), "off": np.array(False)})
    facts = check_all_cuts(path, {"x": X}, {"c": np.exp(X), "y": np.exp(X)})
    assert noted(facts, "3 Dropout nodes")
    assert {node.op_type for node in onnx.load(tmp_path / "prepared.onnx").graph.node} == {"Exp", "Identity"}


def test_a_dropout_whose_mask_is_read_or_that_trains_stays(tmp_path: Path) -> None:
    nodes = [helper.make_node("Dropout", ["x"], ["a", "mask"]), helper.make_node("Dropout", ["a", "ratio", "on"], ["y"])]
    path = save(tmp_path, nodes, [info("x")], [info("y"), info("mask", (2, 3), B)], {"ratio": np.float32(0.0), "on": np.array(True)})
    prepare(path, tmp_path / "prepared.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "prepared.onnx").graph.node] == ["Dropout", "Dropout"]


def test_sparse_weights_are_written_out(tmp_path: Path) -> None:
    def sparse(name: str, places: Any) -> onnx.SparseTensorProto:
        values = numpy_helper.from_array(np.array([1.5, 2.5], np.float32), name)
        return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(places, np.int64), f"{name}.at"), [2, 3])

    nodes = [
        helper.make_node("Add", ["x", "flat"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Mul", ["b", "grid"], ["y"]),
    ]
    path = save(tmp_path, nodes, [info("x")], [info("y")], sparse=[sparse("flat", [1, 4]), sparse("grid", [[0, 2], [1, 0]])])
    flat, grid = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    flat[0, 1], flat[1, 1], grid[0, 2], grid[1, 0] = 1.5, 2.5, 1.5, 2.5
    check_all_cuts(path, {"x": X}, {"y": (X + flat) * grid})


def test_a_sparse_weight_that_does_not_fit_its_shape_or_the_memory_is_refused(tmp_path: Path) -> None:
    for places, extents, words in (([[7, 7]], [2, 3], "indices outside"), ([1], [1 << 20, 1 << 20], "elements")):
        values = numpy_helper.from_array(np.ones(1, np.float32), "w")
        bad = onnx.SparseTensorProto(values=values, indices=numpy_helper.from_array(np.array(places, np.int64)), dims=extents)
        path = save(tmp_path, [helper.make_node("Add", ["x", "w"], ["y"])], [info("x")], [info("y")], sparse=[bad])
        with pytest.raises(ModelError, match=words):
            prepare(path, tmp_path / "prepared.onnx")


def test_bfloat16_is_no_place_to_cut(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Cast", ["r"], ["half"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["half"], ["y"], to=F),
    ]
    prepare(save(tmp_path, nodes, [info("x")], [info("y")]), tmp_path / "prepared.onnx")
    with Slicer(tmp_path / "prepared.onnx") as slicer, pytest.raises(ValueError, match="cannot cut through 'half': BFLOAT16"):
        slicer.write(0, 1, tmp_path / "part.onnx")


def test_a_model_that_only_hands_its_inputs_through_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [info("x")], [info("x")])
    with pytest.raises(ModelError, match="computes nothing"):
        prepare(path, tmp_path / "prepared.onnx")


@pytest.mark.parametrize("target", [ONNXRUNTIME, OPENVINO])
@pytest.mark.parametrize("shape", [(2, 3), (64, 1024)])  # copied into a buffer, and bound as it is
def test_the_engine_hands_out_an_output_that_is_an_input(tmp_path: Path, target: str, shape: tuple[int, int]) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])]
    sides = [info("x", shape), info("idle", shape)]
    path = save(tmp_path, nodes, sides, [info("idle", shape), info("y", shape), info("x", shape)])
    bundle = make_bundle(
        tmp_path / "made.aivmm", onnx.shape_inference.infer_shapes(onnx.load(path)), [Part(target, 0, 0), Part(target, 1, 1)]
    )
    x, idle = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    with aivmm.load_plan(bundle) as engine:
        for scale in (1, 2):
            answers = engine.run({"x": scale * x, "idle": idle})
            np.testing.assert_array_equal(answers["x"], scale * x)
            np.testing.assert_array_equal(answers["idle"], idle)
            np.testing.assert_array_equal(answers["y"], -np.maximum(scale * x, 0))
            assert not np.shares_memory(answers["idle"], idle)
