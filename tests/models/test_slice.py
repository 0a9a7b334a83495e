"""Segments, chained, answer as the whole does; their files share weights, keep names, and load in both runtimes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import openvino as ov
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import AivmmError
from aivmm.models.demo import write_demo
from aivmm.models.graph import analyse, analyse_graph
from aivmm.models.order import PreparedGraph
from aivmm.models.prepare import prepare
from aivmm.models.slice import Slicer, WeightStore, segment
from tests.models.random_graphs import HOSTILE, feeds_for, graphs

SHARED = Path(__file__).parents[3] / "shared" / "models"
FILES = ("ultraface_rfb_320", "magika_v3_3", "silero_vad_16k_op15", "super_resolution")  # of ../shared/models
Arrays = Mapping[str, np.ndarray[Any, Any]]


def run(path: Path, values: Arrays, *, plain: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    options = ort.SessionOptions()
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    answers = session.run(None, {each.name: values[each.name] for each in session.get_inputs()})
    return dict(zip((each.name for each in session.get_outputs()), answers, strict=True))


def chain(paths: Sequence[Path], feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    values = dict(feeds)
    for path in paths:
        values.update(run(path, values))
    return values


def assert_same(found: Arrays, expected: Arrays) -> None:
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = np.linalg.norm((found[name].astype(float) - value.astype(float)).ravel())
        assert error <= 1e-5 * np.linalg.norm(value.astype(float).ravel()), name


def pieces(slicer: Slicer, cuts: Sequence[int], folder: Path, store: WeightStore) -> list[Path]:
    edges = [0, *cuts, len(slicer.prepared.nodes)]
    return [
        slicer.write(first, end - 1, folder / f"{index}_{first}_{end}.onnx", weights=store).path
        for index, (first, end) in enumerate(itertools.pairwise(edges))
    ]


def save(graph: onnx.GraphProto, path: Path, *, opset: int = 17) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def info(name: str, shape: Sequence[int | str] = (2, 3), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, shape: Sequence[int], seed: int = 0) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name)


# --- real models


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Prepare a demo model or a file of ../shared/models, once; skip when it is absent or cannot be prepared."""
    folder = tmp_path_factory.mktemp("prepared")

    def make(name: str) -> Path:
        destination = folder / f"{name}.prepared.onnx"
        if not destination.exists():
            source = SHARED / f"{name}.onnx" if name in FILES else write_demo(name, folder)
            if not source.exists():
                pytest.skip(f"{source.name} is not in ../shared/models")
            try:
                prepare(source, destination)
            except AivmmError as error:
                pytest.skip(f"{name} cannot be prepared: {error}")
        return destination

    return make


def feeds_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    feeds = {}
    for value in PreparedGraph(path).inputs:
        shape, dtype = tuple(value.shape), value.dtype.numpy()
        ones = np.full(shape, 16000 if value.name == "sr" else 1, dtype)
        feeds[value.name] = rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else ones
    return feeds


