"""One caller's way through a plan: a request per stage, bound to shared boundary buffers. The hot path of the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.backend import Buffer, Executable, Request, aligned_empty
from aivmm.runtime.plan import Stage
from aivmm.tensors import TensorSpec

# Up to this size an input is copied into a buffer bound once; beyond it the caller's own array is bound for the call, since a copy of a
# megabyte takes longer than a rebinding (1.4 µs in ONNX Runtime, 3 to 8 µs in OpenVINO).
COPY_LIMIT_BYTES = 32 << 10
_RING = 4096  # latencies remembered per stage and lane, for the statistics


class StageClock:
    """Durations of one stage in one lane, in nanoseconds: the last ones, and how many there were. Only its lane writes."""

    __slots__ = ("count", "durations")

    def __init__(self) -> None:
        self.durations: deque[int] = deque(maxlen=_RING)
        self.count = 0

    def add(self, nanoseconds: int) -> None:
        """Remember one duration."""
        self.durations.append(nanoseconds)
        self.count += 1

    def recent_ns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the last durations."""
        while True:
            try:
                return np.array(self.durations, dtype=np.int64)
            except RuntimeError:
                continue  # its lane added one meanwhile


def new_buffer(spec: TensorSpec) -> Buffer | None:
    """Return a buffer for `spec`, or None when only the runtime can allocate it."""
    return aligned_empty(spec) if spec.static and is_numpy(spec.dtype) else None


def is_numpy(dtype: str) -> bool:
    """Say whether NumPy alone has this type of fixed size: not strings, and bfloat16 and its like only where ml_dtypes was imported."""
    try:
        return np.dtype(dtype).kind in "biufc"
    except TypeError:
        return False


