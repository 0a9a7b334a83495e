"""Shapes as a user lists them, and bundles of several: padding is taken where it is right, and refused with numbers where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import aivmm
from aivmm import arguments
from aivmm.errors import UsageError
from aivmm.probes.lab import Lab
from aivmm.runtime.family import Bucket, Dimension
from aivmm.runtime.many import ShapedEngine
from aivmm.runtime.target import Target
from aivmm.tensors import TensorSpec
from aivmm.tuner.buckets import BucketTuner, reference_first
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.other_shapes import OtherShapes
from aivmm.tuner.padding import PaddingCheck, Paddings, dimensions_of
from aivmm.tuner.progress import Silent
from aivmm.tuner.shapes import doublings, parse_dim_lists, parse_shape_lists, wanted
from tests.making import normal, onnx_model, reference, token_model, write_model
from tests.tuner.harness import ONE_RUNTIME, SMALL, Finished, Place

# --- what a user lists


@pytest.mark.parametrize(
    ("text", "extents"),
    [
        ("seq=128", (128,)),
        ("seq=32,128,512", (32, 128, 512)),
        ("seq=512,32", (32, 512)),
        ("seq=32..512", (32, 64, 128, 256, 512)),
        ("seq=3..20", (3, 6, 12, 20)),
        ("seq=1..2,7", (1, 2, 7)),
        ("a=b=4", (4,)),
    ],
)
def test_extents_of_a_dimension(text: str, extents: tuple[int, ...]) -> None:
    assert list(parse_dim_lists([text]).values()) == [extents]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["seq"], "NAME=N"),
        (["=4"], "NAME=N"),
        (["seq="], "NAME=N"),
        (["seq=a"], "'a' is no extent"),
        (["seq=-4"], "'-4' is no extent"),
        (["seq=1.5"], "'1.5' is no extent"),
        (["seq=4,,8"], "'' is no extent"),
        (["seq=0"], "at least 1"),
        (["seq=64..32"], "does not go up"),
        (["seq=64..64"], "does not go up"),
        (["seq=4..8..16"], "is no extent"),
        (["seq=32..128,64..256"], "64..256 overlaps 32..128"),
        (["seq=32,32"], "32 overlaps 32"),
        (["seq=32..128,100"], "100 overlaps 32..128"),
        (["seq=32", "seq=64"], "given twice"),
        (["seq=99999999999999999999"], "is no extent"),
    ],
)
def test_extents_that_cannot_be_read_are_refused_in_one_line(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_dim_lists(texts)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("x=1x3x224x224", ((1, 3, 224, 224),)),
        ("x=1x3x224x224,1x3x448x448", ((1, 3, 224, 224), (1, 3, 448, 448))),
        ("x=1x3x64..256x64..256", ((1, 3, 64, 64), (1, 3, 128, 128), (1, 3, 256, 256))),
        ("x=", ((),)),
    ],
)
def test_shapes_of_an_input(text: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    assert parse_shape_lists([text]) == {"x": shapes}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x"], "NAME=EXTENTS"),
        (["x=1xx3"], "NAME=EXTENTS"),
        (["x=1x3,1x3"], "1x3 is there twice; give each shape once"),
        (["x=1,1,99,37"], "write it as x=1x1x99x37"),
        (["x=1x3", "x=1x4"], "given twice"),
        (["x=1x64..256x64..128"], "unlike numbers of steps"),
    ],
)
def test_shapes_that_cannot_be_read_are_refused_in_one_line(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shape_lists(texts)
    assert words in str(caught.value)


def test_dimensions_multiply_and_inputs_go_in_step() -> None:
    found = wanted({"a": ((1, 2), (1, 4)), "b": ((2,), (4,)), "c": ((7,),)}, {"n": (1, 8), "m": (5,)})
    assert [each.name for each in found] == ["a=1x2, b=2, n=1", "a=1x2, b=2, n=8", "a=1x4, b=4, n=1", "a=1x4, b=4, n=8"]
    assert found[3].shapes == {"a": (1, 4), "b": (4,), "c": (7,)}
    assert found[3].dims == {"n": 8, "m": 5}
    assert [each.name for each in wanted({}, {})] == [""]
    with pytest.raises(UsageError, match="2 for 'a', 3 for 'b'"):
        wanted({"a": ((1,), (2,)), "b": ((1,), (2,), (3,))}, {})
    with pytest.raises(UsageError, match="18 shapes are more than"):
        wanted({}, {"a": tuple(range(1, 7)), "b": (1, 2, 3)})


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_a_range_doubles_from_its_first_to_its_last(first: int, more: int) -> None:
    found = list(doublings(first, first + more))
    assert (found[0], found[-1]) == (first, first + more)
    assert all(a < b <= 2 * a for a, b in pairwise(found))


def test_axes_that_change_alike_are_one_dimension_and_height_and_width_are_two() -> None:
    def inputs(rows: int, size: int) -> dict[str, TensorSpec]:
        return {
            "ids": TensorSpec(name="ids", dtype="int64", shape=(1, rows)),
            "mask": TensorSpec(name="mask", dtype="int64", shape=(1, rows)),
            "image": TensorSpec(name="image", dtype="float32", shape=(1, 3, size, size)),
        }

    found = dimensions_of([inputs(4, 8), inputs(16, 8), inputs(4, 32), inputs(16, 32)], {"seq": [4, 16, 4, 16], "fixed": [1, 1, 1, 1]})
    assert [(each.name, each.places) for each in found] == [
        ("seq", [("ids", 1), ("mask", 1)]),
        ("image[2]", [("image", 2)]),
        ("image[3]", [("image", 3)]),
    ]


# --- how smaller inputs may be padded


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture(scope="module")
def targets(lab: Lab) -> list[Target]:
    return reference_first(lab.discover(["onnxruntime"])[0])


def check(lab: Lab, targets: list[Target], folder: Path, model: Any, shapes: list[dict[str, tuple[int, ...]]]) -> Paddings:
    source = write_model(folder / "model.onnx", model)
    kinds = {each.name: "int64" if each.type.tensor_type.elem_type == TensorProto.INT64 else "float32" for each in model.graph.input}
    inputs = [{name: TensorSpec(name=name, dtype=kinds[name], shape=shape) for name, shape in each.items()} for each in shapes]
    dimensions = dimensions_of(inputs, {})
    buckets = [
        Bucket(name=str(index), plan=str(index), extents={each.name: one[each.places[0][0]][each.places[0][1]] for each in dimensions})
        for index, one in enumerate(shapes)
    ]
    return PaddingCheck(lab=lab, source=source, folder=folder, buckets=buckets, shapes=inputs, dimensions=dimensions, targets=targets).run()


def token_shapes(*rows: int) -> list[dict[str, tuple[int, ...]]]:
    return [{"x": (1, each, 16), "mask": (1, each)} for each in rows]


def only(found: Paddings) -> Dimension:
    (dimension,) = found.dimensions
    return dimension


def test_rows_that_a_mask_leaves_out_are_padded_with_zeros(lab: Lab, targets: list[Target], tmp_path: Path) -> None:
    found = check(lab, targets, tmp_path, token_model("rows"), token_shapes(4, 16))
    assert only(found).padding == "zero"
    assert "at 1, 2, 5, 10 the answers are those of the unpadded input" in only(found).why
    assert [(each.output, each.axis, each.times) for each in found.crops] == [("y", 1, 1)]
    assert {case.extents["x[1]"] for case in found.cases} == {1, 2, 5, 10}


def test_a_mean_over_all_rows_is_padded_with_nothing(lab: Lab, targets: list[Target], tmp_path: Path) -> None:
    found = check(lab, targets, tmp_path, token_model("rows", mean=True), token_shapes(4, 16))
    assert only(found).padding == "none"
    assert "with zeros they differ by" in only(found).why
    assert "with copies of its last element they differ by" in only(found).why
    assert found.crops == ()


def test_a_maximum_is_padded_with_copies_of_the_last_element(lab: Lab, targets: list[Target], tmp_path: Path) -> None:
    """Zeros would win over rows that are all negative; what is there twice changes no maximum."""
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Neg", ["e"], ["n"]),
        helper.make_node("ReduceMax", ["n"], ["y"], axes=[1], keepdims=0),
    ]
    model = onnx_model(nodes, [("x", TensorProto.FLOAT, (1, "rows"))], [("y", TensorProto.FLOAT, (1,))])
    found = check(lab, targets, tmp_path, model, [{"x": (1, 8)}, {"x": (1, 32)}])
    assert only(found).padding == "edge"


def convolutions(count: int) -> Any:
    nodes, last = [], "x"
    for index in range(count):
        nodes += [
            helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]),
            helper.make_node("Sigmoid", [f"c{index}"], ["y" if index == count - 1 else f"s{index}"]),
        ]
        last = f"s{index}"
    weights = {f"w{index}": normal(3, 3, 3, 3, seed=index) for index in range(count)}
    shape = (1, 3, "height", "width")
    return onnx_model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)], weights)


@pytest.mark.parametrize(("count", "padding"), [(1, "zero"), (2, "none")])
def test_zeros_behind_an_image_are_right_for_one_convolution_and_wrong_for_two(
    lab: Lab, targets: list[Target], tmp_path: Path, count: int, padding: str
) -> None:
    """The first pads with zeros itself, so more of them change nothing; behind a sigmoid they are halves, and reach what is kept."""
    found = check(lab, targets, tmp_path, convolutions(count), [{"x": (1, 3, 8, 8)}, {"x": (1, 3, 16, 16)}])
    assert [each.padding for each in found.dimensions] == [padding, padding]
    assert sorted((each.axis, each.times) for each in found.crops) == ([(2, 1), (3, 1)] if padding == "zero" else [])


def test_a_batch_is_padded_because_its_samples_do_not_see_each_other(lab: Lab, targets: list[Target], tmp_path: Path) -> None:
    model = onnx_model(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Softmax", ["m"], ["y"], axis=-1)],
        [("x", TensorProto.FLOAT, ("batch", 8))],
        [("y", TensorProto.FLOAT, ("batch", 4))],
        {"w": normal(8, 4)},
    )
    assert only(check(lab, targets, tmp_path, model, [{"x": (1, 8)}, {"x": (8, 8)}])).padding == "zero"


# --- the whole way


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Any]:
    """A tune of two shapes. Look, do not touch."""
    place = Place.at(tmp_path_factory.mktemp("shapes"))
    write_model(place.work / "tokens.onnx", token_model("rows"))
    done = place.aivmm("tune", "tokens.onnx", "--dim", "rows=4,16", *ONE_RUNTIME, *SMALL, "--json")
    assert done.code == 0, done.err
    return place, done.json


def test_the_summary_tells_of_each_shape_and_of_the_padding(tuned: tuple[Place, Any]) -> None:
    place, summary = tuned
    assert summary["plan"] == {"path": "tokens.aivmm", "buckets": ["rows=4", "rows=16"]}
    assert [each["extents"] for each in summary["buckets"]] == [{"rows": 4}, {"rows": 16}]
    for each in summary["buckets"]:
        assert each["measured"]["median_s"] > 0
        assert each["baselines"]
        assert f"{each['name']}: " in summary["verdict"]
    (padding,) = summary["padding"]
    assert (padding["dimension"], padding["padding"], padding["places"]) == ("rows", "zero", [["x", 1], ["mask", 1]])
    assert padding["why"] in summary["verdict"]
    assert (place.work / summary["report"]).is_file()


def test_the_bundle_of_several_shapes_answers_as_the_model(tuned: tuple[Place, Any]) -> None:
    with aivmm.load_plan(tuned[0].work / "tokens.aivmm") as engine:
        assert isinstance(engine, ShapedEngine)
        for rows in (1, 4, 7, 16):
            feeds = {"x": normal(1, rows, 16), "mask": np.ones((1, rows), np.int64)}
            found = engine.run(feeds)
            for name, value in reference(token_model("rows"), feeds).items():
                np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)
        with pytest.raises(UsageError, match="nothing here takes rows=17"):
            engine.run({"x": normal(1, 17, 16), "mask": np.ones((1, 17), np.int64)})


def test_the_report_has_a_row_for_each_shape_and_links_that_lead_somewhere(tuned: tuple[Place, Any]) -> None:
    bundle = tuned[0].work / "tokens.aivmm"
    text = (bundle / "report.html").read_text()
    for index, name in enumerate(("rows=4", "rows=16")):
        assert f'<a href="report-{index}.html"><bdi>{name}</bdi></a>' in text
        assert (bundle / f"report-{index}.html").read_text().startswith("<!doctype html>")
    assert "http:" not in text
    assert "https:" not in text


def test_python_lists_are_what_the_command_line_lists() -> None:
    found = wanted(arguments.shapes({"x": [1, 3, 8, 8], "y": [(1, 2), (1, 4)]}), arguments.extents({"n": 5, "m": [8, 1]}))
    text = wanted(parse_shape_lists(["x=1x3x8x8", "y=1x2,1x4"]), parse_dim_lists(["n=5", "m=1,8"]))
    assert found == text
    assert wanted(arguments.shapes({}), arguments.extents(None)) == wanted({}, {})
    for shapes, dims in (({}, {"n": [4, 4]}), ({}, {"n": []}), ({"x": [(1,), (1,)]}, {})):
        with pytest.raises(UsageError, match="each once"):
            wanted(arguments.shapes(shapes), arguments.extents(dims))


# --- what runs other shapes


@pytest.mark.slow
def test_other_shapes_run_with_open_extents_where_that_is_asked_for(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    write_model(place.work / "tokens.onnx", token_model("rows"))
    done = place.aivmm("tune", "tokens.onnx", "--dim", "rows=4,8", "--other-shapes", "dynamic", *ONE_RUNTIME, *SMALL, "--json")
    assert done.code == 0, done.err
    checked = "checked at rows=13; rows=16 by cosine>=0.999"
    assert f"Other shapes run on onnxruntime:CPU with open extents, {checked}; not tuned." in done.json["verdict"]
    timed = done.json["other_shapes"]["open_against_padding"]
    assert [(each["bucket"], each["extents"]) for each in timed] == [
        ("rows=4", {"rows": 1}), ("rows=4", {"rows": 2}), ("rows=8", {"rows": 5}), ("rows=8", {"rows": 6})
    ]  # fmt: skip
    for each in timed:
        assert 0 < each["low"] <= each["ratio"] <= each["high"]
        assert f"{each['ratio']:.2f} ({each['verdict']}) at rows={each['extents']['rows']}" in done.json["verdict"]
    with aivmm.load_plan(place.work / "tokens.aivmm") as engine:
        assert isinstance(engine, ShapedEngine)
        for rows in (3, 8, 9, 40):
            feeds = {"x": normal(1, rows, 16), "mask": np.ones((1, rows), np.int64)}
            found = engine.run(feeds)
            for name, value in reference(token_model("rows"), feeds).items():
                np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)
        stats, smaller = engine.stats(), engine.served.buckets[0].smaller  # of rows=4: whichever was faster on this machine
        assert (stats["padded"], stats["fallback"]) == ((1, 2) if smaller == "padded" else (0, 3))


def test_other_shapes_keep_to_the_targets_that_constraints_leave_and_say_which_limits_are_not_judged(lab: Lab) -> None:
    found, unavailable = lab.discover(["onnxruntime", "openvino"])
    options = TuneOptions(model="m.onnx", constraints=("targets in (openvino:CPU)", "sqnr>=30dB"))
    tuner = BucketTuner(options, (), Silent())
    assert [str(each) for each in tuner.usable(found, unavailable)] == ["openvino:CPU"]  # and not the reference's, which comes first
    assert tuner.judged_by() == "cosine>=0.999, not by sqnr>=30dB"
    stricter = replace(options, constraints=("cosine>=0.9999, sqnr>=30dB",), targets=("onnxruntime",))
    assert [str(each) for each in BucketTuner(stricter, (), Silent()).usable(found, unavailable)] == ["onnxruntime:CPU"]
    assert BucketTuner(stricter, (), Silent()).judged_by() == "cosine>=0.9999, not by sqnr>=30dB"


@pytest.mark.parametrize(
    ("listed", "padding", "sizes"),
    [
        ((4, 8), "none", [13, 16, 7]),
        ((6, 7, 8), "none", [13, 16, 5]),
        ((1, 2), "none", [4, 4]),
        ((4, 8), "zero", [13, 16]),
    ],
)
def test_other_shapes_are_checked_at_none_that_is_listed(listed: tuple[int, ...], padding: Any, sizes: list[int]) -> None:
    dimension = Dimension(name="rows", places=[("x", 1)], padding=padding)
    check = SimpleNamespace(buckets=[Bucket(name=str(each), plan="", extents={"rows": each}) for each in listed])
    others: Any = OtherShapes.__new__(OtherShapes)
    others.check, others.dimensions = check, [dimension]
    assert [each["rows"] for each in others._sizes()] == sizes


def test_open_extents_are_refused_where_no_list_is_given(place: Place, in_process: Callable[..., Finished]) -> None:
    write_model(place.work / "tokens.onnx", token_model("rows"))
    done = in_process(place, "tune", "tokens.onnx", "--dim", "rows=4", "--other-shapes", "dynamic", "-q")
    assert (done.code, len(done.error_lines)) == (2, 1) and "asks what runs beside several shapes" in done.err
    done = in_process(place, "tune", "tokens.onnx", "--dim", "rows=4,8", "--other-shapes", "any", "-q")
    assert (done.code, len(done.error_lines)) == (2, 1) and "unknown --other-shapes 'any'; known: refuse, dynamic" in done.err
