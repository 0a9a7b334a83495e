"""The ways an engine runs its stages: one after another, pipelined, replicated; futures, awaiting, streams; errors and closing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.feed import COPY_LIMIT_BYTES
from aivmm.runtime.handing import Handing
from aivmm.runtime.lane import Lane
from aivmm.runtime.plan import Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, onnx_model, reference
from tests.runtime.engines import Load

F, I64 = TensorProto.FLOAT, TensorProto.INT64
PIPELINED = Execution(mode="pipelined")
CUT = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
WAYS = {
    "sequential": (Execution(), 1, 1),
    "three callers": (Execution(), 1, 3),
    "two replicas": (Execution(), 2, 1),
    "pipelined": (PIPELINED, 1, 1),
    "pipelined, one slot a stage": (Execution(mode="pipelined", depth=1), 1, 1),
    "pipelined, two replicas": (PIPELINED, 2, 1),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, load: Load) -> Callable[..., Engine]:
    """Load a model cut in two the way that the parameter names."""
    execution, replicas, callers = WAYS[request.param]

    def make(model: Any, cut: int) -> Engine:
        parts = [Part(OPENVINO, 0, cut, replicas=replicas), Part(ONNXRUNTIME, cut + 1, replicas=1)]
        return load(model, parts, execution=execution, callers=callers)

    return make


def samples(count: int, *shape: int) -> list[Any]:
    return [normal(*shape, seed=seed) for seed in range(count)]


def early_model() -> Any:
    """Return a chain of which the first stage makes an output, too: those are not handed out, so what is lent holds a lane."""
    model = chain_model()
    model.graph.output.append(helper.make_tensor_value_info("r0", F, (2, 32)))
    return model


def same(found: Any, expected: Any) -> bool:
    return bool(np.allclose(found, expected, rtol=1e-4, atol=1e-5))


def test_every_way_to_ask_gives_each_request_its_own_answer(way: Callable[..., Engine]) -> None:
    model = chain_model()
    engine = way(model, 3)
    inputs = samples(12, 2, 32)
    answers = [reference(model, {"x": x})["y"] for x in inputs]

    async def gather() -> list[Any]:
        return await asyncio.gather(*(engine.arun({"x": x}) for x in inputs))

    futures = [engine.submit({"x": x}) for x in inputs]
    for found in (
        [engine.run({"x": x}) for x in inputs],
        [each.result(60) for each in futures],
        list(engine.stream({"x": x} for x in inputs)),
        asyncio.run(gather()),
    ):
        assert all(same(one["y"], answer) for one, answer in zip(found, answers, strict=True))
    for x, answer in zip(inputs, answers, strict=True):
        with engine.lend({"x": x}) as outputs:
            assert same(outputs["y"], answer)
    assert engine.stats()["runs"] == 60
    assert [each["count"] for each in engine.stats()["stages"]] == [60, 60]


def test_many_threads_of_every_kind_get_their_own_answers(way: Callable[..., Engine]) -> None:
    model = chain_model()
    engine = way(model, 3)
    inputs = samples(8, 2, 32)
    answers = [reference(model, {"x": x})["y"] for x in inputs]
    wrong: list[str] = []

    def work(index: int) -> None:
        for turn in range(30):
            ask = (lambda x: engine.submit(x).result(60)) if (turn + index) % 2 else engine.run
            if not same(ask({"x": inputs[index]})["y"], answers[index]):
                wrong.append(f"{index} in turn {turn}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    assert wrong == []


@pytest.mark.parametrize("rows", [2, 512], ids=["small", "beyond the copy limit"])
def test_what_was_submitted_may_be_changed_at_once(way: Callable[..., Engine], rows: int) -> None:
    model = chain_model(rows=rows)
    assert (rows * 32 * 4 > COPY_LIMIT_BYTES) == (rows == 512)
    engine = way(model, 3)
    inputs = samples(6, rows, 32)
    reused = np.empty_like(inputs[0])
    futures = []
    for x in inputs:
        reused[...] = x
        futures.append(engine.submit({"x": reused}))
        reused[...] = np.nan
    for x, future in zip(inputs, futures, strict=True):
        assert same(future.result(60)["y"], reference(model, {"x": x})["y"])


def runtimes_address(request: Any, name: str, *, output: bool) -> int | None:
    """Return where the runtime itself says that a tensor lies; None where it does not say (ONNX Runtime of an input)."""
    if isinstance(request, Handing):
        request = request.now.request
    if hasattr(request, "_binding"):
        return int(request._binding.get_outputs()[request._places[name]].data_ptr()) if output else None
    tensor = request._request.get_output_tensor if output else request._request.get_input_tensor
    return int(tensor((request._outputs if output else request._inputs)[name]).data.ctypes.data)


@pytest.mark.parametrize("execution", [Execution(), PIPELINED], ids=lambda each: each.mode)
def test_nothing_is_copied_between_stages_whatever_lane_it_is(load: Load, execution: Execution) -> None:
    model = chain_model()
    parts = [Part(OPENVINO, 0, 3, replicas=2), Part(ONNXRUNTIME, 4, 5), Part(ONNXRUNTIME, 6, 6), Part(OPENVINO, 7)]
    engine = load(model, parts, execution=execution)
    lanes = engine._program.lanes
    assert len(lanes) == engine.stats()["lanes"] == (2 if execution.mode == "sequential" else 2 * 4 * 3)
    list(engine.stream({"x": normal(2, 32, seed=seed)} for seed in range(40)))
    seen = set()
    for lane in lanes:
        for producer, name in enumerate(("r1", "r2", "m3")):
            address = lane.buffers[name].ctypes.data
            assert address % 4096 == 0
            assert runtimes_address(lane._requests[producer], name, output=True) == address
            assert runtimes_address(lane._requests[producer + 1], name, output=False) in (address, None)
            seen.add(address)
        # And where the runtime does not say: what is written there is what the next stage reads.
        lane.buffers["r2"][...] = normal(2, 32, seed=99)
        lane._requests[2].run()
        np.testing.assert_allclose(lane.buffers["m3"], normal(2, 32, seed=99) @ weights_of(model, "w3"), rtol=1e-4, atol=1e-5)
    assert len(seen) == 3 * len(lanes)  # and no two lanes share any


def weights_of(model: Any, name: str) -> Any:
    return numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


def test_lent_outputs_are_the_engines_own_buffers(way: Callable[..., Engine]) -> None:
    engine = way(early_model(), 3)
    owned = {lane.buffers["r0"].ctypes.data for lane in engine._program.lanes}
    with engine.lend({"x": normal(2, 32)}) as outputs:
        assert outputs["r0"].ctypes.data in owned
        expected = {name: array.copy() for name, array in outputs.items()}
        if len(owned) > 1:  # another request takes another lane
            engine.run({"x": normal(2, 32, seed=1)})
            for name, array in expected.items():
                np.testing.assert_array_equal(outputs[name], array)
    assert engine.run({"x": normal(2, 32)})["r0"].ctypes.data not in owned
    with pytest.raises(ZeroDivisionError), engine.lend({"x": normal(2, 32)}):
        1 / 0  # noqa: B018
    for _ in range(2 * len(owned)):  # the lane came back all the same
        engine.run({"x": normal(2, 32)})


def test_what_is_handed_out_anyway_is_lent_without_holding_a_lane(load: Load) -> None:
    engine, x = load(chain_model(), CUT), {"x": normal(2, 32)}
    with engine.lend(x) as outputs:
        expected = outputs["y"].copy()
        assert engine.stats()["lanes"] == 1
        for seed in range(1, 6):
            engine.run({"x": normal(2, 32, seed=seed)})
        np.testing.assert_array_equal(outputs["y"], expected)
    assert same(expected, reference(chain_model(), x)["y"])


def lookup() -> Any:
    """y = table[i] + 0: an index beyond the table fails in ONNX Runtime, while running."""
    nodes = [helper.make_node("Gather", ["table", "i"], ["g"]), helper.make_node("Identity", ["g"], ["y"])]
    return onnx_model(nodes, [("i", I64, (1,))], [("y", F, (1,))], {"table": np.arange(4, dtype=np.float32)})


@pytest.mark.parametrize("execution", [Execution(), PIPELINED], ids=lambda each: each.mode)
@pytest.mark.parametrize("parts", [[Part(ONNXRUNTIME)], [Part(ONNXRUNTIME, 0, 0), Part(OPENVINO, 1)]], ids=len)
def test_an_error_reaches_the_request_it_belongs_to_and_no_other(load: Load, execution: Execution, parts: list[Part]) -> None:
    engine = load(lookup(), parts, execution=execution, callers=3)
    numbers = [2, 99, 0, -77, 3, 1, 50, 51, 2]
    futures = [engine.submit({"i": np.array([number])}) for number in numbers]
    for number, future in zip(numbers, futures, strict=True):
        if 0 <= number < 4:
            assert future.result(60)["y"].tolist() == [number]
        else:
            with pytest.raises(Unsupported, match=r"ONNX Runtime while running"):
                future.result(60)
    stream = engine.stream({"i": np.array([number])} for number in numbers)
    assert next(stream)["y"].tolist() == [2]
    with pytest.raises(Unsupported):
        next(stream)
    for number in range(4):  # from the second on by the hot path
        with pytest.raises(Unsupported, match=r"ONNX Runtime while running") as caught:
            engine.run({"i": np.array([99])})
        assert caught.value.__cause__ is not None
        assert engine.run({"i": np.array([number])})["y"].tolist() == [number]
    assert engine.run({"i": np.array([3])})["y"].tolist() == [3]


@pytest.mark.parametrize("how", ["run", "lend"])
@pytest.mark.parametrize("parts", [[Part(ONNXRUNTIME)], [Part(ONNXRUNTIME, 0, 0), Part(OPENVINO, 1)]], ids=len)
def test_a_request_that_fails_is_one_reason_to_take_a_program_for_dead(load: Load, parts: list[Part], how: str) -> None:
    engine, bad = load(lookup(), parts, fallbacks=[[Part(ONNXRUNTIME)]]), {"i": np.array([99])}
    for _ in range(2):  # three are needed where nothing was answered yet
        with pytest.raises(Unsupported, match="ONNX Runtime while running"):
            engine.run(bad) if how == "run" else engine.lend(bad).__enter__()
        assert engine.running == "the plan"
    assert engine.run({"i": np.array([3])})["y"].tolist() == [3]


def test_bad_inputs_are_refused_before_anything_runs(way: Callable[..., Engine]) -> None:
    engine = way(chain_model(), 3)
    good = {"x": normal(2, 32)}
    for bad, words in (({}, "missing"), ({"x": normal(2, 31)}, "shape"), ({**good, "z": 1}, "unknown input 'z'")):
        with pytest.raises(UsageError, match=words):
            engine.submit(bad)
        with pytest.raises(UsageError, match=words):
            engine.run(bad)
        with pytest.raises(UsageError, match=words):
            asyncio.run(engine.arun(bad))
        with pytest.raises(UsageError, match=words), engine.lend(bad):
            pass
        stream = engine.stream([good, bad, good])
        next(stream)
        with pytest.raises(UsageError, match=words):
            next(stream)
    for _ in range(2 * engine.stats()["lanes"]):  # no lane was lost
        engine.run(good)


def test_a_stream_takes_no_more_than_it_has_room_for(load: Load) -> None:
    engine = load(chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], execution=PIPELINED)
    taken = itertools.count()
    stream = engine.stream({"x": normal(2, 32, seed=next(taken))} for _ in itertools.count())
    for _ in range(10):
        next(stream)
    assert next(taken) <= 10 + engine.stats()["lanes"] + 1
    stream.close()
    engine.run({"x": normal(2, 32)})


def until_it_waits(thread: threading.Thread) -> None:
    while (frame := sys._current_frames().get(thread.ident or 0)) is None or frame.f_code.co_name not in ("wait", "get"):
        time.sleep(0.001)


def test_who_brings_more_than_fits_waits_and_the_wait_is_counted(load: Load) -> None:
    engine = load(early_model(), CUT)
    with engine.lend({"x": normal(2, 32)}):
        thread = threading.Thread(target=engine.run, args=({"x": normal(2, 32)},))
        thread.start()
        until_it_waits(thread)
        time.sleep(0.05)
        assert thread.is_alive() and engine.stats()["runs"] == 1
    thread.join(60)
    assert engine.stats()["runs"] == 2
    waits = engine.stats()["waits"]
    assert waits["count"] == 1 and waits["p50_s"] >= 0.04 and waits["total_s"] >= 0.04


def test_statistics_tell_waits_and_bytes_of_each_stage(load: Load) -> None:
    engine = load(chain_model(), [Part(OPENVINO, 0, 3, replicas=2), Part(ONNXRUNTIME, 4)], execution=PIPELINED)
    list(engine.stream({"x": normal(2, 32)} for _ in range(20)))
    stats = engine.stats()
    assert stats["mode"] == "pipelined" and [each["replicas"] for each in stats["stages"]] == [2, 1]
    for each in stats["stages"]:
        assert each["count"] == 20 and each["out_bytes"] == 20 * 2 * 32 * 4
        assert 0 < each["p50_s"] <= each["total_s"] and 0 <= each["wait_p50_s"] <= each["wait_total_s"]


def test_sizes_known_only_after_the_run_are_counted(load: Load) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Neg", ["where"], ["y"])]
    model = onnx_model(nodes, [("x", F, (6,))], [("y", I64, (1, "n"))])
    engine = load(model, [Part(ONNXRUNTIME, 0, 0), Part(ONNXRUNTIME, 1)], execution=PIPELINED)
    rows = [np.array([1] * count + [0] * (6 - count), dtype=np.float32) for count in (1, 6, 0, 3)]
    for count, outputs in zip((1, 6, 0, 3), engine.stream({"x": x} for x in rows), strict=True):
        assert outputs["y"].tolist() == [[-each for each in range(count)]]
    assert [each["out_bytes"] for each in engine.stats()["stages"]] == [80, 80]


def test_closing_finishes_what_is_in_flight(way: Callable[..., Engine]) -> None:
    model = chain_model(width=256, rows=64)
    engine = way(model, 3)
    x = normal(64, 256)
    expected = reference(model, {"x": x})["y"]
    futures: list[Future[Any]] = []
    refused = threading.Event()

    def bring() -> None:
        try:
            while True:
                futures.append(engine.submit({"x": x}))
        except UsageError:
            refused.set()

    threads = [threading.Thread(target=bring) for _ in range(3)]
    for each in threads:
        each.start()
    time.sleep(0.1)
    engine.close()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    assert refused.is_set() and futures
    assert all(np.allclose(each.result(0)["y"], expected, rtol=1e-3, atol=1e-3) for each in futures)
    # A laboratory's thread that starts workers (aivmm-spawner) outlives other tests of this process.
    assert not [each for each in threading.enumerate() if each.name.startswith("aivmm-") and "spawner" not in each.name]
    for ask in (engine.run, engine.submit, lambda inputs: asyncio.run(engine.arun(inputs)), lambda inputs: next(engine.stream([inputs]))):
        with pytest.raises(UsageError, match="closed; load the plan again"):
            ask({"x": x})


def test_closing_from_a_callback_does_not_hang(load: Load) -> None:
    engine = load(chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], execution=PIPELINED)
    done = threading.Event()

    def close(_: Future[Any]) -> None:
        engine.close()
        done.set()

    engine.submit({"x": normal(2, 32)}).add_done_callback(close)
    assert done.wait(60)


@pytest.mark.parametrize("execution", [Execution(), PIPELINED], ids=lambda each: each.mode)
def test_a_callback_that_would_wait_for_itself_is_told(load: Load, execution: Execution) -> None:
    engine = load(chain_model(), [Part(ONNXRUNTIME)], execution=execution)
    x = {"x": normal(2, 32)}
    told: list[BaseException] = []
    done = threading.Event()

    def greedy(_: Future[Any]) -> None:
        try:
            for _turn in range(10):  # more than there are lanes, on the one thread that could free one
                engine.submit(x)
        except UsageError as error:
            told.append(error)
        done.set()

    engine.submit(x).add_done_callback(greedy)
    assert done.wait(60)
    assert "from another thread" in str(told[0])


def test_closing_tells_who_awaits_his_turn(load: Load) -> None:
    engine = load(early_model(), CUT)
    x = {"x": normal(2, 32)}

    async def gather() -> list[Any]:
        first = await engine.arun(x)
        loan = engine.lend(x)
        loan.__enter__()  # the only lane
        waiting = [asyncio.ensure_future(engine.arun(x)) for _ in range(5)]
        await asyncio.sleep(0.05)
        closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
        while not engine._program._closed:
            await asyncio.sleep(0.001)
        loan.__exit__(None, None, None)
        await closing
        with pytest.raises(UsageError, match="closed"):
            await engine.arun(x)
        return [first, *await asyncio.gather(*waiting, return_exceptions=True)]

    first, *others = asyncio.run(gather())
    assert same(first["y"], reference(chain_model(), x)["y"])
    assert [str(each) for each in others] == ["this engine is closed; load the plan again"] * 5


def test_a_request_that_nobody_awaits_any_more_does_no_harm(load: Load) -> None:
    engine = load(early_model(), CUT)
    x = {"x": normal(2, 32)}

    async def give_up() -> Any:
        with engine.lend(x):
            task = asyncio.ensure_future(engine.arun(x))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await engine.arun(x)

    assert same(asyncio.run(give_up())["y"], reference(chain_model(), x)["y"])


@pytest.mark.parametrize("how", ["run", "lend"])
def test_ctrl_c_leaves_a_lane_to_the_stages_that_still_work_in_it(load: Load, how: str) -> None:
    engine = load(chain_model(), [Part(ONNXRUNTIME)], execution=Execution(mode="pipelined", depth=1))
    (lane,) = engine._program.lanes
    inside, go = threading.Event(), threading.Event()
    run, *rest = lane._steps[0]
    lane._steps = [(lambda: (inside.set(), go.wait(60), run()), *rest)]  # type: ignore[list-item]
    ask = engine.run if how == "run" else lambda inputs: engine.lend(inputs).__enter__()

    def interrupt() -> None:
        inside.wait(60)
        until_it_waits(threading.main_thread())  # a signal in front of a wait does not end it
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        ask({"x": normal(2, 32)})
    free = lane in engine._program.free.lanes
    futures: list[Any] = []
    later = threading.Thread(target=lambda: futures.extend(engine.submit({"x": x}) for x in samples(3, 2, 32)))
    later.start()
    go.set()
    assert not free
    later.join(60)
    for x, future in zip(samples(3, 2, 32), futures, strict=True):
        assert same(future.result(60)["y"], reference(chain_model(), {"x": x})["y"])


UNCLOSED = """
import sys, threading, numpy as np, aivmm
engine = aivmm.load_plan(sys.argv[1])
x = {"x": np.ones((512, 512), dtype=np.float32)}
futures = [engine.submit(x) for _ in range(4)]
def forever():
    while True:
        engine.submit(x)
