"""One request's way through a list of stages: a request of each executable, bound to shared boundary buffers. The engine's hot path.

A lane is a caller's turn in a sequential plan (one thread runs all its steps) and a slot of a pipeline (each step on its stage's thread).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy import ndarray

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.backend import Buffer, DeviceTensor, DeviceTensors, Executable, Request, aligned_empty, host_buffer
from aivmm.runtime.clocks import StageClock
from aivmm.runtime.drift import BLOCK
from aivmm.runtime.inputs import checked, dtype_of, elsewhere, is_numpy, refuse_unknown
from aivmm.runtime.plan import Stage
from aivmm.tensors import TensorSpec

# Up to this size an input is copied into a buffer bound once; beyond it the caller's own array is bound for the call, since a copy of a
# megabyte takes longer than a rebinding (1.4 µs in ONNX Runtime, 3 to 8 µs in OpenVINO).
COPY_LIMIT_BYTES = 32 << 10
# A caller who fills one array again and again is not asked for a copy each time: after so many calls his array is bound itself.
_STEADY = 8
_FOLD_NS = 50_000_000  # what was timed is counted this often: for calls below half a millisecond in less than one of a hundred


def new_buffer(spec: TensorSpec) -> Buffer | None:
    """Return a buffer for `spec`, or None when only the runtime can allocate it."""
    return aligned_empty(spec) if spec.static and is_numpy(spec.dtype) else None


def _wanted(spec: TensorSpec, executables: Sequence[Executable]) -> Buffer | None:
    """Return a buffer of the kind that the first of the executables which wants any wants, of any kind where none does.

    None when only the runtime can allocate it.
    """
    for each in executables:
        buffer = host_buffer(each, spec)
        if buffer is not None:
            return buffer
    return new_buffer(spec)


def _one_memory(executables: Sequence[Executable]) -> bool:
    """Say whether all keep their tensors in one device's memory."""
    return len({each.memory if isinstance(each, DeviceTensors) else None for each in executables}) == 1 and isinstance(
        executables[0], DeviceTensors
    )


