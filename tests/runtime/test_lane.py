"""The pieces of a lane: its clocks, its buffers, its checks."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from aivmm.errors import UsageError
from aivmm.runtime.clocks import RING, StageClock
from aivmm.runtime.feed import new_buffer
from aivmm.runtime.inputs import checked, is_numpy, refuse_unknown
from aivmm.tensors import TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=(2, None))


def test_a_clock_counts_all_and_remembers_the_last() -> None:
    clock = StageClock()
    assert clock.recent_ns().size == 0 and clock.last(3) == []
    for number in range(5000):
        clock.took(number)
        if number in (2, RING - 1):
            assert clock.recent_ns().tolist() == list(range(number + 1))
    assert clock.count == 5000 and clock.total_ns == sum(range(5000))
    recent = clock.recent_ns()
    assert recent.tolist() == list(range(5000 - RING, 5000))
    recent[:] = 0
    assert clock.last(2) == [4998, 4999] and len(clock.last(5000)) == RING


def test_a_clock_that_was_asked_for_much_takes_no_more_memory() -> None:
    tracemalloc.start()
    try:
        clock = StageClock()
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20 * RING):
            clock.took(10**6 + number)
        assert tracemalloc.get_traced_memory()[0] - before < 200 * 32  # what was there from the beginning is used again
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (1,)])
def test_buffers_are_aligned_and_of_the_right_form(shape: tuple[int, ...]) -> None:
    buffer = new_buffer(TensorSpec(name="x", dtype="int64", shape=shape))
    assert buffer is not None and buffer.shape == shape and buffer.dtype == np.int64
    assert not buffer.size or buffer.ctypes.data % 4096 == 0
    assert buffer.flags.c_contiguous and buffer.flags.writeable


@pytest.mark.parametrize("spec", [X, TensorSpec(name="s", dtype="string", shape=(1,)), TensorSpec(name="u", dtype="unknown", shape=())])
def test_what_only_the_runtime_can_allocate_has_no_buffer(spec: TensorSpec) -> None:
    assert new_buffer(spec) is None


def test_types_of_numpy() -> None:
    assert all(map(is_numpy, ("float32", "float16", "bool", "uint8", "int64", "complex64")))
    assert not any(map(is_numpy, ("string", "unknown", "object", "O", "U3", "M8[s]", "no such type", "int4")))


@pytest.mark.parametrize(
    "array", [np.ones((2, 3), dtype=np.float32), [[1.0, 2.0], [3.0, 4.0]], np.ones((2, 0), dtype=np.float32), [[1], [2]]]
)
def test_open_extents_take_any_size(array: Any) -> None:
    found = checked(array, X, {"x": X})
    assert found.dtype == np.float32 and found.shape == np.shape(array) and found.flags.c_contiguous


def test_an_array_as_wanted_is_taken_as_it_is() -> None:
    array = np.ones((2, 3), dtype=np.float32)
    assert checked(array, X, {"x": X}) is array


def test_lossless_conversions_of_python_numbers_and_no_others() -> None:
    spec = TensorSpec(name="i", dtype="int32", shape=())
    assert checked(7, spec, {}) == 7
    for bad in (7.0, 2**31, "7", None, np.array(7, dtype=np.int64)):
        with pytest.raises(UsageError, match="'i'"):
            checked(bad, spec, {})
    half = TensorSpec(name="h", dtype="float16", shape=())
    assert checked(0.1, half, {}) == np.float16(0.1)
    assert np.isinf(checked(float("inf"), half, {})) and np.isnan(checked(float("nan"), half, {}))
    with pytest.raises(UsageError, match="do not fit"):
        checked(1e5, half, {})


def test_unknown_names_are_answered_with_the_known() -> None:
    refuse_unknown({"x": 1}, {"x": X})
    with pytest.raises(UsageError, match=r"unknown input 'z'; the plan takes x: float32\[2, \?\]"):
        refuse_unknown({"x": 1, "z": 2}, {"x": X})