def check_cuts(path: Path, folder: Path, *, at_most: int | None) -> None:
    feeds = feeds_of(path)
    expected = run(path, feeds)
    slicer = Slicer(path)
    cuts = [cut.position for cut in analyse_graph(slicer.prepared).cut_points]
    assert cuts
    step = 1 if at_most is None else max(1, len(cuts) // at_most)
    store = WeightStore(folder / "weights")
    for position in cuts[step // 2 :: step]:
        assert_same(chain(pieces(slicer, [position], folder, store), feeds), expected)
    three = [cuts[len(cuts) // 3], cuts[2 * len(cuts) // 3]]
    assert_same(chain(pieces(slicer, three, folder, store), feeds), expected)


@pytest.mark.parametrize(
    ("name", "at_most"),
    [
        ("squeezenet", 6),
        ("shufflenet", 3),
        ("encoder", 3),
        ("lstm", 7),
        ("ultraface_rfb_320", 6),
        ("magika_v3_3", 3),
        ("silero_vad_16k_op15", 4),
    ],
)
def test_a_model_cut_at_a_sample_of_its_cut_points_answers_as_the_whole(
    prepared: Callable[[str], Path], tmp_path: Path, name: str, at_most: int
) -> None:
    check_cuts(prepared(name), tmp_path, at_most=at_most)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "resnet50", "densenet121", "encoder", "recommender", *FILES])
def test_a_model_cut_at_every_cut_point_answers_as_the_whole(prepared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    check_cuts(prepared(name), tmp_path, at_most=None)


def test_blocks_written_one_by_one_are_what_the_analysis_says_and_load_in_both_runtimes(
    prepared: Callable[[str], Path], tmp_path: Path
) -> None:
    path = prepared("shufflenet")
    structure, core = analyse(path), ov.Core()
    store = WeightStore(tmp_path / "weights")
    with Slicer(path) as slicer:
        segments = [slicer.write(block.first, block.last, tmp_path / f"{block.index}.onnx", weights=store) for block in structure.blocks]
        cut = store.nbytes
        slicer.write_whole(tmp_path / "whole.onnx", weights=store)
    assert store.nbytes == cut == (tmp_path / "weights").stat().st_size
    for block, part in zip(structure.blocks, segments, strict=True):
        assert (part.structure, part.content) == (block.structure, block.content)
        assert (part.inputs, part.outputs, part.weight_bytes) == (block.inputs, block.outputs, block.weight_bytes)
        loaded = core.read_model(str(part.path))
        assert [port.any_name for port in loaded.inputs] == [spec.name for spec in block.inputs]
        assert [port.any_name for port in loaded.outputs] == [spec.name for spec in block.outputs]
    feeds = feeds_of(path)
    assert_same(chain([part.path for part in segments], feeds), run(path, feeds))
    assert_same(run(tmp_path / "whole.onnx", feeds), run(path, feeds))


# --- small graphs, each with its own trouble


def branch(name: str, op: str, reads: Sequence[str], *, initializers: Sequence[onnx.TensorProto] = ()) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node(op, list(reads), ["inner"], name=name)], name, [], [info("inner")], list(initializers))


@pytest.fixture
def branching(tmp_path: Path) -> Path:
    """x -> a -> If(reads a and b from outside, holds a large weight in one branch) -> y; c is an output that is also read inside."""
    big = numpy_helper.from_array(np.arange(600, dtype=np.float32).reshape(200, 3), "inner_weight")
    then = branch("then", "Mul", ["a", "shared"])
    other = helper.make_graph(
        [helper.make_node("ReduceMax", ["inner_weight"], ["top"], axes=[0]), helper.make_node("Add", ["b", "top"], ["inner"])],
        "other",
        [],
        [info("inner")],
        [big],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="n0"),
        helper.make_node("Sigmoid", ["a"], ["b"], name="n1"),
        helper.make_node("Add", ["b", "shared"], ["c"], name="n2"),
        helper.make_node("If", ["flag"], ["d"], name="n3", then_branch=then, else_branch=other),
        helper.make_node("Mul", ["c", "d"], ["y"], name="n4"),
    ]
    inputs = [info("x"), info("flag", (), TensorProto.BOOL)]
    return save(helper.make_graph(nodes, "g", inputs, [info("c"), info("y")], [weight("shared", (2, 3))]), tmp_path / "branching.onnx")


@pytest.mark.parametrize("flag", [True, False])
def test_values_captured_by_branches_cross_the_cut(branching: Path, tmp_path: Path, flag: bool) -> None:
    feeds = {"x": np.array([[1, -2, 3], [4, 5, -6]], np.float32), "flag": np.array(flag)}
    slicer = Slicer(branching)
    store = WeightStore(tmp_path / "weights")
    for position in range(1, len(slicer.prepared.nodes)):
        assert_same(chain(pieces(slicer, [position], tmp_path, store), feeds), run(branching, feeds))


