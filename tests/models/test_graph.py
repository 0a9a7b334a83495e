"""Where a model can be cut, in which order its nodes stand, and how blocks share the work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import ModelError
from aivmm.models.blocks import Place, partition
from aivmm.models.graph import MAX_LIVE, analyse, cut_further
from aivmm.models.order import PreparedGraph


def info(name: str, shape: Sequence[int | str] = (2, 8), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, shape: Sequence[int] = (8, 8)) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(shape, 0.1, np.float32), name)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    initializers: Sequence[onnx.TensorProto] = (),
) -> Path:
    for index, node in enumerate(nodes):
        node.name = node.name or f"n{index}"
    graph = helper.make_graph(list(nodes), "g", list(inputs) or [info("x")], list(outputs) or [info("y")], list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def layers(count: int, *, last: str = "y") -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """`count` residual layers: MatMul, Tanh, Add of the layer's input."""
    nodes, weights, before = [], [], "x"
    for index in range(count):
        after = last if index == count - 1 else f"h{index}"
        weights.append(weight(f"w{index}"))
        nodes += [
            helper.make_node("MatMul", [before, f"w{index}"], [f"m{index}"]),
            helper.make_node("Tanh", [f"m{index}"], [f"t{index}"]),
            helper.make_node("Add", [f"t{index}", before], [after]),
        ]
        before = after
    return nodes, weights


# --- order


def test_a_node_stands_right_before_what_needs_it_whatever_the_files_order(tmp_path: Path) -> None:
    late = [helper.make_node("Relu", ["z"], ["zr"], name="side"), helper.make_node("Exp", ["zr"], ["ze"], name="side2")]
    chain, weights = layers(3, last="h")
    nodes = [*late, *chain, helper.make_node("Add", ["h", "ze"], ["y"], name="end")]
    prepared = PreparedGraph(save(tmp_path / "m.onnx", nodes, inputs=[info("x"), info("z")], initializers=weights))
    assert [node.name for node in prepared.nodes][-3:] == ["side", "side2", "end"]
    assert [len(live) for _, live in prepared.live()] == [1, 1, 1, 2, 2, 1, 2, 2, 1, 2, 2]


def test_a_shape_is_measured_early_so_that_its_tensor_need_not_stay_alive(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Reshape", ["a", "flat"], ["b"], name="flatten"),
        helper.make_node("Exp", ["b"], ["c"], name="exp"),
        helper.make_node("Shape", ["a"], ["s"], name="shape"),
        helper.make_node("Reshape", ["c", "s"], ["y"], name="back"),
    ]
    flat = numpy_helper.from_array(np.array([-1]), "flat")
    prepared = PreparedGraph(save(tmp_path / "m.onnx", nodes, initializers=[flat]))
    assert [node.name for node in prepared.nodes] == ["first", "shape", "flatten", "exp", "back"]


