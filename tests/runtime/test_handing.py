"""Large outputs are handed out without a copy: what is kept, however it was sliced, no later run overwrites; the rest is written again."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.handing import Handing
from aivmm.runtime.plan import Execution
from aivmm.tensors import TensorSpec
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, onnx_model, reference

ROWS, WIDTH = 128, 32
WAYS = {
    "openvino": ([Part(OPENVINO)], Execution(), 1),
    "onnxruntime": ([Part(ONNXRUNTIME)], Execution(), 1),
    "three callers": ([Part(ONNXRUNTIME)], Execution(), 3),
    "cut": ([Part(ONNXRUNTIME, 0, 3), Part(OPENVINO, 4)], Execution(), 1),
    "pipelined": ([Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], Execution(mode="pipelined"), 1),
    "replicated": ([Part(OPENVINO, replicas=2)], Execution(), 1),
}
Load = Callable[[Any, Sequence[Part], Execution, int], Engine]


@pytest.fixture(scope="module")
def model() -> Any:
    return chain_model(rows=ROWS, width=WIDTH)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    engines: list[Engine] = []
    numbers = itertools.count()

    def make(model: Any, parts: Sequence[Part], execution: Execution, callers: int) -> Engine:
        path = make_bundle(tmp_path / f"{next(numbers)}.aivmm", model, parts, execution=execution, callers=callers)
        engines.append(Engine.load(path))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=WAYS)
def engine(request: pytest.FixtureRequest, load: Load, model: Any) -> Engine:
    return load(model, *WAYS[request.param])


def inputs(seed: int) -> dict[str, Any]:
    return {"x": normal(ROWS, WIDTH, seed=seed)}


def assert_right(model: Any, found: Any, seed: int, where: Any = np.s_[...]) -> None:
    np.testing.assert_allclose(found, reference(model, inputs(seed))["y"][where], rtol=1e-4, atol=1e-5)


def test_what_is_kept_stays_as_it_was(engine: Engine, model: Any) -> None:
    kept = [engine.run(inputs(seed))["y"] for seed in range(8)]
    kept += [each["y"] for each in engine.stream(inputs(seed) for seed in range(8, 16))]
    for seed, each in enumerate(kept):
        assert_right(model, each, seed)
        assert each.flags.writeable and each.flags.c_contiguous
    assert len({each.ctypes.data for each in kept}) == len(kept)


@pytest.mark.parametrize("where", [np.s_[5], np.s_[3:7, ::2], np.s_[..., -1:], np.s_[:, None, :]], ids=str)
def test_a_slice_keeps_what_it_shows(engine: Engine, model: Any, where: Any) -> None:
    kept = [engine.run(inputs(seed))["y"][where] for seed in range(6)]
    for seed, each in enumerate(kept):
        assert_right(model, each, seed, where)


def test_so_does_what_other_libraries_made_of_it(engine: Engine, model: Any) -> None:
    makes: list[Callable[[Any], Any]] = [
        memoryview,
        np.from_dlpack,
        lambda y: y.T,
        lambda y: y.reshape(-1),
        lambda y: y.view(np.uint8),
        lambda y: np.lib.stride_tricks.as_strided(y, (WIDTH,), (4,)),
        iter,
    ]
    kept = [make(engine.run(inputs(seed))["y"]) for seed, make in enumerate(makes)]
    for _ in range(8):
        engine.run(inputs(99))
    assert_right(model, np.asarray(kept[0]), 0)
    assert_right(model, kept[1], 1)
    assert_right(model, kept[2].T, 2)
    assert_right(model, kept[3].reshape(ROWS, WIDTH), 3)
    assert_right(model, kept[4].view(np.float32), 4)
    assert_right(model, kept[5], 5, np.s_[0])
    assert_right(model, next(kept[6]), 6, np.s_[0])


@pytest.mark.usefixtures("hot_path")
def test_what_nobody_keeps_is_written_again(load: Load, model: Any) -> None:
    engine = load(model, [Part(ONNXRUNTIME)], Execution(), 1)
    engine.run(inputs(0))  # copied: there may be no other
    assert len({engine.run(inputs(seed))["y"].ctypes.data for seed in range(5)}) == 1
    answer, seen = {}, set()
    for seed in range(20):  # as most callers do: the last answer is let go when the next one is there
        answer = engine.run(inputs(seed))
        seen.add(answer["y"].ctypes.data)
    assert_right(model, answer["y"], 19)
    assert len(seen) == 2


def test_an_answer_that_comes_back_as_an_input_is_read_before_it_is_overwritten(load: Load) -> None:
    shape = (64, 128)
    model = onnx_model(
        [helper.make_node("Add", ["state", "x"], ["next"])],
        [("state", TensorProto.FLOAT, shape), ("x", TensorProto.FLOAT, shape)],
        [("next", TensorProto.FLOAT, shape)],
    )
    for target in (OPENVINO, ONNXRUNTIME):
        engine = load(model, [Part(target)], Execution(), 1)
        state, one = np.zeros(shape, dtype=np.float32), np.ones(shape, dtype=np.float32)
        for step in range(30):
            state = engine.run({"state": state, "x": one})["next"]
            assert (state == step + 1).all()


@pytest.mark.usefixtures("hot_path")
def test_callers_on_many_threads_keep_their_own(load: Load, model: Any) -> None:
    engine = load(model, [Part(OPENVINO)], Execution(), 3)
    expected = [reference(model, inputs(seed))["y"] for seed in range(6)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        mine = [engine.run(inputs(seed))["y"] for _ in range(20)]
        if not all(np.allclose(each, expected[seed], rtol=1e-4, atol=1e-5) for each in mine):
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    assert wrong == []


def test_what_was_handed_out_outlives_the_engine(engine: Engine, model: Any) -> None:
    kept = engine.run(inputs(1))["y"]
    engine.close()
    gc.collect()
    assert_right(model, kept, 1)


class _Request:
    """Writes the number of its run where its output is bound."""

    array: Any = None

    def __init__(self, runs: list[int]) -> None:
        self._runs = runs

    def bind(self, name: str, buffer: Any) -> None:
        if name == "y":
            self.array = buffer

    def run(self) -> None:
        self._runs[0] += 1
        self.array[...] = self._runs[0]


class _Made:
    """What makes such requests."""

    def __init__(self) -> None:
        self.runs = [0]

    def new_request(self) -> _Request:
        return _Request(self.runs)


@given(st.lists(st.one_of(st.just(-1), st.integers(0, 9)), max_size=60))
def test_no_run_ever_writes_where_an_array_is_kept(steps: list[int]) -> None:
    made: Any = _Made()
    handing = Handing(made, [TensorSpec(name="y", dtype="int32", shape=(12,))])
    kept: dict[int, Any] = {}
    for step in steps:
        if step >= 0:  # a run, whose output is kept as the step-th, in the place of an earlier one
            handing.run()
            (number,) = made.runs
            kept[step] = (number, handing.hand_out()["y"][number % 7 :])
        elif kept:
            kept.pop(next(iter(kept)))
        assert all((array == value).all() for value, array in kept.values())


@pytest.mark.usefixtures("hot_path")
@pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
def test_closing_frees_what_the_runtime_holds_at_once(load: Load, model: Any, target: str) -> None:
    engine = load(model, [Part(target)], Execution(), 1)
    for seed in range(4):
        engine.run(inputs(seed))
    (lane,) = engine.lanes()
    assert lane._handing is not None
    requests = [weakref.ref(each.request) for each in (lane._handing.private, *lane._handing.slots)]
    del lane
    gc.disable()  # a cycle would be found sometime
    try:
        engine.close()
        assert [each() for each in requests] == [None] * len(requests) and len(requests) > 1
    finally:
        gc.enable()


@pytest.mark.usefixtures("hot_path")
def test_a_run_that_was_taken_before_closing_is_told_and_does_not_keep_it_from_closing(load: Load, model: Any) -> None:
    engine = load(model, [Part(ONNXRUNTIME)], Execution(), 1)
    engine.run(inputs(0))
    run, told = engine.run, threading.Event()

    def ask() -> None:
        try:
            while True:
                run(inputs(0))
        except UsageError:
            told.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive() and told.wait(60)


@pytest.mark.usefixtures("hot_path")
def test_a_run_that_was_taken_before_a_deadline_was_set_is_watched(load: Load, model: Any) -> None:
    engine = load(model, [Part(ONNXRUNTIME)], Execution(), 1)
    engine.run(inputs(0))
    run = engine.run
    engine.timeout_s = 60
    run(inputs(0))
    assert any(each.name.startswith("aivmm-stage") for each in threading.enumerate())


@pytest.mark.usefixtures("hot_path")
def test_runs_of_subclasses_are_asked_every_time(tmp_path: Path, model: Any) -> None:
    asked = []

    class Mine(Engine):
        def run(self, inputs: Any) -> Any:
            asked.append(inputs)
            return super().run(inputs)

    with Mine.load(make_bundle(tmp_path / "m.aivmm", model, [Part(ONNXRUNTIME)])) as engine:
        for seed in range(4):
            engine.run(inputs(seed))
    assert len(asked) == 4


@pytest.mark.usefixtures("hot_path")
def test_where_no_further_request_can_be_made_answers_are_copies(load: Load, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(model, [Part(ONNXRUNTIME)], Execution(), 1)
    (executable,) = engine._program._executables[0]

    def refuse() -> Any:
        raise RuntimeError("no memory for another request")

    monkeypatch.setattr(executable, "new_request", refuse)
    kept = [engine.run(inputs(seed))["y"] for seed in range(4)]
    for seed, each in enumerate(kept):
        assert_right(model, each, seed)
    assert engine.events == []


def test_outputs_come_in_the_plans_order_whatever_stage_makes_them(load: Load) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["b"]), helper.make_node("Exp", ["b"], ["a"])]
    model = onnx_model(nodes, [("x", TensorProto.FLOAT, (3,))], [("b", TensorProto.FLOAT, (3,)), ("a", TensorProto.FLOAT, (3,))])
    for parts in ([Part(ONNXRUNTIME)], [Part(ONNXRUNTIME, 0, 0), Part(OPENVINO, 1)]):
        engine = load(model, parts, Execution(), 1)
        for _ in range(3):
            assert list(engine.run({"x": normal(3)})) == [each.name for each in engine.outputs] == ["b", "a"]
            with engine.lend({"x": normal(3)}) as outputs:
                assert list(outputs) == ["b", "a"]


def test_a_type_that_numpy_has_by_a_library_alone_is_copied(load: Load) -> None:
    pytest.importorskip("ml_dtypes")
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E5M2)
    model = onnx_model([node], [("x", TensorProto.FLOAT, (4,))], [("y", TensorProto.FLOAT8E5M2, (4,))])
    try:
        engine = load(model, [Part(ONNXRUNTIME)], Execution(), 1)
    except Unsupported as refusal:
        pytest.skip(str(refusal))
    x = np.array([1, 2, 4, 8], dtype=np.float32)
    assert all((engine.run({"x": x})["y"].astype(np.float32) == x).all() for _ in range(4))


@pytest.mark.parametrize("target", [ONNXRUNTIME, OPENVINO])
def test_an_idle_engine_refers_to_the_last_inputs_at_most(load: Load, target: str) -> None:
    rows = 4096  # large enough to be bound where it is, on both
    engine = load(chain_model(rows=rows, width=WIDTH), [Part(target)], Execution(), 1)
    given: list[weakref.ref[Any]] = []
    kept = []
    for seed in range(8):  # who keeps answers has all of a lane's requests in use, each of which was bound to other inputs
        x = normal(rows, WIDTH, seed=seed).copy()
        given.append(weakref.ref(x))
        kept.append(engine.run({"x": x})["y"])
    del x
    gc.collect()
    assert [each() is not None for each in given] == [False] * 7 + [True]
    again = normal(rows, WIDTH, seed=3)  # and a request that forgot its inputs gets others before it runs
    for answer in (kept[3], engine.run({"x": again})["y"], engine.run({"x": again})["y"]):
        np.testing.assert_allclose(answer, reference(chain_model(rows=rows, width=WIDTH), {"x": again})["y"], rtol=1e-4, atol=1e-5)
    engine.close()
    gc.collect()
    assert given[-1]() is None