def test_a_weight_inside_a_branch_is_read_by_both_runtimes_from_the_shared_file(branching: Path, tmp_path: Path) -> None:
    part = segment(branching, 0, 4, tmp_path / "whole.onnx")
    assert part.weights[0].stat().st_size == 2400
    feeds = {"x": np.ones((2, 3), np.float32), "flag": np.array(False)}
    expected = run(branching, feeds)
    assert_same(run(part.path, feeds), expected)
    compiled = ov.Core().compile_model(str(part.path), "CPU")
    assert_same({"y": compiled(feeds)["y"]}, {"y": expected["y"]})


def test_a_loop_that_reads_outer_values_can_be_cut_off_its_neighbours(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "a"], ["next"]),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body",
        [info("i", (), TensorProto.INT64), info("go", (), TensorProto.BOOL), info("state")],
        [info("still", (), TensorProto.BOOL), info("next")],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="n0"),
        helper.make_node("Exp", ["a"], ["b"], name="n1"),
        helper.make_node("Loop", ["trips", "", "b"], ["c"], name="n2", body=body),
        helper.make_node("Neg", ["c"], ["y"], name="n3"),
    ]
    trips = numpy_helper.from_array(np.array(3, np.int64), "trips")
    path = save(helper.make_graph(nodes, "g", [info("x")], [info("y")], [trips], value_info=[info("c")]), tmp_path / "loop.onnx")
    feeds = {"x": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}
    slicer = Slicer(path)
    for position in (1, 2, 3):
        assert_same(chain(pieces(slicer, [position], tmp_path, WeightStore(tmp_path / "w")), feeds), run(path, feeds))
    assert [spec.name for spec in slicer.write(2, 3, tmp_path / "tail.onnx").inputs] == ["b", "a"]


def test_hostile_names_are_kept_and_never_name_a_file(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", [before, "w"], [after], name=after) for before, after in itertools.pairwise(HOSTILE)]
    graph = helper.make_graph(nodes, HOSTILE[0], [info(HOSTILE[0], (8, 64))], [info(HOSTILE[-1], (8, 64))], [weight("w", (8, 64))])
    folder = tmp_path / "out"
    folder.mkdir()
    path = save(graph, tmp_path / "m.onnx")
    slicer, feeds = Slicer(path), {HOSTILE[0]: np.ones((8, 64), np.float32)}
    store = WeightStore(folder / "weights")
    paths = pieces(slicer, range(1, len(nodes)), folder, store)
    assert_same(chain(paths, feeds), run(path, feeds))
    assert {each.name for each in folder.iterdir()} == {each.name for each in paths} | {"weights"}
    assert {each.name for each in tmp_path.iterdir()} == {"out", "m.onnx"}


def test_constants_as_outputs_belong_to_the_first_segment_and_inputs_passed_through_to_none(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Exp", ["a"], ["y"])]
    graph = helper.make_graph(nodes, "g", [info("x"), info("unused")], [info("y"), info("x"), info("k")], [weight("k", (2, 3))])
    path = save(graph, tmp_path / "m.onnx")
    slicer, feeds = Slicer(path), {"x": -np.ones((2, 3), np.float32), "unused": np.zeros((2, 3), np.float32)}
    expected = run(path, feeds)
    parts = [slicer.write(0, 0, tmp_path / "a.onnx"), slicer.write(1, 1, tmp_path / "b.onnx")]
    assert [[spec.name for spec in part.outputs] for part in parts] == [["a", "k"], ["y"]]
    assert_same(chain([part.path for part in parts], feeds), expected)
    whole = slicer.write_whole(tmp_path / "whole.onnx")
    assert [spec.name for spec in whole.inputs] == ["x", "unused"]
    assert_same({**feeds, **run(whole.path, feeds)}, expected)


def test_missing_optional_outputs_and_inputs_stay_missing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r", "", "", "h0"], ["", "h"], hidden_size=4, name="lstm"),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    inputs = [info("x", (5, 1, 3)), info("h0", (1, 1, 4))]
    graph = helper.make_graph(nodes, "g", inputs, [info("y", (1, 1, 4))], [weight("w", (1, 16, 3)), weight("r", (1, 16, 4), 1)])
    path = save(graph, tmp_path / "m.onnx")
    feeds = {"x": np.ones((5, 1, 3), np.float32), "h0": np.ones((1, 1, 4), np.float32)}
    assert_same(chain(pieces(Slicer(path), [1], tmp_path, WeightStore(tmp_path / "w")), feeds), run(path, feeds))


def test_a_sequence_is_kept_inside_a_segment(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="n0"),
        helper.make_node("SequenceConstruct", ["a", "x"], ["both"], name="n1"),
        helper.make_node("SequenceAt", ["both", "first"], ["b"], name="n2"),
        helper.make_node("Exp", ["b"], ["y"], name="n3"),
    ]
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    path = save(helper.make_graph(nodes, "g", [info("x")], [info("y")], [first]), tmp_path / "m.onnx")
    assert 2 not in [cut.position for cut in analyse(path).cut_points]
    with pytest.raises(ValueError, match="cannot cut through 'both'"):
        segment(path, 0, 1, tmp_path / "a.onnx")


def test_positions_and_folders_that_do_not_fit_are_refused(branching: Path, tmp_path: Path) -> None:
    for first, last in ((-1, 2), (3, 2), (0, 5), (5, 5)):
        with pytest.raises(ValueError, match="no run of nodes"):
            segment(branching, first, last, tmp_path / "a.onnx")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="must lie beside"):
        segment(branching, 0, 2, tmp_path / "a.onnx", weights=WeightStore(tmp_path / "elsewhere" / "weights"))


