"""The shortest way through a program: what `Engine.run` comes to once a request was answered, in one function.

A model leaves the caches cold, and then each line of memory that is touched, and each page, the interpreter's own too, costs a part of the
ten microseconds that the whole engine may take. So there are few steps, and few objects of few types: what they refer to lies side by
side in the lane and in the function's defaults (each of which is counted at each call, so that what is seldom wanted is one of them), and
taking and giving back a lane are `Pool.get` and `put` without their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from sys import getrefcount
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.batching import Outputs
from aivmm.runtime.inputs import refuse_unknown
from aivmm.runtime.lane import Lane
from aivmm.tensors import TensorSpec

if TYPE_CHECKING:
    from aivmm.runtime.program import Program

Instead = Callable[["Program", Mapping[str, Any], BaseException], Outputs]  # what answers a request that failed


def shortest(program: Program, instead: Instead) -> Callable[[Mapping[str, Any]], Outputs]:
    """Return what answers a request of a program whose callers run it themselves, and by `instead` where that fails."""
    return _of_one(program, instead) if all(each.of_one for each in program.lanes) else _of_any(program, instead)


def _of_any(program: Program, instead: Instead) -> Callable[[Mapping[str, Any]], Outputs]:
    lanes = program.free.lanes

    def run(
        inputs: Mapping[str, Any],
        take: Callable[[], Lane] = lanes.popleft,
        give: Callable[[Lane], None] = lanes.append,
        program: Program = program,
        instead: Instead = instead,
    ) -> Outputs:
        try:
            try:
                lane = take()
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


def _of_one(program: Program, instead: Instead) -> Callable[[Mapping[str, Any]], Outputs]:
    """Return the same with what `Lane.call` does in it, for a stage of one input and one output, which most models have."""
    lanes = program.free.lanes
    ((output, _),) = program.lanes[0].hands.private.arrays

    def run(
        inputs: Mapping[str, Any],
        take: Callable[[], Lane] = lanes.popleft,
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
                lane = take()
            except IndexError:
                lane = seldom[0].acquire()
            try:
                array = inputs.get(name)
                if array is not lane.feed.bound:
                    lane.feed.take(array)
                if size(inputs) != 1:
                    refuse_unknown(inputs, seldom[2])
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
                lane.durations.append(ended_ns - started_ns)
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
