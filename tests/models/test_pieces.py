"""Pieces that follow the operators: convex, few, in an order in which they run, and right; repeats: what is alike is cut alike."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import helper, numpy_helper

from aivmm.models.contract import arrange, closed, levels, ring
from aivmm.models.graph import analyse, analyse_graph
from aivmm.models.order import PreparedGraph
from aivmm.models.pieces import cut_around, split_around
from aivmm.models.repeats import stretches
from aivmm.models.slice import Slicer, WeightStore
from tests.models.random_graphs import feeds_for, graphs, info
from tests.models.test_slice import run, save


def answers_in_pieces(path: Path, pieces: Sequence[Collection[str]], folder: Path) -> dict[str, bytes]:
    """Run the blocks' chain of a model in that order, without optimisations."""
    prepared = PreparedGraph(path, pieces=pieces)
    slicer, store = Slicer(prepared), WeightStore(folder / "w")
    values = feeds_for(True)
    for first, last in prepared.runs:
        part = slicer.write(first, last, folder / "part.onnx", weights=store)
        values.update(run(part.path, values, plain=True))
    return {str(value.name): values[str(value.name)].tobytes() for value in prepared.outputs}


def fewest(prepared: PreparedGraph, odd: Collection[str]) -> int:
    """Count the changes on the path with the most of them: no partition has fewer pieces."""
    changes = {}
    for node in prepared.nodes:
        makers = [maker for value in prepared.reads(node) if (maker := value.producer()) is not None]
        changes[node] = max((changes[each] + ((each.name in odd) != (node.name in odd)) for each in makers), default=0)
    return 1 + max(changes.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pieces")


@given(graph=graphs(), data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_pieces_around_any_set_of_nodes_are_pure_few_and_right(folder: Path, graph: onnx.GraphProto, data: st.DataObject) -> None:
    path = save(graph, folder / "m.onnx")
    prepared = PreparedGraph(path)
    names = [str(node.name) for node in prepared.nodes]
    refused = data.draw(st.sets(st.sampled_from(names)))
    pieces = split_around(prepared, refused)
    assert sorted(itertools.chain(*pieces)) == sorted(names)
    joined = {str(node.name) for node in prepared.nodes if node.op_type in ("SequenceConstruct", "SequenceAt")}
    if not joined:
        assert all(set(piece) <= refused or not set(piece) & refused for piece in pieces)
        assert len(pieces) == fewest(prepared, refused)
    expected = run(path, feeds_for(True), plain=True)
    assert answers_in_pieces(path, pieces, folder) == {name: value.tobytes() for name, value in expected.items()}


@given(graph=graphs(), data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_convex_set_can_be_cut_out_and_no_other(folder: Path, graph: onnx.GraphProto, data: st.DataObject) -> None:
    path = save(graph, folder / "m.onnx")
    prepared = PreparedGraph(path)
    wanted = data.draw(st.sets(st.sampled_from(prepared.nodes), min_size=1))
    above = {node: {maker for value in prepared.reads(node) if (maker := value.producer()) is not None} for node in prepared.nodes}
    for node in prepared.nodes:
        above[node] |= set().union(*(above[each] for each in above[node]))
    between = {
        node for node in prepared.nodes if node not in wanted and above[node] & wanted and any(node in above[each] for each in wanted)
    }
    names = [str(node.name) for node in wanted]
    if between:
        with pytest.raises(ValueError, match=r"not convex: piece 0 -> "):
            PreparedGraph(path, pieces=[names])
        return
    cut = PreparedGraph(path, pieces=[names])
    assert {str(node.name) for node in prepared.nodes} == {str(node.name) for node in cut.nodes}
    assert set(names) in [{str(node.name) for node in cut.nodes[first : last + 1]} for first, last in cut.runs]
    if not any(node.op_type == "SequenceConstruct" for node in prepared.nodes):
        expected = run(path, feeds_for(True), plain=True)
        assert answers_in_pieces(path, [names], folder) == {name: value.tobytes() for name, value in expected.items()}


def inception(path: Path) -> Path:
    """A stem, then four branches of different length side by side, joined; twice."""
    nodes, before = [], "x0"
    for number in range(2):
        nodes.append(helper.make_node("Relu", [before], [f"stem{number}"]))
        ends = []
        for branch in range(4):
            last = f"stem{number}"
            for step in range(branch + 1):
                nodes.append(helper.make_node("MatMul", [last, "w"], [f"b{number}.{branch}.{step}"]))
                last = f"b{number}.{branch}.{step}"
            ends.append(last)
        before = f"join{number}"
        nodes.append(helper.make_node("Sum", ends, [before]))
    for node in nodes:
        node.name = node.output[0]
    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    return save(helper.make_graph(nodes, "g", [info("x0")], [info(before)], [weight]), path)


def test_a_branch_of_a_wide_block_becomes_a_piece_when_it_is_refused_or_asked_for(tmp_path: Path) -> None:
    path = inception(tmp_path / "m.onnx")
    prepared = PreparedGraph(path)
    pieces = split_around(prepared, ["b0.2.1"])
    assert [len(piece) for piece in pieces] == [2, 1, 21]
    structure = analyse(path, pieces=[["b1.3.0", "b1.3.1", "b1.3.2", "b1.3.3"]])
    edges = {block.first for block in structure.blocks}
    cut = PreparedGraph(path, pieces=[["b1.3.0", "b1.3.1", "b1.3.2", "b1.3.3"]])
    names = [node.name for node in cut.nodes]
    assert {names.index("b1.3.0"), names.index("b1.3.3") + 1} <= edges
    assert {cut.position for cut in structure.cut_points} >= edges - {0}
    whole = analyse(path)
    assert (structure.structure, structure.content, structure.flops) == (whole.structure, whole.content, whole.flops)


@given(graph=graphs(), data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_blocks_cut_around_nodes_have_all_or_none_of_them_and_stay_right(folder: Path, graph: onnx.GraphProto, data: st.DataObject) -> None:
    """Twice, as for two runtimes that refuse different things: what was kept apart stays so."""
    path = save(graph, folder / "m.onnx")
    structure = analyse(path, max_blocks=4)
    names = [str(node.name) for node in PreparedGraph(path).nodes]
    both = [data.draw(st.sets(st.sampled_from(names))) for _ in range(2)]
    for apart in both:
        structure = cut_around(path, structure, apart)
    prepared = PreparedGraph(path, pieces=structure.pieces)
    blocks = [{str(node.name) for node in prepared.nodes[block.first : block.last + 1]} for block in structure.blocks]
    assert sorted(itertools.chain(*blocks)) == sorted(names)
    if not any(node.op_type in ("SequenceConstruct", "SequenceAt") for node in prepared.nodes):
        assert all(block <= apart or not block & apart for block in blocks for apart in both)
    whole = analyse(path)
    assert (structure.structure, structure.content) == (whole.structure, whole.content)
    assert {(each.signature, each.count) for each in structure.operators} == {(each.signature, each.count) for each in whole.operators}
    slicer, values = Slicer(prepared), feeds_for(True)
    for block in structure.blocks:
        values.update(run(slicer.write(block.first, block.last, folder / "part.onnx").path, values, plain=True))
    expected = run(path, feeds_for(True), plain=True)
    assert {name: values[name].tobytes() for name in expected} == {name: value.tobytes() for name, value in expected.items()}
    assert cut_around(path, structure, both[1]) == structure


def test_blocks_are_cut_in_the_order_at_hand_where_that_is_as_good(tmp_path: Path) -> None:
    path = inception(tmp_path / "m.onnx")
    structure = analyse(path)
    in_order = cut_around(path, structure, ["stem1"])
    assert in_order.pieces == () and in_order.cut_points == structure.cut_points
    scattered = cut_around(path, structure, ["b0.1.0", "b0.3.2", "b1.2.2"])  # five runs in the order, or these
    assert [set(piece) & {"b0.1.0", "b0.3.2", "b1.2.2"} for piece in scattered.pieces] == [
        set(),
        {"b0.1.0", "b0.3.2"},
        set(),
        {"b1.2.2"},
        set(),
    ]
    assert cut_around(path, structure, []) == structure
    with pytest.raises(ValueError, match="no node 'nobody'"):
        cut_around(path, structure, ["nobody"])


def test_pieces_that_overlap_or_name_no_node_are_refused(tmp_path: Path) -> None:
    path = inception(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="'stem0' is in two pieces"):
        PreparedGraph(path, pieces=[["stem0"], ["stem0"]])
    with pytest.raises(ValueError, match="no node 'nobody'"):
        PreparedGraph(path, pieces=[["nobody"]])
    with pytest.raises(ValueError, match="no node 'nobody'"):
        split_around(PreparedGraph(path), ["nobody"])
    with pytest.raises(ValueError, match="not convex: piece 0 -> piece 1 -> piece 0"):
        PreparedGraph(path, pieces=[["stem0", "b0.1.1"], ["b0.1.0", "join0"]])


def test_what_cannot_cross_a_cut_stays_with_what_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x0"], ["a"], name="a"),
        helper.make_node("SequenceConstruct", ["a", "x0"], ["both"], name="both"),
        helper.make_node("Exp", ["a"], ["e"], name="e"),
        helper.make_node("SequenceAt", ["both", "first"], ["at"], name="at"),
        helper.make_node("Add", ["at", "e"], ["y"], name="y"),
    ]
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    path = save(helper.make_graph(nodes, "g", [info("x0")], [info("y")], [first]), tmp_path / "m.onnx")
    assert {frozenset(piece) for piece in split_around(PreparedGraph(path), ["at"])} >= {frozenset(("both", "at"))}
    with pytest.raises(ValueError, match="cannot cut through 'both', at the edge of a piece"):
        analyse_graph(PreparedGraph(path, pieces=[["at"]]))


# --- the arithmetic


@given(data=st.data(), count=st.integers(1, 12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_closing_a_grouping_merges_no_more_than_it_must(data: st.DataObject, count: int) -> None:
    needs = [sorted(data.draw(st.sets(st.integers(0, node - 1), max_size=3))) if node else [] for node in range(count)]
    group = [data.draw(st.integers(0, count - 1)) for _ in range(count)]
    found = closed(needs, group)
    order = arrange(needs, found)
    assert order is not None and sorted(order) == list(range(count))
    assert all(order.index(each) < order.index(node) for node, needed in enumerate(needs) for each in needed)
    assert all(found[a] == found[b] for a in range(count) for b in range(count) if group[a] == group[b])
    assert (arrange(needs, group) is None) == bool(ring(needs, group))
    if arrange(needs, group) is not None:
        assert len(set(found)) == len(set(group))
    odd = data.draw(st.sets(st.sampled_from(sorted(set(found)))))
    for level in levels(needs, found, odd):
        assert all(level[each] <= level[node] for node, needed in enumerate(needs) for each in needed)
        assert all(level[node] % 2 == (found[node] in odd) for node in range(count))


# --- repeats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcabcabc", [(0, 3, 3)]),
        ("xaby", []),
        ("xababy", [(1, 2, 2)]),
        ("aaaa", [(0, 1, 4)]),
        ("sabcabcabctdedeu", [(1, 3, 3), (11, 2, 2)]),
        ("xabcabcabcaby", [(1, 3, 3)]),
        ("", []),
        ("a", []),
    ],
)
def test_stretches_of_a_text(text: str, expected: list[tuple[int, int, int]]) -> None:
    assert [(each.first, each.period, each.count) for each in stretches(text, [1.0] * len(text))] == expected


def transformer(path: Path, layers: int) -> Path:
    """A stem, layers of eight nodes with a skip each, a head."""
    rng = np.random.default_rng(0)
    nodes, weights, before = [helper.make_node("MatMul", ["x0", "w.in"], ["h0"])], [("w.in", (3, 64))], "h0"
    for layer in range(layers):
        steps = ["MatMul", "Relu", "MatMul", "Tanh", "MatMul", "Softmax"]
        last = before
        for step, op in enumerate(steps):
            reads = [last]
            if op == "MatMul":
                weights.append((f"w{layer}.{step}", (64, 64)))
                reads.append(weights[-1][0])
            last = f"l{layer}.{step}"
            nodes.append(helper.make_node(op, reads, [last]))
        nodes.append(helper.make_node("Add", [last, before], [f"l{layer}.sum"]))
        before = f"l{layer}.sum"
    nodes.append(helper.make_node("MatMul", [before, "w.out"], ["y"]))
    weights.append(("w.out", (64, 3)))
    made = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in weights]
    return save(helper.make_graph(nodes, "g", [info("x0")], [info("y")], made), path)


@pytest.mark.parametrize(("layers", "count"), [(5, 5), (12, 12), (40, 20)])
def test_layers_are_cut_alike_and_shown_as_repeats(tmp_path: Path, layers: int, count: int) -> None:
    structure = analyse(transformer(tmp_path / "m.onnx", layers))
    assert len(structure.blocks) <= 24
    repeat = max(structure.repeats, key=lambda each: each.count * each.period)
    assert repeat.count == count
    inside = structure.blocks[repeat.first : repeat.end]
    assert len({block.structure for block in inside}) == repeat.period
    assert len({block.content for block in inside}) > repeat.period  # the weights differ
    assert [block.first for block in structure.blocks] == [0, *(block.last + 1 for block in structure.blocks[:-1])]


def masked(path: Path, layers: int) -> Path:
    """Layers that add one mask, made of an input of its own, in the middle of each; what is written first needs it first."""
    rng = np.random.default_rng(0)
    nodes, weights, before = [helper.make_node("MatMul", ["x0", "w.in"], ["h0"])], [("w.in", (3, 64))], "h0"
    for layer in range(layers):
        weights += [(f"w{layer}.{step}", (64, 64)) for step in range(2)]
        nodes.append(helper.make_node("MatMul", [before, f"w{layer}.0"], [f"l{layer}.scores"]))
        if not layer:
            nodes += [helper.make_node("Neg", ["x1"], ["hole"]), helper.make_node("ReduceSum", ["hole", "axes"], ["mask"])]
        nodes += [
            helper.make_node("Add", [f"l{layer}.scores", "mask"], [f"l{layer}.masked"]),
            helper.make_node("Softmax", [f"l{layer}.masked"], [f"l{layer}.soft"]),
            helper.make_node("MatMul", [f"l{layer}.soft", f"w{layer}.1"], [f"l{layer}.mixed"]),
            helper.make_node("Add", [f"l{layer}.mixed", before], [f"l{layer}.sum"]),
        ]
        before = f"l{layer}.sum"
    nodes.append(helper.make_node("MatMul", [before, "w.out"], ["y"]))
    weights.append(("w.out", (64, 3)))
    made = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in weights]
    made.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    return save(helper.make_graph(nodes, "g", [info("x0"), info("x1")], [info("y")], made), path)


def test_the_first_layer_is_like_the_others_when_what_all_share_stands_before_it(tmp_path: Path) -> None:
    path = masked(tmp_path / "m.onnx", 6)
    structure = analyse(path)
    names = [node.outputs[0].name for node in PreparedGraph(path).nodes]
    assert set(names[:2]) == {"hole", "mask"}
    (repeat,) = structure.repeats
    assert repeat.count == 6
    inside = structure.blocks[repeat.first : repeat.end]
    assert sum(block.op_types.get("Softmax", 0) for block in inside) == 6