# --- files


def many_weights(path: Path) -> Path:
    """Two large weights of equal bytes, one of 2 MiB, one small."""
    twin = weight("twin_a", (64, 64))
    other = onnx.TensorProto()
    other.CopyFrom(twin)
    other.name = "twin_b"
    nodes = [
        helper.make_node("MatMul", ["x", "twin_a"], ["a"]),
        helper.make_node("MatMul", ["a", "twin_b"], ["b"]),
        helper.make_node("Add", ["b", "small"], ["c"]),
        helper.make_node("MatMul", ["c", "wide"], ["y"]),
    ]
    weights = [twin, other, weight("small", (64,), 3), weight("wide", (64, 8192), 4)]
    return save(helper.make_graph(nodes, "g", [info("x", (2, 64))], [info("y", (2, 8192))], weights), path)


def places(path: Path) -> dict[str, tuple[str, int, int]]:
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (entries["location"], int(entries["offset"]), int(entries["length"]))
    return found


def test_weights_are_stored_once_aligned_and_named_without_a_folder(tmp_path: Path) -> None:
    part = segment(many_weights(tmp_path / "m.onnx"), 0, 3, tmp_path / "s.onnx", weights=WeightStore(tmp_path / "store.bin"))
    stored = places(part.path)
    assert set(stored) == {"twin_a", "twin_b", "wide"}
    assert stored["twin_a"] == stored["twin_b"] == ("store.bin", 0, 64 * 64 * 4)
    assert stored["wide"][1] % 4096 == 0
    assert (tmp_path / "store.bin").stat().st_size == stored["wide"][1] + 64 * 8192 * 4
    assert part.weights == (tmp_path / "store.bin",)


