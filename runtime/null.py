"""A device made of arithmetic: right answers, exact times, a fake clock and no sleeping.

For dry runs, for the documentation, and for tests of planners and searches: what is best on it can be worked out,
and a search be held to it.

`null_device` has the figures of a device and the formulas that they enter.

onnx is imported only when a model is compiled: listing devices costs nothing, and production never does either.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Baseline, Buffer, CopyRoute, Placement, Stray, Strays, routes_of
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.null_device import (
    DEFAULT_DEVICES,
    METER,
    FakeClock,
    Memory,
    NullDevice,
    Setup,
    compute_s,
    interval_s,
    parts_s,
    rounded,
    stray_s,
)
from aivmm.runtime.null_memory import NullCopier, copy_s
from aivmm.runtime.null_work import Work, evaluated, evaluator_of, load, op_types, spec_of, work_of
from aivmm.runtime.target import Device, Target, Unavailable
from aivmm.tensors import TensorSpec


@runtime_checkable
class SimulatedTime(Protocol):
    """A request whose time is made of arithmetic. A probe that meets one takes `last_s` where it would have read a clock."""

    @property
    def last_s(self) -> float:
        """Seconds the last run took, in simulated time, with every open request of its executable kept busy; 0 before the first run."""


def counts_itself(targets: Iterable[Target]) -> bool:
    """True where all targets are made of arithmetic, which tells what they use where others need a counter."""
    return all(target.runtime == NullBackend.name for target in targets)


class NullBackend:
    """A runtime whose devices are made of arithmetic. Its answers are those of `onnx.reference`; its times are the formula's.

    `unavailable` is what `targets` lists as absent. Times with noise are the same in every process for the same `seed` and order of runs.
    """

    name: ClassVar[str] = "null"

    def __init__(
        self,
        devices: Iterable[NullDevice] = DEFAULT_DEVICES,
        *,
        clock: FakeClock | None = None,
        seed: int = 0,
        unavailable: Sequence[Unavailable] = (),
    ) -> None:
        self.clock = clock or FakeClock()
        self._devices = {device.name: device for device in devices}
        self._memory = Memory()
        self._turns = {name: threading.Lock() for name in self._devices}  # who has a device for itself, in real time
        self._seed = seed
        self._unavailable = tuple(unavailable)

    def targets(self) -> Sequence[Target | Unavailable]:
        """List the devices it was made with."""
        return (*(_target(device, self.name) for device in self._devices.values()), *self._unavailable)

    def knobs(self, target: Target) -> Sequence[Knob]:
        """List threads, streams and the device's choices, as far as the device has more than one value for them."""
        device = self._device(target)
        knobs = []
        if device.cores > 1:
            why = "each thread shortens the parallel part and adds overhead, so the best count lies between"
            knobs.append(Knob(name="threads", kind="int", low=1, high=2 * device.cores, default=device.cores, why=why))
        if device.max_streams > 1:
            why = "several runs at once fill the device while one copies or is serial, and each costs memory"
            objectives = frozenset({"throughput"})
            knobs.append(Knob(name="streams", kind="int", low=1, high=device.max_streams, default=1, why=why, objectives=objectives))
        for name, factors in device.choices.items():
            why = f"each choice of {name} scales the compute time by its own factor"
            first, best = next(iter(factors)), device.promising.get(name)
            knobs.append(Knob(name=name, kind="choice", choices=tuple(factors), default=first, promising=best, why=why))
        return knobs

    def baselines(self, targets: Sequence[Target], objective: str) -> Sequence[Baseline]:
        """List each target's defaults."""
        return [Baseline(name=f"{target} default", target=target, config=Config()) for target in targets if target.runtime == self.name]

    def compile(self, model: Path | bytes, target: Target, config: Config) -> NullExecutable:
        """Check `model`, make sure that it fits, and keep its memory until it is closed.

        Raises:
            Unsupported: onnx cannot read or evaluate the model, the device lacks an operator, a setting or a precision, or it does not fit.
        """
        device, setup = self._device(target), self._setup(target, config)
        proto, name = load(model)
        missing = sorted(set(op_types(proto.graph)) - device.op_types) if device.op_types is not None else []
        if missing:
            raise Unsupported(f"{target} does not support {', '.join(missing)}", advice="run these operators on another target")
        seed = f"{self._seed} {target} {config.key()} {name}"
        from aivmm.runtime.null_card import NullCardExecutable  # here: it is made of what is below

        kind = NullCardExecutable if device.keeps_tensors else NullExecutable
        executable = kind(proto, device, setup, clock=self.clock, seed=seed, turn=self._turns[device.name])
        needed = executable.work.weight_bytes + executable.work.activation_bytes * setup.streams
        self._memory.take(name, needed, device)
        executable.on_close(weakref.finalize(executable, self._memory.free, device, needed))
        return executable

    def strays(self, model: Path | bytes, target: Target, config: Config, inputs: Mapping[str, Buffer]) -> Strays:
        """Return the nodes that the device leaves to the host, and the copies for them; see `ExplainsStrays`."""
        device, proto = self._device(target), load(model)[0]
        found = [(node, moved) for node, (op, _, moved) in zip(proto.graph.node, work_of(proto).nodes, strict=True) if op in device.left]
        names = [(node.name or node.output[0], node.op_type) for node, _ in found]
        return Strays(
            nodes=tuple(Stray(node=name, op_type=op, seconds=device.launch_s) for name, op in names),
            copies=tuple(
                Stray(node=f"{way} {name}", op_type="Copy", seconds=stray_s(moved, device) / 2)
                for (name, _), (_, moved) in zip(names, found, strict=True)
                for way in ("to", "from")
            ),
            call_s=self.expect_s(model, target, config),
        )

    def expect_s(self, model: Path | bytes, target: Target, config: Config, *, callers: int = 1) -> float:
        """Return the time between two completed runs, without noise, without running and without asking whether it fits."""
        return interval_s(work_of(load(model)[0]), self._device(target), self._setup(target, config), callers)

    def optimum(self, model: Path | bytes, target: Target, *, callers: int = 1, precision: str | None = None) -> tuple[Config, float]:
        """Return the config with the shortest `expect_s` and that time, found by trying every one: the yardstick of a search."""
        work, device = work_of(load(model)[0]), self._device(target)

        def expected(config: Config) -> float:
            return interval_s(work, device, self._setup(target, config), callers)

        best = min((Config.of(settings, precision=precision) for settings in _grid(self.knobs(target))), key=expected)
        return best, expected(best)

    def memory_in_use(self, target: Target) -> int:
        """Return the bytes that open executables hold on `target`."""
        return self._memory.used(self._device(target))

    def routes(self, targets: Sequence[Target]) -> Sequence[CopyRoute]:
        """List the ways between the host and devices, and between devices. Where the host's memory is shared nothing is copied."""
        mine = [each for each in targets if each.runtime == self.name and each.device.kind != "cpu"]
        return routes_of([each for each in mine if copy_s(None, self._device(each), 1) > 0])

    def copier(self, route: CopyRoute, size_bytes: int) -> NullCopier:
        """Make what copies along a route in simulated time; its bytes count as taken."""
        ends = tuple(None if each is None else self._device(each) for each in (route.source, route.destination))
        return NullCopier(route, (ends[0], ends[1]), size_bytes, self._memory, self.clock)

    def _device(self, target: Target) -> NullDevice:
        if target.runtime != self.name or target.name not in self._devices:
            known = ", ".join(f"{self.name}:{name}" for name in self._devices)
            raise Unsupported(f"{target} is not a device of the null backend", advice=f"it has {known}")
        return self._devices[target.name]

    def _setup(self, target: Target, config: Config) -> Setup:
        device, knobs = self._device(target), {knob.name: knob for knob in self.knobs(target)}
        settings: dict[str, Any] = {name: knob.default for name, knob in knobs.items()}
        for name, value in config.settings:
            if name not in knobs:
                raise Unsupported(f"{target} has no setting {name!r}", advice=f"it has {', '.join(knobs) or 'none'}")
            _require_allowed(target, knobs[name], value)
            settings[name] = value
        precision = config.precision or "fp32"
        if precision not in device.speed:
            raise Unsupported(f"{target} does not run {precision!r}", advice=f"it runs {', '.join(device.speed)}")
        threads, streams = settings.pop("threads", 1), settings.pop("streams", 1)
        return Setup(threads=threads, streams=streams, precision=precision, chosen=settings)


