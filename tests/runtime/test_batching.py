"""Dynamic batching: each request gets its own rows, whatever company it had; nobody waits longer than was said."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from aivmm.errors import BundleError, Unsupported, UsageError
from aivmm.runtime.batching import Answer, Batcher
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, onnx_model, reference
from tests.runtime.engines import Load

F, I64 = TensorProto.FLOAT, TensorProto.INT64
CUT = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
MODES = pytest.mark.parametrize("mode", ["sequential", "pipelined"])


def batched(most: int, wait_s: float = 0.0, mode: Any = "sequential") -> Execution:
    return Execution(mode=mode, batching=Batching(max_batch=most, max_wait_s=wait_s))


def rowwise(rows: int, width: int = 32) -> Any:
    """Return a model on `rows` rows, and what it answers to any number of them."""
    model = chain_model(rows=rows, width=width)
    one = chain_model(rows=1, width=width)

    def answer(x: Any) -> Any:
        return np.concatenate([reference(one, {"x": each[None]})["y"] for each in x])

    return model, answer


def same(found: Any, expected: Any) -> bool:
    return found.shape == expected.shape and bool(np.allclose(found, expected, rtol=1e-4, atol=1e-5))


@MODES
@pytest.mark.parametrize("width", [32, 4096], ids=["small", "beyond the copy limit"])
def test_requests_of_any_number_of_rows_are_padded_or_split(load: Load, mode: str, width: int) -> None:
    model, answer = rowwise(4, width) if width == 32 else (None, None)
    if model is None:
        nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])]
        model = onnx_model(nodes, [("x", F, (4, width))], [("y", F, (4, width))])
        answer = lambda x: -np.maximum(x, 0)  # noqa: E731
    parts = CUT if width == 32 else [Part(OPENVINO, 0, 0), Part(ONNXRUNTIME, 1)]
    engine = load(model, parts, execution=batched(8, mode=mode), batch=4)
    for rows in (1, 4, 3, 5, 8, 13, 2):
        x = normal(rows, width, seed=rows)
        kept = x.copy()
        future = engine.submit({"x": x})
        x[...] = np.nan  # it was copied
        assert same(future.result(60)["y"], answer(kept))
        assert same(engine.run({"x": kept})["y"], answer(kept))
        assert same(asyncio.run(engine.arun({"x": kept}))["y"], answer(kept))
    stats = engine.stats()["batches"]
    assert stats["capacity"] == 4 and stats["requests"] == 21 and stats["rows"] == 3 * 36
    assert stats["count"] == 3 * (1 + 1 + 1 + 2 + 2 + 4 + 1)


@MODES
def test_rows_of_several_requests_run_together(load: Load, mode: str) -> None:
    model, answer = rowwise(8)
    engine = load(model, CUT, execution=batched(8, 30.0, mode), batch=8)
    inputs = [normal(rows, 32, seed=seed) for seed, rows in enumerate((1, 2, 3, 2))]
    futures = [engine.submit({"x": x}) for x in inputs]  # eight rows: the last one fills the batch, so nobody waits
    for x, future in zip(inputs, futures, strict=True):
        assert same(future.result(20)["y"], answer(x))
    assert engine.stats()["batches"] == {"count": 1, "rows": 8, "requests": 4, "capacity": 8}
    assert engine.stats()["runs"] == 1


@MODES
def test_who_gets_no_company_leaves_when_the_time_has_come(load: Load, mode: str) -> None:
    model, answer = rowwise(8)
    engine = load(model, CUT, execution=batched(8, 0.05, mode), batch=8)
    x = normal(2, 32)
    started = time.monotonic()
    assert same(engine.run({"x": x})["y"], answer(x))
    assert time.monotonic() - started >= 0.05
    assert same(engine.run({"x": x})["y"], answer(x))
    assert engine.stats()["batches"]["count"] == 2


def test_a_request_that_does_not_fit_any_more_begins_the_next_batch(load: Load) -> None:
    model, answer = rowwise(4)
    engine = load(model, CUT, execution=batched(4, 30.0), batch=4, callers=2)
    inputs = [normal(3, 32, seed=0), normal(4, 32, seed=1)]
    futures = [engine.submit({"x": x}) for x in inputs]
    assert all(same(future.result(20)["y"], answer(x)) for x, future in zip(inputs, futures, strict=True))
    assert engine.stats()["batches"]["count"] == 2


def test_max_batch_may_be_less_than_the_plans_batch(load: Load) -> None:
    model, answer = rowwise(8)
    engine = load(model, CUT, execution=batched(2), batch=8)
    x = normal(5, 32)
    assert same(engine.run({"x": x})["y"], answer(x))
    assert engine.stats()["batches"]["count"] == 3


@MODES
def test_many_threads_of_requests_of_all_sizes(load: Load, mode: str) -> None:
    model, answer = rowwise(4)
    engine = load(model, CUT, execution=batched(4, 0.002, mode), batch=4, callers=2)
    inputs = [normal(1 + seed % 6, 32, seed=seed) for seed in range(8)]
    answers = [answer(x) for x in inputs]
    wrong: list[Any] = []

    def work(index: int) -> None:
        for _ in range(25):
            try:
                if not same(engine.run({"x": inputs[index]})["y"], answers[index]):
                    wrong.append(index)
            except BaseException as error:  # noqa: BLE001 - none may come
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
        assert not each.is_alive()
    assert wrong == []
    stats = engine.stats()["batches"]
    assert stats["rows"] == 25 * sum(len(x) for x in inputs)


def weighted(rows: int | str = 4) -> Any:
    """y = x * w, where all rows share w [2]."""
    return onnx_model([helper.make_node("Mul", ["x", "w"], ["y"])], [("x", F, (rows, 2)), ("w", F, (2,))], [("y", F, (rows, 2))])


@pytest.mark.parametrize("rows", [4, "n"], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
def test_what_all_rows_share_keeps_unlike_requests_apart(load: Load, target: str, rows: int | str) -> None:
    engine = load(weighted(rows), [Part(target)], execution=batched(4, 30.0), batch=4, callers=3)
    x, one, two = normal(2, 2), np.ones(2, dtype=np.float32), np.full(2, 2, dtype=np.float32)
    futures = [engine.submit({"x": x, "w": w}) for w in (one, one, two, two)]
    assert [float(np.max(np.abs(future.result(20)["y"] - x * w))) for future, w in zip(futures, (1, 1, 2, 2), strict=True)] == [0] * 4
    assert engine.stats()["batches"]["count"] == 2
    engine.submit({"x": x, "w": one})
    assert np.array_equal(engine.run({"x": normal(4, 2), "w": two})["y"], normal(4, 2) * 2)


@pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
def test_a_stage_that_takes_any_batch_runs_just_the_rows_there_are(load: Load, target: str) -> None:
    engine = load(weighted("n"), [Part(target)], execution=batched(4), batch=1)
    w = np.full(2, 3, dtype=np.float32)
    for rows in (1, 4, 2, 9):
        x = normal(rows, 2, seed=rows)
        np.testing.assert_array_equal(engine.run({"x": x, "w": w})["y"], x * 3)
    assert engine.stats()["batches"]["capacity"] == 4


@pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
def test_requests_of_unlike_lengths_are_no_company_and_no_error(load: Load, target: str) -> None:
    """Where the stages leave more open than the batch: rows of 2 and rows of 5 cannot lie in one array."""
    model = onnx_model([helper.make_node("Relu", ["x"], ["y"])], [("x", F, ("n", "length"))], [("y", F, ("n", "length"))])
    engine = load(model, [Part(target)], execution=batched(4, 0.2), callers=3)
    arrays = [normal(1, length, seed=index) for index, length in enumerate((2, 5, 5, 2))]
    futures = [engine.submit({"x": x}) for x in arrays]
    for future, x in zip(futures, arrays, strict=True):
        np.testing.assert_array_equal(future.result(20)["y"], np.maximum(x, 0))
    assert engine.stats()["batches"]["count"] == 3


def test_a_batch_that_cannot_be_put_together_fails_without_the_turn(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callbacks may close the engine, which waits for the thread that watches, which waits for the turn."""

    def no_room(self: Batcher, batch: Any) -> None:
        raise MemoryError("no room")

    engine = load(weighted(), [Part(ONNXRUNTIME)], execution=batched(4, 30.0), batch=4)
    request = {"x": normal(2, 2), "w": np.ones(2, dtype=np.float32)}
    future = engine.submit(request)
    time.sleep(0.1)  # until somebody watches
    monkeypatch.setattr(Batcher, "_load", no_room)
    closed = threading.Event()
    future.add_done_callback(lambda _: (engine.close(), closed.set()))
    second = engine.submit(request)  # the batch is full, and leaves on this thread
    for each in (future, second):
        with pytest.raises(MemoryError, match="no room"):
            each.result(20)
    assert closed.wait(20)


