"""Tensors that callers have, or want, in a device's own memory: what of it does not go is refused, and costs no later request anything."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.null import NullRequest
from aivmm.runtime.null_memory import NullTensor
from tests.making import ONNXRUNTIME, Part, normal, onnx_model
from tests.runtime.engines import Load, Lose

CARD = "null:GPU.0"
X, SHAPE = normal(2, 4), (2, 4)


def there(array: Any) -> NullTensor:
    """Return a tensor in the fake card's memory."""
    return NullTensor(array, CARD)


@pytest.fixture
def load_null(load: Load) -> Load:
    """Load y = -relu(x) with the stages that are given; `outputs` beside y."""

    def make(*parts: Part, outputs: tuple[str, ...] = ("y",), **fields: Any) -> Engine:
        nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])]
        model = onnx_model(nodes, [("x", TensorProto.FLOAT, SHAPE)], [(name, TensorProto.FLOAT, SHAPE) for name in outputs])
        return load(model, parts, **fields)

    return make


@pytest.fixture
def lost(lose: Lose) -> threading.Event:
    """The null devices, lost as soon as this is set."""
    event = threading.Event()
    lose(NullRequest, lambda _: event.is_set())
    return event


def assert_right(found: Any, x: Any = X) -> None:
    np.testing.assert_array_equal(found, -np.maximum(x, 0))


def test_between_stages_of_one_card_nothing_leaves_it_and_between_card_and_host_everything_does(load_null: Load) -> None:
    engine = load_null(Part(CARD, 0, 0), Part(CARD, 1))
    assert engine.one_lane().kept_on_device == {"r": CARD}
    assert_right(engine.run({"x": X})["y"])
    mixed = load_null(Part(CARD, 0, 0), Part(ONNXRUNTIME, 1))
    assert mixed.one_lane().kept_on_device == {}
    assert_right(mixed.run({"x": there(X)})["y"])
    with pytest.raises(UsageError, match=r"the input 'x' does not lie in null:GPU\.0"):
        mixed.run({"x": NullTensor(X, "null:GPU.1")})
    assert_right(mixed.run({"x": X})["y"])


def test_outputs_stay_where_they_are_made(load_null: Load) -> None:
    engine = load_null(Part(CARD, 0, 0), Part(CARD, 1))
    made = engine.run_on_device({"x": there(X)})["y"]
    assert isinstance(made, NullTensor)
    assert_right(engine.run({"x": X + 1})["y"], X + 1)
    assert_right(made.array)  # the caller's own


def test_an_output_that_a_later_stage_reads_on_the_host_cannot_stay(load_null: Load) -> None:
    engine = load_null(Part(CARD, 0, 0), Part(CARD, 1), outputs=("r", "y"))
    assert_right(engine.run({"x": X + 1})["y"], X + 1)
    with pytest.raises(UsageError, match="a later stage reads the output 'r' too, from the host; use run"):
        engine.run_on_device({"x": X})
    assert_right(engine.run({"x": X})["y"])


def test_a_first_request_from_a_device_leaves_failover_as_it_is(load_null: Load, lost: threading.Event) -> None:
    engine = load_null(Part(CARD), fallbacks=[[Part(ONNXRUNTIME)]])
    assert_right(engine.run({"x": there(X)})["y"])
    assert_right(engine.run({"x": X})["y"])
    lost.set()
    assert_right(engine.run({"x": X + 1})["y"], X + 1)
    assert [each.target for each in engine.stages] == [ONNXRUNTIME]


def test_where_nothing_came_from_the_host_the_third_failure_in_a_row_is_a_dead_stage(load_null: Load, lost: threading.Event) -> None:
    engine = load_null(Part(CARD), fallbacks=[[Part(ONNXRUNTIME)]])
    for _ in range(2):
        lost.clear()
        assert_right(engine.run({"x": there(X)})["y"])
        lost.set()
        for _ in range(2):
            with pytest.raises(Unsupported, match="device lost"):
                engine.run({"x": X})
    assert_right(engine.run({"x": X})["y"])
    assert [each.target for each in engine.stages] == [ONNXRUNTIME]