def test_a_store_starts_anew_fills_gaps_with_zeros_and_aligns_by_size(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(b"left from another run")
    odd, other, large = (ir.tensor(np.full(size, value, np.uint8)) for value, size in ((1, 1030), (2, 1030), (3, 1 << 20)))
    store = WeightStore(path)
    offsets = [store.put(tensor, name)[0] for name, tensor in (("odd", odd), ("other", other), ("large", large), ("other", other))]
    assert offsets == [0, 1088, 4096, 1088]
    assert path.read_bytes() == b"\1" * 1030 + bytes(58) + b"\2" * 1030 + bytes(4096 - 2118) + b"\3" * (1 << 20)
    assert store.nbytes == path.stat().st_size


def test_a_segment_of_small_weights_needs_no_second_file(tmp_path: Path) -> None:
    part = segment(many_weights(tmp_path / "m.onnx"), 2, 2, tmp_path / "s.onnx")
    assert part.weights == ()
    assert {each.name for each in tmp_path.iterdir()} == {"m.onnx", "s.onnx"}


def test_the_same_calls_write_the_same_bytes(tmp_path: Path) -> None:
    source = many_weights(tmp_path / "m.onnx")
    written = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        store = WeightStore(tmp_path / attempt / "w")
        with Slicer(source) as slicer:
            files = [slicer.write(first, last, tmp_path / attempt / f"{first}", weights=store).path for first, last in ((0, 1), (2, 3))]
        written.append([file.read_bytes() for file in (*files, store.path)])
    assert written[0] == written[1]


def test_a_segment_of_a_model_with_external_data_does_not_lean_on_the_old_file(tmp_path: Path) -> None:
    source = many_weights(tmp_path / "m.onnx")
    feeds = {"x": np.ones((2, 64), np.float32)}
    expected = run(source, feeds)
    onnx.save(onnx.load(source), tmp_path / "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=0)
    (tmp_path / "out").mkdir()
    part = segment(tmp_path / "ext.onnx", 0, 3, tmp_path / "out" / "s.onnx")
    (tmp_path / "ext.data").unlink()
    assert_same(run(part.path, feeds), expected)
    assert places(part.path) == places(segment(source, 0, 3, tmp_path / "s.onnx").path)


def test_a_written_segment_can_be_analysed_and_cut_again(branching: Path, tmp_path: Path) -> None:
    part = segment(branching, 0, 3, tmp_path / "part.onnx")
    again = analyse(part.path)
    assert (again.structure, again.content, again.weight_bytes) == (part.structure, part.content, part.weight_bytes)


# --- any graph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("random")


def check_any_cut(folder: Path, graph: onnx.GraphProto, flag: bool, data: st.DataObject) -> None:
    """Cut at each place and at several; without optimisations, so that no fusion crosses a cut, every bit has to be the same."""
    path = save(graph, folder / "m.onnx")
    feeds = feeds_for(flag)
    expected = run(path, feeds, plain=True)
    slicer, store = Slicer(path), WeightStore(folder / "w")
    count = len(slicer.prepared.nodes)
    several = sorted(data.draw(st.sets(st.integers(1, max(1, count - 1)), max_size=4)))
    for cuts in ([], *([position] for position in range(1, count)), several if count > 1 else []):
        try:
            paths = pieces(slicer, cuts, folder, store)
        except ValueError as error:
            assert str(error).removeprefix("cannot cut through ")[1:].startswith("sequence")
            continue
        values = dict(feeds)
        for part in paths:
            values.update(run(part, values, plain=True))
        for name, value in expected.items():
            assert values[name].tobytes() == value.tobytes(), (name, cuts)


@given(graph=graphs(), flag=st.booleans(), data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_graph_cut_anywhere_answers_as_the_whole(folder: Path, graph: onnx.GraphProto, flag: bool, data: st.DataObject) -> None:
    check_any_cut(folder, graph, flag, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(graph=graphs(most=16), flag=st.booleans(), data=st.data())
@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_thousand_graphs_cut_anywhere_answer_as_the_whole(folder: Path, graph: onnx.GraphProto, flag: bool, data: st.DataObject) -> None:
    check_any_cut(folder, graph, flag, data)
