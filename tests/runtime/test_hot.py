"""The hot path in C and its reference in Python: both do the same, and keep nothing. Without `_hot` all works."""

from __future__ import annotations

import collections
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime import clocks, hot, pool, program, shortest
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, onnx_model, reference
from tests.runtime.engines import Load, close_to
from tests.runtime.interrupts import interrupted_at

SHAPE = (4, 16)
COPIED, BOUND = 64, 768  # rows of 128 floats that are copied in, and so many that they are bound where they are


def plus_one(*shape: int | str, steps: int = 1) -> Any:
    """Return a model that adds 1 in so many steps, a power of two: a node each."""
    names = ["x", *(f"m{each}" for each in range(1, steps)), "y"]
    nodes = [helper.make_node("Add", [names[each], "step"], [names[each + 1]]) for each in range(steps)]
    step = {"step": np.array([1 / steps], np.float32)}
    return onnx_model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)], step)


@pytest.fixture(params=[1, 4], ids=["whole", "cut"])
def stages(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def in_stages(count: int, target: str) -> list[Part]:
    """Cut `plus_one` of as many steps; both runtimes take turns, and `target` has the last stage."""
    other = {OPENVINO: ONNXRUNTIME, ONNXRUNTIME: OPENVINO}[target]
    return [Part(target if (count - each) % 2 else other, each, each) for each in range(count)]


@pytest.fixture
def warm(load: Load, hot_path: str, stages: int) -> Callable[..., Engine]:
    """Load an engine, and have it answer until it takes the hot path."""

    def make(target: str = ONNXRUNTIME, x: Any = None, **fields: Any) -> Engine:
        x = np.zeros(SHAPE, np.float32) if x is None else x
        engine = load(plus_one(*x.shape, steps=stages), in_stages(stages, target), **fields)
        for _ in range(3):
            engine.run({"x": x})
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
def test_arrays_of_every_layout_and_mappings_of_every_kind_are_answered(warm: Callable[..., Engine], target: str, rows: int) -> None:
    x = normal(rows, 128)
    engine = warm(target, x)
    for number, form in enumerate(forms(x)):
        before = np.array(form, np.float32)
        for mapping in (
            {"x": form},
            types.MappingProxyType({"x": form}),
            collections.OrderedDict(x=form),
            collections.ChainMap({"x": form}),
        ):
            close_to(engine.run(mapping), {"y": before + 1})
        np.testing.assert_array_equal(np.array(form, np.float32), before, err_msg=str(number))  # and not written to


def test_an_array_that_is_filled_again_and_again_is_read_each_time(warm: Callable[..., Engine]) -> None:
    engine, x, others = warm(), np.zeros(SHAPE, np.float32), [np.full(SHAPE, each, np.float32) for each in range(3)]
    for number in range(40):
        x[...] = number
        assert (engine.run({"x": x})["y"] == number + 1).all()
        if number > 20:  # by then it is bound itself
            assert (engine.run({"x": others[number % 3]})["y"] == number % 3 + 1).all()


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
    "no array": ({"x": "text"}, "expected float32"),
    "no mapping": ([1, 2], "inputs are given by name, and this is a list"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_inputs_is_said_and_the_engine_goes_on(warm: Callable[..., Engine], bad: Any, message: str) -> None:
    engine = warm()
    for _ in range(3):
        with pytest.raises(UsageError, match=message):
            engine.run(bad)
        assert (engine.run({"x": np.ones(SHAPE, np.float32)})["y"] == 2).all()
    assert engine.stats()["runs"] == 6  # what was refused did not run


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
def test_what_callers_do_to_an_answer_is_in_no_later_one(warm: Callable[..., Engine], spoil: Callable[[dict[str, Any]], None]) -> None:
    engine, x = warm(), np.ones(SHAPE, np.float32)
    for _ in range(10):
        answer = engine.run({"x": x})
        assert list(answer) == ["y"] and answer["y"].shape == SHAPE and answer["y"].dtype == np.float32
        assert answer["y"].flags.writeable and answer["y"].flags.c_contiguous and (answer["y"] == 2).all()
        spoil(answer)


def test_the_end_of_an_answers_array_is_told_by_the_next_turn_of_its_request(warm: Callable[..., Engine]) -> None:
    engine, x, told = warm(), np.ones(SHAPE, np.float32), []
    for number in range(8):
        weakref.finalize(engine.run({"x": x})["y"], told.append, number)
    for _ in range(4):  # as many requests as a lane has
        engine.run({"x": x})
    assert sorted(told) == list(range(8))


@pytest.mark.parametrize("ask", ["run", "submit", "lend", "close"])
def test_who_is_told_that_an_answers_array_ended_may_ask_the_engine(warm: Callable[..., Engine], ask: str) -> None:
    engine, x, told = warm(), np.ones(SHAPE, np.float32), []
    assert engine.stats()["lanes"] == 1  # which the one who asks would wait for

    def ended() -> None:
        if ask == "close":
            engine.close()
        told.append(engine._closed or engine.run({"x": x})["y"])

    def caller() -> None:
        for _ in range(6):
            if not engine._closed:
                weakref.finalize(engine.run({"x": x})["y"], ended)
        for _ in range(6):
            if ask == "submit":
                engine.submit({"x": x}).result()
            elif ask == "lend":
                with engine.lend({"x": x}):
                    pass
            elif not engine._closed:
                engine.run({"x": x})

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
    warm: Callable[..., Engine], raised: BaseException, expected: type[BaseException], stages: int, failing: str
) -> None:
    engine, which = warm(), 0 if failing == "the first" else stages - 1
    (lane,) = engine.lanes()
    x = np.ones(SHAPE, np.float32)

    def fail() -> None:
        raise raised

    for _ in range(2):
        lane.wrap(lambda index, run: fail if index == which else run)
        with pytest.raises(expected) as caught:
            engine.run({"x": x})
        assert isinstance(raised, expected) or (caught.value.__cause__ is raised and "it broke" in str(caught.value))
        assert "fail" in "".join(traceback.format_exception(raised))
        lane.wrap(None)
        assert (engine.run({"x": x})["y"] == 2).all()
    stats = engine.stats()
    assert [each["count"] for each in stats["stages"]] == [7 if each < which else 5 for each in range(stages)]
    assert stats["hot_path"] == ("python" if hot.native is None else "native")


def test_a_stage_that_dies_is_replaced_by_the_fallback(warm: Callable[..., Engine], lose: Any) -> None:
    from aivmm.runtime.ort_requests import BoundRequest

    engine = warm(fallbacks=[[Part(OPENVINO)]])
    lose(BoundRequest, lambda request: True)
    (lane,) = engine.lanes()
    lane.wrap(lambda _, run: run)  # which is the request's own, lost, and no longer the runtime's call
    for _ in range(3):
        assert (engine.run({"x": np.ones(SHAPE, np.float32)})["y"] == 2).all()
    assert [each.target for each in engine.stages] == [OPENVINO]


# --- what is kept ---


def test_calls_and_errors_leave_nothing_behind(warm: Callable[..., Engine], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "aivmm.engine")  # what is logged is kept: by the test's own log
    engine = warm()
    (lane,) = engine.lanes()
    lane.watch = None  # which remembers what is usual
    arrays = [np.ones(SHAPE, np.float32) for _ in range(3)]
    wrong, kept = {"x": np.ones((1, 2), np.float32)}, None

    def broken() -> None:
        raise RuntimeError("it broke")

    def calls(count: int) -> None:
        nonlocal kept
        for number in range(count):
            kept = engine.run({"x": arrays[number % 3]})
            if number % 50 == 0:
                with pytest.raises(UsageError):
                    engine.run(wrong)
                lane.wrap(lambda _, run: broken)
                with pytest.raises(Unsupported):
                    engine.run({"x": arrays[0]})
                lane.wrap(None)

    def held() -> list[int]:
        gc.collect()
        watched = (None, True, False, lane, lane.feed, lane.hands, *lane.hands.slots, *arrays, "y", UsageError, wrong["x"], engine._program)
        return [sys.getallocatedblocks(), *map(sys.getrefcount, watched)]

    calls(2000)
    before = held()
    calls(20_000)
    grown = [after - ago for ago, after in zip(before, held(), strict=True)]
    assert grown[0] < 500 and max(map(abs, grown[1:])) < 100, grown


def test_an_engine_that_nobody_has_goes_away_without_being_closed(hot_path: str, tmp_path: Path) -> None:
    engine = Engine.load(make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)]))
    for _ in range(4):
        kept = engine.run({"x": normal(2, 32)})
    gone = weakref.ref(engine._program)
    del engine
    gc.collect()
    assert gone() is None
    close_to(kept, reference(chain_model(), {"x": normal(2, 32)}))