class NullExecutable:
    """A model on a made-up device. Every open request is taken to be kept busy: that is what `callers` means here."""

    requests_are_callers = True  # each open request counts as one that is kept busy: the engine makes no more than it has callers

    def __init__(
        self, proto: Any, device: NullDevice, setup: Setup, *, clock: FakeClock, seed: str, turn: threading.Lock | None = None
    ) -> None:
        initialized = {each.name for each in proto.graph.initializer}
        self.inputs: Sequence[TensorSpec] = tuple(spec_of(each) for each in proto.graph.input if each.name not in initialized)
        self.outputs: Sequence[TensorSpec] = tuple(spec_of(each) for each in proto.graph.output)
        self.effective_config: Mapping[str, Setting] = setup.as_settings()
        stray = tuple(each.name or each.output[0] for each in proto.graph.node if each.op_type in device.left)
        nodes = {device.name: len(proto.graph.node) - len(stray)} | ({"host": len(stray)} if stray else {})
        self.placement = Placement(devices=(device.name,), nodes=nodes, stray=stray)
        self.work = work_of(proto)
        self._device, self._setup, self._clock = device, setup, clock
        self._evaluator = evaluator_of(proto)
        self._proto = proto if any(not each.static for each in self.inputs) else None
        self._requests: weakref.WeakSet[NullRequest] = weakref.WeakSet()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._turn, self._streams = turn or threading.Lock(), threading.BoundedSemaphore(setup.streams)
        self._free: Any = None
        self._closed = False

    def on_close(self, free: weakref.finalize[Any, Any]) -> None:
        """Call `free` once, on closing; it frees itself when the executable is forgotten unclosed."""
        self._free = free

    def new_request(self) -> NullRequest:
        """Make another request."""
        self._require_open()
        request = NullRequest(self)
        self._requests.add(request)
        return request

    def close(self) -> None:
        """Give the memory back. Closing twice is closing once."""
        self._closed = True
        if self._free is not None:
            self._free()

    def evaluate(self, feeds: Mapping[str, Buffer], resident: Collection[str] = ()) -> tuple[list[Any], float]:
        """Return the outputs for `feeds`, and the simulated seconds that took; the clock has moved by this run's share of them.

        Inputs and outputs named in `resident` are on the device and stay there: they are not copied.
        """
        self._require_open()
        if self._device.real_time:
            self._last(self._without_copies(self.work, resident))
        # One at a time: the operators of onnx.reference keep state while they run.
        with self._lock, np.errstate(all="ignore"):
            results = evaluated(self._evaluator, feeds)
            callers = len(self._requests)
            work = work_of(self._proto, {name: array.shape for name, array in feeds.items()}) if self._proto is not None else self.work
            work = self._without_copies(work, resident)
            seconds = interval_s(work, self._device, self._setup, callers)
            busy_s = compute_s(work, self._device, self._setup) * self._setup.threads
            METER.add(seconds * self._device.idle_w + busy_s * self._device.busy_w, seconds)
            if self._device.noise:
                seconds *= math.exp(self._random.gauss(0.0, self._device.noise))
            self._clock.advance(seconds)
        return [rounded(result, self._setup.precision) for result in results], seconds * callers

    @property
    def real_time(self) -> bool:
        """Whether a run lasts as long as it says."""
        return self._device.real_time

    def _without_copies(self, work: Work, resident: Collection[str]) -> Work:
        if not resident:
            return work
        staying = [each.nbytes or 0 for each in (*self.inputs, *self.outputs) if each.name in resident]
        return replace(work, copied_bytes=work.copied_bytes - sum(staying), copied_tensors=work.copied_tensors - len(staying))

    def _last(self, work: Work) -> None:
        """Let one run's time pass on the wall."""
        computes_s, copies_s = parts_s(work, self._device, self._setup)
        alone_s = computes_s * self._setup.threads / self._device.cores
        with self._streams:
            ends = time.perf_counter() + computes_s + copies_s
            with self._turn:
                time.sleep(alone_s)
            time.sleep(max(0.0, ends - time.perf_counter()))

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this executable is closed")


