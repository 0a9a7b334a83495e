"""The hot path in C and its reference in Python: both do the same, and keep nothing. Without `_hot` all works."""

from __future__ import annotations

import collections
import gc
import logging
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime import clocks, hot, pool, program, shortest
from aivmm.runtime.engine import Engine
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, onnx_model, reference
from tests.runtime.engines import Load, close_to
from tests.runtime.interrupts import interrupted_at

SHAPE = (4, 16)
COPIED, BOUND = 64, 768  # rows of 128 floats that are copied in, and so many that they are bound where they are


def plus_one(*shape: int | str, steps: int = 1, several: bool = False) -> Any:
    """Return a model that adds 1 in so many steps, a power of two: a node each. With `several` it adds `z`, too, and has `w`, -y."""
    names = ["x", *(f"m{each}" for each in range(1, steps)), "y"]
    nodes = [helper.make_node("Add", [names[each], "step"], [names[each + 1]]) for each in range(steps)]
    inputs, outputs = [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)]
    if several:
        nodes[0] = helper.make_node("Sum", ["x", "z", "step"], [names[1]])
        nodes.append(helper.make_node("Neg", ["y"], ["w"]))
        inputs.append(("z", TensorProto.FLOAT, shape))
        outputs.append(("w", TensorProto.FLOAT, shape))
    return onnx_model(nodes, inputs, outputs, {"step": np.array([1 / steps], np.float32)})


class Kind(NamedTuple):
    """A plan of `plus_one`: how many stages it is cut into, and whether it has several inputs and outputs."""

    stages: int = 1
    several: bool = False

    @property
    def names(self) -> list[str]:
        return ["y", "w"] if self.several else ["y"]

    def model(self, *shape: int) -> Any:
        return plus_one(*shape, steps=self.stages, several=self.several)

    def parts(self, target: str) -> list[Part]:
        """Both runtimes take turns, and `target` has the last stage."""
        other, last = {OPENVINO: ONNXRUNTIME, ONNXRUNTIME: OPENVINO}[target], self.stages - 1
        return [Part(target if (last - each) % 2 == 0 else other, each, -1 if each == last else each) for each in range(self.stages)]

    def given(self, x: Any) -> dict[str, Any]:
        """Return inputs that come to x + 1."""
        return {"x": x, "z": np.zeros(np.shape(x), np.float32)} if self.several else {"x": x}

    def expected(self, y: Any) -> dict[str, Any]:
        return {"y": y, "w": -y} if self.several else {"y": y}


@pytest.fixture(params=[Kind(), Kind(4), Kind(4, several=True)], ids=["whole", "cut", "several, cut"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def warm(load: Load, hot_path: str, kind: Kind) -> Callable[..., Engine]:
    """Load an engine, and have it answer until it takes the hot path."""

    def make(target: str = ONNXRUNTIME, x: Any = None, **fields: Any) -> Engine:
        x = np.zeros(SHAPE, np.float32) if x is None else x
        engine = load(kind.model(*x.shape), kind.parts(target), **fields)
        for _ in range(3):
            engine.run(kind.given(x))
        assert engine.stats()["hot_path"] == hot_path
        return engine

    return make


def forms(x: Any) -> Iterator[Any]:
    locked = x.copy()
    locked.flags.writeable = False
    yield from (x, x, x.copy(), locked, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1, ::-1].copy()[::-1, ::-1])
    yield from (x.tolist(), np.broadcast_to(x[:1], x.shape), np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape), x.view(np.matrix))


@pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
@pytest.mark.parametrize("rows", [COPIED, BOUND], ids=["copied", "bound"])
def test_arrays_of_every_layout_and_mappings_of_every_kind_are_answered(
    warm: Callable[..., Engine], target: str, rows: int, kind: Kind
) -> None:
    x = normal(rows, 128)
    engine = warm(target, x)
    for number, form in enumerate(forms(x)):
        before = np.array(form, np.float32)
        for kind_of_mapping in (dict, types.MappingProxyType, collections.OrderedDict, collections.ChainMap):
            close_to(engine.run(kind_of_mapping(kind.given(form))), kind.expected(before + 1))
        np.testing.assert_array_equal(np.array(form, np.float32), before, err_msg=str(number))  # and not written to


def test_an_array_that_is_filled_again_and_again_is_read_each_time(warm: Callable[..., Engine], kind: Kind) -> None:
    engine, x, others = warm(), np.zeros(SHAPE, np.float32), [np.full(SHAPE, each, np.float32) for each in range(3)]
    for number in range(40):
        x[...] = number
        assert (engine.run(kind.given(x))["y"] == number + 1).all()
        if number > 20:  # by then it is bound itself
            assert (engine.run(kind.given(others[number % 3]))["y"] == number % 3 + 1).all()


