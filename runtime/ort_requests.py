"""Requests of ONNX Runtime: bound buffers on the host, tensors in a card's own memory, and feeds for what cannot be bound."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol

import numpy as np

from aivmm.errors import AivmmError, Unsupported, UsageError
from aivmm.runtime.backend import Buffer, DeviceTensor, foreign_dtype, holds_foreign, is_foreign, raw_view
from aivmm.runtime.cuda import is_pinned, wait_for_producers
from aivmm.runtime.onnx_interface import ELEMENT_TYPES
from aivmm.runtime.turns import Recordings, Turn, Turns
from aivmm.tensors import TensorSpec

_TURNS = Turns()  # of all graphs in the process, whichever their cards: decision 0041
_NO_TURN: AbstractContextManager[Any] = nullcontext()
_DLPACK_CUDA = 2  # kDLCUDA
# Where in its source the library was, with the whole signature of a C++ template: what went wrong comes before and after.
_SOURCE = re.compile(r"\S*/onnxruntime_src/\S+:\d+ .*?\[with .*?\] ")
_ELEMENTS = {name: number for number, name in ELEMENT_TYPES.items()}


def words(error: BaseException) -> str:
    """Return what ONNX Runtime says, on one line of bounded length."""
    text = " ".join(str(error).split())
    text = _SOURCE.sub("", text.partition("[ONNXRuntimeError] : ")[2] or text)
    return text if len(text) <= 600 else text[:600] + " …"


def _as_ours(error: BaseException) -> Unsupported:
    return Unsupported(f"ONNX Runtime while running: {words(error)}")


def ort_value() -> Any:
    """Return ONNX Runtime's class of values."""
    from onnxruntime import OrtValue  # here: a build that is absent is a reason for the user, not an error at import

    return OrtValue