class NullRequest:
    """One slot of a `NullExecutable`: its bound buffers, and the simulated time of its last run."""

    def __init__(self, executable: NullExecutable) -> None:
        self._executable = executable
        self._inputs = {each.name: each for each in executable.inputs}
        self._outputs = {each.name: each for each in executable.outputs}
        self._bound: dict[str, Buffer] = {}
        self._resident: set[str] = set()  # bound in the device's own memory
        self._results: dict[str, Buffer] = {}
        if not executable.real_time:  # what lasts as long as it says is timed by the clock
            self.last_s = 0.0

    def bind(self, name: str, buffer: Buffer) -> None:
        """Bind an array to an input or output; it is read or written in place by each run.

        Raises:
            ValueError: there is no such tensor, or the array has another type or shape, is not C-contiguous, or is an output that cannot be
                bound: one that is read-only, holds strings, or has a shape that is not known before the run.
        """
        spec = self._inputs.get(name) or self._outputs.get(name)
        if spec is None:
            raise ValueError(f"no input or output {name!r}; there are {', '.join((*self._inputs, *self._outputs))}")
        pairs = zip(spec.shape, buffer.shape, strict=False)
        fits = len(buffer.shape) == len(spec.shape) and all(want in (None, have) for want, have in pairs)
        typed = buffer.dtype.kind in "OUST" if spec.dtype == "string" else buffer.dtype == np.dtype(spec.dtype)
        if not fits or not typed or not buffer.flags.c_contiguous:
            raise ValueError(f"{spec} cannot be bound to {buffer.dtype}{list(buffer.shape)}, C-contiguous: {buffer.flags.c_contiguous}")
        if name in self._outputs and (not spec.static or spec.dtype == "string" or not buffer.flags.writeable):
            raise ValueError(f"output {spec} cannot be bound; read it with output()")
        self._bound[name] = buffer

    def run(self) -> None:
        """Run once, and move the clock.

        Raises:
            ValueError: an input is not bound.
        """
        missing = [name for name in self._inputs if name not in self._bound]
        if missing:
            raise ValueError(f"input {', '.join(missing)} is not bound")
        results, seconds = self._executable.evaluate({name: self._bound[name] for name in self._inputs}, self._resident)
        if not self._executable.real_time:
            self.last_s = seconds
        for name, result in zip(self._outputs, results, strict=True):
            if name in self._bound:
                np.copyto(self._bound[name], result, casting="no")
                self._results[name] = self._bound[name]
            else:
                self._results[name] = np.array(result)  # a copy: an output may be a view of an input

    def output(self, name: str) -> Buffer:
        """Return an output of the last run."""
        return self._results[name]


