"""One array filled again and again: after a few calls it is read where it lies, and no answer is another than that of what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aivmm
from aivmm.errors import UsageError
from aivmm.runtime import feed
from aivmm.runtime.plan import Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference

CALLS = 3 * feed._STEADY


@pytest.fixture(params=[OPENVINO, ONNXRUNTIME])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(request.param, 0, 3), Part(ONNXRUNTIME, 4)])


@pytest.fixture
def engine(bundle: Path) -> Iterator[aivmm.Engine]:
    with aivmm.load_plan(bundle) as loaded:
        assert isinstance(loaded, aivmm.Engine)
        yield loaded


def right(x: Any) -> Any:
    return reference(chain_model(), {"x": x})["y"]


def bound(engine: aivmm.Engine) -> Any:
    return engine.one_lane()._requests[0]._bound["x"]


def assert_answers(engine: aivmm.Engine, x: Any) -> None:
    np.testing.assert_allclose(engine.run({"x": x})["y"], right(x), rtol=1e-4, atol=1e-5)


def test_one_array_filled_again_and_again_is_read_where_it_lies(engine: aivmm.Engine) -> None:
    x = normal(2, 32)
    for seed in range(CALLS):
        x[...] = normal(2, 32, seed=seed)
        assert_answers(engine, x)
    assert bound(engine) is x


def test_new_arrays_are_copied_and_so_is_a_new_one_after_one_that_was_bound(engine: aivmm.Engine) -> None:
    own = bound(engine)
    for seed in range(CALLS):
        assert_answers(engine, normal(2, 32, seed=seed))
    assert bound(engine) is own
    steady = normal(2, 32)
    for _ in range(CALLS):
        engine.run({"x": steady})
    for seed in range(4):
        assert_answers(engine, normal(2, 32, seed=seed))
        assert_answers(engine, steady)
    assert bound(engine) is own


def test_what_cannot_be_shared_is_copied_for_ever(engine: aivmm.Engine) -> None:
    strided, locked = normal(2, 64)[:, ::2], normal(2, 32, seed=1)
    locked.flags.writeable = False
    for _ in range(CALLS):
        assert_answers(engine, strided)
    for _ in range(CALLS):
        assert_answers(engine, locked)


def test_a_bad_array_after_a_steady_one_is_refused_and_costs_nothing(engine: aivmm.Engine) -> None:
    x = normal(2, 32)
    for _ in range(CALLS):
        engine.run({"x": x})
    with pytest.raises(UsageError, match="'x'"):
        engine.run({"x": x.astype(np.float64)})
    with pytest.raises(UsageError, match="unknown input 'z'"):
        engine.run({"x": x, "z": x})
    assert_answers(engine, x)


@pytest.mark.parametrize("mode", ["sequential", "pipelined"])
def test_what_is_submitted_is_copied_even_after_calls_that_bound_the_array(bundle: Path, mode: Any) -> None:
    with aivmm.Engine.load(bundle, execution=Execution(mode=mode)) as engine:
        x = normal(2, 32)
        for _ in range(CALLS):
            engine.run({"x": x})
        futures = []
        for seed in range(CALLS):
            x[...] = normal(2, 32, seed=seed)
            futures.append(engine.submit({"x": x}))
        for seed, future in enumerate(futures):
            np.testing.assert_allclose(future.result()["y"], right(normal(2, 32, seed=seed)), rtol=1e-4, atol=1e-5)
