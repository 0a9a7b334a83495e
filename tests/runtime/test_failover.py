"""A stage that dies while the engine runs: what it could not answer the fallback answers, everyone is told, nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported
from aivmm.runtime import onnxruntime
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, normal, onnx_model, reference
from tests.runtime.engines import Load, Lose

CUT = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
MODES = pytest.mark.parametrize("execution", [Execution(), Execution(mode="pipelined")], ids=lambda each: each.mode)


def ask(engine: Engine, how: str, x: Any) -> Any:
    if how == "run":
        return engine.run({"x": x})["y"]
    if how == "submit":
        return engine.submit({"x": x}).result(60)["y"]
    if how == "arun":
        return asyncio.run(engine.arun({"x": x}))["y"]
    if how == "stream":
        return next(engine.stream([{"x": x}]))["y"]
    with engine.lend({"x": x}) as outputs:
        return outputs["y"].copy()


@MODES
@pytest.mark.parametrize("how", ["run", "submit", "arun", "stream", "lend"])
def test_the_fallback_answers_what_a_dead_stage_could_not(load: Load, lost: threading.Event, execution: Execution, how: str) -> None:
    model = chain_model()
    engine = load(model, CUT, execution=execution, fallbacks=[[Part("acme:1")], [Part(OPENVINO)]], conditions=False)
    for seed in range(3):
        engine.run({"x": normal(2, 32, seed=seed)})
    assert len(engine.stages) == 2
    lost.set()
    for seed in range(3):
        x = normal(2, 32, seed=seed)
        np.testing.assert_allclose(ask(engine, how, x), reference(model, {"x": x})["y"], rtol=1e-4, atol=1e-5)
    assert [each.target for each in engine.stages] == [OPENVINO]
    text = "\n".join(engine.events)
    assert "the plan died: ONNX Runtime while running: device lost" in text
    assert "running the fallback 'fallback 1' instead" in text
    assert [(each["name"], each["outcome"]) for each in engine.stats()["attempts"]] == [
        ("the plan", "runs"), ("the plan", "failed"), ("fallback 0", "failed"), ("fallback 1", "runs")
    ]  # fmt: skip


@MODES
def test_no_request_is_lost_or_wrong_while_many_threads_meet_the_death(load: Load, lost: threading.Event, execution: Execution) -> None:
    model = chain_model()
    engine = load(model, CUT, execution=execution, fallbacks=[[Part(OPENVINO)]], callers=3)
    samples = [normal(2, 32, seed=seed) for seed in range(6)]
    answers = [reference(model, {"x": x})["y"] for x in samples]
    wrong: list[Any] = []
    ready = threading.Barrier(6)

    def work(index: int) -> None:
        for turn in range(40):
            if turn == 10:
                ready.wait(60)
            if (index, turn) == (0, 12):
                lost.set()
            try:
                found = ask(engine, ("run", "submit")[(index + turn) % 2], samples[index])
            except BaseException as error:  # noqa: BLE001 - none may come
                wrong.append(error)
                return
            if not np.allclose(found, answers[index], rtol=1e-4, atol=1e-5):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
        assert not each.is_alive()
    assert wrong == []
    assert sum("died" in each for each in engine.events) == 1


@MODES
@pytest.mark.parametrize("on_mismatch", ["warn", "error"])
def test_without_a_fallback_every_request_is_told_at_once(
    load: Load, lost: threading.Event, execution: Execution, on_mismatch: str
) -> None:
    fallbacks = [[Part(OPENVINO)]] if on_mismatch == "error" else []  # which this policy does not allow
    engine = load(chain_model(), CUT, execution=execution, fallbacks=fallbacks, on_mismatch=on_mismatch)
    engine.run({"x": normal(2, 32)})
    lost.set()
    for how in ("run", "submit", "arun", "stream", "lend"):
        with pytest.raises(Unsupported, match="device lost"):
            ask(engine, how, normal(2, 32))
    assert [each.partition(":")[0] for each in engine.events] == ["the plan died", "nothing is left to run instead"]
    lost.clear()  # and a device that comes back serves again
    engine.run({"x": normal(2, 32)})


@MODES
def test_bad_requests_are_no_reason_to_fall_back(load: Load, execution: Execution) -> None:
    model = onnx_model(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", TensorProto.INT64, (1,))],
        [("y", TensorProto.FLOAT, (1,))],
        {"table": np.arange(4, dtype=np.float32)},
    )
    engine = load(model, [Part(ONNXRUNTIME)], execution=execution, fallbacks=[[Part(OPENVINO)]])
    assert engine.run({"i": np.array([1])})["y"].tolist() == [1.0]
    for _ in range(6):
        with pytest.raises(Unsupported):
            engine.run({"i": np.array([99])})
        with pytest.raises(Unsupported):
            engine.submit({"i": np.array([99])}).result(60)
    assert engine.events == [] and [each.target for each in engine.stages] == [ONNXRUNTIME]
    assert engine.run({"i": np.array([2])})["y"].tolist() == [2.0]


def test_a_plan_that_never_answered_is_given_up_at_the_third_failure(load: Load, lost: threading.Event) -> None:
    lost.set()
    engine = load(chain_model(), CUT, fallbacks=[[Part(OPENVINO)]])
    for _ in range(2):
        with pytest.raises(Unsupported, match="device lost"):
            engine.run({"x": normal(2, 32)})
    assert engine.run({"x": normal(2, 32)})["y"].shape == (2, 32)
    assert [each.target for each in engine.stages] == [OPENVINO]


def test_one_dead_replica_of_two_is_a_dead_stage(load: Load, lose: Lose) -> None:
    dead: list[Any] = []
    lose(onnxruntime.BoundRequest, lambda request: request._session in dead)
    engine = load(chain_model(), [Part(ONNXRUNTIME, replicas=2)], fallbacks=[[Part(OPENVINO)]])
    engine.run({"x": normal(2, 32)})
    dead.append(engine._program._executables[0][1]._session)
    for _ in range(4):
        assert engine.run({"x": normal(2, 32)})["y"].shape == (2, 32)
    assert [each.target for each in engine.stages] == [OPENVINO]


def test_closing_while_a_fallback_takes_over_hangs_nobody(load: Load, lost: threading.Event) -> None:
    engine = load(chain_model(), CUT, execution=Execution(mode="pipelined"), fallbacks=[[Part(OPENVINO)]])
    engine.run({"x": normal(2, 32)})
    lost.set()
    futures = [engine.submit({"x": normal(2, 32)}) for _ in range(4)]
    engine.close()
    for each in futures:
        assert each.exception(60) is None or isinstance(each.exception(0), Exception)