def test_a_piece_that_comes_while_another_ones_error_is_told_makes_no_answer_of_it() -> None:
    answer = Answer(None)
    first, second = answer.expect(), answer.expect()
    tell = answer.future.set_exception

    def told(error: BaseException | None) -> None:
        answer.settle(second, {"y": np.ones(2)}, last=2)  # on another stage's thread, between the decision and the word
        tell(error)

    answer.future.set_exception = told  # type: ignore[method-assign]
    answer.settle(first, ValueError("its own"), last=2)
    assert str(answer.future.exception(0)) == "its own"


def test_pieces_that_do_not_fit_together_are_an_error_and_hang_nobody() -> None:
    """Where an output's length depends on the data, a request that was split may come back in unlike pieces."""
    answer = Answer(None)
    places = [answer.expect(), answer.expect()]
    for place, length in zip(places, (2, 3), strict=True):
        answer.settle(place, {"y": np.ones((1, length))}, last=2)
    assert isinstance(answer.future.exception(0), ValueError)


def lookup(rows: int) -> Any:
    return onnx_model(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", I64, (rows,))],
        [("y", F, (rows,))],
        {"table": np.arange(4, dtype=np.float32)},
    )


@MODES
def test_the_error_of_one_request_is_not_that_of_its_company(load: Load, mode: str) -> None:
    engine = load(lookup(4), [Part(ONNXRUNTIME)], execution=batched(4, 30.0, mode), batch=4)
    futures = [engine.submit({"i": np.array([number])}) for number in (1, 99, 3, 2)]
    assert [future.result(20)["y"].tolist() for future in (futures[0], futures[2], futures[3])] == [[1], [3], [2]]
    with pytest.raises(Unsupported, match="ONNX Runtime while running"):
        futures[1].result(20)
    with pytest.raises(Unsupported, match="ONNX Runtime while running"):
        engine.submit({"i": np.array([0, 1, 2, 99, 1])}).result(20)


