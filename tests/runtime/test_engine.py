"""The engine with real runtimes: right answers, checked inputs, many threads, fallbacks said aloud, and none of the tuning machinery."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.feed import COPY_LIMIT_BYTES
from aivmm.runtime.handing import Handing
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, onnx_model, reference
from tests.runtime.engines import Load, close_to

BOTH = pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
F, I64 = TensorProto.FLOAT, TensorProto.INT64


# --- answers ---


@pytest.mark.parametrize(
    "parts",
    [
        [Part(OPENVINO)],
        [Part(ONNXRUNTIME)],
        [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)],
        [Part(ONNXRUNTIME, 0, 0), Part(OPENVINO, 1, 3), Part(ONNXRUNTIME, 4, 6), Part(OPENVINO, 7)],
    ],
    ids=len,
)
def test_every_way_to_cut_gives_what_onnx_runtime_gives(load: Load, parts: list[Part]) -> None:
    model = chain_model()
    engine = load(model, parts)
    for seed in range(3):
        x = normal(2, 32, seed=seed)
        close_to(engine.run({"x": x}), reference(model, {"x": x}))


def diamond() -> Any:
    """x -> a -> (b, c) -> y with x read again at the end, and b an output of the model as well."""
    nodes = [
        helper.make_node("Exp", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Sqrt", ["a"], ["c"]),
        helper.make_node("Sum", ["b", "c", "x"], ["y"]),
    ]
    return onnx_model(nodes, [("x", F, (3,))], [("y", F, (3,)), ("b", F, (3,))])


@pytest.mark.parametrize("order", [(OPENVINO, ONNXRUNTIME), (ONNXRUNTIME, OPENVINO)])
def test_tensors_that_several_stages_read_and_outputs_in_the_middle(load: Load, order: tuple[str, str]) -> None:
    model = diamond()
    engine = load(model, [Part(order[index % 2], index, index) for index in range(4)])
    close_to(engine.run({"x": normal(3)}), reference(model, {"x": normal(3)}))


def test_boundaries_are_shared_between_the_runtimes_without_a_copy(load: Load) -> None:
    engine = load(chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4, 5), Part(OPENVINO, 6)])
    lane = engine.one_lane()
    engine.run({"x": normal(2, 32)})
    for producer, name, consumer in ((0, "r1", 1), (1, "r2", 2)):
        address = lane.buffers[name].ctypes.data
        assert address % 4096 == 0
        assert lane._requests[producer].output(name).ctypes.data == address
        reading = lane._requests[consumer]
        reading = reading.now.request if isinstance(reading, Handing) else reading
        assert reading._bound[name].ctypes.data == address  # type: ignore[attr-defined]
    before = {name: lane.buffers[name].ctypes.data for name in ("r1", "r2")}
    engine.run({"x": normal(2, 32, seed=1)})
    assert {name: lane.buffers[name].ctypes.data for name in before} == before


@BOTH
def test_the_answer_is_the_callers_own(load: Load, target: str) -> None:
    model = chain_model()
    engine = load(model, [Part(target)])
    first = engine.run({"x": normal(2, 32)})
    kept = {name: value.copy() for name, value in first.items()}
    second = engine.run({"x": normal(2, 32, seed=1)})
    np.testing.assert_array_equal(first["y"], kept["y"])
    second["y"][...] = 0  # and writing into one does no harm
    close_to(engine.run({"x": normal(2, 32)}), kept)
    engine.close()
    np.testing.assert_array_equal(first["y"], kept["y"])


def nonzero() -> Any:
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Neg", ["where"], ["y"])]
    return onnx_model(nodes, [("x", F, (6,))], [("y", I64, (1, "n"))])


@pytest.mark.parametrize(
    "parts",
    [[Part(ONNXRUNTIME)], [Part(OPENVINO)], [Part(ONNXRUNTIME, 0, 0), Part(OPENVINO, 1)], [Part(OPENVINO, 0, 0), Part(ONNXRUNTIME, 1)]],
)
def test_shapes_that_depend_on_the_data_change_from_run_to_run(load: Load, parts: list[Part]) -> None:
    engine = load(nonzero(), parts)
    kept = []
    for x in ([1, 0, 2, 0, 0, 3], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 5, 0, 0, 0, 0]):
        kept.append((engine.run({"x": np.array(x, dtype=np.float32)})["y"], [[-index for index, value in enumerate(x) if value]]))
    for found, expected in kept:
        assert found.tolist() == expected


@BOTH
def test_integer_boolean_and_scalar_inputs(load: Load, target: str) -> None:
    nodes = [
        helper.make_node("Where", ["yes", "i", "zero"], ["picked"]),
        helper.make_node("Cast", ["picked"], ["f"], to=F),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    model = onnx_model(
        nodes,
        [("i", I64, (2, 2)), ("yes", TensorProto.BOOL, (2, 2)), ("s", F, ())],
        [("y", F, (2, 2))],
        {"zero": np.array(0, dtype=np.int64)},
    )
    engine = load(model, [Part(target)])
    feeds = {"i": np.array([[1, -2], [3, 4]]), "yes": np.array([[True, False], [True, True]]), "s": np.array(0.5, dtype=np.float32)}
    close_to(engine.run(feeds), reference(model, feeds))
    as_python = {"i": [[1, -2], [3, 4]], "yes": [[True, False], [True, True]], "s": 0.5}
    close_to(engine.run(as_python), reference(model, feeds))
    close_to(engine.run({**feeds, "s": np.float32(0.5)}), reference(model, feeds))


def strings() -> Any:
    kind = TensorProto.STRING
    return onnx_model([helper.make_node("Identity", ["x"], ["y"])], [("x", kind, (2,))], [("y", kind, (2,))])


WORDS = ["a", "größe"]


@pytest.mark.parametrize("x", [WORDS, np.array(WORDS), np.array(WORDS, dtype=object), np.char.encode(WORDS, "utf-8")], ids=str)
def test_strings_in_every_form_numpy_has(load: Load, x: Any) -> None:
    found = load(strings(), [Part(ONNXRUNTIME)]).run({"x": x})["y"]
    assert found.tolist() == ["a", "größe"]


@pytest.mark.parametrize(
    "x", [np.array([1, 2]), np.array(["a", 1], dtype=object), np.array(["a", None], dtype=object), np.array([b"\xff", b"a"])]
)
def test_what_is_no_string_is_refused(load: Load, x: Any) -> None:
    with pytest.raises(UsageError, match=r"input 'x' (has type int64, expected strings|holds)"):
        load(strings(), [Part(ONNXRUNTIME)]).run({"x": x})


@pytest.mark.usefixtures("hot_path")
@BOTH
def test_integers_that_c_calls_long_long_are_taken(load: Load, target: str) -> None:
    model = onnx_model([helper.make_node("Neg", ["x"], ["y"])], [("x", I64, (9000,))], [("y", I64, (9000,))])
    x = np.arange(9000, dtype=np.longlong)
    np.testing.assert_array_equal(load(model, [Part(target)]).run({"x": x})["y"], -x)


@BOTH
def test_an_input_that_nothing_reads_is_asked_for_all_the_same(load: Load, target: str) -> None:
    for count in (3, COPY_LIMIT_BYTES):
        model = onnx_model([helper.make_node("Relu", ["x"], ["y"])], [("x", F, (3,)), ("unused", F, (count,))], [("y", F, (3,))])
        engine = load(model, [Part(target)])
        assert [each.name for each in engine.inputs] == ["x", "unused"]
        close_to(engine.run({"x": normal(3), "unused": normal(count)}), {"y": np.maximum(normal(3), 0)})
        with pytest.raises(UsageError, match="'unused' is missing"):
            engine.run({"x": normal(3)})


@BOTH
def test_empty_tensors(load: Load, target: str) -> None:
    model = onnx_model([helper.make_node("Concat", ["x", "e"], ["y"], axis=0)], [("x", F, (2, 3)), ("e", F, (0, 3))], [("y", F, (2, 3))])
    try:
        engine = load(model, [Part(target)])
    except Unsupported as refusal:
        pytest.skip(str(refusal))
    x = normal(2, 3)
    np.testing.assert_array_equal(engine.run({"x": x, "e": np.zeros((0, 3), dtype=np.float32)})["y"], x)


# --- inputs ---


LARGE = 520  # rows of 512 bytes: beyond the limit of every runtime


def big(rows: int = LARGE) -> Any:
    """A model whose input is beyond the copy limit; the first operators could work in place, and one output is a view of the input."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Add", ["r", "one"], ["y"]),
        helper.make_node("Reshape", ["x", "flat"], ["v"]),
    ]
    weights = {"one": np.ones(1, dtype=np.float32), "flat": np.array([-1])}
    return onnx_model(nodes, [("x", F, (rows, 128))], [("y", F, (rows, 128)), ("v", F, (rows * 128,))], weights)


