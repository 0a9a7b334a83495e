"""Cards with memory of their own: what is read is what the caller's arrays hold now, and what stays on the card never leaves it."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.config import Config
from aivmm.runtime.cuda import _check, _library, is_pinned, pinned_empty, wait_for_producers
from aivmm.runtime.engine import Engine
from aivmm.runtime.finding import find_named
from aivmm.runtime.plan import Copy, Execution
from aivmm.runtime.registry import load_backend
from aivmm.tensors import TensorSpec
from tests.making import Part, chain_model, make_bundle, normal, onnx_model, reference, write_model

CUDA = "onnxruntime:CUDA:0"
PINNED = (("host_memory", "pinned"),)
GRAPH = (("provider.enable_cuda_graph", "1"),)
WAYS = pytest.mark.parametrize("settings", [(), PINNED, GRAPH, (*PINNED, *GRAPH)], ids=["default", "pinned", "graph", "both"])
TF32 = 5e-3  # of values around one: products with 10 bits of mantissa


def _engine(tmp_path: Path, model: onnx.ModelProto, *parts: Part, **fields: Any) -> Engine:
    return Engine.load(make_bundle(tmp_path / "made.aivmm", model, parts, **fields), cache=False)


def _close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, atol=TF32 * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.gpu
@WAYS
@pytest.mark.parametrize("rows", [2, 4096], ids=["small", "large"])
def test_a_changed_array_is_read_anew(tmp_path: Path, settings: Any, rows: int) -> None:
    """ONNX Runtime's binding copies an input to the card when it is bound, and never looks again."""
    model = chain_model(rows=rows, width=64)
    array = normal(rows, 64)
    with _engine(tmp_path, model, Part(CUDA, settings=settings)) as engine:
        for seed in range(5):
            array[...] = normal(rows, 64, seed=seed)
            _close(engine.run({"x": array})["y"], reference(model, {"x": array})["y"])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1 << 13, 1 << 18, 5 << 18], ids=["64 KiB", "2 MiB", "10 MiB"])
def test_several_inputs_on_their_way_to_the_card_leave_each_other_alone(tmp_path: Path, rows: int) -> None:
    """They go through the same page-locked pieces, which the card may still be reading when the next input comes."""
    names = ["a", "b", "c", "d"]
    nodes = [
        helper.make_node("Sub", names[:2], ["x"]),
        helper.make_node("Sub", names[2:], ["z"]),
        helper.make_node("Mul", ["x", "z"], ["y"]),
    ]
    shape = (rows, 2)
    model = onnx_model(nodes, [(each, TensorProto.FLOAT, shape) for each in names], [("y", TensorProto.FLOAT, shape)])
    with _engine(tmp_path, model, Part(CUDA, settings=PINNED)) as engine:
        for seed in range(20):
            feed = {name: np.full(shape, (seed + 1) * 10.0**at, dtype=np.float32) for at, name in enumerate(names)}
            assert not any(map(is_pinned, feed.values()))
            wanted = (feed["a"] - feed["b"]) * (feed["c"] - feed["d"])
            np.testing.assert_allclose(engine.run(feed)["y"], wanted, rtol=1e-6)


@pytest.mark.gpu
def test_a_changed_array_is_read_anew_with_an_open_shape(tmp_path: Path) -> None:
    model = onnx_model(
        [helper.make_node("Mul", ["x", "x"], ["y"])], [("x", TensorProto.FLOAT, ("n", 8))], [("y", TensorProto.FLOAT, ("n", 8))]
    )
    with _engine(tmp_path, model, Part(CUDA)) as engine:
        for rows in (3, 3, 5000):
            array = normal(rows, 8, seed=rows)
            for _ in range(2):
                array += 1
                _close(engine.run({"x": array})["y"], array * array)
    with pytest.raises(Unsupported, match="fixed shapes"):
        Engine.load(make_bundle(tmp_path / "graph.aivmm", model, [Part(CUDA, settings=GRAPH)]), cache=False)