class BoundRequest:
    """Runs through I/O binding: 3 to 5 µs a call where `run` with a feed costs 8."""

    def __init__(self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs = {each.name for each in inputs}
        self._order = [each.name for each in outputs]
        self._types = {each.name: each.dtype for each in outputs}
        self._bound: dict[str, Buffer] = {}
        self._free = list(self._order)
        self._places: dict[str, int] = {}  # output -> its place among those of the binding, which go by who was bound first
        self._call, self._argument = _direct(session, self._binding)
        # The method in Python keeps the array alive, which `_bound` does as long as that is needed.
        self._bind_array: Callable[[str, Buffer], None] = getattr(
            getattr(self._binding, "_iobinding", None), "bind_input", self._binding.bind_cpu_input
        )

    def bind(self, name: str, buffer: Buffer) -> None:
        """Share `buffer` with the session; kept alive here, since the binding holds its address only.

        Raises:
            Unsupported: the array is not C-contiguous, so that the library would copy it once and never look again.
        """
        if not buffer.flags.c_contiguous:
            raise Unsupported(f"the array for {name!r} is not C-contiguous, so it cannot be shared")
        foreign = holds_foreign(buffer)
        if name in self._inputs and not foreign:
            self._bind_array(name, buffer)
        else:
            kind = ort_value()
            raw = raw_view(buffer, name) if foreign else buffer
            value = kind.ortvalue_from_numpy_with_onnx_type(raw, _ELEMENTS[buffer.dtype.name]) if foreign else kind.ortvalue_from_numpy(raw)
            if name in self._inputs:
                self._binding.bind_ortvalue_input(name, value)
            else:
                self._places.setdefault(name, len(self._places))
                self._free = [each for each in self._free if each != name]
                self._binding.bind_ortvalue_output(name, value)
        self._bound[name] = buffer

    def forget_inputs(self) -> None:
        """Let go of the inputs' arrays; see `ForgetsInputs`. The binding keeps their addresses, and does not look there."""
        for name in self._inputs:
            self._bound.pop(name, None)

    def run(self) -> None:
        """Run. No RunOptions: an unset one costs 50 µs inside the library."""
        # Unbound outputs are allocated by the session, which then insists on that shape in the next run: bind them anew.
        for name in self._free:
            self._places.setdefault(name, len(self._places))
            self._binding.bind_output(name, "cpu")
        try:
            self._call(self._argument, None)
        except Exception as error:
            raise _as_ours(error) from error

    def direct(self) -> tuple[Callable[[], object], Callable[[BaseException], Exception | None]] | None:
        """Return the library's call where all outputs are bound, and what makes an error of ours of one of its."""
        if self._free or type(self) is not BoundRequest:
            return None
        return partial(self._call, self._argument, None), _as_ours

    def output(self, name: str) -> Buffer:
        """Return the output's array.

        Raises:
            Unsupported: NumPy has no such elements (bfloat16 and its like).
        """
        bound = self._bound.get(name)
        if bound is not None:
            return bound
        value = self._binding.get_outputs()[self._places[name]]
        if is_foreign(self._types[name]):
            return _foreign_copy(value, foreign_dtype(self._types[name], name))
        try:
            array: Buffer = value.numpy()
        except RuntimeError as error:
            raise Unsupported(f"ONNX Runtime cannot hand out {name!r}: {words(error)}", advice="cast it inside the model") from error
        return array

    def bind_device(self, name: str, tensor: DeviceTensor) -> None:
        """Read or write a tensor where it is. For sessions on a card."""
        if name in self._inputs:
            self._binding.bind_ortvalue_input(name, tensor)
        else:
            self._places.setdefault(name, len(self._places))
            self._free = [each for each in self._free if each != name]
            self._binding.bind_ortvalue_output(name, tensor)
        self._bound.pop(name, None)


class RebindingRequest(BoundRequest):
    """For devices with memory of their own: the binding copies an input there when it is bound, and never looks again."""

    def __init__(
        self,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        around: AbstractContextManager[Any] = _NO_TURN,
    ) -> None:
        """Make one; each run is inside `around`."""
        super().__init__(session, inputs, outputs)
        self._around = around
        self._again: dict[str, Callable[[], None]] = {}

    def bind(self, name: str, buffer: Buffer) -> None:
        """Read an input from `buffer` at each run, not before, or write an output there. Raises as `BoundRequest.bind`."""
        if name not in self._inputs:
            super().bind(name, buffer)
            return
        if not buffer.flags.c_contiguous:
            raise Unsupported(f"the array for {name!r} is not C-contiguous, so it cannot be shared")
        if holds_foreign(buffer):
            self._again[name] = partial(super().bind, name, buffer)
        else:
            self._again[name] = partial(self._bind_array, name, buffer)

    def forget_inputs(self) -> None:
        """Let go of the inputs' arrays, which are not read before others are bound."""
        self._again.clear()
        super().forget_inputs()

    def bind_device(self, name: str, tensor: DeviceTensor) -> None:
        """Read or write a tensor where it is."""
        self._again.pop(name, None)
        super().bind_device(name, tensor)

    def run(self) -> None:
        """Bind the inputs anew, and run. What the library refuses, in the copy of an input too, is Unsupported."""
        with self._around:
            try:
                for again in self._again.values():
                    again()
            except AivmmError:
                raise
            except Exception as error:  # on a card this is the upload: it may be full, or have failed
                raise _as_ours(error) from error
            super().run()


class Copies(Protocol):
    """What a staged request wants of a card's stream (`aivmm.runtime.cuda.Stream`): copies that are begun in order, and a wait for all."""

    def copy(self, destination: int, source: int, size: int) -> None:
        """Begin to copy `size` bytes between two addresses."""

    def upload(self, destination: int, array: Buffer) -> None:
        """Begin to copy a contiguous array; return when it has been read."""

    def wait(self) -> None:
        """Return when all that was begun is done."""


class StagedRequest(BoundRequest):
    """Runs on tensors in a card's memory at fixed addresses, as CUDA graphs need it; what is on the host is copied in before and out after.

    The copies go through a stream of their own, or, where `ordered`, through the one that the session computes on, which then needs no
    wait in between. Inputs and outputs have static shapes, and `place` gives a tensor for each. Where `pinned`, what comes from other
    memory goes through page-locked memory.
    """

    def __init__(
        self,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        stream: Copies,
        place: Callable[[TensorSpec], DeviceTensor],
        pinned: bool,
        recorded: bool,
        ordered: bool = False,
        around: AbstractContextManager[Any] = _NO_TURN,
    ) -> None:
        super().__init__(session, inputs, outputs)
        self._recordings = Recordings()
        self._turn: Turn | None = _TURNS.add() if recorded else None
        self._pinned = pinned
        self._ordered = ordered
        self._around = around
        self._stream = stream
        self._tensors: dict[str, Any] = {}
        self._into: dict[str, tuple[int, int, int]] = {}  # destination, source, bytes
        self._through: dict[str, tuple[int, Buffer]] = {}  # destination, array
        self._out: dict[str, tuple[int, int, int]] = {}
        self._specs = {each.name: each for each in (*inputs, *outputs)}
        self._dtypes: dict[str, np.dtype[Any]] = {}  # those that were found right: a type's name takes a microsecond
        self._lent: dict[str, DeviceTensor] = {}  # kept alive: elsewhere only their addresses are known
        for each in (*inputs, *outputs):
            tensor = place(each)
            self._tensors[each.name] = tensor
            super().bind_device(each.name, tensor)

    def bind(self, name: str, buffer: Buffer) -> None:
        """Copy between `buffer` and the card at each run."""
        self._require_fitting(name, buffer)
        place = int(self._tensors[name].data_ptr())
        through = self._pinned and name in self._inputs and not is_pinned(buffer)
        self._move(name, place, buffer.ctypes.data, buffer.nbytes, buffer if through else None)
        self._bound[name] = buffer
        self._lent.pop(name, None)  # nothing is copied from there or to it any more

    def _require_fitting(self, name: str, buffer: Buffer) -> None:
        """Raise Unsupported unless the array is what goes into the tensor on the card, or comes from it: a copy knows no end."""
        spec = self._specs[name]
        if not buffer.flags.c_contiguous:
            raise Unsupported(f"the array for {name!r} is not C-contiguous, so it cannot be copied as it is")
        if self._dtypes.get(name) is not buffer.dtype:
            if buffer.dtype.name != spec.dtype:
                raise Unsupported(f"{spec} cannot be bound to {buffer.dtype}{list(buffer.shape)}")
            self._dtypes[name] = buffer.dtype
        if buffer.shape != spec.shape:
            raise Unsupported(f"{spec} cannot be bound to {buffer.dtype}{list(buffer.shape)}")

    def bind_device(self, name: str, tensor: DeviceTensor) -> None:
        """Copy between `tensor` and the fixed place at each run: on one card that takes next to nothing."""
        value: Any = tensor
        self._move(name, int(self._tensors[name].data_ptr()), int(value.data_ptr()), int(value.tensor_size_in_bytes()), None)
        self._bound.pop(name, None)
        self._lent[name] = tensor

    def run(self) -> None:
        """Copy in, run, copy out."""
        turn, recordings = self._turn, self._recordings
        with self._around:
            if turn is None:
                self._run()
            elif recordings.left:
                turn.record(self._run)
                recordings.left -= 1
            else:
                turn.replay(self._run)

    def _run(self) -> None:
        try:
            self._copy_in()
            self._compute()
            for destination, source, size in self._out.values():
                self._stream.copy(destination, source, size)
            if self._out:
                self._stream.wait()
        except BaseException:
            with suppress(Unsupported):  # copies that were begun read and write the caller's arrays until they are done
                self._stream.wait()
            raise

    def _compute(self) -> None:
        try:
            self._call(self._argument, None)
        except Exception as error:
            raise _as_ours(error) from error

    def _copy_in(self) -> None:
        for destination, array in self._through.values():
            self._stream.upload(destination, array)
        for destination, source, size in self._into.values():
            self._stream.copy(destination, source, size)
        if (self._into or self._through) and not self._ordered:
            self._stream.wait()

    def output(self, name: str) -> Buffer:
        """Return the output's array: the bound buffer, or a copy from the card."""
        bound = self._bound.get(name)
        if bound is not None:
            return bound
        array: Buffer = self._tensors[name].numpy()
        return array

    def _move(self, name: str, place: int, address: int, size: int, through: Buffer | None) -> None:
        for moves in (self._into, self._through, self._out):
            moves.pop(name, None)
        if size == 0:
            return
        if through is not None:
            self._through[name] = (place, through)
        elif name in self._inputs:
            self._into[name] = (place, address, size)
        else:
            self._out[name] = (address, place, size)


def device_tensor(spec: TensorSpec, device: int) -> DeviceTensor:
    """Return an uninitialised tensor in the memory of the card with CUDA's index `device`.

    Raises:
        Unsupported: its shape is open, there is no memory left, or no such type, in the runtime's words.
    """
    if not spec.static:
        raise Unsupported(f"{spec} has no fixed size, so that it has no place of its own on the card", advice="bind its shape with --dim")
    try:
        tensor: DeviceTensor = ort_value().ortvalue_from_shape_and_type(list(spec.shape), _numpy_or_onnx(spec.dtype), "cuda", device)
    except Exception as error:
        raise Unsupported(f"ONNX Runtime has no place for {spec} on the card: {words(error)}") from error
    return tensor


def _numpy_or_onnx(dtype: str) -> Any:
    return _ELEMENTS[dtype] if is_foreign(dtype) else np.dtype(dtype).type


def shared_tensor(array: Any, spec: TensorSpec, device: int) -> DeviceTensor:
    """Return a caller's tensor on the card as ONNX Runtime has it, without a copy.

    Raises:
        UsageError: it is elsewhere, of another type or shape, or not in one piece.
    """
    kind, index = array.__dlpack_device__()
    if (int(kind), int(index)) != (_DLPACK_CUDA, device):
        raise UsageError(f"the input {spec.name!r} lies on another device than cuda:{device}, where the plan runs", advice="move it there")
    try:
        tensor = ort_value().from_dlpack(array)
    except Exception as error:
        raise UsageError(f"the input {spec.name!r} cannot be taken through DLPack: {words(error)}", advice="make it contiguous") from error
    wait_for_producers(device)
    found = TensorSpec(name=spec.name, dtype=ELEMENT_TYPES.get(tensor.element_type(), "unknown"), shape=tuple(tensor.shape()))
    if found.dtype != spec.dtype or not _fits(found.shape, spec.shape):
        raise UsageError(f"the input {spec} was given as {found}")
    given: DeviceTensor = tensor
    return given


def _fits(found: Sequence[int | None], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(b is None or a == b for a, b in zip(found, wanted, strict=True))


def _direct(session: Any, binding: Any) -> tuple[Callable[[Any, None], None], Any]:
    """Return what `session.run_with_iobinding(binding)` comes to, and its argument.

    The method in Python asks at each call whether WebGPU captures graphs: a microsecond, and several when a model has left the caches cold.
    """
    inner, bound = getattr(session, "_sess", None), getattr(binding, "_iobinding", None)
    if inner is None or bound is None or getattr(inner, "is_webgpu_graph_capture_enabled", lambda: False)():
        return session.run_with_iobinding, binding  # another release, or it does capture
    return inner.run_with_iobinding, bound


def _foreign_copy(value: Any, dtype: np.dtype[Any]) -> Buffer:
    """Return what a value of the runtime's holds, in a type that its own `numpy()` does not know."""
    shape = tuple(value.shape())
    array: Buffer = np.empty(shape, dtype=dtype)
    ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array


class FeedRequest:
    """Runs with a feed and fetched outputs: strings, sequences and optionals cannot be bound."""

    def __init__(self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._session = session
        self._inputs = {each.name for each in inputs}
        self._order = [each.name for each in outputs]
        self._bound: dict[str, Buffer] = {}
        self._last: dict[str, Any] = {}

    def bind(self, name: str, buffer: Buffer) -> None:
        """Remember the array of an input, or where an output is to be copied."""
        self._bound[name] = buffer

    def run(self) -> None:
        """Run, and copy into the bound outputs."""
        feed = {name: array for name, array in self._bound.items() if name in self._inputs}
        try:
            self._last = dict(zip(self._order, self._session.run(self._order, feed), strict=True))
        except Exception as error:
            raise Unsupported(f"ONNX Runtime while running: {words(error)}") from error
        for name in self._order:
            if name in self._bound:
                self._bound[name][...] = self._last[name]

    def output(self, name: str) -> Buffer:
        """Return the output's array."""
        bound = self._bound.get(name)
        array: Buffer = bound if bound is not None else self._last[name]
        return array