SIZES = pytest.mark.parametrize("rows", [4, LARGE], ids=["copied", "bound"])


def forms() -> dict[str, Callable[[Any], Any]]:
    def misaligned(x: Any) -> Any:
        raw = np.zeros(x.nbytes + 1, dtype=np.uint8)
        raw[1:] = np.frombuffer(x.tobytes(), dtype=np.uint8)
        return np.frombuffer(raw.data, dtype=x.dtype, offset=1).reshape(x.shape)

    def read_only(x: Any) -> Any:
        x = x.copy()
        x.flags.writeable = False
        return x

    return {
        "plain": lambda x: x,
        "fortran": np.asfortranarray,
        "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": read_only,
        "misaligned": misaligned,
        "from bytes": lambda x: np.frombuffer(x.tobytes(), dtype=x.dtype).reshape(x.shape),
        "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
        "list": lambda x: x.tolist(),
    }


@BOTH
@SIZES
@pytest.mark.parametrize("form", forms())
def test_arrays_of_every_layout_give_the_answer_and_are_not_written_to(load: Load, target: str, rows: int, form: str) -> None:
    x = forms()[form](normal(rows, 128))
    before = np.array(x, dtype=np.float32)
    engine = load(big(rows), [Part(target)])
    for _ in range(2):
        found = engine.run({"x": x})
        close_to(found, {"y": np.maximum(before, 0) + 1, "v": before.ravel()})
        found["v"][...] = -1  # a view of the caller's array must not come back
        np.testing.assert_array_equal(np.array(x, dtype=np.float32), before)