def _target(device: NullDevice, runtime: str) -> Target:
    # The figures stand where others have their driver's version: numbers of differently made devices never merge.
    figures = hashlib.sha256(repr(device).encode()).hexdigest()[:16]
    described = Device(
        kind=device.kind,
        model=f"null {device.name}",
        driver=f"arithmetic-{figures}",
        memory_bytes=None if device.kind == "cpu" else device.memory_bytes,
        cores=device.cores if device.kind == "cpu" else None,
    )
    return Target(runtime=runtime, name=device.name, device=described, runtime_version="1", precisions=tuple(device.speed))


def _require_allowed(target: Target, knob: Knob, value: Setting) -> None:
    if knob.kind == "int":
        if not isinstance(value, int) or isinstance(value, bool) or not knob.low <= value <= knob.high:
            raise Unsupported(f"{target} cannot take {knob.name}={value!r}", advice=f"it takes {knob.low} to {knob.high}")
    elif value not in knob.choices:
        raise Unsupported(f"{target} cannot take {knob.name}={value!r}", advice=f"it takes {', '.join(map(str, knob.choices))}")


def _grid(knobs: Sequence[Knob]) -> Iterator[dict[str, Setting]]:
    values = [knob.choices if knob.kind == "choice" else range(int(knob.low), int(knob.high) + 1) for knob in knobs]
    for point in itertools.product(*values):
        yield dict(zip((knob.name for knob in knobs), point, strict=True))