def test_threads_that_wait_for_turns_get_their_own_answers(warm: Callable[..., Engine]) -> None:
    engine = warm(callers=2)
    wrong = []

    def work(number: int) -> None:
        kept = [engine.run({"x": np.full(SHAPE, number * 1000 + each, np.float32)})["y"] for each in range(300)]
        wrong.extend(each for each, y in enumerate(kept) if not (y == number * 1000 + each + 1).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    assert wrong == [] and engine.stats()["runs"] == 8 * 300 + 3


def test_a_trace_sees_the_calls(warm: Callable[..., Engine], stages: int) -> None:
    engine = warm()
    with engine.trace() as trace:
        engine.run({"x": np.ones(SHAPE, np.float32)})
    engine.run({"x": np.ones(SHAPE, np.float32)})
    assert [each.stage for each in trace.runs] == list(range(stages)) and engine.stats()["runs"] == 5


# --- which one is used ---


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 2**50), st.tuples(st.integers(1, 3000))), max_size=12), st.integers(-1, 2000))
def test_both_clocks_remember_the_same(notes: list[Any], many: int) -> None:
    if hot.native is None:
        pytest.skip(hot.why_not)
    both = (clocks.PythonClock(), hot.native.Clock())
    for each in both:
        each.fill()
        for note in notes:
            for number in range(*note) if isinstance(note, tuple) else [note]:
                each.note(number)
                each.count += 1
    ours, native = both
    assert ours.newest(many) == native.newest(many) and ours.count == native.count
    assert ours.newest_ns(many) == native.newest_ns(many) == sum(ours.newest(many))
    for without, step, most_ns in ((0, 16, 1 << 62), (1, 67, 1000), (max(many, 0), 1, 5), (3, 5000, 1 << 40)):
        assert ours.sums(many, without, step, most_ns) == native.sums(many, without, step, most_ns)
    assert len(native.newest(clocks.RING + 1)) == min(ours.count, clocks.RING)
    for each in both:
        with pytest.raises(ValueError):
            each.sums(many, 0, 0, 1)  # and not for ever


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 3000)), min_size=1, max_size=12),
    st.integers(1, 300),
    st.integers(1, 6000),
    st.sampled_from([0.0, 1000.0, 1500.0, 1e12]),
    st.sampled_from([0.0, 1e12]),
)
def test_both_clocks_wait_for_as_long(phases: list[tuple[int, int]], step: int, most: int, call_ns: float, ratio: float) -> None:
    if hot.native is None:
        pytest.skip(hot.why_not)
    both = (clocks.PythonClock(), hot.native.Clock())
    waited: list[list[Any]] = [[], []]
    for each, found in zip(both, waited, strict=True):
        each.fill()
        each.wait(0, step, min(most, 1000), 100_000, 500_000, call_ns, ratio)
        now_ns = 0
        for calls, took_ns in phases:
            for _ in range(calls):
                now_ns += took_ns
                each.note(took_ns)
                each.count += 1
                if each.count >= each.due or now_ns >= each.due_ns:
                    found.append((each.count, each.may_wait(now_ns), each.may_wait(now_ns) and each.due, each.due_ns))
                    if not each.may_wait(now_ns):
                        each.wait(now_ns, step, min(most, 1000), 100_000, 500_000, call_ns, ratio)
    assert waited[0] == waited[1]