@BOTH
def test_large_inputs_are_bound_where_they_are(load: Load, target: str) -> None:
    engine = load(big(), [Part(target)])
    x = normal(LARGE, 128)
    engine.run({"x": x})
    request = engine.one_lane()._requests[0]
    assert isinstance(request, Handing)
    assert request.now.request._bound["x"] is x  # type: ignore[attr-defined]
    assert "x" not in engine.one_lane().buffers
    x *= -1  # the same array with other contents gives another answer
    close_to(engine.run({"x": x}), {"y": np.maximum(x, 0) + 1, "v": x.ravel()})


@BOTH
@SIZES
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: {}, r"input 'x' is missing; the plan takes x: float32\["),
        (lambda x: {"x": None}, "input 'x' is missing"),
        (lambda x: {"x": x, "extra": x}, r"unknown input 'extra'; the plan takes x: float32"),
        (lambda x: {"X": x}, "input 'x' is missing"),
        (lambda x: {"x": x.astype(np.float64)}, r"type float64, expected float32; convert it with \.astype\('float32'\)"),
        (lambda x: {"x": x.astype(np.int32)}, "type int32, expected float32"),
        (lambda x: {"x": x.astype(">f4")}, "type >f4, expected float32"),
        (lambda x: {"x": x[:, :-1]}, r"shape \[\d+, 127\], expected x: float32\["),
        (lambda x: {"x": x[None]}, r"shape \[1, "),
        (lambda x: {"x": x.ravel()}, "shape"),
        (lambda x: {"x": 1.0}, r"shape \[\]"),
        (lambda x: {"x": "text"}, "input 'x' is text, expected numbers; give an array of float32"),
        (lambda x: {"x": x.astype(object)}, "input 'x' is of type object, expected numbers"),
        (lambda x: {"x": [[1.0], [1.0, 2.0]]}, "input 'x' is not an array"),
        (lambda x: {"x": np.full(x.shape, 1e40).tolist()}, "do not fit into float32"),
    ],
)  # fmt: skip
def test_inputs_are_checked_and_the_engine_goes_on(load: Load, target: str, rows: int, bad: Callable[[Any], Any], message: str) -> None:
    engine = load(big(rows), [Part(target)])
    x = normal(rows, 128)
    with pytest.raises(UsageError, match=message):
        engine.run(bad(x))
    close_to(engine.run({"x": x}), {"y": np.maximum(x, 0) + 1, "v": x.ravel()})


@pytest.mark.parametrize("value", [300, -129, 2**40])
def test_python_numbers_are_not_wrapped_around(load: Load, value: int) -> None:
    model = onnx_model([helper.make_node("Identity", ["x"], ["y"])], [("x", TensorProto.INT8, (1,))], [("y", TensorProto.INT8, (1,))])
    engine = load(model, [Part(ONNXRUNTIME)])
    with pytest.raises(UsageError, match="do not fit into int8"):
        engine.run({"x": [value]})
    assert engine.run({"x": [-128]})["y"].tolist() == [-128]


# --- threads, statistics, closing ---