def test_what_no_output_needs_is_left_out(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Exp", ["x"], ["nobody"])]
    assert analyse(save(tmp_path / "m.onnx", nodes)).node_count == 1


def test_a_value_that_only_a_branch_reads_is_alive_until_the_branch(tmp_path: Path) -> None:
    body = [helper.make_graph([helper.make_node("Neg", ["a"], ["r"])], name, [], [info("r")]) for name in ("t", "e")]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("If", ["flag"], ["c"], then_branch=body[0], else_branch=body[1]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    cuts = analyse(save(tmp_path / "m.onnx", nodes, inputs=[info("x"), info("flag", (), TensorProto.BOOL)])).cut_points
    assert [[spec.name for spec in cut.tensors] for cut in cuts] == [["a"], ["a", "b"], ["b", "c"]]


def test_an_output_of_the_model_is_alive_only_while_something_reads_it(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Exp", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["y"])]
    structure = analyse(save(tmp_path / "m.onnx", nodes, outputs=[info("a"), info("y")]))
    assert [[spec.name for spec in cut.tensors] for cut in structure.cut_points] == [["a"], ["b"]]
    assert [cut.bytes for cut in structure.cut_points] == [64, 64]


@pytest.mark.parametrize("broken", ["cycle", "undefined"])
def test_a_graph_that_cannot_run_is_refused_in_one_line(tmp_path: Path, broken: str) -> None:
    second = "y" if broken == "cycle" else "nowhere"
    nodes = [helper.make_node("Add", ["x", second], ["a"], name="culprit"), helper.make_node("Relu", ["a"], ["y"], name="next")]
    graph = helper.make_graph(nodes, "g", [info("x")], [info("y")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"cyclic at node" if broken == "cycle" else r"'culprit' \(Add\) reads 'nowhere'") as caught:
        analyse(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


# --- cut points


def test_a_cut_has_work_on_both_sides(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([4, 4]), "shape")
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Exp", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["y"]),
    ]
    structure = analyse(save(tmp_path / "m.onnx", nodes, outputs=[info("y", (4, 4))], initializers=[shape]))
    assert [cut.position for cut in structure.cut_points] == [3]
    assert [(block.first, block.last) for block in structure.blocks] == [(0, 2), (3, 4)]


def test_no_cut_goes_through_more_than_four_tensors(tmp_path: Path) -> None:
    fan = [helper.make_node("Relu", ["x"], ["a"]), *(helper.make_node("Exp", ["a"], [f"e{index}"]) for index in range(6))]
    nodes = [*fan, helper.make_node("Sum", [f"e{index}" for index in range(6)], ["s"]), helper.make_node("Neg", ["s"], ["y"])]
    widths = [len(cut.tensors) for cut in analyse(save(tmp_path / "m.onnx", nodes)).cut_points]
    assert max(widths) == MAX_LIVE
    assert widths.count(1) == 2


def test_a_model_of_independent_halves_can_be_cut_between_them(tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["x"], ["y"]), helper.make_node("Exp", ["z"], ["w"])]
    structure = analyse(save(tmp_path / "m.onnx", nodes, inputs=[info("x"), info("z")], outputs=[info("y"), info("w")]))
    assert [(cut.tensors, cut.bytes) for cut in structure.cut_points] == [((), 0)]
    assert [[spec.name for spec in (*block.inputs, *block.outputs)] for block in structure.blocks] == [["x", "y"], ["z", "w"]]


def test_a_cut_through_a_tensor_of_unknown_size_is_listed_without_a_size_and_avoided(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["a"]),
        helper.make_node("NonZero", ["a"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["c"], ["d"], keepdims=0),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    structure = analyse(save(tmp_path / "m.onnx", nodes))
    assert [cut.bytes for cut in structure.cut_points] == [64, None, None, 4]
    assert [block.first for block in analyse(tmp_path / "m.onnx", max_blocks=3).blocks] == [0, 1, 4]
    assert structure.data_dependent
    assert [operator.op_type for operator in structure.operators if operator.data_dependent] == ["NonZero", "Cast", "ReduceSum"]


# --- blocks


def test_layers_that_are_alike_become_blocks_that_are_alike(tmp_path: Path) -> None:
    nodes, weights = layers(30)
    structure = analyse(save(tmp_path / "m.onnx", nodes, initializers=weights), max_blocks=20)
    assert len(structure.blocks) == 15
    assert len({block.structure for block in structure.blocks}) == 1
    assert all(block.op_types == {"Add": 2, "MatMul": 2, "Tanh": 2} for block in structure.blocks)
    assert structure.weight_bytes == 30 * 256 == sum(block.weight_bytes for block in structure.blocks)
    assert structure.flops == 30 * (2 * 2 * 8 * 8 + 2 * 8 + 2 * 8) == sum(block.flops or 0 for block in structure.blocks)


def test_a_block_does_not_begin_with_what_runtimes_fuse_into_the_node_before(tmp_path: Path) -> None:
    nodes, weights, before = [], [], "x"
    for index in range(4):
        weights += [weight(f"w{index}"), weight(f"b{index}", (8,))]
        nodes += [
            helper.make_node("MatMul", [before, f"w{index}"], [f"m{index}"]),
            helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"]),
            helper.make_node("Relu", [f"a{index}"], ["y" if index == 3 else f"h{index}"]),
        ]
        before = f"h{index}"
    structure = analyse(save(tmp_path / "m.onnx", nodes, initializers=weights))
    assert [cut.position for cut in structure.cut_points] == list(range(1, 12))
    assert [(block.first, block.last) for block in structure.blocks] == [(0, 2), (3, 5), (6, 8), (9, 11)]


def test_a_wide_heavy_stretch_is_opened_with_wider_cuts(tmp_path: Path) -> None:
    """Two towers side by side between narrow waists: all the work would be one block if only waists counted."""
    weights, nodes, ends = [weight("w")], [helper.make_node("Relu", ["x"], ["a"])], []
    for tower in "pq":
        before = "a"
        for index in range(8):
            nodes.append(helper.make_node("MatMul", [before, "w"], [f"{tower}{index}"]))
            before = f"{tower}{index}"
        ends.append(before)
    nodes.append(helper.make_node("Add", ends, ["y"]))
    structure = analyse(save(tmp_path / "m.onnx", nodes, initializers=weights))
    assert len(structure.blocks) >= 8
    assert max(block.flops or 0 for block in structure.blocks) <= (structure.flops or 0) / 4


def test_analysis_is_the_same_each_time_and_free_of_names(tmp_path: Path) -> None:
    nodes, weights = layers(5)
    path = save(tmp_path / "m.onnx", nodes, initializers=weights)
    model = onnx.load(path)
    renamed = {
        name: f"?{index}" for index, name in enumerate([*(n for node in model.graph.node for n in node.output), *(w.name for w in weights)])
    }
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*model.graph.initializer, *model.graph.value_info, *model.graph.output):
        value.name = renamed.get(value.name, value.name)
    onnx.save(model, tmp_path / "renamed.onnx")
    one, two, other = analyse(path), analyse(path), analyse(tmp_path / "renamed.onnx")
    assert one == two
    assert [(b.first, b.last, b.structure, b.content) for b in one.blocks] == [
        (b.first, b.last, b.structure, b.content) for b in other.blocks
    ]
    assert (one.structure, one.content) == (other.structure, other.content)


def test_a_model_without_work_is_one_block_and_one_without_nodes_has_none(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["a"]), helper.make_node("Identity", ["a"], ["y"])]
    structure = analyse(save(tmp_path / "m.onnx", nodes))
    assert ([(block.first, block.last) for block in structure.blocks], structure.cut_points) == ([(0, 1)], ())
    graph = helper.make_graph([], "g", [info("x")], [info("x")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "empty.onnx")
    assert analyse(tmp_path / "empty.onnx").blocks == ()


def test_max_blocks_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_blocks"):
        analyse(save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])]), max_blocks=0)