@MODES
def test_a_fallback_answers_each_request_of_the_batch_that_died(load: Load, mode: str, lost: threading.Event) -> None:
    model, answer = rowwise(4)
    engine = load(model, CUT, execution=batched(4, 0.2, mode), batch=4, fallbacks=[[Part(OPENVINO)]])
    engine.run({"x": normal(1, 32)})
    lost.set()
    inputs = [normal(1, 32, seed=1), normal(2, 32, seed=2)]
    futures = [engine.submit({"x": x}) for x in inputs]
    assert all(same(future.result(60)["y"], answer(x)) for x, future in zip(inputs, futures, strict=True))
    assert [each.target for each in engine.stages] == [OPENVINO]
    assert same(engine.run({"x": inputs[1]})["y"], answer(inputs[1]))


def test_bad_rows_are_refused_at_once(load: Load) -> None:
    engine = load(weighted(), [Part(ONNXRUNTIME)], execution=batched(4, 30.0), batch=4)
    w = np.ones(2, dtype=np.float32)
    for bad, words in (
        ({"x": normal(0, 2), "w": w}, "same number of rows, at least one: 'x' has 0"),
        ({"x": normal(2, 3), "w": w}, "has shape"),
        ({"x": normal(2, 2)}, "'w' is missing"),
        ({"x": normal(2, 2), "w": w, "z": w}, "unknown input 'z'"),
        ({"x": normal(2, 2), "w": normal(3)}, "has shape"),
    ):
        with pytest.raises(UsageError, match=words):
            engine.submit(bad)


def test_a_model_whose_outputs_are_not_by_row_cannot_be_batched(load: Load) -> None:
    model = onnx_model([helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)], [("x", F, (4, 2))], [("y", F, ())])
    with pytest.raises(BundleError, match=r"requests cannot be batched: the output y: float32\[\] has no row for each of 4"):
        load(model, [Part(ONNXRUNTIME)], execution=batched(4), batch=4)
    with pytest.raises(BundleError, match="no input has 3 rows"):
        load(onnx_model([helper.make_node("Shape", ["x"], ["y"])], [("x", F, (2, 2, 2))], [("y", I64, (3,))]),
             [Part(ONNXRUNTIME)], execution=batched(4), batch=3)  # fmt: skip


def test_closing_sends_the_open_batch_on_its_way(load: Load) -> None:
    model, answer = rowwise(8)
    engine = load(model, CUT, execution=batched(8, 60.0), batch=8)
    x = normal(2, 32)
    future = engine.submit({"x": x})
    engine.close()
    assert same(future.result(0)["y"], answer(x))
    with pytest.raises(UsageError, match="closed"):
        engine.submit({"x": x})
    # A laboratory's thread that starts workers (aivmm-spawner) outlives other tests of this process.
    assert not [each for each in threading.enumerate() if each.name.startswith("aivmm-") and "spawner" not in each.name]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 11), min_size=1, max_size=8))
def test_any_sequence_of_sizes_comes_back_row_by_row(shared: Any, sizes: list[int]) -> None:
    engine, answer = shared
    x = normal(sum(sizes), 32, seed=len(sizes))
    cuts = np.split(x, np.cumsum(sizes)[:-1])
    futures = [engine.submit({"x": each}) for each in cuts]
    assert same(np.concatenate([each.result(60)["y"] for each in futures]), answer(x))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model, answer = rowwise(4)
    bundle = make_bundle(tmp_path_factory.mktemp("b") / "m.aivmm", model, CUT, execution=batched(4, 0.001, "pipelined"), batch=4)
    with Engine.load(bundle) as engine:
        yield engine, answer
