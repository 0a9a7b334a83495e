"""An engine over a long time and under many threads: memory that stays, answers that are right. The long ones are slow; `benchmarks.engine`
measures the same with gates."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference

ONE = {OPENVINO: (("INFERENCE_NUM_THREADS", 1),), ONNXRUNTIME: (("intra_op_num_threads", 1),)}
WAYS = {
    "sequential": Execution(),
    "pipelined": Execution(mode="pipelined"),
    "batched": Execution(batching=Batching(max_batch=2, max_wait_s=0.001)),
}
MIB = 1 << 20


@pytest.fixture(params=WAYS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    parts = [Part(OPENVINO, 0, 3, settings=ONE[OPENVINO]), Part(ONNXRUNTIME, 4, settings=ONE[ONNXRUNTIME])]
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), parts, execution=WAYS[request.param], batch=2, callers=2)
    with Engine.load(bundle) as loaded:
        yield loaded


def hammer(engine: Engine, threads: int, seconds: float) -> None:
    samples = [{"x": normal(2, 32, seed=seed)} for seed in range(threads)]
    answers = [reference(chain_model(), each)["y"] for each in samples]
    outcomes: list[Any] = [None] * threads
    end = time.monotonic() + seconds

    def work(index: int) -> None:
        count = 0
        while time.monotonic() < end or not count:
            if not np.allclose(engine.run(samples[index])["y"], answers[index], rtol=1e-4, atol=1e-5):
                outcomes[index] = "a wrong answer"
                return
            count += 1
        outcomes[index] = count

    workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(seconds + 120)
        assert not each.is_alive()
    assert all(isinstance(each, int) for each in outcomes), outcomes


def test_sixty_four_threads_get_right_answers(engine: Engine) -> None:
    hammer(engine, 64, 1.0)


@pytest.mark.slow
def test_sixty_four_threads_get_right_answers_for_a_minute(engine: Engine) -> None:
    hammer(engine, 64, 60.0)


def grown(engine: Engine, calls: int) -> int:
    """Return by how many bytes the process grew over `calls` runs, after a twentieth of them to warm up (and what rings hold).

    The warm-up is made of what is measured, and by the thread that makes it: it was streams, which run on threads of the engine's, and the
    first 40,000 runs after that took up to a megabyte more of the C library's free lists; what was in use stayed the same to 30 KB.
    """
    x = {"x": normal(2, 32)}
    warm_up = max(10_000, calls // 20)
    for _ in engine.stream(x for _ in range(warm_up)):
        pass
    for _ in range(warm_up):
        engine.run(x)
    before = psutil.Process().memory_info().rss
    for _ in range(calls):
        engine.run(x)
    return int(psutil.Process().memory_info().rss - before)


@pytest.mark.parametrize("engine", ["sequential"], indirect=True)
def test_memory_does_not_grow_with_calls(engine: Engine) -> None:
    # A leak grows each time. A process in which thousands of tests ran takes another arena of 1 MiB now and then.
    assert any(grown(engine, 20_000) < MIB for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sequential"], indirect=True)
def test_memory_does_not_grow_over_a_million_calls(engine: Engine) -> None:
    assert grown(engine, 1_000_000) < MIB