class Feed:
    """Where one input comes in. `bound` is what the stages read now: the lane's own buffer, or an array of a caller's."""

    __slots__ = ("_copies", "_dtype", "_known", "_own", "_seen", "_shape", "_spec", "_times", "_users", "bound", "name")

    def __init__(self, spec: TensorSpec, known: Mapping[str, TensorSpec], users: Sequence[tuple[Any, Executable]]) -> None:
        """Bind a buffer where one is copied into: for a small input of a size that is known."""
        self.name = spec.name
        self.bound: Any = self  # at first nothing that a caller could bring
        self._spec, self._known, self._users = spec, known, users  # the requests that read it, with their executables
        self._dtype, self._shape = dtype_of(spec), spec.shape  # without a type only `checked` can compare
        size = spec.nbytes
        self._copies = size is not None and size <= COPY_LIMIT_BYTES
        self._own: Buffer | None = None
        self._seen: Any = None  # the array that was copied last, and how often in a row
        self._times = 0
        if self._copies:
            own = self.own()
            assert own is not None
            self._bind(own)

    def own(self) -> Buffer | None:
        """Return the lane's own buffer for the input; None when its size is not known before the call."""
        if self._own is None:
            self._own = self.new()
        return self._own

    def new(self) -> Buffer | None:
        """Return another buffer for the input, in the memory that its stages read fastest; None as `own`."""
        return _wanted(self._spec, [executable for _, executable in self._users])

    def take(self, array: Any) -> None:
        """Copy a small array, bind a large one where it is.

        Raises:
            UsageError: it is missing, or of another type or shape.
        """
        if not (type(array) is ndarray and array.dtype is self._dtype and array.shape == self._shape):
            if elsewhere(array):
                self._read_there(array)
                return
            array = checked(array, self._spec, self._known)
        own = self._own
        if self._copies and array is not own:
            self._times = self._times + 1 if array is self._seen else 0
            self._seen = array
            if self._times < _STEADY or not array.flags.carray:
                if self.bound is not own:
                    self._bind(own)
                own[...] = array  # type: ignore[index]
                return
        # `carray`: C-contiguous, aligned and writeable, which is what the runtimes share.
        self._bind(array if array.flags.carray else checked(array, self._spec, self._known))

    def copy(self, array: Any) -> None:
        """Take a copy, of a large array too: its owner may change it as soon as this returns.

        Raises:
            UsageError: as `take`.
        """
        if elsewhere(array):
            raise UsageError(
                f"the input {self.name!r} lies on a device, and is to be copied on the host", advice="use run or run_on_device"
            )
        array = checked(array, self._spec, self._known)
        own = self.own()
        if own is None:
            self._bind(array.copy())
            return
        own[...] = array
        if self.bound is not own:
            self._bind(own)

    def _bind(self, array: Any) -> None:
        self.bound = self  # nothing, should one of several stages refuse it
        for request, _ in self._users:
            request.bind(self.name, array)
        self.bound = array

    def _read_there(self, array: Any) -> None:
        """Have an input that lies on the stages' own device read where it is.

        Raises:
            UsageError: it lies on a device that is not the stages', or is not the input it should be.
        """
        self.bound = self  # the same tensor may hold something else next time, and its writer has to be waited for
        for request, executable in self._users:
            if not isinstance(executable, DeviceTensors):
                raise UsageError(f"the input {self.name!r} lies on a device, and is read on the host", advice="give an array of the host")
            request.bind_device(self.name, executable.from_dlpack(array, self._spec))


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
        self.at = 0  # the stage it is in, on a thread of the program's
        self.queued_ns = 0  # when it was put in the queue it stands in
        self._specs = {each.name: each for each in inputs}
        self._requests: list[Request] = [executable.new_request() for executable in executables]
        self.clocks = [StageClock() for _ in stages]
        self.watch: Callable[[Sequence[int]], None] | None = None  # takes the durations of runs, in nanoseconds, by whole blocks
        self._whole: list[int] = []  # durations of runs of several stages
        self._rest: list[int] = []  # of the block that is not whole yet
        self._due_ns = 0  # when what was timed is counted next
        self._so_far_ns = 0  # of a run that is taken by steps
        self._buffers: dict[str, Buffer] = {}
        self.kept_on_device: dict[str, str] = {}  # tensor between stages -> the memory that it never leaves
        self._read_again: set[str] = set()  # outputs that a later stage reads, too
        self._late: list[list[tuple[str, StageClock, Request, list[Request]]]] = [[] for _ in stages]
        self._feeds: Sequence[Feed] = tuple(self._feed(each, executables) for each in inputs)
        self._bind_boundaries(stages, executables, {each.name for each in outputs})
        self._steps = [
            (request.run, clock.fresh.append, late) for request, clock, late in zip(self._requests, self.clocks, self._late, strict=True)
        ]
        self._cut = len(self._steps) > 1
        self._count = len(self._specs)
        self._makers: dict[str, tuple[Any, Executable]] = {
            each.name: (request, executable)
            for stage, request, executable in zip(stages, self._requests, executables, strict=True)
            for each in stage.outputs
        }
        made = self._makers
        self._fixed = [(each.name, self._buffers[each.name]) for each in outputs if each.name in self._buffers and each.name in made]
        fixed = dict(self._fixed)
        self._readers = [self._reader(each.name, stages) for each in outputs if each.name not in fixed]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once and return copies of the outputs.

        Few lines and few calls on purpose, here and in `load` and `execute`: a model leaves the caches cold, and then each line of memory
        that is touched costs a part of the ten microseconds that the whole engine may take.

        Raises:
            UsageError, Unsupported: as `load` and `execute`.
        """
        self.load(inputs)
        self.execute()
        outputs = {}
        for name, buffer in self._fixed:
            outputs[name] = buffer.copy()
        if self._readers:
            for name, read in self._readers:
                outputs[name] = read(name).copy()
        return outputs

    def load(self, inputs: Mapping[str, Any]) -> None:
        """Take the inputs: copy the small ones, bind the large ones, and those that come again and again, where they are.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape.
        """
        for feed in self._feeds:
            array = inputs.get(feed.name)
            if array is not feed.bound:
                feed.take(array)
        if len(inputs) != self._count:
            refuse_unknown(inputs, self._specs)

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Take copies of the inputs, large ones too: their owner may change them as soon as this returns.

        Raises:
            UsageError: as `load`.
        """
        for feed in self._feeds:
            feed.copy(inputs.get(feed.name))
        if len(inputs) != self._count:
            refuse_unknown(inputs, self._specs)

    def own(self, name: str) -> Buffer | None:
        """Return the lane's own buffer for an input; None when its size is not known before the call."""
        return next(each for each in self._feeds if each.name == name).own()

    def execute(self) -> None:
        """Run all stages on what was loaded.

        Raises:
            Unsupported: a stage's runtime refuses, in its own words.
        """
        started_ns = now = perf_counter_ns()
        for run, took, late in self._steps:
            last_ns = now
            run()
            if late:
                self._hand_on(late)
            now = perf_counter_ns()
            took(now - last_ns)
        if self._cut:
            self._whole.append(now - started_ns)
        if now >= self._due_ns:
            self._fold(now)

    def wrap(self, wrapped: Callable[[int, Callable[[], None]], Callable[[], None]] | None) -> None:
        """Run each stage by what `wrapped` makes of its number and its run, for a trace; None runs the stages themselves again."""
        runs = [request.run if wrapped is None else wrapped(index, request.run) for index, request in enumerate(self._requests)]
        # A new list: who is on the way goes by the old one. Closed, it has none; so it may be while this looks.
        self._steps = [(run, took, late) for run, (_, took, late) in zip(runs, self._steps, strict=False)]

    def step(self, index: int) -> None:
        """Run one stage, after those before it."""
        run, took, late = self._steps[index]
        started_ns = perf_counter_ns()
        run()
        if late:
            self._hand_on(late)
        now = perf_counter_ns()
        took(now - started_ns)
        self._so_far_ns = now - started_ns + (self._so_far_ns if index else 0)
        if index == len(self._steps) - 1:
            if self._cut:
                self._whole.append(self._so_far_ns)
            if now >= self._due_ns:
                self._fold(now)

    def _fold(self, now: int) -> None:
        """Count what was timed, and pass it on to who watches."""
        self._due_ns = now + _FOLD_NS
        for clock in self.clocks:
            whole = clock.fold()
        if self._cut:
            whole = self._whole[:]
            del self._whole[:]
        if self.watch is not None:
            whole = self._rest + whole
            end = len(whole) // BLOCK * BLOCK
            self._rest = whole[end:]
            if end:
                self.watch(whole[:end])

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

    @property
    def on_host(self) -> bool:
        """Whether all of the inputs that were loaded last lie on the host."""
        for each in self._feeds:  # noqa: SIM110 - `all` with a generator takes three times as long
            if each.bound is each:
                return False
        return True

    def loaded(self) -> dict[str, Buffer]:
        """Return copies of the inputs that were loaded last, without those that lie on a device."""
        return {each.name: np.array(each.bound) for each in self._feeds if each.bound is not each}

    def _hand_on(self, late: list[tuple[str, StageClock, Request, list[Request]]]) -> None:
        """Bind what a runtime allocated itself to the stages that read it."""
        for name, clock, producer, consumers in late:
            value = producer.output(name)
            clock.late_bytes += getattr(value, "nbytes", 0)
            for consumer in consumers:
                consumer.bind(name, value)

    def close(self) -> None:
        """Let go of requests and buffers: as long as a request lives, so does what the runtime holds for it. The clocks stay."""
        self._requests, self._steps, self._readers, self._feeds, self._fixed = [], [], [], (), []
        self._late.clear()
        self._makers.clear()
        self._buffers.clear()

    def _feed(self, spec: TensorSpec, executables: Sequence[Executable]) -> Feed:
        if spec.dtype != "string" and not is_numpy(spec.dtype):
            raise Unsupported(f"the input {spec} is of a type that NumPy does not have", advice="cast it inside the model")
        users = [
            (request, executable)
            for request, executable in zip(self._requests, executables, strict=True)
            if any(each.name == spec.name for each in executable.inputs)
        ]
        feed = Feed(spec, self._specs, users)
        if feed.bound is not feed:
            self._buffers[spec.name] = feed.bound
        return feed

    def _bind_boundaries(self, stages: Sequence[Stage], executables: Sequence[Executable], wanted: Collection[str]) -> None:
        """Bind each stage's outputs to buffers which the stages that read them share: nothing is copied between stages.

        What only stages on one card read stays on it.
        """
        for index, (stage, executable) in enumerate(zip(stages, executables, strict=True)):
            specs = {each.name: each for each in executable.outputs}
            for tensor in stage.outputs:
                spec = specs.get(tensor.name, tensor.spec)
                reading = [
                    later for later in range(index + 1, len(stages)) if any(each.name == spec.name for each in executables[later].inputs)
                ]
                consumers = [self._requests[later] for later in reading]
                around = [executables[each] for each in (index, *reading)]
                if reading and spec.name in wanted:
                    self._read_again.add(spec.name)
                if reading and spec.static and spec.name not in wanted and _one_memory(around):
                    self._keep_there(spec, executable, [self._requests[index], *consumers])
                    continue
                buffer = _wanted(spec, around)
                if buffer is None:
                    self._late[index].append((spec.name, self.clocks[index], self._requests[index], consumers))
                    continue
                self._buffers[spec.name] = buffer
                self._requests[index].bind(spec.name, buffer)
                for consumer in consumers:
                    consumer.bind(spec.name, buffer)

    def _keep_there(self, spec: TensorSpec, executable: Any, requests: Sequence[Any]) -> None:
        tensor = executable.device_tensor(spec)
        for request in requests:
            request.bind_device(spec.name, tensor)
        self.kept_on_device[spec.name] = executable.memory

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        """Run once and leave the outputs on the devices where they are made, in tensors that are the caller's own.

        Raises:
            UsageError: as `load`, or an output is made where nothing can stay, or of no fixed shape, or a later stage reads it on the host.
        """
        made: dict[str, DeviceTensor] = {}
        own = dict(self._fixed)
        for name in (*own, *(name for name, _ in self._readers)):
            if name not in own or not isinstance(self._makers[name][1], DeviceTensors):
                raise UsageError(f"the output {name!r} is not made in a device's memory, or has no fixed shape", advice="use run")
            if name in self._read_again:
                raise UsageError(f"a later stage reads the output {name!r} too, from the host", advice="use run")
        self.load(inputs)
        try:
            for name in own:
                request, executable = self._makers[name]
                assert isinstance(executable, DeviceTensors)
                made[name] = executable.device_tensor(next(each for each in executable.outputs if each.name == name))
                request.bind_device(name, made[name])
            self.execute()
        finally:
            for name, buffer in own.items():
                self._makers[name][0].bind(name, buffer)
        return made

    def new_inputs(self) -> dict[str, Buffer]:
        """Return arrays for the inputs in the memory that the stages which read them read fastest.

        Raises:
            UsageError: an input has no fixed shape, or holds strings.
        """
        found = {each.name: each.new() for each in self._feeds}
        for name, buffer in found.items():
            if buffer is None:
                raise UsageError(f"the input {self._specs[name]} has no fixed size", advice="make its array with numpy")
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def _reader(self, name: str, stages: Sequence[Stage]) -> tuple[str, Callable[[str], Buffer]]:
        """Return where an output without a buffer is read: what its stage's runtime allocated, or the input that it is."""
        for stage, request in zip(stages, self._requests, strict=True):
            if any(each.name == name for each in stage.outputs):
                return name, request.output
        handed = next(each for each in self._feeds if each.name == name)  # the plan was checked: what no stage makes is an input
        return name, lambda _: handed.bound

    @property
    def runs(self) -> Sequence[Callable[[], None]]:
        """What runs each stage alone, on what the last `run` bound: for probes that hold it against the stage in its place."""
        return [request.run for request in self._requests]

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """The bound buffers by tensor name, for tests that follow pointers."""
        return self._buffers
