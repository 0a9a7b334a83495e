"""The shortest way through a program: what `Engine.run` comes to once a request was answered, in one function.

A model leaves the caches cold, and then each line of memory that is touched, and each page, the interpreter's own too, costs a part of the
ten microseconds that the whole engine may take. So there are few steps, and few objects of few types: what they refer to lies side by
side in the lane and in the function's defaults (each of which is counted at each call, so that what is seldom wanted is one of them), and
taking and giving back a lane are `Pool.get` and `put` without their calls. Fewer still in C: see `hot` and decision 0066.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from sys import getrefcount
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from numpy import ndarray

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime import hot
from aivmm.runtime.batching import Outputs
from aivmm.runtime.clocks import StageClock
from aivmm.runtime.feed import Feed
from aivmm.runtime.handing import Handing, Refusing, Slot
from aivmm.runtime.inputs import refuse_unknown
from aivmm.runtime.lane import Lane
from aivmm.tensors import TensorSpec

if TYPE_CHECKING:
    from aivmm.runtime.program import Program

Ask = Callable[[Mapping[str, Any]], Outputs]  # what answers a request
Instead = Callable[["Program", Mapping[str, Any], BaseException], Outputs]  # what answers a request that failed


def shortest(program: Program, instead: Instead) -> Ask:
    """Return what answers a request of a program whose callers run it themselves, and by `instead` where that fails."""
    reference = (_of_one if program.of_one else _of_any)(program, instead)
    return reference if hot.native is None or not program.short else _native(program, instead, reference)


def hot_path(program: Program, *, watched: bool) -> dict[str, str | None]:
    """Return which hot path requests take that `Engine.run` answers, and why it is not the one in C. `watched`: they have a deadline."""
    why_not = hot.why_not
    if watched or program.pipelined or program.execution.batching is not None:
        why_not = "stages run on threads of their own"
    elif not program.short:
        why_not = "arrays are not handed on as they are: a shape is open, a type is not NumPy's own, or a device writes them"
    return {"hot_path": "python" if why_not else "native", "hot_path_reason": why_not or None}


def _native(program: Program, instead: Instead, reference: Ask) -> Ask:
    """Return what does in C what `reference` does, and asks it, or the methods that it asks, where more is to be done than usual."""
    assert hot.native is not None
    lane, free = program.lanes[0], program.free

    def failed(inputs: Mapping[str, Any], error: BaseException, refused: Handing | Refusing | None) -> Outputs:
        """Answer a request that came to `error`, when its lane is given back; `refused` is there where it was a runtime that failed."""
        try:
            try:
                raise error
            except Exception as raised:
                if refused is not None:
                    refused.refuse(raised)
                raise
        except (Unsupported, UsageError) as known:
            return instead(program, inputs, known)

    turns = free.lanes.popleft, free.lanes.append, free.wake
    one = (lane.feed.name, lane.hands.private.arrays[0][0], lane.feed.copied_bytes) if lane.of_one else None
    made: Ask = hot.native.Shortest(*turns, reference, failed, Lane, Feed, Slot, ndarray, StageClock, len(lane.feeds), one).ask
    return made


def _of_any(program: Program, instead: Instead) -> Ask:
    lanes = program.free.lanes

    def run(
        inputs: Mapping[str, Any],
        takes: Iterator[Lane] = program.free.takes,
        give: Callable[[Lane], None] = lanes.append,
        program: Program = program,
        instead: Instead = instead,
    ) -> Outputs:
        try:
            try:
                for lane in takes:  # noqa: B007 - see `Pool`
                    break
            except IndexError:
                lane = program.acquire()
            try:
                return lane.call(inputs)
            finally:
                give(lane)
                if lane.awaited:
                    program.free.wake()
        except (Unsupported, UsageError) as error:
            return instead(program, inputs, error)

    return run


def _of_one(program: Program, instead: Instead) -> Ask:
    """Return the same with what `Lane.call` does in it, for a plan of one input and one output, which most models have."""
    lanes = program.free.lanes
    ((output, _),) = program.lanes[0].hands.private.arrays

    def run(
        inputs: Mapping[str, Any],
        takes: Iterator[Lane] = program.free.takes,
        give: Callable[[Lane], None] = lanes.append,
        name: str = program.lanes[0].feed.name,
        size: Callable[[Any], int] = len,
        references: Callable[[object], int] = getrefcount,
        clock: Callable[[], int] = perf_counter_ns,
        output: str = output,
        seldom: tuple[Program, Instead, Mapping[str, TensorSpec]] = (program, instead, {each.name: each for each in program.inputs}),
    ) -> Outputs:
        try:
            try:
                for lane in takes:  # noqa: B007 - see `Pool`
                    break
            except IndexError:
                lane = seldom[0].acquire()
            try:
                array = inputs.get(name)
                if array is not lane.feed.bound:
                    lane.feed.take(array)
                if size(inputs) != 1:
                    refuse_unknown(inputs, seldom[2])
                ahead = None if lane.ahead is None else lane.run_ahead(lane.ahead)
                slot = lane.turn  # `Handing.next` without its call
                if slot is None or references(slot.face) > slot.face_alone:
                    slot = lane.hands.another()
                lane.turn = slot.after
                if slot.stale:
                    lane.hands.catch_up(slot)
                started_ns = clock()
                try:
                    slot.runs()
                except Exception as error:
                    lane.hands.refuse(error)
                    raise
                ended_ns = clock()
                if ahead is not None:
                    started_ns = lane.count_last(*ahead, ended_ns)
                lane.note(ended_ns - started_ns)
                lane.count = count = lane.count + 1
                if count >= lane.due or ended_ns >= lane.due_ns:
                    lane.pass_on(started_ns, ended_ns)
                lane.ended_ns = ended_ns
                return lane.hands.given(slot) if slot.face is None else {output: slot.face.view()}
            finally:
                give(lane)
                if lane.awaited:
                    seldom[0].free.wake()
        except (Unsupported, UsageError) as error:
            return seldom[1](seldom[0], inputs, error)

    return run