# --- the rule itself

works = st.lists(st.integers(0, 1000).map(float), min_size=1, max_size=60)


@given(work=works, data=st.data(), max_blocks=st.integers(1, 24))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_blocks_are_all_nodes_once_split_at_useful_places_and_no_more_than_asked(
    work: list[float], data: st.DataObject, max_blocks: int
) -> None:
    positions = data.draw(st.sets(st.integers(1, len(work)).filter(lambda at: at < len(work)))) if len(work) > 1 else set()
    places = {at: Place(level=data.draw(st.integers(1, 8)), bytes=data.draw(st.integers(0, 9))) for at in positions}
    blocks = partition(work, places, max_blocks)
    assert [node for first, last in blocks for node in range(first, last + 1)] == list(range(len(work)))
    assert len(blocks) <= max_blocks
    before = [0.0, *accumulate(work)]
    for first, _ in blocks[1:]:
        assert first in places
        assert 0 < before[first] < before[-1]
    if len(blocks) > 1:
        shares = [before[last + 1] - before[first] for first, last in blocks]
        assert min(shares) >= before[-1] / max_blocks / 8


def test_narrow_places_alone_serve_where_they_share_the_work_evenly() -> None:
    places = {at: Place(level=1 if at % 2 == 0 else 2, bytes=1) for at in range(1, 16)}
    assert [first for first, _ in partition([10.0] * 16, places, 24)] == list(range(0, 16, 2))


def test_of_places_with_no_work_between_them_the_one_with_fewest_bytes_stays() -> None:
    places = {at: Place(level=1, bytes=size) for at, size in ((1, 9), (2, 4), (3, 4))}
    assert partition([10.0, 0.0, 0.0, 10.0], places, 24) == [(0, 1), (2, 3)]


def test_of_cuts_of_equal_weight_the_widest_goes_first() -> None:
    places = {1: Place(level=1, bytes=1), 2: Place(level=3, bytes=1), 3: Place(level=1, bytes=1)}
    assert partition([10.0] * 4, places, 3) == [(0, 0), (1, 2), (3, 3)]


def test_blocks_are_cut_further_at_cut_points_and_only_there(tmp_path: Path) -> None:
    nodes, weights = layers(6)
    path = save(tmp_path / "m.onnx", nodes, initializers=weights)
    whole = analyse(path, max_blocks=2)
    inner = next(cut.position for cut in whole.cut_points if cut.position not in {block.first for block in whole.blocks})
    found = cut_further(path, whole, [inner, whole.blocks[-1].first])
    assert sorted({block.first for block in found.blocks}) == sorted({block.first for block in whole.blocks} | {inner})
    assert [block.index for block in found.blocks] == list(range(len(whole.blocks) + 1))
    assert found.blocks[0].first == 0 and found.blocks[-1].last == whole.node_count - 1
    assert all(one.last + 1 == two.first for one, two in pairwise(found.blocks))
    assert (found.structure, found.content, found.cut_points, found.operators) == (
        whole.structure, whole.content, whole.cut_points, whole.operators,
    )  # fmt: skip
    assert cut_further(path, whole, []) == whole
    with pytest.raises(ValueError, match="no cut points"):
        cut_further(path, whole, [whole.node_count + 5])
