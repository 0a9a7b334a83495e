"""The threads that carry requests through the stages of a program, where its callers do not do so themselves."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from time import perf_counter_ns
from typing import TYPE_CHECKING

from aivmm.runtime.lane import Lane

if TYPE_CHECKING:
    from aivmm.runtime.program import Program

Wake = Callable[[], None]
Done = Callable[[Lane], Wake | None]  # takes what a lane brings, and may return what wakes who waits for that
log = logging.getLogger("aivmm.engine")


class StageThreads:
    """The threads that carry lanes through the stages: one for each replica of a stage, or one for each lane where the plan is sequential.

    Started with the first request that needs them. A queue never holds more than the lanes there are, which bounds it.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._queues: list[list[SimpleQueue[Lane | None]]] = []  # of each step of the way, of each replica there
        self._threads: list[threading.Thread] = []

    def send(self, lane: Lane, done: Done) -> None:
        """Put a lane in front of the first stage. It is on its way from when it has `done` until it has lost that."""
        if not self._queues:
            self._start()
        lane.done, lane.error = done, None
        _put(lane, self._queues, 0)

    def carry(self, thread: threading.Thread) -> bool:
        """Say whether `thread` is one of them."""
        return thread in self._threads

    def stop(self) -> None:
        """Let the threads end. All lanes have to be free."""
        with self._lock:
            for queue in (each for row in self._queues for each in row):
                queue.put(None)
            for thread in self._threads:
                if thread is not threading.current_thread():  # closed by a callback of a future
                    thread.join()
            self._queues, self._threads = [], []

    def _start(self) -> None:
        with self._lock:
            if self._queues:
                return
            program = self._program
            if program.pipelined:
                steps = [([index], copies) for index, copies in enumerate(program._counts())]
            else:
                steps = [(list(range(len(program.stages))), len(program.lanes))]
            queues: list[list[SimpleQueue[Lane | None]]] = [[SimpleQueue() for _ in range(copies)] for _, copies in steps]
            for place, (stages, copies) in enumerate(steps):
                for copy in range(copies):
                    name = f"aivmm-stage-{place}.{copy}"
                    ahead = (queues, place + 1) if place + 1 < len(steps) else None
                    thread = threading.Thread(target=_carry, args=(queues[place][copy], stages, ahead), name=name, daemon=True)
                    thread.start()
                    self._threads.append(thread)
            self._queues = queues
            # Nobody may ever close the program: the threads know their queues only, and end when it is forgotten.
            weakref.finalize(self, _end, [each for row in queues for each in row]).atexit = False


def _end(queues: Sequence[SimpleQueue[Lane | None]]) -> None:
    for each in queues:
        each.put(None)


def _put(lane: Lane, queues: Sequence[Sequence[SimpleQueue[Lane | None]]], step: int) -> None:
    """Put a lane in front of a step of the way, where its seat is."""
    lane.queued_ns = perf_counter_ns()
    queues[step][lane.seats[step]].put(lane)


def _carry(
    queue: SimpleQueue[Lane | None], stages: Sequence[int], ahead: tuple[Sequence[Sequence[SimpleQueue[Lane | None]]], int] | None
) -> None:
    """Run `stages` of each lane that comes along and hand it on. The thread of one step of the way, until it is sent None.

    Who waits for an answer is woken just before this thread runs the next lane or rests, which is when it lets go of the interpreter's
    lock: woken before, he would take a processor from a stage to wait for that lock, and once more when he has it.
    """
    wake: Wake | None = None
    while True:
        if wake is not None and queue.empty():
            wake()
            wake = None
        lane = queue.get()
        if lane is not None:
            lane.clocks[stages[0]].waited(perf_counter_ns() - lane.queued_ns)
        if wake is not None:
            wake()
            wake = None
        if lane is None:
            return
        if lane.error is None:
            try:
                for index in stages:
                    lane.at = index
                    lane.step(index)
            except BaseException as error:  # noqa: BLE001 - it belongs to this lane's request, and the thread serves others
                lane.error = error
        if ahead is not None:
            _put(lane, *ahead)
        else:
            wake = _land(lane)
        del lane  # a thread that waits holds on to nothing


def _land(lane: Lane) -> Wake | None:
    done, lane.done = lane.done, None
    assert done is not None
    try:
        return done(lane)
    except BaseException:
        log.exception("a callback of a request failed")
        return None