class Lane:
    """Runs the stages one after another. Used by one thread at a time; the engine sees to that."""

    def __init__(
        self, stages: Sequence[Stage], executables: Sequence[Executable], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self._specs = {each.name: each for each in inputs}
        self._requests: list[Request] = [executable.new_request() for executable in executables]
        self.clocks = [StageClock() for _ in stages]
        self._buffers: dict[str, Buffer] = {}
        self._rebind: dict[str, list[Callable[[str, Buffer], None]]] = {}
        self._late: list[list[tuple[str, Request, list[Request]]]] = [[] for _ in stages]
        self._bind_inputs(inputs, executables)
        self._bind_boundaries(stages, executables)
        self._steps = [(request.run, clock, late) for request, clock, late in zip(self._requests, self.clocks, self._late, strict=True)]
        self._copied = [
            (name, buffer, buffer.dtype, buffer.shape)
            for name, buffer in self._buffers.items()
            if name in self._specs and name not in self._rebind
        ]
        # [name, type, shape, binders, the array bound last (at first something that is none)]; without a type only `checked` can compare.
        self._direct: list[list[Any]] = [
            [name, _dtype(self._specs[name]), self._specs[name].shape, binders, self] for name, binders in self._rebind.items()
        ]
        self._count = len(self._specs)
        self._fixed = [(each.name, self._buffers[each.name]) for each in outputs if each.name in self._buffers]
        self._readers = [self._reader(each.name, stages) for each in outputs if each.name not in self._buffers]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once and return copies of the outputs.

        Straight code on purpose: a model leaves the caches cold, and then each Python call here costs microseconds, not nanoseconds.
        """
        for name, buffer, dtype, shape in self._copied:
            array = inputs.get(name)
            if type(array) is np.ndarray and array.dtype is dtype and array.shape == shape:
                buffer[...] = array
            else:
                buffer[...] = checked(array, self._specs[name], self._specs)
        for direct in self._direct:
            name, dtype, shape, binders, last = direct
            array = inputs.get(name)
            if array is last:
                continue  # bound as it is
            # `carray`: C-contiguous, aligned and writeable, which is what the runtimes share.
            if not (type(array) is np.ndarray and array.dtype is dtype and array.shape == shape and array.flags.carray):
                array = checked(array, self._specs[name], self._specs)
            for bind in binders:
                bind(name, array)
            direct[4] = array
        if len(inputs) != self._count:
            refuse_unknown(inputs, self._specs)
        last_ns = perf_counter_ns()
        for run, clock, late in self._steps:
            run()
            for name, producer, consumers in late:
                value = producer.output(name)
                for consumer in consumers:
                    consumer.bind(name, value)
            now = perf_counter_ns()
            clock.add(now - last_ns)
            last_ns = now
        outputs = {name: buffer.copy() for name, buffer in self._fixed}
        for name, read in self._readers:
            outputs[name] = read(name).copy()
        return outputs

    def close(self) -> None:
        """Let go of requests and buffers: as long as a request lives, so does what the runtime holds for it. The clocks stay."""
        self._requests, self._steps, self._readers, self._copied, self._direct, self._fixed = [], [], [], [], [], []
        self._rebind.clear()
        self._late.clear()
        self._buffers.clear()

    def _bind_inputs(self, inputs: Sequence[TensorSpec], executables: Sequence[Executable]) -> None:
        for spec in inputs:
            if spec.dtype != "string" and not is_numpy(spec.dtype):
                raise Unsupported(f"the input {spec} is of a type that NumPy does not have", advice="cast it inside the model")
            users = [
                request
                for request, executable in zip(self._requests, executables, strict=True)
                if any(each.name == spec.name for each in executable.inputs)
            ]
            size = spec.nbytes
            if size is None or size > COPY_LIMIT_BYTES:
                self._rebind[spec.name] = [request.bind for request in users]
                continue
            buffer = aligned_empty(spec)
            self._buffers[spec.name] = buffer
            for request in users:
                request.bind(spec.name, buffer)

    def _bind_boundaries(self, stages: Sequence[Stage], executables: Sequence[Executable]) -> None:
        """Bind each stage's outputs to buffers which the stages that read them share: nothing is copied between stages."""
        for index, (stage, executable) in enumerate(zip(stages, executables, strict=True)):
            specs = {each.name: each for each in executable.outputs}
            for tensor in stage.outputs:
                spec = specs.get(tensor.name, tensor.spec)
                consumers = [
                    self._requests[later]
                    for later in range(index + 1, len(stages))
                    if any(each.name == spec.name for each in executables[later].inputs)
                ]
                buffer = new_buffer(spec)
                if buffer is None:
                    self._late[index].append((spec.name, self._requests[index], consumers))
                    continue
                self._buffers[spec.name] = buffer
                self._requests[index].bind(spec.name, buffer)
                for consumer in consumers:
                    consumer.bind(spec.name, buffer)

    def _reader(self, name: str, stages: Sequence[Stage]) -> tuple[str, Callable[[str], Buffer]]:
        """Return where an output without a buffer is read: what its stage's runtime allocated, or the input that it is."""
        for stage, request in zip(stages, self._requests, strict=True):
            if any(each.name == name for each in stage.outputs):
                return name, request.output
        handed = next(direct for direct in self._direct if direct[0] == name)  # the plan was checked: what no stage makes is an input
        return name, lambda _: handed[4]

    @property
    def runs(self) -> Sequence[Callable[[], None]]:
        """What runs each stage alone, on what the last `run` bound: for probes that hold it against the stage in its place."""
        return [request.run for request in self._requests]

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """The bound buffers by tensor name, for tests that follow pointers."""
        return self._buffers


def _dtype(spec: TensorSpec) -> np.dtype[Any] | None:
    return None if spec.dtype in ("string", "unknown") else np.dtype(spec.dtype)


def checked(array: Any, spec: TensorSpec, known: Mapping[str, TensorSpec]) -> Buffer:
    """Return `array` as the runtimes take it, converting only what loses nothing: a missing dimension of extent 1 is not guessed.

    Raises:
        UsageError: missing, of another type, or of another shape; names the input and what it should be.
    """
    if array is None:
        raise UsageError(f"input {spec.name!r} is missing", advice=f"the plan takes {', '.join(map(str, known.values()))}")
    try:
        value = np.asarray(array)
    except ValueError as error:
        raise UsageError(f"input {spec.name!r} is not an array ({error})") from error
    if spec.dtype == "string":
        value = _strings(value, spec.name)
    elif value.dtype != np.dtype(spec.dtype):
        plain = not isinstance(array, np.ndarray)  # Python numbers and lists have no type of their own to insist on
        if not (plain and np.can_cast(value.dtype, spec.dtype, casting="same_kind")):
            raise UsageError(
                f"input {spec.name!r} has type {value.dtype}, expected {spec.dtype}", advice=f"convert it with .astype({spec.dtype!r})"
            )
        value = _converted(value, spec)
    if len(value.shape) != len(spec.shape) or any(want not in (None, have) for want, have in zip(spec.shape, value.shape, strict=True)):
        raise UsageError(
            f"input {spec.name!r} has shape {list(value.shape)}, expected {spec}", advice="tune for this shape with --shape or --batch"
        )
    if not value.flags.c_contiguous or not value.flags.writeable or not value.flags.aligned:
        value = value.copy()  # both runtimes share only contiguous memory, and OpenVINO only writeable
    return value


def _converted(value: Buffer, spec: TensorSpec) -> Buffer:
    """Return Python numbers in the type wanted; those that do not fit are refused instead of wrapped around."""
    with np.errstate(over="ignore"):
        converted = value.astype(spec.dtype)
    fits = np.array_equal(converted, value) if converted.dtype.kind in "biu" else np.array_equal(np.isinf(converted), np.isinf(value))
    if not fits:
        raise UsageError(f"input {spec.name!r} holds numbers that do not fit into {spec.dtype}")
    return converted


def _strings(value: Buffer, name: str) -> Buffer:
    if value.dtype.kind == "S":
        try:
            value = np.char.decode(value, "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"input {name!r} holds bytes that are not UTF-8", advice="give strings") from error
    if value.dtype.kind not in "OTU":
        raise UsageError(f"input {name!r} has type {value.dtype}, expected strings")
    value = value.astype(object)
    odd = [each for each in value.flat if not isinstance(each, str)]
    if odd:
        raise UsageError(f"input {name!r} holds {type(odd[0]).__name__}, expected strings")
    return value


def refuse_unknown(inputs: Mapping[str, Any], known: Mapping[str, TensorSpec]) -> None:
    """Raise UsageError when `inputs` names a tensor that the plan does not take."""
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise UsageError(f"unknown input {unknown[0]!r}", advice=f"the plan takes {', '.join(map(str, known.values()))}")