@pytest.mark.gpu
@WAYS
def test_many_threads_get_their_own_answers(tmp_path: Path, settings: Any) -> None:
    """A graph is recorded with its addresses: a thread that comes to another lane must not read the first one's."""
    model = chain_model(rows=512, width=64)
    feeds = [normal(512, 64, seed=seed) for seed in range(6)]
    wanted = [reference(model, {"x": each})["y"] for each in feeds]
    wrong: list[BaseException] = []

    def call(engine: Engine, index: int) -> None:
        try:
            for turn in range(12):
                place = (index + turn) % len(feeds)
                _close(engine.run({"x": feeds[place]})["y"], wanted[place])
        except BaseException as error:  # noqa: BLE001 - shown below
            wrong.append(error)

    with _engine(tmp_path, model, Part(CUDA, settings=settings), callers=3) as engine:
        threads = [threading.Thread(target=call, args=(engine, index)) for index in range(6)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not wrong


@pytest.mark.gpu
@WAYS
def test_between_stages_of_one_card_nothing_leaves_it(tmp_path: Path, settings: Any) -> None:
    model = chain_model(rows=256, width=64)
    parts = [Part(CUDA, 0, 2, settings=settings), Part(CUDA, 3, 5, settings=settings), Part("onnxruntime:CPU", 6, 7)]
    with _engine(tmp_path, model, *parts) as engine:
        assert list(engine.one_lane().kept_on_device.values()) == ["cuda:0"]  # the last boundary goes to the CPU
        for seed in range(3):
            array = normal(256, 64, seed=seed)
            _close(engine.run({"x": array})["y"], reference(model, {"x": array})["y"])


@pytest.mark.gpu
@WAYS
def test_callers_give_and_take_tensors_on_the_card(tmp_path: Path, settings: Any) -> None:
    import onnxruntime  # its values speak DLPack, as any library's tensors do

    model = chain_model(rows=512, width=64)
    arrays = [normal(512, 64, seed=seed) for seed in range(3)]
    there = [onnxruntime.OrtValue.ortvalue_from_numpy(each, "cuda", 0) for each in arrays]
    wanted = [reference(model, {"x": each})["y"] for each in arrays]
    with _engine(tmp_path, model, Part(CUDA, settings=settings)) as engine:
        _close(engine.run({"x": there[0]})["y"], wanted[0])
        _close(engine.run({"x": arrays[1]})["y"], wanted[1])  # and back to the host
        made = engine.run_on_device({"x": there[2]})["y"]
        assert tuple(map(int, made.__dlpack_device__())) == (2, 0)
        _close(engine.run({"x": arrays[0]})["y"], wanted[0])
        _close(onnxruntime.OrtValue.from_dlpack(made).numpy(), wanted[2])  # the caller's own: later runs leave it alone
        with pytest.raises(UsageError, match=r"float32\[512, 64\].*was given as"):
            engine.run({"x": onnxruntime.OrtValue.ortvalue_from_numpy(arrays[0][:8].copy(), "cuda", 0)})
        _close(engine.run({"x": arrays[0]})["y"], wanted[0])


@pytest.mark.gpu
def test_page_locked_memory_is_what_it_says() -> None:
    buffer = pinned_empty(TensorSpec(name="x", dtype="float32", shape=(3, 1000)))
    assert is_pinned(buffer) and is_pinned(buffer[1:]) and not is_pinned(normal(3))
    assert buffer.flags.c_contiguous and buffer.flags.writeable and buffer.ctypes.data % 64 == 0


@pytest.mark.gpu
def test_the_engine_gives_arrays_that_are_read_without_a_copy(tmp_path: Path) -> None:
    model = chain_model(rows=512, width=64)
    with _engine(tmp_path, model, Part(CUDA, settings=PINNED)) as engine:
        inputs = engine.new_inputs()
        assert is_pinned(inputs["x"])
        for seed in range(3):
            inputs["x"][...] = normal(512, 64, seed=seed)
            _close(engine.run(inputs)["y"], reference(model, inputs)["y"])


@pytest.mark.gpu(count=2)
def test_a_tensor_on_the_second_card_is_taken_there_and_the_threads_card_stays(tmp_path: Path) -> None:
    import onnxruntime

    model, array = chain_model(rows=512, width=64), normal(512, 64)
    with _engine(tmp_path, model, Part("onnxruntime:CUDA:1", settings=PINNED)) as engine:
        there = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 1)
        for chosen in (0, 1):
            _check(_library().cudaSetDevice(chosen), "choose a card")
            _close(engine.run({"x": there})["y"], reference(model, {"x": array})["y"])
            wait_for_producers(1 - chosen)
            now = ctypes.c_int(-1)
            _check(_library().cudaGetDevice(ctypes.byref(now)), "tell its card")
            assert now.value == chosen
        _check(_library().cudaSetDevice(0), "choose a card")


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("mode", ["sequential", "pipelined"])
def test_stages_on_two_cards(tmp_path: Path, mode: Any) -> None:
    model = chain_model(rows=512, width=64)
    parts = [Part(CUDA, 0, 3, settings=PINNED), Part("onnxruntime:CUDA:1", 4, 7, settings=PINNED)]
    with _engine(tmp_path, model, *parts, execution=Execution(mode=mode)) as engine:
        feeds = [normal(512, 64, seed=seed) for seed in range(8)]
        for feed, answer in zip(feeds, engine.stream({"x": each} for each in feeds), strict=True):
            _close(answer["y"], reference(model, {"x": feed})["y"])


