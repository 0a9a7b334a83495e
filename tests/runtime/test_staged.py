"""Requests that copy to a card and back, on ONNX Runtime's CPU: the session is real, and a card's memory is the host's.

The stream is as late as a card's may be: it reads what it is to copy, and writes it, only when somebody waits.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Buffer
from aivmm.runtime.ort_requests import RebindingRequest, StagedRequest, ort_value, words
from aivmm.tensors import TensorSpec
from tests.making import normal, onnx_model

SHAPE = (3, 5)
A, B, Y, Z = (TensorSpec(name=name, dtype="float32", shape=SHAPE) for name in "abyz")


class LateStream:
    """Copies when it is waited for, in order; what is uploaded was read before, as `Copies` promises."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, int, int, Any]] = []
        self.uploads = self.waits = 0

    def copy(self, destination: int, source: int, size: int) -> None:
        self.waiting.append((destination, source, size, None))

    def upload(self, destination: int, array: Buffer) -> None:
        self.uploads += 1
        read = array.copy()
        self.waiting.append((destination, read.ctypes.data, read.nbytes, read))

    def wait(self) -> None:
        self.waits += 1
        while self.waiting:
            destination, source, size, _ = self.waiting.pop(0)
            ctypes.memmove(destination, source, size)


def place(spec: TensorSpec) -> Any:
    return ort_value().ortvalue_from_shape_and_type(list(spec.shape), np.dtype(spec.dtype).type, "cpu", 0)


def there(array: Buffer) -> Any:
    """Return a tensor "on the card" that holds what an array holds now."""
    return ort_value().ortvalue_from_numpy(array.copy())


def staged(*, pinned: bool = False, recorded: bool = False) -> tuple[StagedRequest, LateStream]:
    """Return a request for y = a - b and z = a * b."""
    nodes = [helper.make_node("Sub", ["a", "b"], ["y"]), helper.make_node("Mul", ["a", "b"], ["z"])]
    kind = TensorProto.FLOAT
    model = onnx_model(nodes, [("a", kind, SHAPE), ("b", kind, SHAPE)], [("y", kind, SHAPE), ("z", kind, SHAPE)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    stream = LateStream()
    return StagedRequest(session, (A, B), (Y, Z), stream=stream, place=place, pinned=pinned, recorded=recorded), stream


@pytest.mark.parametrize("pinned", [False, True])
def test_each_run_reads_what_the_arrays_hold_then_and_writes_all_of_its_answers(pinned: bool) -> None:
    request, stream = staged(pinned=pinned)
    a, b, y, z = (np.empty(SHAPE, np.float32) for _ in range(4))
    for name, array in (("a", a), ("b", b), ("y", y), ("z", z)):
        request.bind(name, array)
    for seed in range(3):
        a[...], b[...] = normal(*SHAPE, seed=seed), normal(*SHAPE, seed=seed + 10)
        request.run()
        np.testing.assert_array_equal(y, a - b)
        np.testing.assert_array_equal(z, a * b)
        assert request.output("y") is y and not stream.waiting
    assert stream.uploads == (6 if pinned else 0)  # no array of these is page-locked
    assert stream.waits == 6  # one before the run and one after it


def test_an_output_that_nobody_bound_is_read_from_its_place() -> None:
    request, stream = staged()
    a, b = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    request.bind("a", a), request.bind("b", b)
    request.run()
    np.testing.assert_array_equal(request.output("y"), a - b)
    np.testing.assert_array_equal(request.output("z"), a * b)
    assert stream.waits == 1


def test_another_array_takes_the_place_of_the_first() -> None:
    request, _ = staged()
    first, second, b, y = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2), normal(*SHAPE, seed=3), np.empty(SHAPE, np.float32)
    request.bind("a", first), request.bind("b", b), request.bind("y", y)
    request.run()
    request.bind("a", second)
    first[...] = np.nan
    request.run()
    np.testing.assert_array_equal(y, second - b)
    other = np.empty(SHAPE, np.float32)
    request.bind("y", other)
    y[...] = 0
    request.run()
    np.testing.assert_array_equal(other, second - b)
    assert not y.any()


def test_tensors_on_the_card_and_arrays_of_the_host_take_turns() -> None:
    request, _ = staged()
    a, b, y = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2), np.empty(SHAPE, np.float32)
    request.bind("b", b), request.bind("y", y)
    for turn in range(2):
        tensor = there(a + turn)
        request.bind_device("a", tensor)
        request.run()
        np.testing.assert_array_equal(y, a + turn - b)
        request.bind("a", a)
        request.run()
        np.testing.assert_array_equal(y, a - b)
        assert "a" not in request._lent  # the card's memory is the caller's to free
    made = there(np.zeros(SHAPE, np.float32))
    request.bind_device("y", made)
    y[...] = 7
    request.run()
    np.testing.assert_array_equal(made.numpy(), a - b)
    np.testing.assert_array_equal(request.output("y"), a - b)
    assert (y == 7).all()
    request.bind("a", a + 1), request.bind("y", y)
    request.run()
    np.testing.assert_array_equal(made.numpy(), a - b)  # the caller's own: later runs leave it alone
    np.testing.assert_array_equal(y, a + 1 - b)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(SHAPE, np.float64), "cannot be bound to float64"),
        (np.zeros((5, 3), np.float32), r"cannot be bound to float32\[5, 3\]"),
        (np.zeros((2, 5), np.float32), r"cannot be bound to float32\[2, 5\]"),
        (np.zeros((5, 3), np.float32).T, "not C-contiguous"),
        (np.zeros((3, 10), np.float32)[:, ::2], "not C-contiguous"),
    ],
)
@pytest.mark.parametrize("name", ["a", "y"])
def test_an_array_that_does_not_fit_is_refused_before_a_byte_is_copied(name: str, array: Buffer, said: str) -> None:
    request, _ = staged()
    a, b, y = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2), np.empty(SHAPE, np.float32)
    request.bind("a", a), request.bind("b", b), request.bind("y", y)
    with pytest.raises(Unsupported, match=said):
        request.bind(name, array)
    request.run()
    np.testing.assert_array_equal(y, a - b)


