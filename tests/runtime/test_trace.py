"""The recording of a running engine, as Perfetto and Chrome read it."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from aivmm.errors import UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
from aivmm.runtime.trace import Trace
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal
from tests.runtime.engines import Load
from tests.tuner.harness import Shell

CUT = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
PIPELINED = Execution(mode="pipelined")


@pytest.fixture
def load_cut(load: Load) -> Load:
    """Load the chain cut in two, with more fields of its plan."""
    return lambda **fields: load(chain_model(), CUT, **fields)


def events(trace: Trace, kind: str) -> list[dict[str, Any]]:
    return [each for each in trace.as_json()["traceEvents"] if each["ph"] == kind]


def let_stages_meet(engine: Engine) -> None:
    """Let the second stage end its first request only once the first stage has begun the next: a pipeline can, on any machine."""
    begun, first, second = threading.Event(), itertools.count(), itertools.count()

    def before(run: Callable[[], None]) -> None:
        if next(first) == 1:
            begun.set()
        run()

    def behind(run: Callable[[], None]) -> None:
        run()
        if next(second) == 0:
            begun.wait(30)

    for lane in engine._program.lanes:
        for at, meet in enumerate((before, behind)):
            run, *rest = lane._steps[at]
            lane._steps[at] = (partial(meet, run), *rest)


def test_a_pipelined_plan_shows_each_stage_on_its_own_thread_and_at_once(load_cut: Load, tmp_path: Path) -> None:
    engine = load_cut(execution=PIPELINED)
    let_stages_meet(engine)
    with engine.trace() as trace:
        list(engine.stream({"x": normal(2, 32, seed=seed)} for seed in range(200)))
    stored = json.loads(trace.write(tmp_path / "trace.json").read_text())
    assert {"traceEvents", "displayTimeUnit"} <= stored.keys()
    for each in stored["traceEvents"]:
        assert isinstance(each["pid"], int) and isinstance(each["tid"], int) and each["name"]
        assert each["ph"] == "M" or each["ts"] >= 0

    slices = events(trace, "X")
    by_stage = {name: [each for each in slices if each["name"].startswith(name)] for name in ("stage 1", "stage 2")}
    assert [len(each) for each in by_stage.values()] == [200, 200]
    first, second = ({each["tid"] for each in found} for found in by_stage.values())
    assert len(first) == len(second) == 1 and first != second
    for found in by_stage.values():  # a thread does one thing at a time
        ordered = sorted(found, key=lambda each: each["ts"])
        assert all(one["ts"] + one["dur"] <= other["ts"] + 0.002 for one, other in pairwise(ordered))
    overlap = any(
        one["ts"] < other["ts"] + other["dur"] and other["ts"] < one["ts"] + one["dur"]
        for one in by_stage["stage 1"]
        for other in by_stage["stage 2"]
    )
    assert overlap, "a pipeline works on two requests at once"

    names = {each["tid"]: each["args"]["name"] for each in events(trace, "M") if each["name"] == "thread_name"}
    assert names[first.pop()] == "aivmm-stage-0.0" and names[second.pop()] == "aivmm-stage-1.0"
    assert [each["args"]["name"] for each in events(trace, "M") if each["name"] == "process_name"] == [
        f"{engine.plan.model.name}, the plan, pipelined"
    ]
    assert all(each["args"]["queued_us"] >= 0 for each in slices)


def test_a_requests_stages_are_joined_in_their_order(load_cut: Load) -> None:
    engine = load_cut()
    with engine.trace() as trace:
        for seed in range(5):
            engine.run({"x": normal(2, 32, seed=seed)})
    begins, ends = events(trace, "b"), events(trace, "e")
    assert {each["id"] for each in begins} == {each["id"] for each in ends} and len(begins) == len(ends) == 5
    arrows = {kind: {each["id"]: each["ts"] for each in events(trace, kind)} for kind in ("s", "f")}
    assert arrows["s"].keys() == arrows["f"].keys() and len(arrows["s"]) == 5
    assert all(arrows["s"][each] < arrows["f"][each] for each in arrows["s"])
    assert "queued_us" not in events(trace, "X")[0]["args"]  # nobody queues in a sequential plan


def test_off_the_engine_runs_what_it_ran_before(load_cut: Load) -> None:
    engine = load_cut()
    (lane,) = engine.lanes()
    before = [run for run, *_ in lane._steps]
    with engine.trace() as trace:
        assert [run for run, *_ in lane._steps] != before
        with pytest.raises(UsageError, match="traced already"), engine.trace():
            pass
        engine.run({"x": normal(2, 32)})
    assert [run for run, *_ in lane._steps] == before
    engine.run({"x": normal(2, 32)})
    assert len(trace.runs) == 2
    with engine.trace():  # again, after the first has ended
        pass


def test_a_recording_is_bounded(load_cut: Load) -> None:
    engine = load_cut()
    with Trace([engine], limit=3) as trace:
        for _ in range(4):
            engine.run({"x": normal(2, 32)})
    assert len(trace.runs) == 3 and trace.dropped == 5
    assert trace.as_json()["otherData"]["left out"] == 5


def test_a_fallback_that_takes_over_is_recorded_too(load_cut: Load, lost: threading.Event) -> None:
    engine = load_cut(fallbacks=[[Part(OPENVINO)]])
    with engine.trace() as trace:
        engine.run({"x": normal(2, 32)})
        lost.set()
        engine.run({"x": normal(2, 32)})
    programs = [each["args"]["name"] for each in events(trace, "M") if each["name"] == "process_name"]
    assert len(programs) == 2 and programs[0] != programs[1]
    assert any(each["pid"] == 2 and each["name"] == "stage 1: openvino:CPU" for each in events(trace, "X"))


def test_nothing_recorded_is_still_a_trace_and_a_file_that_cannot_be_written_is_said(load_cut: Load, tmp_path: Path) -> None:
    with load_cut().trace() as trace:
        pass
    assert [each["ph"] for each in trace.as_json()["traceEvents"]] == ["M"]
    with pytest.raises(UsageError, match="cannot write the trace"):
        trace.write(tmp_path / "no" / "trace.json")


def test_run_and_bench_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(tmp_path, capsys)
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), CUT, execution=PIPELINED)
    for words in (["run", "--repeat", "3"], ["bench", "--scenario", "offline", "--duration", "0.1s"]):
        file = tmp_path / f"{words[0]}.json"
        assert shell.aivmm(words[0], bundle, *words[1:], "--trace", file).code == 0
        stored = json.loads(file.read_text())
        assert {each["name"] for each in stored["traceEvents"] if each["ph"] == "X"} == {
            "stage 1: openvino:CPU",
            "stage 2: onnxruntime:CPU",
        }


def test_who_comes_to_a_recording_that_has_ended_is_left_alone(load_cut: Load) -> None:
    engine = load_cut()
    trace = engine.trace()
    with trace:
        follow = trace.follow  # a failover that looked just before the end
    before = [run for lane in engine.lanes() for run, *_ in lane._steps]
    follow(engine, engine._program)
    assert [run for lane in engine.lanes() for run, *_ in lane._steps] == before
    with trace:  # which may begin again
        engine.run({"x": normal(2, 32)})
    assert len(trace.runs) == 2


def test_batches_wait_in_front_of_the_first_stage_alone_and_what_is_lent_nowhere(load_cut: Load) -> None:
    engine = load_cut(execution=Execution(batching=Batching(max_batch=2)), batch=2)
    with engine.trace() as trace:
        engine.run({"x": normal(2, 32)})
        with engine.lend({"x": normal(2, 32)}):
            pass
    assert [(each["name"].split(":")[0], "queued_us" in each["args"]) for each in events(trace, "X")] == [
        ("stage 1", True), ("stage 2", False), ("stage 1", False), ("stage 2", False)
    ]  # fmt: skip
