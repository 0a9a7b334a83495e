"""One request's way through a list of stages: a request of each executable, bound to shared boundary buffers. The engine's hot path.

A lane is a caller's turn in a sequential plan (one thread runs all its steps) and a slot of a pipeline (each step on its stage's thread).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Buffer, Executable, Request, aligned_empty
from aivmm.runtime.clocks import StageClock
from aivmm.runtime.drift import BLOCK
from aivmm.runtime.inputs import checked, dtype_of, is_numpy, refuse_unknown
from aivmm.runtime.plan import Stage
from aivmm.tensors import TensorSpec

# Up to this size an input is copied into a buffer bound once; beyond it the caller's own array is bound for the call, since a copy of a
# megabyte takes longer than a rebinding (1.4 µs in ONNX Runtime, 3 to 8 µs in OpenVINO).
COPY_LIMIT_BYTES = 32 << 10


def new_buffer(spec: TensorSpec) -> Buffer | None:
    """Return a buffer for `spec`, or None when only the runtime can allocate it."""
    return aligned_empty(spec) if spec.static and is_numpy(spec.dtype) else None


class Lane:
    """Runs the stages one after another. Used by one thread at a time; who holds it sees to that."""

    def __init__(
        self,
        stages: Sequence[Stage],
        executables: Sequence[Executable],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        index: int = 0,
        places: Sequence[int] | None = None,
    ) -> None:
        """Bind a new request of each of `executables`, one a stage.

        Raises:
            Unsupported: an input is of a type that NumPy lacks.
        """
        self.index = index  # its number in its program
        self.places = tuple(places or (0,) * len(stages))  # which of each stage's executables it is bound to
        self.seats: Sequence[int] = (index,)  # which queue of each step of the way is its own
        self.error: BaseException | None = None  # of the flight it is on: a stage that failed, and the later ones are left out
        self.done: Callable[[Lane], None] | None = None  # who takes what it brings
        self.queued_ns = 0  # when it was put in the queue it stands in
        self._specs = {each.name: each for each in inputs}
        self._requests: list[Request] = [executable.new_request() for executable in executables]
        self.clocks = [StageClock() for _ in stages]
        self.watch: Callable[[Sequence[int]], None] | None = None  # takes the durations of so many runs, in nanoseconds
        self._took: list[int] = []
        self._so_far_ns = 0  # of a run that is taken by steps
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
            [name, dtype_of(self._specs[name]), self._specs[name].shape, binders, self] for name, binders in self._rebind.items()
        ]
        self._count = len(self._specs)
        self._own: dict[str, Buffer] = {}  # private copies of large inputs, for requests that outlive the call that brought them
        self._fixed = [(each.name, self._buffers[each.name]) for each in outputs if each.name in self._buffers]
        self._readers = [self._reader(each.name, stages) for each in outputs if each.name not in self._buffers]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once and return copies of the outputs."""
        self.load(inputs)
        self.execute()
        return self.copies()

    def load(self, inputs: Mapping[str, Any]) -> None:
        """Take the inputs: copy the small ones, bind the large ones where they are.

        Few lines on purpose, here and in `execute` and `copies`: a model leaves the caches cold, and then what takes nanoseconds takes
        microseconds, of the ten that the whole engine may cost.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape.
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
            direct[4] = self  # nothing, should one of several stages refuse it
            for bind in binders:
                bind(name, array)
            direct[4] = array
        if len(inputs) != self._count:
            refuse_unknown(inputs, self._specs)

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Take copies of the inputs, large ones too: their owner may change them as soon as this returns.

        Raises:
            UsageError: as `load`.
        """
        taken = dict(inputs)
        for name, *_ in self._direct:
            array = checked(inputs.get(name), self._specs[name], self._specs)
            own = self.own(name)
            if own is None:
                taken[name] = array.copy()
            else:
                own[...] = array
                taken[name] = own
        self.load(taken)

    def own(self, name: str) -> Buffer | None:
        """Return the lane's own buffer for an input; None when its size is not known before the call."""
        if name not in self._rebind:
            return self._buffers[name]
        if name not in self._own:
            buffer = new_buffer(self._specs[name])
            if buffer is None:
                return None
            self._own[name] = buffer
        return self._own[name]

    def execute(self) -> None:
        """Run all stages on what was loaded.

        Raises:
            Unsupported: a stage's runtime refuses, in its own words.
        """
        started_ns = last_ns = perf_counter_ns()
        for run, clock, late in self._steps:
            run()
            if late:
                self._hand_on(late, clock)
            now = perf_counter_ns()
            clock.add(now - last_ns)
            last_ns = now
        if self.watch is not None:
            self._took.append(last_ns - started_ns)
            if len(self._took) >= BLOCK:
                self._tell()

    def step(self, index: int) -> None:
        """Run one stage, after those before it."""
        run, clock, late = self._steps[index]
        started = perf_counter_ns()
        run()
        if late:
            self._hand_on(late, clock)
        took = perf_counter_ns() - started
        clock.add(took)
        if self.watch is not None:
            self._so_far_ns += took
            if index == len(self._steps) - 1:
                self._took.append(self._so_far_ns)
                self._so_far_ns = 0
                if len(self._took) >= BLOCK:
                    self._tell()

    def _tell(self) -> None:
        assert self.watch is not None
        took, self._took = self._took, []
        self.watch(took)

    def copies(self) -> dict[str, Buffer]:
        """Return the outputs of the last run; the arrays are the caller's own."""
        outputs = {}
        for name, buffer in self._fixed:
            outputs[name] = buffer.copy()
        for name, read in self._readers:
            outputs[name] = read(name).copy()
        return outputs

    def views(self) -> dict[str, Buffer]:
        """Return the outputs of the last run where they are: this lane's next run overwrites them."""
        return dict(self._fixed) | {name: read(name) for name, read in self._readers}

    def loaded(self) -> dict[str, Buffer]:
        """Return copies of the inputs that were loaded last."""
        bound = {name: array for name, *_, array in self._direct if array is not self}
        return {name: np.array(array) for name, array in ({each[0]: each[1] for each in self._copied} | bound).items()}

    def _hand_on(self, late: list[tuple[str, Request, list[Request]]], clock: StageClock) -> None:
        """Bind what a runtime allocated itself to the stages that read it."""
        for name, producer, consumers in late:
            value = producer.output(name)
            clock.late_bytes += getattr(value, "nbytes", 0)
            for consumer in consumers:
                consumer.bind(name, value)

    def close(self) -> None:
        """Let go of requests and buffers: as long as a request lives, so does what the runtime holds for it. The clocks stay."""
        self._requests, self._steps, self._readers, self._copied, self._direct, self._fixed = [], [], [], [], [], []
        self._rebind.clear()
        self._own.clear()
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