def test_a_run_that_fails_writes_no_answer() -> None:
    nodes = [helper.make_node("Gather", ["t", "i"], ["y"])]
    model = onnx_model(nodes, [("t", TensorProto.FLOAT, (4,)), ("i", TensorProto.INT64, (2,))], [("y", TensorProto.FLOAT, (2,))])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = (TensorSpec(name="t", dtype="float32", shape=(4,)), TensorSpec(name="i", dtype="int64", shape=(2,)))
    outputs = (TensorSpec(name="y", dtype="float32", shape=(2,)),)
    request = StagedRequest(session, inputs, outputs, stream=LateStream(), place=place, pinned=False, recorded=True)
    table, index, y = np.arange(4, dtype=np.float32), np.array([3, 1]), np.full(2, 7, np.float32)
    for name, array in (("t", table), ("i", index), ("y", y)):
        request.bind(name, array)
    index[0] = 99
    with pytest.raises(Unsupported, match="ONNX Runtime while running"):
        request.run()
    assert y.tolist() == [7, 7]
    index[0] = 2
    request.run()
    assert y.tolist() == [2, 1]


def test_a_request_that_binds_anew_reads_its_arrays_at_each_run_and_tensors_where_they_are() -> None:
    nodes = [helper.make_node("Sub", ["a", "b"], ["y"])]
    kind = TensorProto.FLOAT
    model = onnx_model(nodes, [("a", kind, SHAPE), ("b", kind, SHAPE)], [("y", kind, SHAPE)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inside: list[str] = []

    class Around:
        def __enter__(self) -> None:
            inside.append("in")

        def __exit__(self, *_: object) -> None:
            inside.append("out")

    request = RebindingRequest(session, (A, B), (Y,), around=Around())
    a, b, y = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2), np.empty(SHAPE, np.float32)
    request.bind("a", a), request.bind("b", b), request.bind("y", y)
    for _ in range(3):
        a += 1
        request.run()
        np.testing.assert_array_equal(y, a - b)
    assert inside == ["in", "out"] * 3
    tensor = there(a)
    request.bind_device("a", tensor)
    a[...] = np.nan
    request.run()
    np.testing.assert_array_equal(y, tensor.numpy() - b)
    request.bind("a", b)
    request.run()
    assert not y.any()
    with pytest.raises(Unsupported, match="not C-contiguous"):
        request.bind("a", np.zeros((5, 3), np.float32).T)


def test_after_a_refusal_nothing_is_on_its_way_from_or_to_the_arrays() -> None:
    class Full(LateStream):
        def copy(self, destination: int, source: int, size: int) -> None:
            if len(self.waiting) == 1:
                raise Unsupported("CUDA could not copy: a card has failed")
            super().copy(destination, source, size)

    request, _ = staged()
    request._stream = stream = Full()
    request.bind("a", normal(*SHAPE, seed=1)), request.bind("b", normal(*SHAPE, seed=2))
    with pytest.raises(Unsupported, match="a card has failed"):
        request.run()
    assert not stream.waiting  # whoever was refused may free its arrays


@pytest.mark.parametrize("wrong", ["datetime64[s]", "complex64"])
def test_an_error_of_the_binding_is_ours(wrong: str) -> None:
    # On a card the binding is the upload. On a processor it refuses only what is of no type that it has, with the same kind of error.
    entered = []

    class Around(nullcontext[None]):
        def __exit__(self, *_: object) -> None:
            entered.append(1)

    request = RebindingRequest(staged()[0]._session, (A, B), (Y, Z), around=Around())
    request.bind("a", np.zeros(SHAPE, wrong)), request.bind("b", normal(*SHAPE, seed=2))
    with pytest.raises(Unsupported, match=r"^ONNX Runtime while running: Numpy_type .* can't be converted"):
        request.run()
    a, b = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    request.bind("a", a)
    request.run()
    np.testing.assert_array_equal(request.output("y"), a - b)
    assert entered == [1, 1]


def test_inputs_that_are_forgotten_can_be_freed() -> None:
    request = RebindingRequest(staged()[0]._session, (A, B), (Y, Z))
    a, b = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    alive = [weakref.ref(each) for each in (a, b)]
    request.bind("a", a), request.bind("b", b)
    request.run()
    wanted = a - b
    request.forget_inputs()
    del a, b
    gc.collect()
    assert [each() for each in alive] == [None, None]
    np.testing.assert_array_equal(request.output("y"), wanted)
    again = normal(*SHAPE, seed=3)
    request.bind("a", again), request.bind("b", again)
    request.run()
    assert not request.output("y").any()


def test_what_the_library_says_goes_without_the_signatures_of_its_source() -> None:
    source = (
        "/onnxruntime_src/onnxruntime/core/providers/cuda/cudnn_fe_call.cc:117 std::conditional_t<THRW, void, Status> CudaCall(ERRTYPE)"
    )
    error = RuntimeError(
        f"[ONNXRuntimeError] : 1 : FAIL : Failed to start: {source} [with ERRTYPE = int; bool THRW = true] failure 11: BAD"
    )
    assert words(error) == "1 : FAIL : Failed to start: failure 11: BAD"
