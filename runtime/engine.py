"""The engine: a loaded plan, running."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from aivmm.errors import AivmmError, BundleError, Unsupported, UsageError
from aivmm.runtime.backend import Backend, Buffer, Executable
from aivmm.runtime.bundle import Bundle
from aivmm.runtime.environment import environment_of
from aivmm.runtime.lane import Lane
from aivmm.runtime.plan import Plan, Stage, agree
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target, Unavailable
from aivmm.tensors import TensorSpec

log = logging.getLogger("aivmm.engine")


@runtime_checkable
class FindsTarget(Protocol):
    """A backend that can look for one target without trying all the others, which production would wait for."""

    def find(self, name: str) -> Target | Unavailable:
        """Return the target of that device name, or why it is absent."""


def find_target(backend: Backend, name: str) -> Target:
    """Return the target `runtime:name` of `backend`.

    Raises:
        Unsupported: it is not available here, with the reason.
    """
    if isinstance(backend, FindsTarget):
        found: Target | Unavailable | None = backend.find(name)
    else:
        found = next((each for each in backend.targets() if isinstance(each, Target) and each.name == name), None)
    if isinstance(found, Target):
        return found
    reason = found.reason if found else "there is no such device"
    raise Unsupported(f"{backend.name}:{name} is not available here: {reason}", advice=found.advice if found else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """How far a plan's numbers hold on this machine: `exact`, `compatible` (same device models; numbers may differ) or `retune`."""

    grade: Literal["exact", "compatible", "retune"]
    differences: Mapping[str, tuple[object, object]] = field(default_factory=dict)  # "target.field" -> (here, in the plan)


def _closed() -> UsageError:
    return UsageError("this engine is closed", advice="load the plan again")