@pytest.mark.parametrize("callers", [1, 3])
def test_eight_threads_get_their_own_answers(load: Load, callers: int) -> None:
    model = chain_model()
    engine = load(model, [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], callers=callers)
    samples = [normal(2, 32, seed=seed) for seed in range(8)]
    answers = [reference(model, {"x": x})["y"] for x in samples]

    def work(index: int) -> bool:
        return all(np.allclose(engine.run({"x": samples[index]})["y"], answers[index], rtol=1e-4, atol=1e-5) for _ in range(40))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    stats = engine.stats()
    assert stats["runs"] == 320
    assert stats["callers"] == callers


def test_statistics_tell_what_ran(load: Load) -> None:
    engine = load(chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)])
    assert [each["p50_s"] for each in engine.stats()["stages"]] == [None, None]
    for _ in range(20):
        engine.run({"x": normal(2, 32)})
    stats = engine.stats()
    json.dumps(stats, allow_nan=False)
    assert stats["runs"] == 20 and stats["callers"] == 1 and stats["validity"] == "exact" and stats["events"] == []
    assert stats["load_s"] == engine.load_s > 0
    assert [each["target"] for each in stats["stages"]] == [OPENVINO, ONNXRUNTIME]
    for each in stats["stages"]:
        assert each["count"] == 20 and 0 < each["p50_s"] <= each["p90_s"] <= each["p99_s"] < 5


@pytest.mark.usefixtures("hot_path")
def test_a_closed_engine_says_so(load: Load) -> None:
    with load(chain_model(), [Part(ONNXRUNTIME)]) as engine:
        engine.run({"x": normal(2, 32)})
    engine.close()
    with pytest.raises(UsageError, match="closed; load the plan again"):
        engine.run({"x": normal(2, 32)})
    assert engine.stats()["runs"] == 1


def test_closing_waits_for_who_is_inside_and_turns_away_who_waits(load: Load) -> None:
    model = chain_model(width=256, rows=64)
    engine = load(model, [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], callers=2)
    x = normal(64, 256)
    expected = reference(model, {"x": x})["y"]
    outcomes: list[object] = []
    started = threading.Barrier(9)

    def work() -> None:
        started.wait()
        try:
            while True:
                found = engine.run({"x": x})["y"]
                assert np.allclose(found, expected, rtol=1e-3, atol=1e-3)
        except BaseException as error:  # noqa: BLE001 - what ended each thread is what the test asks
            outcomes.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for each in threads:
        each.start()
    started.wait()
    time.sleep(0.1)
    closers = [threading.Thread(target=engine.close) for _ in range(2)]
    for each in (*closers, *threads):
        if each in closers:
            each.start()
    for each in (*closers, *threads):
        each.join(timeout=20)
        assert not each.is_alive()
    assert [type(each) for each in outcomes] == [UsageError] * 8


@pytest.mark.usefixtures("hot_path")
def test_a_run_that_fails_in_the_runtime_costs_only_itself(load: Load) -> None:
    model = onnx_model(
        [helper.make_node("Gather", ["table", "i"], ["y"])], [("i", I64, (1,))], [("y", F, (1,))], {"table": np.arange(4, dtype=np.float32)}
    )
    engine = load(model, [Part(ONNXRUNTIME)])
    for _ in range(3):
        with pytest.raises(Exception, match=r"(?i)out of|indices|bounds"):
            engine.run({"i": np.array([99])})
    assert engine.run({"i": np.array([2])})["y"].tolist() == [2.0]


def test_a_zip_is_loaded_and_its_copy_removed(tmp_path: Path) -> None:
    import shutil

    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO)])
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", bundle)
    engine = Engine.load(archive)
    copy = engine._bundle.folder
    assert engine.run({"x": normal(2, 32)})["y"].shape == (2, 32)
    engine.close()
    assert not copy.exists()


@pytest.mark.usefixtures("hot_path")
@pytest.mark.parametrize("given", [None, normal(2, 32), [normal(2, 32)], "x", 7], ids=lambda each: type(each).__name__)
def test_inputs_without_names_are_refused_in_words(load: Load, given: Any) -> None:
    engine = load(chain_model(), [Part(ONNXRUNTIME)])
    for _ in range(2):  # the second time by the shorter way
        for ask in (engine.run, engine.submit, lambda each: list(engine.stream([each])), lambda each: engine.lend(each).__enter__()):
            with pytest.raises(UsageError, match=f"inputs are given by name, and this is a {type(given).__name__}; give a mapping"):
                ask(given)
        assert engine.run({"x": normal(2, 32)})["y"].shape == (2, 32)
