"""The engine: a loaded plan, running."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from aivmm.errors import AivmmError, BundleError, Unsupported, UsageError
from aivmm.runtime import hot
from aivmm.runtime.ahead import get_ready
from aivmm.runtime.backend import Buffer, DeviceTensor, Executable
from aivmm.runtime.blobs import BlobCache
from aivmm.runtime.bundle import Bundle
from aivmm.runtime.causes import Machine
from aivmm.runtime.deadline import Deadlines
from aivmm.runtime.drift import Drift
from aivmm.runtime.finding import find_named, waking
from aivmm.runtime.inputs import kept, refuse_unnamed
from aivmm.runtime.lane import Lane
from aivmm.runtime.loan import Loan
from aivmm.runtime.paces import PacedMonitor, tell_apart
from aivmm.runtime.paging import give_back
from aivmm.runtime.plan import Execution, Plan, Stage
from aivmm.runtime.program import Program
from aivmm.runtime.registry import load_backend
from aivmm.runtime.signing import Key
from aivmm.runtime.streaming import Reply, ordered
from aivmm.runtime.target import Target
from aivmm.runtime.validity import Attempt, Validity, check_interface, check_policy, grade_stages
from aivmm.tensors import TensorSpec

if TYPE_CHECKING:
    from aivmm.runtime.trace import Trace

log = logging.getLogger("aivmm.engine")
_PLAN = "the plan"


class Engine:
    """A plan, compiled and ready. Thread-safe: as many requests are in flight as the plan provides for, further ones wait."""

    def __init__(self, bundle: Bundle, *, on_mismatch: str = "warn", execution: Execution | None = None, cache: bool = True) -> None:
        """Compile the plan of `bundle`, which the engine closes in the end. The options are those of `load`."""
        started = perf_counter()
        self._on_mismatch = check_policy(on_mismatch)
        hot.check()
        self._bundle, self._asked = bundle, execution
        self._lock, self._failover, self._closed = threading.Lock(), threading.Lock(), False
        self.plan: Plan = bundle.plan
        self._blobs = BlobCache(bundle.digest) if cache else None
        self._has_room = get_ready(bundle, self._blobs)
        self.events: list[str] = []  # what did not go as planned: fallbacks taken, conditions that differ
        self._targets: dict[str, Target] = {}
        self.attempts: list[Attempt] = []  # the plan and its fallbacks, in the order they were tried
        self._beyond_help = False  # a stage died, and no fallback was left
        self._program, self.validity = self._compile()
        if self._blobs:
            self._blobs.forget()
        try:
            bundle.verify()
        except BundleError:
            self._program.close()
            raise
        self._ask: Callable[[Mapping[str, Any]], dict[str, Buffer]] = self._asked_at_length  # what `run` does
        self._deadlines: Deadlines | None = None
        self.tracer: Trace | None = None  # that records now
        self._admission: ThreadPoolExecutor | None = None  # brings in the requests of `arun`
        self.on_drift: Callable[[Drift], None] | None = None  # called on a thread of its own: it may ask the engine, or close it
        self._drift, self._unwatched = self._watch()
        self.load_s = perf_counter() - started

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        on_mismatch: str = "warn",
        require_signature: Key | Sequence[Key] | None = None,
        execution: Execution | None = None,
        cache: bool = True,
        alternative: str | None = None,
    ) -> Engine:
        """Open the bundle at `path`, check it, compile it.

        Where the machine is not the one that the plan was proven on (grade `retune`) or cannot run it, `on_mismatch` decides:
        `warn` runs the plan where it can and else the first fallback that can; `fallback` runs the first fallback that can, and the plan
        only when none does; `error` runs the plan itself on conditions at least `compatible`, or nothing.
        `require_signature` names public keys, as PEM files or PEM text, one of which must have signed the plan.
        `execution` replaces what the plan says of mode, depth and batching. Compiled stages are kept in the user's cache folder, and loaded
        from there, unless `cache` is False. `alternative` names an objective for which the plan keeps another way: that one runs instead.

        Raises:
            UsageError: the plan has no such alternative, or `AIVMM_HOT_PATH` asks for what is not here.
            BundleError: the bundle is damaged or unsafe, or not signed as required.
            Unsupported: no stage list of it that `on_mismatch` allows runs here; the first reason is given.
        """
        check_policy(on_mismatch)
        bundle = Bundle.open(path, signed_by=require_signature, read_later=True, first=waking)
        try:
            if alternative is not None:
                bundle.plan = bundle.plan.for_goal(alternative)
            return cls(bundle, on_mismatch=on_mismatch, execution=execution, cache=cache)
        except BaseException:  # not handled, only cleaned up: nobody else could close it
            bundle.close()
            raise

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that `run` takes."""
        return tuple(each.spec for each in self.plan.model.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that `run` returns."""
        return tuple(each.spec for each in self.plan.model.outputs)

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages in use: the plan's, or a fallback's."""
        return self._program.stages

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once, with arrays by input name, and return arrays by output name; the arrays are the caller's own.

        Not so the arrays that they are views of: what is done to the shape or the flags of an answer's `base` is seen in later answers.
        Inputs are not kept, but for those of the last request of each caller that the plan provides for (`stats()["lanes"]`).

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape; or the engine is closed.
            Unsupported: a stage's runtime refuses, in its own words.
        """
        try:
            ask = self._ask  # under a name of its own: CPython 3.11 is slow at calling what is an attribute of one object only
            return ask(inputs)
        except (AttributeError, TypeError):
            refuse_unnamed(inputs)
            raise

    def _asked_at_length(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Do what `run` does, whatever is to be done, and see whether there is a shorter way by now."""
        if self._deadlines is not None:
            return self.submit(inputs).result()
        program = self._program
        self._shorten(program)  # from the second request on: the first one is waited for the longest
        try:
            return program.ask(inputs)
        except (Unsupported, UsageError) as error:
            return self._instead(program, inputs, error)

    def _shorten(self, program: Program) -> None:
        """Have `run` do what the program does for a request, in one function, where that is all; see `Program.shortest`."""
        shortest = program.shortest(self._instead)
        if shortest is not None:
            with self._lock:
                if program is self._program and self._deadlines is None and not self._closed:
                    self._ask = shortest

    def _lengthen(self) -> None:
        """Have `run` look anew what is to be done."""
        with self._lock:
            self._ask = self._asked_at_length

    def submit(self, inputs: Mapping[str, Any]) -> Future[dict[str, Buffer]]:
        """Start a run and return a future of what `run` returns. The inputs are copied: their arrays are free as soon as this returns.

        Waits while as many requests are in flight as the plan provides for (`stats()["lanes"]`). A future cannot be cancelled, and its
        callbacks run on a stage's thread, which serves nobody else meanwhile.

        Raises:
            UsageError: as `run`, at once.
        """
        return cast("Future[dict[str, Buffer]]", self._start(inputs, None))

    def _start(self, inputs: Mapping[str, Any], reply: Reply | None) -> Future[dict[str, Buffer]] | Reply:
        """Do what `submit` does. A `reply` is told what comes of it, in place of a future where nobody else needs one."""
        program, deadlines = self._program, self._deadlines
        rescue = partial(self._instead, program)
        try:
            if reply is not None and deadlines is None and program.execution.batching is None:
                program.start(inputs, reply, rescue)
                return reply
            again = {} if deadlines is None else kept(inputs)
            running = program.submit(inputs, rescue)
        except (AttributeError, TypeError):
            refuse_unnamed(inputs)
            raise
        except (UsageError, Unsupported):
            if self._program is program:
                raise
            return self._start(inputs, reply)  # it was waiting in front of one that died
        if deadlines is not None:
            running = deadlines.watch(running, lambda: self._hangs(program, again, deadlines.timeout_s))
        return running if reply is None else reply.follow(running)

    @property
    def timeout_s(self) -> float | None:
        """How long a request may take from its turn to its answer before its stage is taken to hang; None waits for ever.

        Stages then run on threads of the engine's own, which costs two wake-ups a call. What hangs cannot be stopped: it keeps its thread
        and its memory. Its request is answered by the next fallback or by `Unsupported`, from a copy of its inputs: they have to lie on the
        host, since a fallback may run elsewhere. `lend` and `run_on_device` are not watched.

        Setting it raises UsageError where requests wait as long for company to be batched with.
        """
        return None if self._deadlines is None else self._deadlines.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float | None) -> None:
        executions = (self._program.execution, *(self._asked or each for _, _, each in self._ways))
        self._deadlines = None if seconds is None else Deadlines(seconds, executions)
        self._lengthen()

    async def arun(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once without blocking the event loop. The inputs' arrays must stay as they are until this returns.

        Raises:
            UsageError, Unsupported: as `run`.
        """
        import asyncio  # here: production that never awaits need not wait for it

        with self._lock:
            if self._closed or self._program.left_behind:
                raise self._program.gone()
            if self._admission is None:
                self._admission = ThreadPoolExecutor(1, thread_name_prefix="aivmm-admission")
            admitted = self._admission.submit(self.submit, inputs)  # it may have to wait for its turn, so not here
        accepted = await asyncio.wrap_future(admitted)
        return await asyncio.wrap_future(accepted)

    def stream(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Buffer]]:
        """Run each of `requests` and yield the outputs in their order, as many in flight as the plan provides for.

        The iterable may be endless: a request is taken while those before it run, and waits for room. An answer that is there waits for the
        next request where they come slowly, and where they wait for room 10 ms at most for the answers behind it; one that hangs keeps none
        before it. What a request raises is raised at its place in the order, which ends the stream; those in flight are finished unseen.
        """
        return ordered(self._start, self._program.window, requests)

    def lend(self, inputs: Mapping[str, Any]) -> Loan:
        """Run once and lend the outputs without copying them: `with engine.lend(inputs) as outputs:`.

        The arrays are the engine's own buffers, and other requests overwrite them as soon as the block ends. Copy what is to be kept.
        Entering the block raises as `run` does.
        """
        return Loan(self, inputs)

    def new_inputs(self) -> dict[str, Buffer]:
        """Return arrays for one request's inputs, uninitialised, in the memory that the plan reads fastest: page-locked for a card.

        To be filled and given to `run` again and again; what is elsewhere has to be copied first. Requests in flight need arrays each.

        Raises:
            UsageError: an input has no fixed shape, or the engine is closed.
        """
        return self._program.new_inputs()

    def run_on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        """Run once and leave the outputs on the device that makes them, as tensors that DLPack hands on (`torch.from_dlpack`).

        Inputs may be arrays, or tensors on that device; `run` takes those, too. The tensors returned are the caller's own.

        Raises:
            UsageError: as `run`, or an output is made on a device without memory of its own, or has no fixed shape.
            Unsupported: as `run`. No fallback is taken: it may lie elsewhere.
        """
        return self._program.run_on_device(inputs)

    def one_lane(self) -> Lane:
        """Return one caller's way through the plan, for probes of its stages. Nobody else may run the engine meanwhile."""
        return self._program.lanes[0]

    def lanes(self) -> Sequence[Lane]:
        """Return all ways through the plan, each bound to one copy of each stage (`Lane.places`), for probes as `one_lane` is."""
        return self._program.lanes

    def trace(self) -> Trace:
        """Return a recording of which stage ran when, on which thread: `with engine.trace() as trace: ...`, then `trace.write(FILE)`.

        ui.perfetto.dev shows the file. Requests that are on their way when it begins are recorded from their next stage on.
        """
        from aivmm.runtime.trace import Trace  # here: production seldom asks

        return Trace([self])

    @property
    def running(self) -> str:
        """What is in use: `the plan`, or the name of a fallback."""
        return self._running

    def stats(self) -> dict[str, Any]:
        """Return what has run so far: per stage the count, latency and queue-wait quantiles in seconds and bytes made, and the events."""
        return {
            **self._program.stats(watched=self._deadlines is not None),
            "callers": self.plan.callers,
            "load_s": self.load_s,
            **self._bundle.hashing,
            "cache": self._blobs.stats() if self._blobs else None,
            "validity": self.validity.grade,
            "differences": {key: {"here": here, "plan": there} for key, (here, there) in self.validity.differences.items()},
            "attempts": [asdict(each) for each in self.attempts],
            "drift": self._drift.state() if self._drift else {"state": "not watched", "reason": self._unwatched},
            "events": list(self.events),
        }

    def close(self) -> None:
        """Wait for running requests, then free what the runtimes hold. Calling it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._lengthen()
        with self._failover:  # a fallback that is being compiled comes first
            program = self._program
        program.close()
        self._deadlines = None  # all is answered, and its thread ends
        if self._admission is not None:  # who still waits there is told that the engine is closed
            self._admission.shutdown()
        self._bundle.close()
        if self._has_room:
            give_back()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        targets = dict.fromkeys(one.target for each in self.stages for one in each.everywhere())
        return f"<aivmm.Engine {self.plan.model.name} on {' + '.join(targets)}>"

    def _hangs(self, program: Program, inputs: Mapping[str, Any], seconds: float) -> dict[str, Buffer]:
        error = Unsupported(f"no answer within {seconds:g} s: a stage hangs (on {program.where()})", advice="load the plan again")
        try:
            return self._instead(program, inputs, error, hangs=True)
        finally:
            program.give_up(error)

    def _instead(self, program: Program, inputs: Mapping[str, Any], error: BaseException, *, hangs: bool = False) -> dict[str, Buffer]:
        """Answer a request that failed in `program`: by what runs in its place, or by its error when it was the request's own.

        A stage is dead when it fails on what it could answer before, too (or, when it never answered anything, on three requests).
        """
        if not hangs and self._program is program:
            # Without the lock: what is asked may hang, and then this request's deadline, and others', need it.
            own = not isinstance(error, Unsupported) or self._closed or self._beyond_help or program.alive()
            if own and self._program is program:  # a program that was replaced meanwhile is closed, and says nothing of the error
                raise error
        with self._failover:
            if self._program is program:
                if not isinstance(error, Unsupported) or self._closed or self._beyond_help:
                    raise error
                self._event(f"{self._running} {'hangs' if hangs else 'died'}: {error}")
                self.attempts.append(Attempt(name=self._running, outcome="failed", reason=str(error)))
                try:
                    replacement, self.validity = self._next_way(error)
                except AivmmError as refusal:
                    self._beyond_help = True
                    self._event("nothing is left to run instead" + ("" if refusal is error else f": {refusal}"))
                    raise error from None
                self._program = replacement
                self._lengthen()
                if (tracer := self.tracer) is not None:
                    tracer.follow(self, replacement)
                self._drift, self._unwatched = self._watch()
                if hangs:
                    program.give_up(error)  # who waits for a lane of it asks the other one
                else:
                    threading.Thread(target=program.close, name="aivmm-retire", daemon=True).start()  # it may have to wait for others
        # What takes over may hang as well, and is watched as it was.
        return self._program.run(inputs) if self._deadlines is None else self.submit(inputs).result()

    def _compile(self) -> tuple[Program, Validity]:
        """Compile the plan's stages or, loudly, the first fallback that this machine can take, as `on_mismatch` says."""
        plan = self.plan
        self._ways = [(_PLAN, plan.stages, plan.execution)]
        for each in plan.fallbacks:  # what requests may look like stays as it is
            batching = each.execution.batching or plan.execution.batching
            self._ways.append((each.name, each.stages, each.execution.replaced(batching=batching)))
        if self._on_mismatch == "error":
            self._ways = self._ways[:1]
        first = self._mismatch()
        if first is not None:
            if self._on_mismatch == "error":
                raise first
            self._tried(_PLAN, "passed over", first)
            self._ways = [*self._ways[1:], self._ways[0]]
        return self._next_way(first)

    def _next_way(self, first: AivmmError | None) -> tuple[Program, Validity]:
        """Compile the first of the ways not tried yet that this machine can take; `first` is why it is not the plan itself.

        Raises:
            AivmmError: none is left; `first`, or why the first one was refused.
        """
        while self._ways:
            name, stages, execution = self._ways.pop(0)
            try:
                validity = self._grade(stages)
                program = self._compile_stages(stages, self._asked or execution)
            except AivmmError as error:
                self._bundle.verify()  # a file that was changed explains more than what a runtime makes of it
                first = first or error
                self._tried(name, "failed", error)
                continue
            self._running = name
            self.attempts.append(Attempt(name=name, outcome="runs", reason=str(validity)))
            if first is not None:
                self._event("running the plan all the same" if name == _PLAN else f"running the fallback {name!r} instead")
            if validity.differences:
                self._event(f"the plan was proven under other conditions ({validity})")
            return program, validity
        assert first is not None
        raise first

    def _mismatch(self) -> AivmmError | None:
        """Return why the plan itself is not to be run first, which only `on_mismatch` makes a reason."""
        if self._on_mismatch == "warn":
            return None
        try:
            validity = self._grade(self.plan.stages)
        except Unsupported:
            return None  # found again when the plan is tried
        if validity.grade != "retune":
            return None
        return Unsupported(f"the plan was proven under other conditions ({validity})", advice="tune again on this machine")

    def _tried(self, name: str, outcome: Literal["passed over", "failed"], error: AivmmError) -> None:
        self.attempts.append(Attempt(name=name, outcome=outcome, reason=str(error)))
        self._event(f"{name} {'is not run' if outcome == 'passed over' else 'cannot run'} here: {error}")

    def _grade(self, stages: Sequence[Stage]) -> Validity:
        """Find the targets of `stages`, and grade the conditions that the plan records of them."""
        for target in (each.target for stage in stages for each in stage.everywhere() if each.target not in self._targets):
            self._targets[target] = find_named(target)
        return grade_stages(stages, self.plan.environments, self._targets)

    def _compile_stages(self, stages: Sequence[Stage], execution: Execution) -> Program:
        executables: list[list[Executable]] = []
        try:
            for stage in stages:
                executables.append([])
                for place in stage.everywhere():
                    for _ in range(place.replicas):
                        executables[-1].append(self._compile_stage(place))
            plan = self.plan
            return Program(stages, executables, self.inputs, self.outputs, execution=execution, callers=plan.callers, batch=plan.batch)
        except BaseException:  # not handled, only cleaned up: what compiled is of no use without the rest
            for each in (each for copies in executables for each in copies):
                each.close()
            raise

    def _compile_stage(self, stage: Stage) -> Executable:
        target = self._targets[stage.target]
        backend = load_backend(target.runtime)
        model, config = self._bundle.file(stage.model), stage.compiled_with.compiled_for(target.precisions)
        if self._blobs is None:
            self._bundle.verify()
            executable = backend.compile(model, target, config)
        else:
            executable = self._blobs.load(
                backend, model, target, config, verified=self._bundle.verify, meanwhile=self._bundle.start_reading
            )
        try:
            check_interface(stage, executable)
        except BundleError:
            executable.close()
            raise
        return executable

    def _watch(self) -> tuple[PacedMonitor | None, str]:
        """Watch the latency of calls, or say why it cannot be told from other things that change it."""
        if self._program.execution.batching is not None:
            return None, "requests are batched, and a batch takes as long as it has rows"
        if not all(spec.static for spec in self._program.inputs):
            return None, "inputs change their shape"
        # Where the plan's numbers do not hold anyway, an engine is held against its own beginning.
        names = {_PLAN: self.plan.expected, **{each.name: each.expected for each in self.plan.fallbacks}}
        expected = None if self.validity.grade == "retune" else names[self._running].get("median_s")
        here = Machine(self._targets[each.target].device for stage in self.stages for each in stage.everywhere())
        drift = PacedMonitor(expected, callers=self._program.window, tell=self._drifted, machine=here)
        for lane in self._program.lanes:
            lane.watch = drift
        return drift, ""

    def _drifted(self, found: Drift) -> None:
        self._event(str(found))
        tell_apart(self.on_drift, found)

    def _event(self, text: str) -> None:
        self.events.append(text)
        log.warning("%s: %s", self.plan.model.name, text)