def test_a_name_may_be_another_object_than_the_one_in_the_plan(load: Load, hot_path: str) -> None:
    node = helper.make_node("Add", ["pixels", "pixels"], ["y"])
    engine = load(onnx_model([node], [("pixels", TensorProto.FLOAT, SHAPE)], [("y", TensorProto.FLOAT, SHAPE)]), [Part(ONNXRUNTIME)])
    spelled = "".join(["pix", "els"])
    assert spelled is not sys.intern("pixels")
    for number in range(6):
        answer = engine.run({spelled if number % 2 else "pixels": np.full(SHAPE, number, np.float32)})
        assert list(answer) == ["y"] and (answer["y"] == 2 * number).all()


BAD: dict[str, tuple[Any, str]] = {
    "none": ({}, r"input 'x' is missing; the plan takes x: float32\[4, 16\]"),
    "another name": ({"X": np.zeros(SHAPE, np.float32)}, "input 'x' is missing"),
    "one more": ({"x": np.zeros(SHAPE, np.float32), "extra": 1}, "unknown input 'extra'"),
    "another type": ({"x": np.zeros(SHAPE)}, "type float64, expected float32"),
    "another byte order": ({"x": np.zeros(SHAPE, ">f4")}, "type >f4, expected float32"),
    "another shape": ({"x": np.zeros((16, 4), np.float32)}, r"shape \[16, 4\]"),
    "as many elements": ({"x": np.zeros(64, np.float32)}, r"shape \[64\]"),
    "no array": ({"x": "text"}, "is text, expected numbers; give an array of float32"),
    "no mapping": ([1, 2], "inputs are given by name, and this is a list"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_inputs_is_said_and_the_engine_goes_on(warm: Callable[..., Engine], bad: Any, message: str, kind: Kind) -> None:
    engine = warm()
    if kind.several and isinstance(bad, dict) and bad:
        bad = bad | {"z": np.zeros(SHAPE, np.float32)}
    for _ in range(3):
        with pytest.raises(UsageError, match=message):
            engine.run(bad)
        assert (engine.run(kind.given(np.ones(SHAPE, np.float32)))["y"] == 2).all()
    assert engine.stats()["runs"] == 6  # what was refused did not run


@pytest.mark.parametrize("kind", [Kind(several=True), Kind(4, several=True)], ids=["whole", "cut"], indirect=False)
def test_each_of_several_inputs_is_read_and_checked(warm: Callable[..., Engine], kind: Kind) -> None:
    engine = warm()
    x, other = np.ones(SHAPE, np.float32), np.ones((1, 2), np.float32)
    for number in range(20):
        z = np.full(SHAPE, number, np.float32)
        for inputs in ({"x": x, "z": z}, {"z": z, "x": x}):  # in any order
            close_to(engine.run(inputs), kind.expected(x + number + 1))
        for bad, message in (({"x": x, "y": z}, "input 'z' is missing"), ({"x": x, "z": other}, r"'z' has .*shape \[1, 2\]")):
            with pytest.raises(UsageError, match=message):
                engine.run(bad)


def test_of_several_outputs_each_may_be_kept_for_itself(load: Load, hot_path: str) -> None:
    kind = Kind(several=True)
    engine, kept = load(kind.model(*SHAPE), kind.parts(ONNXRUNTIME)), []
    for number in range(60):
        x = np.full(SHAPE, number, np.float32)
        answer = engine.run(kind.given(x))
        kept.append((number, "yw"[number % 2], answer["yw"[number % 2]]))
        if number % 7 == 6:
            kept.pop(0)
        for at, name, array in kept:
            assert (array == (at + 1 if name == "y" else -at - 1)).all()
    assert engine.stats()["hot_path"] == hot_path


def turned(answer: dict[str, Any]) -> None:
    answer["y"].shape = (2, 32)


def locked(answer: dict[str, Any]) -> None:
    answer["y"].flags.writeable = False


def read_otherwise(answer: dict[str, Any]) -> None:
    answer["y"].dtype = np.int32


def renamed(answer: dict[str, Any]) -> None:
    answer["mine"] = answer.pop("y")


def overwritten(answer: dict[str, Any]) -> None:
    answer["y"][...] = -1


@pytest.mark.parametrize("spoil", [turned, locked, read_otherwise, renamed, overwritten])
@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
def test_what_callers_do_to_an_answer_is_in_no_later_one(
    warm: Callable[..., Engine], spoil: Callable[[dict[str, Any]], None], kind: Kind
) -> None:
    engine, x = warm(), np.ones(SHAPE, np.float32)
    for _ in range(10):
        answer = engine.run(kind.given(x))
        assert list(answer) == kind.names and answer["y"].shape == SHAPE and answer["y"].dtype == np.float32
        for name, expected in kind.expected(2).items():
            assert answer[name].flags.writeable and answer[name].flags.c_contiguous and (answer[name] == expected).all()
        spoil(answer)


def test_the_end_of_an_answers_array_is_told_by_the_next_turn_of_its_request(warm: Callable[..., Engine], kind: Kind) -> None:
    engine, x, told = warm(), np.ones(SHAPE, np.float32), []
    for number in range(8):
        weakref.finalize(engine.run(kind.given(x))["y"], told.append, number)
    for _ in range(4):  # as many requests as a lane has
        engine.run(kind.given(x))
    assert sorted(told) == list(range(8))


@pytest.mark.parametrize("ask", ["run", "submit", "lend", "close"])
def test_who_is_told_that_an_answers_array_ended_may_ask_the_engine(warm: Callable[..., Engine], ask: str, kind: Kind) -> None:
    engine, x, told = warm(), np.ones(SHAPE, np.float32), []
    assert engine.stats()["lanes"] == 1  # which the one who asks would wait for

    def ended() -> None:
        if ask == "close":
            engine.close()
        told.append(engine._closed or engine.run(kind.given(x))["y"])

    def caller() -> None:
        for _ in range(6):
            if not engine._closed:
                weakref.finalize(engine.run(kind.given(x))["y"], ended)
        for _ in range(6):
            if ask == "submit":
                engine.submit(kind.given(x)).result()
            elif ask == "lend":
                with engine.lend(kind.given(x)):
                    pass
            elif not engine._closed:
                engine.run(kind.given(x))

    thread = threading.Thread(target=caller, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and len(told) == 6 if ask != "close" else engine._closed


def of_lanes(code: CodeType) -> bool:
    return code.co_filename in (shortest.__file__, pool.__file__, program.__file__)


@pytest.mark.parametrize("inputs", [("x",), ("x", "z")])
def test_whenever_a_call_is_interrupted_its_lane_comes_back(load: Load, hot_path: str, inputs: tuple[str, ...]) -> None:
    nodes = [helper.make_node("Add", [inputs[0], inputs[-1]], ["y"])]
    model = onnx_model(nodes, [(each, TensorProto.FLOAT, SHAPE) for each in inputs], [("y", TensorProto.FLOAT, SHAPE)])
    engine, given = load(model, [Part(ONNXRUNTIME)]), dict.fromkeys(inputs, np.ones(SHAPE, np.float32))
    for _ in range(3):
        engine.run(given)
    ask, free = engine._ask, engine._program.free.lanes
    for call in (partial(ask, given), partial(engine._program._at_once, given), partial(engine._program._first, given)):
        step = 1
        while interrupted_at(step, call, of_lanes):
            lost = not free
            if lost:
                free.append(engine.one_lane())  # without it nothing can be closed
            assert not lost, f"no lane is left after an interrupt at instruction {step} of {call}"
            step += 1
        assert step > 20 or (call.func is ask and hot_path == "native")  # which has no instructions of Python's


def test_who_is_interrupted_while_it_waits_for_a_lane_leaves_all_of_them(load: Load, hot_path: str) -> None:
    engine, given = load(plus_one(*SHAPE), [Part(ONNXRUNTIME)]), {"x": np.ones(SHAPE, np.float32)}
    free, step = engine._program.free, 1

    def wait() -> None:
        free.lanes.append(free.get())

    def of_waiting(code: CodeType) -> bool:
        return code.co_filename == pool.__file__

    while interrupted_at(step, wait, of_waiting):
        lost = not free.lanes
        if lost:
            free.lanes.append(engine.one_lane())
        assert not lost, f"no lane is left after an interrupt at instruction {step}"
        step += 1
    for _ in range(100):
        engine.run(given)
    assert step > 20 and list(free.lanes) == [engine.one_lane()] and free._tokens.qsize() <= 1


# --- errors ---


class Odd(BaseException):
    """Something like Ctrl-C."""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(RuntimeError("it broke"), Unsupported), (Unsupported("it cannot"), Unsupported), (UsageError("not so"), UsageError), (Odd(), Odd)],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else "",
)
@pytest.mark.parametrize("failing", ["the first", "the last"])
def test_an_error_is_the_requests_alone(
    warm: Callable[..., Engine], raised: BaseException, expected: type[BaseException], kind: Kind, failing: str
) -> None:
    engine, which = warm(), 0 if failing == "the first" else kind.stages - 1
    (lane,) = engine.lanes()
    x = np.ones(SHAPE, np.float32)

    def fail() -> None:
        raise raised

    for _ in range(2):
        lane.wrap(lambda index, run: fail if index == which else run)
        with pytest.raises(expected) as caught:
            engine.run(kind.given(x))
        assert isinstance(raised, expected) or (caught.value.__cause__ is raised and "it broke" in str(caught.value))
        assert "fail" in "".join(traceback.format_exception(raised))
        lane.wrap(None)
        assert (engine.run(kind.given(x))["y"] == 2).all()
    stats = engine.stats()
    assert [each["count"] for each in stats["stages"]] == [7 if each < which else 5 for each in range(kind.stages)]
    assert stats["hot_path"] == ("python" if hot.native is None else "native")


def test_a_stage_that_dies_is_replaced_by_the_fallback(warm: Callable[..., Engine], lose: Any, kind: Kind) -> None:
    from aivmm.runtime.ort_requests import BoundRequest

    engine = warm(fallbacks=[[Part(OPENVINO)]])
    lose(BoundRequest, lambda request: True)
    (lane,) = engine.lanes()
    lane.wrap(lambda _, run: run)  # which is the request's own, lost, and no longer the runtime's call
    for _ in range(3):
        assert (engine.run(kind.given(np.ones(SHAPE, np.float32)))["y"] == 2).all()
    assert [each.target for each in engine.stages] == [OPENVINO]


# --- what is kept ---


def test_calls_and_errors_leave_nothing_behind(warm: Callable[..., Engine], caplog: pytest.LogCaptureFixture, kind: Kind) -> None:
    caplog.set_level(logging.CRITICAL, "aivmm.engine")  # what is logged is kept: by the test's own log
    engine = warm()
    (lane,) = engine.lanes()
    lane.watch = None  # which remembers what is usual
    arrays = [np.ones(SHAPE, np.float32) for _ in range(3)]
    wrong, kept = kind.given(arrays[0]) | {"x": np.ones((1, 2), np.float32)}, None

    def broken() -> None:
        raise RuntimeError("it broke")

    def calls(count: int) -> None:
        nonlocal kept
        for number in range(count):
            kept = engine.run(kind.given(arrays[number % 3]))
            if number % 50 == 0:
                with pytest.raises(UsageError):
                    engine.run(wrong)
                lane.wrap(lambda _, run: broken)
                with pytest.raises(Unsupported):
                    engine.run(kind.given(arrays[0]))
                lane.wrap(None)

    def held() -> list[int]:
        gc.collect()
        faces = [face for slot in lane.hands.slots for _, face in slot.faces]
        of_lane = (lane, *lane.feeds, lane.hands, *lane.hands.slots, *faces, *(lane.ahead or ()))
        watched = (None, True, False, *of_lane, *arrays, "y", UsageError, wrong["x"], engine._program)
        return [sys.getallocatedblocks(), *map(sys.getrefcount, watched)]

    calls(2000)
    before = held()
    calls(8_000)
    grown = [after - ago for ago, after in zip(before, held(), strict=True)]
    assert grown[0] < 300 and max(map(abs, grown[1:])) < 100, grown


def test_an_engine_that_nobody_has_goes_away_without_being_closed(hot_path: str, tmp_path: Path) -> None:
    engine = Engine.load(make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)]))
    for _ in range(4):
        kept = engine.run({"x": normal(2, 32)})
    gone = weakref.ref(engine._program)
    del engine
    gc.collect()
    assert gone() is None
    close_to(kept, reference(chain_model(), {"x": normal(2, 32)}))