@pytest.mark.gpu(count=2)
def test_copies_on_two_cards_both_work(tmp_path: Path) -> None:
    model = chain_model(rows=512, width=64)
    beside = Copy(model="segments/x.onnx", target="onnxruntime:CUDA:1", precision="fp32", config=dict(PINNED))
    with _engine(tmp_path, model, Part(CUDA, settings=PINNED, copies=(beside,)), callers=4) as engine:
        feeds = [normal(512, 64, seed=seed) for seed in range(16)]
        for feed, answer in zip(feeds, engine.stream({"x": each} for each in feeds), strict=True):
            _close(answer["y"], reference(model, {"x": feed})["y"])
        assert all(each["count"] for each in engine.stats()["stages"][0]["copies"])


def test_the_kind_of_host_memory_is_a_cards_setting_alone(tmp_path: Path) -> None:
    target = find_named("onnxruntime:CPU")
    with pytest.raises(Unsupported, match="no setting 'host_memory'"):
        load_backend("onnxruntime").compile(write_model(tmp_path / "m.onnx", chain_model()), target, Config.of(dict(PINNED)))


def test_an_input_on_a_device_is_refused_by_stages_that_read_the_host(tmp_path: Path) -> None:
    class Elsewhere:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    with _engine(tmp_path, chain_model(), Part("onnxruntime:CPU")) as engine:
        with pytest.raises(UsageError, match="'x' lies on a device, and is read on the host"):
            engine.run({"x": Elsewhere()})
        with pytest.raises(UsageError, match="'y' is not made in a device's memory"):
            engine.run_on_device({"x": normal(2, 32)})
        assert engine.run({"x": normal(2, 32)})["y"].shape == (2, 32)
        inputs = engine.new_inputs()
        inputs["x"][...] = normal(2, 32)
        np.testing.assert_array_equal(engine.run(inputs)["y"], engine.run({"x": normal(2, 32)})["y"])


@pytest.mark.gpu(count=2)
def test_graphs_on_two_cards_answer_right_while_threads_come_and_record_beside_those_that_replay(tmp_path: Path) -> None:
    model = chain_model(rows=512, width=64)
    feeds = [normal(512, 64, seed=seed) for seed in range(4)]
    wanted = [reference(model, {"x": each})["y"] for each in feeds]
    cards = [CUDA, "onnxruntime:CUDA:1"]
    for each in cards:
        (tmp_path / each[-1]).mkdir()
    first, second = (partial(_engine, tmp_path / each[-1], model, Part(each, settings=GRAPH), callers=2) for each in cards)

    def calls(running: Engine, count: int) -> None:
        for number in range(count):
            _close(running.run({"x": feeds[number % 4]})["y"], wanted[number % 4])

    with first() as one, second() as two:
        for _ in range(3):
            with ThreadPoolExecutor(4) as pool:  # new threads, each of which records
                for each in [pool.submit(calls, running, count) for running in (one, two) for count in (40, 15)]:
                    each.result()