class Engine:
    """A plan, compiled and ready. Thread-safe: up to `plan.callers` threads run at once, further ones wait for their turn."""

    def __init__(self, bundle: Bundle) -> None:
        started = perf_counter()
        self._bundle = bundle
        self._lock = threading.Lock()
        self._closed = False
        self.plan: Plan = bundle.plan
        self.events: list[str] = []  # what did not go as planned: fallbacks taken, conditions that differ
        self._targets: dict[str, Target] = {}
        self.stages, self._executables = self._compile()
        self.validity = self._grade()
        self._lanes = [Lane(self.stages, self._executables, self.inputs, self.outputs) for _ in range(self.plan.callers)]
        self._free: SimpleQueue[Lane] = SimpleQueue()  # in C: a queue in Python costs as much as the rest of a call
        for lane in self._lanes:
            self._free.put(lane)
        self.load_s = perf_counter() - started

    @classmethod
    def load(cls, path: str | Path) -> Engine:
        """Open the bundle at `path`, check it, compile it.

        Raises:
            BundleError: the bundle is damaged or unsafe.
            Unsupported: no stage list of it, fallbacks included, runs here; the first reason is given.
        """
        bundle = Bundle.open(path)
        try:
            return cls(bundle)
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

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once, with arrays by input name, and return arrays by output name; the arrays are the caller's own.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape.
        """
        if self._closed:
            raise _closed()
        lane = self._free.get()
        try:
            if self._closed:  # while waiting
                raise _closed()
            return lane.run(inputs)
        finally:
            self._free.put(lane)

    def one_lane(self) -> Lane:
        """Return one caller's way through the plan, for probes of its stages. Nobody else may run the engine meanwhile."""
        return self._lanes[0]

    def stats(self) -> dict[str, Any]:
        """Return what has run so far: per stage the count and latency quantiles in seconds, the stages in use, and the events."""
        stages = []
        for index, stage in enumerate(self.stages):
            clocks = [lane.clocks[index] for lane in self._lanes]
            recent = np.concatenate([clock.recent_ns() for clock in clocks]) / 1e9
            quantiles = {f"p{q}_s": float(np.quantile(recent, q / 100)) if recent.size else None for q in (50, 90, 99)}
            stages.append(
                {"target": stage.target, "precision": stage.precision, "count": sum(clock.count for clock in clocks), **quantiles}
            )
        return {
            "runs": stages[0]["count"],
            "stages": stages,
            "callers": len(self._lanes),
            "load_s": self.load_s,
            "validity": self.validity.grade,
            "events": list(self.events),
        }

    def close(self) -> None:
        """Wait for running requests, then free what the runtimes hold. Calling it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        taken = [self._free.get() for _ in self._lanes]
        for lane in taken:
            lane.close()
        for executable in self._executables:
            executable.close()
        self._executables = []
        for lane in taken:  # whoever still waits in `run` wakes up and is told
            self._free.put(lane)
        self._bundle.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<aivmm.Engine {self.plan.model.name} on {' + '.join(dict.fromkeys(each.target for each in self.stages))}>"

    def _compile(self) -> tuple[Sequence[Stage], list[Executable]]:
        """Compile the plan's stages or, loudly, the first fallback that this machine can take."""
        first: AivmmError | None = None
        for name, stages in (("the plan", self.plan.stages), *((each.name, each.stages) for each in self.plan.fallbacks)):
            executables: list[Executable] = []
            try:
                for stage in stages:
                    executables.append(self._compile_stage(stage))
            except AivmmError as error:
                for each in executables:
                    each.close()
                first = first or error
                self._event(f"{name} cannot run here: {error}")
                continue
            if first is not None:
                self._event(f"running the fallback {name!r} instead")
            return stages, executables
        assert first is not None
        raise first

    def _compile_stage(self, stage: Stage) -> Executable:
        runtime, _, name = stage.target.partition(":")
        try:
            backend = load_backend(runtime)
        except UsageError as error:  # not installed here, or broken: the plan is not at fault
            raise Unsupported(f"{stage.target} is not available here: {error.message}", advice=error.advice) from error
        target = self._targets.get(stage.target) or find_target(backend, name)
        self._targets[stage.target] = target
        executable = backend.compile(self._bundle.file(stage.model), target, stage.compiled_with.compiled_for(target.precisions))
        try:
            _check_interface(stage, executable)
        except BundleError:
            executable.close()
            raise
        return executable

    def _grade(self) -> Validity:
        recorded = {each.target: each for each in self.plan.environments}
        differences: dict[str, tuple[object, object]] = {}
        same_devices = True
        for name in dict.fromkeys(stage.target for stage in self.stages):
            here = asdict(environment_of(self._targets[name]))
            there = recorded[name].model_dump() if name in recorded else {}
            for key, value in here.items():
                value = list(value) if isinstance(value, tuple) else value
                if value != there.get(key):
                    differences[f"{name}.{key}"] = (value, there.get(key))
                    same_devices = same_devices and key not in ("device_model", "system")
        grade: Literal["exact", "compatible", "retune"] = "exact" if not differences else "compatible" if same_devices else "retune"
        if differences:
            shown = "; ".join(f"{key}: {here!r} here, {there!r} in the plan" for key, (here, there) in list(differences.items())[:3])
            self._event(f"the plan was proven under other conditions ({grade}): {shown}")
        return Validity(grade=grade, differences=differences)

    def _event(self, text: str) -> None:
        self.events.append(text)
        log.warning("%s: %s", self.plan.model.name, text)


def _check_interface(stage: Stage, executable: Executable) -> None:
    """Raise BundleError unless the model behind `stage` is what the plan says: buffers are bound by the plan's word."""
    for kind, said, found in (("input", stage.inputs, executable.inputs), ("output", stage.outputs, executable.outputs)):
        specs = {each.name: each.spec for each in said}
        have = {each.name: each for each in found}
        # A runtime may drop an input that nothing reads, and a model may have outputs that the plan leaves alone.
        odd = next(iter(have.keys() - specs.keys() if kind == "input" else specs.keys() - have.keys()), None)
        if odd is not None:
            raise BundleError(f"{stage.model} does not fit its plan: the {kind} {odd!r} is not in both")
        for name in specs.keys() & have.keys():
            if not agree(specs[name], have[name]):
                raise BundleError(f"{stage.model} does not fit its plan: the {kind} {specs[name]} is {have[name]} in the file")
