"""A list of stages, compiled and ready to run: what the engine drives, one for each way through a plan.

All lanes lie in one queue of free ones. Who takes a lane has a request's turn: `run` walks it through the stages on the caller's thread,
and `submit` sends it along the stages' own threads (one for all stages where the plan is sequential). The lanes bound what is in flight:
when none is free, who brings the next request waits.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from ctypes import py_object, pythonapi
from functools import partial
from time import perf_counter_ns
from typing import Any

from aivmm.errors import AivmmError, Unsupported, UsageError
from aivmm.runtime.backend import Buffer, DeviceTensor, Executable
from aivmm.runtime.batching import Batcher, Outputs, Rescue
from aivmm.runtime.clocks import StageClock, quantiles_s, summed
from aivmm.runtime.lane import Lane
from aivmm.runtime.plan import Execution, Stage
from aivmm.runtime.pool import Pool, closed
from aivmm.runtime.sharing import shared_out
from aivmm.runtime.shortest import Instead, hot_path, shortest
from aivmm.runtime.stage_threads import Done, StageThreads
from aivmm.runtime.streaming import Reply
from aivmm.tensors import TensorSpec

_SUSPICIONS = 3  # failed requests after which a program that never answered one is taken for dead


class Program:
    """Compiled stages with their lanes and threads. Thread-safe."""

    def __init__(
        self,
        stages: Sequence[Stage],
        executables: Sequence[Sequence[Executable]],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        execution: Execution | None = None,
        callers: int = 1,
        batch: int = 1,
    ) -> None:
        """Make the lanes. `executables` has the replicas of each stage; `callers` requests can be in flight at least.

        `batch` is the number of rows the stages were made for, which only batching asks for.

        Raises:
            BundleError: requests are to be batched, and the inputs or outputs cannot be.
            Unsupported: an input is of a type that NumPy lacks.
        """
        self.stages, self.inputs, self.outputs = tuple(stages), tuple(inputs), tuple(outputs)
        self.execution = execution or Execution()
        self.pipelined = self.execution.mode == "pipelined"
        self._executables = [list(each) for each in executables]
        copies = max(map(len, self._executables))
        lanes = max(callers, copies * (self.execution.depth * len(self.stages) if self.pipelined else 1))
        # A lane's requests are bound for good, so it belongs to one replica of each stage; lanes come back in the order in which they
        # get done, which gives a slower replica less.
        ways = [shared_out(stage.weights(), lanes) for stage in self.stages]
        self.lanes = [self._new_lane(index, [way[index] for way in ways]) for index in range(lanes)]
        self.free = Pool(self.lanes)
        self._threads = StageThreads(self)
        self._lock = threading.Lock()
        self._asked = threading.Condition(self._lock)
        self._asking = False  # somebody asks whether it is alive
        self._one_asks = threading.Lock()
        self._turn: StageClock | None = None  # waits for a free lane, once somebody waited
        self._good: Mapping[str, Buffer] | None = None  # the first inputs that were answered
        self._suspicions = 0
        self._closed = False
        self._why: AivmmError | None = None  # it was given up
        self.left_behind = False  # in a process that was forked from that which loaded it
        batching = self.execution.batching
        self._batcher = Batcher(self, self.inputs, self.outputs, batch, batching) if batching else None
        by_threads = self.pipelined or batching is not None
        # What a request is given costs no copy and is its own, so there is nothing to lend.
        self.short = all(each.short for each in self.lanes)
        self.gives = self.short and not by_threads
        self.of_one = all(each.of_one for each in self.lanes)
        # What `run` does: by and by something shorter, and in the end it refuses.
        self.ask: Callable[[Mapping[str, Any]], Outputs] = self._run_by_threads if by_threads else self._first
        _running.add(self)  # last: what is not whole cannot be closed

    def run(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run once and return the outputs; the arrays are the caller's own.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape, or the program is closed.
            Unsupported: a stage's runtime refuses, in its own words.
        """
        return self.ask(inputs)

    def shortest(self, instead: Instead) -> Callable[[Mapping[str, Any]], Outputs] | None:
        """Return what answers a request on the caller's thread, and by `instead` where that fails; None where there is more to do."""
        return shortest(self, instead) if self.ask == self._at_once else None

    def _at_once(self, inputs: Mapping[str, Any]) -> Outputs:
        lane = self.acquire()
        try:
            return lane.call(inputs)
        finally:
            self.free.lanes.append(lane)
            self.free.given(lane)

    def _first(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run, and remember what was answered first. From then on requests go by the shorter way."""
        lane = self.acquire()
        try:
            outputs = lane.call(inputs)
            self.answered(lane)
            return outputs
        finally:
            self.free.lanes.append(lane)
            self.free.given(lane)

    def _run_by_threads(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run on the stages' threads, and copy the outputs on the caller's: megabytes would keep the last stage from its next one."""
        if self._batcher is not None:
            return self.submit(inputs).result()
        lane, _ = self.borrow(inputs)
        try:
            return lane.copies()
        finally:
            self.free.put(lane)

    def answered(self, lane: Lane) -> None:
        """Remember what was answered first, to ask it again when a request fails."""
        if self._good is None:
            self._suspicions = 0
            if lane.on_host:  # a caller's tensor on a device may hold something else by then
                self._good = lane.loaded()
                with self._lock:
                    if self.ask == self._first:
                        self.ask = self._at_once

    def alive(self) -> bool:
        """Say whether it still answers what it answered first, asked when a request has failed. Each replica is asked.

        A program that never answered anything, or nothing from the host, is taken for alive twice in a row: the requests may be at fault.
        Closing waits for this, which may take for ever: until the program is given up.
        """
        with self._one_asks:  # for memory's sake: a second lane at once may be what has no room
            with self._lock:
                if self._closed:
                    return True
                if self._good is None:
                    self._suspicions += 1
                    return self._suspicions < _SUSPICIONS
                self._asking = True
            try:
                return self._answers(self._good)
            finally:
                with self._asked:
                    self._asking = False
                    self._asked.notify_all()

    def _answers(self, inputs: Mapping[str, Buffer]) -> bool:
        """Say whether each replica runs on `inputs`."""
        try:
            for index in range(max(map(len, self._executables))):
                lane = self._new_lane(index, [index % len(each) for each in self._executables])
                try:
                    lane.run(inputs)
                finally:
                    lane.close()
        except Unsupported:
            return False
        return True

    def submit(self, inputs: Mapping[str, Any], rescue: Rescue | None = None) -> Future[Outputs]:
        """Take copies of the inputs and return a future of the outputs, which cannot be cancelled. Waits while no lane is free.

        Raises:
            UsageError: as `run`; at once, not in the future.
        """
        if self._batcher is not None:
            if self._closed:
                raise self.gone()
            return self._batcher.submit(inputs, rescue)
        future: Future[Outputs] = Future()
        future.set_running_or_notify_cancel()
        self.start(inputs, future, rescue)
        return future

    def start(self, inputs: Mapping[str, Any], told: Future[Outputs] | Reply, rescue: Rescue | None = None) -> None:
        """Do what `submit` does where requests are not batched, and tell `told` what comes of it. Raises as `submit`."""
        lane = self.acquire()
        try:
            lane.take(inputs)
        except BaseException:  # not handled: the lane goes back first
            self.free.put(lane)
            raise
        self.launch(lane, partial(self._deliver, told, rescue))

    @property
    def window(self) -> int:
        """Requests in flight that keep everything busy."""
        return len(self.lanes) * (self._batcher.capacity if self._batcher else 1)

    def borrow(self, inputs: Mapping[str, Any]) -> tuple[Lane, Outputs]:
        """Run once and return the lane with its outputs where they are, without a copy; they stay until the lane is put back into `free`.

        The request is a batch of its own: it has as many rows as the stages were made for.

        Raises:
            UsageError, Unsupported: as `run`.
        """
        lane = self.acquire()
        landed: threading.Event | None = None
        try:
            if self.pipelined:
                landed = event = threading.Event()
                lane.take(inputs)
                self.launch(lane, lambda _: event.set())
                event.wait()
                if lane.error is not None:
                    raise lane.error
            else:
                lane.queued_ns = 0
                lane.load(inputs)
                lane.execute()
            self.answered(lane)
            return lane, lane.views()
        except BaseException:  # not handled: the lane goes back first
            if lane.done is None:
                self._take_back(lane)
            else:  # Ctrl-C: stages still work in it, and may do so for ever
                threading.Thread(target=self._take_back, args=(lane, landed), name="aivmm-landing", daemon=True).start()
            raise

    def _take_back(self, lane: Lane, landed: threading.Event | None = None) -> None:
        if landed is not None:
            landed.wait()
        lane.error = None
        self.free.put(lane)

    def new_inputs(self) -> dict[str, Buffer]:
        """Return arrays for one request's inputs; see `Lane.new_inputs`."""
        if self._closed:
            raise self.gone()
        return self.lanes[0].new_inputs()

    def run_on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        """Run once on the caller's thread and return the outputs where they are made; see `Lane.on_device`."""
        lane = self.acquire()
        try:
            lane.queued_ns = 0
            return lane.on_device(inputs)
        finally:
            self.free.put(lane)

    def acquire(self) -> Lane:
        """Return a free lane, which its taker puts back into `free`; waits while there is none.

        Raises:
            UsageError: the program is closed.
        """
        if self._closed:
            raise self.gone()
        try:
            for lane in self.free.takes:
                return lane
        except IndexError:
            started = perf_counter_ns()
        if self._threads.carry(threading.current_thread()):
            raise UsageError("a callback of a request waits for the requests behind it", advice="ask the engine from another thread")
        lane = self.free.get()
        try:
            if self._closed:  # while waiting
                raise self.gone()
            with self._lock:
                self._turn = self._turn or StageClock(full=False)
                self._turn.waited(perf_counter_ns() - started)
        except BaseException:  # not handled: the lane goes back first
            self.free.put(lane)
            raise
        return lane

    def launch(self, lane: Lane, done: Done) -> None:
        """Send a loaded lane through the stages; `done` gets it behind the last one, with its error, and puts it back into `free`."""
        self._threads.send(lane, done)

    def stats(self, *, watched: bool = False) -> dict[str, Any]:
        """Return what has run so far: a stage's counts, seconds and bytes over all lanes, the waits for a free lane, and the hot path.

        `watched`: requests have a deadline.
        """
        stages = []
        for index, (stage, copies) in enumerate(zip(self.stages, self._counts(), strict=True)):
            clocks = [lane.clocks[index] for lane in self.lanes]
            figures = summed(clocks)
            made = sum(tensor.spec.nbytes or 0 for tensor in stage.outputs if tensor.spec.dtype not in ("string", "unknown"))
            figures["out_bytes"] = figures["count"] * made + sum(each.late_bytes for each in clocks)
            entry: dict[str, Any] = {"target": stage.target, "precision": stage.precision, "replicas": copies, **figures}
            if stage.copies:
                entry["copies"] = self._shares(index)
            stages.append(entry)
        with self._lock:
            turn = self._turn or StageClock(full=False)
            waits = {"count": turn.wait_count, "total_s": turn.wait_ns / 1e9, **quantiles_s([turn.waits])}
        batches = self._batcher.stats() if self._batcher else None
        return {
            "runs": stages[0]["count"],
            "mode": self.execution.mode,
            "lanes": len(self.lanes),
            "stages": stages,
            "waits": waits,
            "batches": batches,
            **hot_path(self, watched=watched),
        }

    def close(self) -> None:
        """Wait for the requests in flight, stop the threads, free what the runtimes hold. Calling it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.ask = self._closed_to
        if self._batcher is not None:
            self._batcher.flush()
        try:
            taken = [self.free.get() for _ in self.lanes]
        except AivmmError:  # given up meanwhile: what hangs holds its lane, and what the runtimes hold for it
            return
        with self._asked:
            self._asked.wait_for(lambda: not self._asking or self._why is not None)
            if self._why is not None:
                return
        self._threads.stop()
        for lane in taken:
            lane.close()
        for executable in (each for copies in self._executables for each in copies):
            executable.close()
        self.free.close()  # whoever still waits wakes up and is told
        _running.discard(self)

    def give_up(self, why: AivmmError) -> None:
        """Take no more requests, and wait for none: a stage hangs. Who waits for a lane is told `why`, who has one may still finish."""
        with self._lock:
            self._closed, self._why = True, why
            self.ask = self._closed_to
            self._asked.notify_all()
        self.free.close(why)
        _running.discard(self)

    def leave_behind(self) -> None:
        """Refuse requests in a process that was forked: threads, ours and the runtimes', stayed in its parent, so that most would hang.

        No lock is taken here: another thread of the parent may have held it, and is not there to give it back. And what the runtimes hold
        is never freed, not even when the interpreter ends: they would wait for their threads, and the process for ever.
        """
        pythonapi.Py_IncRef(py_object(self))
        why = UsageError("this engine was loaded before the process was forked", advice="load the plan in each process, after the fork")
        self.left_behind, self._closed, self._why = True, True, why
        self.ask = self._closed_to
        self.free.leave_behind(why)
        for lane in self.lanes:  # whoever forked may have one, and give it back here
            lane.__dict__["call"] = self._closed_to

    def _closed_to(self, inputs: Mapping[str, Any]) -> Outputs:
        raise self.gone()

    def gone(self) -> AivmmError:
        """Return what a request is told that comes too late."""
        return closed() if self._why is None else type(self._why)(self._why.message, advice=self._why.advice)

    def where(self) -> str:
        """Return the targets of the stages that requests in flight are in."""
        free = set(map(id, tuple(self.free.lanes)))
        inside = sorted({lane.at for lane in self.lanes if id(lane) not in free})
        if not inside and self._asking:  # in lanes of its own
            inside = list(range(len(self.stages)))
        return " + ".join(self.stages[each].target for each in inside) or "none"

    def _new_lane(self, index: int, places: Sequence[int]) -> Lane:
        chosen = [each[place] for each, place in zip(self._executables, places, strict=True)]
        lane = Lane(self.stages, chosen, self.inputs, self.outputs, index=index, places=places)
        lane.seats = lane.places if self.pipelined else (index,)
        return lane

    def _shares(self, index: int) -> list[dict[str, Any]]:
        """Return how many requests each copy of a stage has run, the stage itself first."""
        found, first = [], 0
        for each in self.stages[index].everywhere():
            mine = range(first, first + each.replicas)
            counts = [lane.clocks[index].count for lane in self.lanes if lane.places[index] in mine]
            found.append({"target": each.target, "replicas": each.replicas, "lanes": len(counts), "count": sum(counts)})
            first += each.replicas
        return found

    def _counts(self) -> list[int]:
        return [len(each) for each in self._executables]

    def _deliver(self, told: Future[Outputs] | Reply, rescue: Rescue | None, lane: Lane) -> Callable[[], None] | None:
        """Take the outputs off a lane, give it back, and tell who waits; return what wakes him.

        On the last stage's thread, which runs nothing meanwhile and has no cache that is warm: each call here is a microsecond of a stage.
        """
        error, outputs, inputs = lane.error, None, None
        try:
            if error is None:
                if self._good is None:
                    self.answered(lane)
                outputs = lane.copies()
            elif rescue is not None:
                inputs = lane.loaded()
        except BaseException as failure:  # noqa: BLE001 - whatever it is, it is the answer to this request
            error = error or failure
        lane.error = None  # its traceback holds what the request held
        free = self.free
        free.lanes.append(lane)
        if lane.awaited or lane.ended:
            free.given(lane)
        if error is None:
            assert outputs is not None
            if isinstance(told, Reply):
                return told.put(outputs)
            told.set_result(outputs)
        elif rescue is None or inputs is None:
            told.set_exception(error)
        else:  # on a thread of its own: it may compile a fallback, and the others must not wait for that
            threading.Thread(target=_rescue, args=(rescue, inputs, error, told), name="aivmm-rescue", daemon=True).start()
        return None


def _rescue(rescue: Rescue, inputs: Mapping[str, Buffer], error: BaseException, told: Future[Outputs] | Reply) -> None:
    try:
        told.set_result(rescue(inputs, error))
    except BaseException as failure:  # noqa: BLE001 - whatever it is, it is the answer to this request
        told.set_exception(failure)


_running: weakref.WeakSet[Program] = weakref.WeakSet()
_PATIENCE_S = 5.0  # for what is still in flight when the interpreter exits


def _leave_behind() -> None:
    """Have engines refuse in the child of a fork. It must not close them: the runtimes would wait for their threads."""
    for each in list(_running):
        each.leave_behind()
    _running.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_leave_behind)


@atexit.register
def _close_all() -> None:
    """Stop the threads of programs that nobody closed: a thread inside a runtime must not meet an interpreter that is gone."""
    for each in list(_running):
        closing = threading.Thread(target=each.close, name="aivmm-close", daemon=True)
        closing.start()
        closing.join(_PATIENCE_S)
