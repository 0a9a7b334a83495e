"""One request's way through a list of stages: a request of each executable, bound to shared boundary buffers. The engine's hot path.

A lane is a caller's turn in a sequential plan (one thread runs all its steps) and a slot of a pipeline (each step on its stage's thread).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from sys import getrefcount
from time import perf_counter_ns
from typing import Any

import numpy as np

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.backend import Buffer, DeviceTensor, DeviceTensors, Executable, Request, host_buffer, is_foreign, on_device
from aivmm.runtime.clocks import StageClock
from aivmm.runtime.feed import Feed, wanted_buffer
from aivmm.runtime.handing import Handing, Slot, counts_references, direct_call, run_before, run_ready
from aivmm.runtime.inputs import is_numpy, refuse_unknown
from aivmm.runtime.plan import Stage
from aivmm.runtime.watched_clock import WatchedClock
from aivmm.tensors import TensorSpec


def _one_memory(executables: Sequence[Executable]) -> bool:
    """Say whether all keep their tensors in one device's memory."""
    return len({each.memory if on_device(each) else None for each in executables}) == 1 and on_device(executables[0])


_Step = tuple[Callable[[], None], Callable[[int], None], list[tuple[str, StageClock, Request, list[Request]]]]


class Lane(WatchedClock):
    """Runs the stages one after another, and is the clock of its whole way. Used by one thread at a time; who holds it sees to that."""

    # What the shortest way touches lies side by side, in the object itself (`shortest`); `hands` where it is `short`, `feed` if `of_one`.
    __slots__ = ("__dict__", "__weakref__", "ahead", "awaited", "ended", "feed", "feeds", "hands", "turn")
    feed: Feed
    feeds: tuple[Feed, ...]
    hands: Handing
    # The stages before the last one, None without any: what runs each, its clock, who is told when it fails; then the last one's clock.
    ahead: tuple[Any, ...] | None

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
        super().__init__(full=False)
        self.awaited = False  # somebody waits for a free lane
        self.turn: Slot | None = None  # of `hands`, the one to look at first
        self.index = index  # its number in its program
        self.places = tuple(places or (0,) * len(stages))  # which of each stage's executables it is bound to
        self.seats: Sequence[int] = (index,)  # which queue of each step of the way is its own
        self.error: BaseException | None = None  # of the flight it is on: a stage that failed, and the later ones are left out
        self.done: Callable[[Lane], Callable[[], None] | None] | None = None  # who takes what it brings, and says who is to be woken
        self.at = 0  # the stage it is in, on a thread of the program's
        self.queued_ns = 0  # when it was put in the queue it stands in
        self._specs = {each.name: each for each in inputs}
        self._handing = self._new_handing(stages, executables, outputs)
        ordinary = executables if self._handing is None else executables[:-1]
        self._requests: list[Request] = [executable.new_request() for executable in ordinary]
        if self._handing is not None:
            self._requests.append(self._handing)
        self._clocks = [StageClock() for _ in stages] if len(stages) > 1 else []
        self._so_far_ns = 0  # of a run that is taken by steps
        self._owed: tuple[int, int] | None = None  # the begin and the end of the last run, from when on it has to be passed on
        self._buffers: dict[str, Buffer] = {}
        self.kept_on_device: dict[str, str] = {}  # tensor between stages -> the memory that it never leaves
        self._read_again: set[str] = set()  # outputs that a later stage reads, too
        self._late: list[list[tuple[str, StageClock, Request, list[Request]]]] = [[] for _ in stages]
        self.feeds = tuple(self._feed(each, executables) for each in inputs)
        self._bind_boundaries(stages, executables, {each.name for each in outputs})
        self._wrapped: Callable[[int, Callable[[], None]], Callable[[], None]] | None = None
        self.ahead = None
        self._steps = self._new_steps()
        self._cut = len(self._steps) > 1
        self._count = len(self._specs)
        self._makers: dict[str, tuple[Any, Executable]] = {
            each.name: (request, executable)
            for stage, request, executable in zip(stages, self._requests, executables, strict=True)
            for each in stage.outputs
        }
        made = self._makers
        handed = set() if self._handing is None else {name for name, _ in self._handing.private.arrays}
        named = [each.name for each in outputs if each.name not in handed]
        self._fixed = [(name, self._buffers[name]) for name in named if name in self._buffers and name in made]
        fixed = dict(self._fixed)
        self._readers = [self._reader(name, stages) for name in named if name not in fixed]
        self._order = [each.name for each in outputs]
        self.short = False
        self._shorten()
        self.of_one = self.short and len(self.feeds) == 1 and self._handing is not None and len(self._handing.private.arrays) == 1
        if self.short:
            assert self._handing is not None
            self.hands = self._handing
        if self.of_one:
            self.feed = self.feeds[0]
        self.ended: list[Buffer] = [] if self._handing is None else self._handing.ended  # emptied by who has given the lane back

    @property
    def clocks(self) -> Sequence[StageClock]:
        """The clock of each stage; that of an only one is the lane's own."""
        return self._clocks or (self,)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once and return the outputs; the arrays are the caller's own.

        Raises:
            UsageError, Unsupported: as `load` and `execute`.
        """
        self.load(inputs)
        self.execute()
        return self.copies()

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Do what `run` does, in the fewest lines that this lane's stages allow: `short` where they allow it."""
        return self.run(inputs)

    def _shorten(self) -> None:
        """Put the short `call` in the place of the long one. Only there: as an attribute that a lane has of itself, it would be a cycle."""
        short = self._new_call()
        if short is not None:
            self.short = True
            self.__dict__["call"] = short

    def _new_call(self) -> Callable[[Mapping[str, Any]], dict[str, Buffer]] | None:
        """Return `run` in one function, what it refers to side by side in its defaults; None where stages make what is not known before, or
        not all that is made is the last one's, to be handed out."""
        handing = self._handing
        if handing is None or self._fixed or self._readers or any(self._late):
            return None

        def call(
            inputs: Mapping[str, Any],
            lane: Lane = self,
            feeds: tuple[tuple[str, Feed], ...] = tuple((each.name, each) for each in self.feeds),
            references: Callable[[object], int] = getrefcount,
            clock: Callable[[], int] = perf_counter_ns,
            handing: Handing = handing,
        ) -> dict[str, Buffer]:
            for name, feed in feeds:
                array = inputs.get(name)
                if array is not feed.bound:
                    feed.take(array)
            if len(inputs) != len(feeds):
                refuse_unknown(inputs, lane._specs)
            ahead = None if lane.ahead is None else lane.run_ahead(lane.ahead)
            slot = lane.turn  # `Handing.next` without its call
            if slot is not None:
                for face in slot.faces:
                    if references(face[1]) > slot.alone:
                        slot = None
                        break
            if slot is None:
                slot = handing.another()
            lane.turn = slot.after
            if slot.stale:
                handing.catch_up(slot)
            started_ns = clock()
            try:
                slot.runs()
            except Exception as error:
                handing.refuse(error)
                raise
            ended_ns = clock()
            if ahead is not None:
                started_ns = lane.count_last(*ahead, ended_ns)
            lane.note(ended_ns - started_ns)
            lane.count = count = lane.count + 1
            if count >= lane.due or ended_ns >= lane.due_ns:
                lane.pass_on(started_ns, ended_ns)
            lane.ended_ns = ended_ns
            return handing.given(slot)

        return call

    def _new_steps(self) -> list[_Step]:
        """Return what runs each stage, what takes its duration, and what it makes of sizes unknown before."""
        wrapped, handing, runs = self._wrapped, self._handing, [each.run for each in self._requests]
        if handing is not None:
            last = len(runs) - 1
            handing.refresh(direct_call if wrapped is None else lambda slot: wrapped(last, slot.request.run))
        if wrapped is not None:
            runs = [
                run if request is handing else wrapped(index, run)
                for index, (request, run) in enumerate(zip(self._requests, runs, strict=True))
            ]
        self.ahead = self._new_ahead(runs)
        # Closed, it has no requests; so it may be while a trace looks.
        return list(zip(runs, (each.took for each in self.clocks), self._late, strict=False))

    def _new_ahead(self, runs: Sequence[Callable[[], None]]) -> tuple[Any, ...] | None:
        """Return what `ahead` is where `runs` run the stages, or the runtimes' own calls where these are not recorded."""
        found: list[Any] = []
        for request, run, clock in zip(self._requests[:-1], runs, self._clocks, strict=False):
            ready, told = run_before(request, None if self._wrapped is None else run)
            found += [ready, clock, told]
        return (*found, self._clocks[-1]) if found else None

    def run_ahead(self, ahead: tuple[Any, ...]) -> tuple[int, int, StageClock]:
        """Run the stages in front of the last one; return when they began and when they ended, and the clock of the last one.

        Raises:
            Unsupported: a stage's runtime refuses, in its own words.
        """
        began_ns = ended_ns = perf_counter_ns()
        for at in range(0, len(ahead) - 1, 3):
            runs, clock, told = ahead[at : at + 3]
            try:
                run_ready(runs)
            except Exception as error:
                told.refuse(error)
                raise
            now_ns = perf_counter_ns()
            clock.took(now_ns - ended_ns)
            ended_ns = now_ns
        return began_ns, ended_ns, ahead[-1]

    def count_last(self, began_ns: int, last_ns: int, clock: StageClock, now_ns: int) -> int:
        """Count a run of the last stage since `last_ns`; return when the first one began."""
        clock.took(now_ns - last_ns)
        return began_ns

    def load(self, inputs: Mapping[str, Any]) -> None:
        """Take the inputs: copy the small ones, bind the large ones, and those that come again and again, where they are.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape.
        """
        for feed in self.feeds:
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
        if self._owed is not None:
            self._pass_on_late(self._owed)
        for feed in self.feeds:
            feed.copy(inputs.get(feed.name))
        if len(inputs) != self._count:
            refuse_unknown(inputs, self._specs)

    def own(self, name: str) -> Buffer | None:
        """Return the lane's own buffer for an input; None when its size is not known before the call."""
        return next(each for each in self.feeds if each.name == name).own()

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
        self._timed(now - started_ns, now)

    def wrap(self, wrapped: Callable[[int, Callable[[], None]], Callable[[], None]] | None) -> None:
        """Run each stage by what `wrapped` makes of its number and its run, for a trace; None runs the stages themselves again."""
        self._wrapped = wrapped
        self._steps = self._new_steps()  # a new list: who is on the way goes by the old one
        if not self._requests:  # closed meanwhile
            self._steps = []
        if self._steps:
            self._shorten()

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
            self._timed(self._so_far_ns, now, later=True)

    def _timed(self, took_ns: int, now_ns: int, *, later: bool = False) -> None:
        """Count a run of all stages. With `later` it is passed on by who brings the next request: a stage's thread has its next lane."""
        if self._cut:
            self.took(took_ns)
        if self.count >= self.due or now_ns >= self.due_ns:
            if later and self._owed is None:
                self._owed = now_ns - took_ns, now_ns
                return
            self._owed = None
            self.pass_on(now_ns - took_ns, now_ns)
        self.ended_ns = now_ns

    def _pass_on_late(self, owed: tuple[int, int]) -> None:
        self._owed = None
        self.pass_on(*owed)
        self.ended_ns = owed[1]

    def copies(self) -> dict[str, Buffer]:
        """Return the outputs of the last run; the arrays are the caller's own. Those of the last stage are not copied: see `handing`."""
        handing = self._handing
        if handing is not None and not self._fixed and not self._readers:
            return handing.given(handing.now)  # in the plan's order already
        outputs = {} if handing is None else handing.hand_out()
        for name, buffer in self._fixed:
            outputs[name] = buffer.copy()
        for name, read in self._readers:
            outputs[name] = read(name).copy()
        return self._ordered(outputs)

    def views(self) -> dict[str, Buffer]:
        """Return the outputs of the last run where they are: this lane's next run overwrites them."""
        handed = () if self._handing is None else self._handing.now.arrays
        return self._ordered(dict((*handed, *self._fixed)) | {name: read(name) for name, read in self._readers})

    def _ordered(self, outputs: dict[str, Buffer]) -> dict[str, Buffer]:
        """Return the outputs in the plan's order, whatever stage made them."""
        return {name: outputs[name] for name in self._order}

    @property
    def on_host(self) -> bool:
        """Whether all of the inputs that were loaded last lie on the host."""
        for each in self.feeds:  # noqa: SIM110 - `all` with a generator takes three times as long
            if each.bound is each:
                return False
        return True

    def loaded(self) -> dict[str, Buffer]:
        """Return copies of the inputs that were loaded last, without those that lie on a device."""
        return {each.name: np.array(each.bound) for each in self.feeds if each.bound is not each}

    def _hand_on(self, late: list[tuple[str, StageClock, Request, list[Request]]]) -> None:
        """Bind what a runtime allocated itself to the stages that read it."""
        for name, clock, producer, consumers in late:
            value = producer.output(name)
            clock.late_bytes += getattr(value, "nbytes", 0)
            for consumer in consumers:
                consumer.bind(name, value)

    def close(self) -> None:
        """Let go of requests and buffers: as long as a request lives, so does what the runtime holds for it. The clocks stay."""
        self._requests, self._steps, self._readers, self.feeds, self._fixed = [], [], [], (), []
        if self._handing is not None:
            self._handing.close()
        self._handing = self.turn = None
        self.__dict__.pop("call", None)
        if self.short:
            del self.hands
        if self.of_one:
            del self.feed
        self.short = self.of_one = False
        self.ahead = None
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
            if self._requests[index] is self._handing:
                continue
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
                buffer = wanted_buffer(spec, around)
                if buffer is None:
                    self._late[index].append((spec.name, self.clocks[index], self._requests[index], consumers))
                    continue
                self._buffers[spec.name] = buffer
                self._requests[index].bind(spec.name, buffer)
                for consumer in consumers:
                    consumer.bind(spec.name, buffer)

    def _new_handing(self, stages: Sequence[Stage], executables: Sequence[Executable], outputs: Sequence[TensorSpec]) -> Handing | None:
        """Return the last stage's request where all that it makes can be handed out without a copy: outputs in plain memory of the host."""
        stage, executable = stages[-1], executables[-1]
        order = [each.name for each in outputs]
        specs = {each.name: each for each in executable.outputs}
        made = [specs.get(each.name, each.spec) for each in stage.outputs]
        if on_device(executable) or not counts_references() or not made or any(each.name not in order for each in made):
            return None
        if not all(each.static for each in executable.inputs):
            return None
        if not all(each.static and is_numpy(each.dtype) and not is_foreign(each.dtype) for each in made):
            return None
        if getattr(executable, "requests_are_callers", False) or any(host_buffer(executable, each) is not None for each in made):
            return None
        return Handing(executable, sorted(made, key=lambda each: order.index(each.name)))

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
        handed = () if self._handing is None else self._handing.private.arrays
        for name in (*own, *(name for name, _ in handed), *(name for name, _ in self._readers)):
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
        found = {each.name: each.new() for each in self.feeds}
        for name, buffer in found.items():
            if buffer is None:
                raise UsageError(f"the input {self._specs[name]} has no fixed size", advice="make its array with numpy")
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def _reader(self, name: str, stages: Sequence[Stage]) -> tuple[str, Callable[[str], Buffer]]:
        """Return where an output without a buffer is read: what its stage's runtime allocated, or the input that it is."""
        for stage, request in zip(stages, self._requests, strict=True):
            if any(each.name == name for each in stage.outputs):
                return name, request.output
        handed = next(each for each in self.feeds if each.name == name)  # the plan was checked: what no stage makes is an input
        return name, lambda _: handed.bound

    @property
    def runs(self) -> Sequence[Callable[[], None]]:
        """What runs each stage alone, on what the last `run` bound: for probes that hold it against the stage in its place."""
        return [request.run for request in self._requests]

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """The bound buffers by tensor name, for tests that follow pointers."""
        return self._buffers | (dict(self._handing.now.arrays) if self._handing is not None else {})