threading.Thread(target=forever, daemon=True).start()
print("leaving", flush=True)
"""


@pytest.mark.parametrize("execution", [Execution(), PIPELINED], ids=lambda each: each.mode)
def test_an_interpreter_that_leaves_without_closing_neither_hangs_nor_crashes(tmp_path: Path, execution: Execution) -> None:
    model = chain_model(width=512, rows=512)
    bundle = make_bundle(tmp_path / "m.aivmm", model, [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], execution=execution)
    done = subprocess.run([sys.executable, "-c", UNCLOSED, str(bundle)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr


def test_the_threads_of_an_engine_that_was_forgotten_end(tmp_path: Path) -> None:
    engine = Engine.load(make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)], execution=PIPELINED))
    engine.submit({"x": normal(2, 32)}).result(60)
    threads = [each for each in threading.enumerate() if each.name.startswith("aivmm-stage")]
    assert threads
    del engine
    gc.collect()
    for each in threads:
        each.join(60)
        assert not each.is_alive()


def test_what_calls_took_is_passed_on_by_who_brings_the_next_request_and_not_by_a_stages_thread(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a tenth of a millisecond, in which the stage would run nothing. Each lane's first call is passed on, and then by many."""
    engine = load(chain_model(), [Part(ONNXRUNTIME, 0, 3), Part(OPENVINO, 4)], execution=Execution(mode="pipelined"))
    by: list[tuple[str, int]] = []
    real = Lane.pass_on

    def pass_on(self: Lane, started_ns: int, now_ns: int) -> None:
        by.append((threading.current_thread().name, self.index))
        real(self, started_ns, now_ns)

    monkeypatch.setattr(Lane, "pass_on", pass_on)
    lanes = len(engine._program.lanes)
    for _ in engine.stream({"x": normal(2, 32)} for _ in range(40 * lanes)):
        pass
    assert {index for _, index in by} == set(range(lanes))
    assert {name for name, _ in by} == {threading.current_thread().name}
    assert engine.stats()["runs"] == 40 * lanes