ANSWER = """
import json, sys
if sys.argv[2] == "hidden":
    sys.modules["aivmm.runtime._hot"] = None
from aivmm.errors import UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
import numpy
try:
    engine = Engine.load(sys.argv[1])
except UsageError as error:
    raise SystemExit(str(error))
with engine:
    for _ in range(1200):
        engine.run({"x": numpy.zeros((2, 32), numpy.float32)})
    stats, kinds = engine.stats(), [each.__name__ for each in type(engine.one_lane()).__mro__]
print(json.dumps([stats["hot_path"], stats["hot_path_reason"], stats["runs"], stats["stages"][0]["p50_s"] > 0, kinds[-2]]))
"""
Answered = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Answer by a plan in a process of its own, and print what `stats()` says; `hidden` hides that the module was built."""
    bundle = make_bundle(tmp_path_factory.mktemp("hot") / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)])

    def run(*, hidden: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != hot.VARIABLE} | variables
        command = [sys.executable, "-c", ANSWER, str(bundle), "hidden" if hidden else ""]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def test_without_the_module_all_works_and_says_so(answered: Answered) -> None:
    path, reason, *rest = json.loads(answered(hidden=True).stdout)
    assert path == "python" and reason.startswith("it was not built") and rest == [1200, True, "PythonClock"]


def test_the_module_is_left_alone_where_that_is_asked_for(answered: Answered) -> None:
    path, reason, *rest = json.loads(answered(AIVMM_HOT_PATH="python").stdout)
    assert path == "python" and reason == "AIVMM_HOT_PATH=python asks for it" and rest == [1200, True, "PythonClock"]


def test_what_cannot_be_had_is_refused(answered: Answered) -> None:
    refused = answered(hidden=True, AIVMM_HOT_PATH="native")
    assert refused.returncode == 1 and "there is no native hot path: it was not built" in refused.stderr
    refused = answered(AIVMM_HOT_PATH="fast")
    assert refused.returncode == 1 and "AIVMM_HOT_PATH is 'fast'; set it to python or native" in refused.stderr


@pytest.mark.skipif(hot.native is None, reason=hot.why_not)
def test_who_asks_for_python_when_c_is_loaded_is_told(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hot.VARIABLE, "python")
    with pytest.raises(UsageError, match=r"AIVMM_HOT_PATH=python came too late: .*; set it before aivmm is imported"):
        load(chain_model(), [Part(ONNXRUNTIME)])


@pytest.mark.skipif(hot.native is None, reason=hot.why_not)
def test_a_module_that_does_not_fit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(array: Any) -> tuple[Any, ...]:
        raise TypeError("this is no array")

    monkeypatch.delenv(hot.VARIABLE, raising=False)
    assert hot._load() is hot.native
    with monkeypatch.context() as other:
        other.setattr(hot.native, "array_fields", refuses)
        with pytest.raises(ImportError, match="lays out arrays in another way"):
            hot._load()
    monkeypatch.delattr(hot.native, "VERSION")  # as of before there was one
    with pytest.raises(ImportError, match="another version of its source: install again"):
        hot._load()


def test_each_stage_counts_its_runs_and_its_time(warm: Callable[..., Engine], stages: int) -> None:
    engine, x = warm(), np.ones(SHAPE, np.float32)
    for _ in range(2 * clocks.RING + 100):  # more than are remembered
        engine.run({"x": x})
    lane = engine.one_lane()
    for each in engine.stats()["stages"]:
        assert each["count"] == 2 * clocks.RING + 103 and 0 < each["p50_s"] <= each["p99_s"] < each["total_s"]
    if stages > 1:  # the whole way has a clock of its own: stages and what is between them
        inside = [sum(durations) for durations in zip(*(each.last(500) for each in lane.clocks), strict=True)]
        whole = lane.last(500)
        assert all(a <= b for a, b in zip(inside, whole, strict=True)) and sum(inside) > 0.5 * sum(whole)


def test_requests_that_go_another_way_say_so(load: Load) -> None:
    two = onnx_model(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [("a", TensorProto.FLOAT, SHAPE), ("b", TensorProto.FLOAT, SHAPE)],
        [("y", TensorProto.FLOAT, SHAPE)],
    )
    assert load(two, [Part(ONNXRUNTIME)]).stats()["hot_path_reason"] == "it is for one input and one output"
    for how in (Execution(mode="pipelined"), Execution(batching=Batching(max_batch=2))):
        assert load(plus_one(1, 16), [Part(ONNXRUNTIME)], execution=how).stats()["hot_path_reason"] == "stages run on threads of their own"
    assert "a shape is open" in load(plus_one("n", 16), [Part(ONNXRUNTIME)]).stats()["hot_path_reason"]
    engine = load(chain_model(), [Part(ONNXRUNTIME)])
    engine.timeout_s = 60
    assert engine.stats()["hot_path"] == "python" and "threads of their own" in engine.stats()["hot_path_reason"]
