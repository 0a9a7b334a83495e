"""What is loaded in a worker and can be run: a compiled model, or an engine; and what a worker holds between requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from aivmm.errors import UsageError
from aivmm.probes.device_memory import MemoryOf
from aivmm.runtime.backend import Buffer, Executable, Request, aligned_empty, host_buffer
from aivmm.runtime.engine import Engine
from aivmm.runtime.feed import new_buffer
from aivmm.runtime.null import NullBackend, SimulatedTime
from aivmm.runtime.target import Target
from aivmm.tensors import TensorSpec


class Runner(Protocol):
    """Something loaded that can be run again and again, by as many threads as it has steps."""

    steps: Sequence[Callable[[], object]]
    simulated: bool  # its time is made of arithmetic

    def outputs(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Run once on `inputs` and return copies of the outputs."""

    def close(self) -> None:
        """Free it."""


class State:
    """What a worker holds between requests."""

    def __init__(self) -> None:
        self.runners: dict[str, Runner] = {}
        self.contexts: dict[Target, int] = {}  # what the first model took of a device's memory before it took any for itself
        self.memories: dict[str, MemoryOf] = {}  # by runner


class ExecutableRunner:
    """A compiled model with `callers` requests bound to buffers, as the engine binds them; `more` are replicas, which take them in turn.

    Inputs are copied, but those that are `private`: aligned arrays which nobody else uses.
    """

    def __init__(
        self,
        executable: Executable,
        inputs: Mapping[str, Buffer],
        callers: int,
        *,
        more: Sequence[Executable] = (),
        private: Collection[str] = (),
    ) -> None:
        self.executable = executable
        self._private = private
        self._all = (executable, *more)
        self._requests = [self._bound(inputs, self._all[index % len(self._all)]) for index in range(callers)]
        self.steps: Sequence[Callable[[], object]] = [request.run for request in self._requests]
        self.simulated = isinstance(self._requests[0], SimulatedTime)

    def _bound(self, inputs: Mapping[str, Buffer], executable: Executable) -> Request:
        request = executable.new_request()
        for spec in executable.inputs:
            if spec.name not in inputs:
                raise UsageError(f"no sample for the input {spec.name!r}")
            array = inputs[spec.name]
            request.bind(spec.name, array if spec.name in self._private else _own(array, spec))
        for spec in executable.outputs:
            buffer = host_buffer(executable, spec)
            buffer = new_buffer(spec) if buffer is None else buffer
            if buffer is not None:
                request.bind(spec.name, buffer)
        return request

    def outputs(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Run once on `inputs` with a request of its own."""
        request = self._bound(inputs, self.executable)
        request.run()
        return {spec.name: np.array(request.output(spec.name)) for spec in self.executable.outputs}

    def close(self) -> None:
        """Free the model."""
        self.steps = []
        self._requests = []
        for each in self._all:
            each.close()


class EngineRunner:
    """A loaded bundle, driven as a user drives it: `engine.run` with arrays, from as many threads as the plan wants callers."""

    def __init__(self, engine: Engine, inputs: Mapping[str, Buffer]) -> None:
        self.engine = engine
        arrays = dict(inputs)
        self.steps: Sequence[Callable[[], object]] = [lambda: engine.run(arrays) for _ in range(engine.plan.callers)]
        stages, mode = engine.plan.stages, engine.plan.execution.mode
        # What runs at once overlaps, and a sum of times says nothing of that.
        one_by_one = mode == "sequential" and all(each.replicas == 1 for each in stages)
        self.simulated = one_by_one and all(each.target.startswith(f"{NullBackend.name}:") for each in stages)

    def outputs(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Run once on `inputs`."""
        return self.engine.run(inputs)

    def each_outputs(self, inputs: Mapping[str, Buffer]) -> list[dict[str, Buffer]]:
        """Run once as a user does; where stages have copies, once through each: two targets need not answer alike."""
        if not any(stage.copies for stage in self.engine.stages):
            return [self.outputs(inputs)]
        ways = {lane.places: lane for lane in reversed(self.engine.lanes())}
        return [lane.run(inputs) for lane in ways.values()]

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


def _own(array: Buffer, spec: TensorSpec) -> Buffer:
    """Return a private copy in an aligned buffer: where a run reads from decides part of its time."""
    if array.dtype.kind in "OSU" or not array.size:
        return array
    copy = aligned_empty(TensorSpec(name=spec.name, dtype=array.dtype.name, shape=array.shape))
    copy[...] = array
    return copy