def test_threads_that_wait_for_turns_get_their_own_answers(warm: Callable[..., Engine], kind: Kind) -> None:
    engine = warm(callers=2)
    wrong = []

    def work(number: int) -> None:
        kept = [engine.run(kind.given(np.full(SHAPE, number * 1000 + each, np.float32)))["y"] for each in range(300)]
        wrong.extend(each for each, y in enumerate(kept) if not (y == number * 1000 + each + 1).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    assert wrong == [] and engine.stats()["runs"] == 8 * 300 + 3


def test_a_trace_sees_the_calls(warm: Callable[..., Engine], kind: Kind) -> None:
    engine = warm()
    with engine.trace() as trace:
        engine.run(kind.given(np.ones(SHAPE, np.float32)))
    engine.run(kind.given(np.ones(SHAPE, np.float32)))
    assert [each.stage for each in trace.runs] == list(range(kind.stages)) and engine.stats()["runs"] == 5


def test_each_stage_counts_its_runs_and_its_time(warm: Callable[..., Engine], kind: Kind) -> None:
    engine, x = warm(), np.ones(SHAPE, np.float32)
    for _ in range(2 * clocks.RING + 100):  # more than are remembered
        engine.run(kind.given(x))
    lane = engine.one_lane()
    for each in engine.stats()["stages"]:
        assert each["count"] == 2 * clocks.RING + 103 and 0 < each["p50_s"] <= each["p99_s"] < each["total_s"]
    if kind.stages > 1:  # the whole way has a clock of its own: stages and what is between them
        inside = [sum(durations) for durations in zip(*(each.last(500) for each in lane.clocks), strict=True)]
        whole = lane.last(500)
        assert all(a <= b for a, b in zip(inside, whole, strict=True)) and sum(inside) > 0.5 * sum(whole)
