"""How much what runs at once slows each other: stages and copies of stages, each timed alone, and beside each other one all the while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from aivmm.probes import phases
from aivmm.probes.arrays import load_arrays
from aivmm.probes.timer import rest, time_steps
from aivmm.runtime.backend import Buffer
from aivmm.runtime.engine import Engine

_LEAST, _SETTLE = 2, 1  # calls, timed and not: of slow ones there are windows enough
_ROUNDS = 8  # each gives one number
_LEAST_SEVERAL = 2  # completed calls of each thread, where several run at once

Steps = Sequence[Callable[[], object]]


def contention(state: Any, *, bundle: str, inputs: str, seconds: float, actors: list[list[int]], pairs: list[list[int]]) -> dict[str, Any]:
    """Load a bundle and time each pair of its parts, alone and together in turn, for `seconds` a pair in all.

    An actor is `[stage, executable]`: an executable of the stage, its replicas counted first, then those of its copies. In a pipelined plan
    one request at a time is inside it, else as many as it has lanes. A pair is `[slowed, beside]`, places in `actors`; both may be of one
    kind: then what counts is what both complete, since who of two equals gets more is chance. Returns `pairs`, in order, each with
    `alone` and `together`: seconds from one completed run of the slowed to the next, the mean of a window each.

    A plan of one stage is called as the engine calls it, with `inputs`; stages of others run on what the engine has bound, with the values
    of one run of `inputs`: each writes what it has written before.
    """
    with Engine.load(Path(bundle), cache=False) as engine:
        phases.enter(phases.RUN)
        arrays = load_arrays(inputs)
        for lane in engine.lanes():
            lane.run(arrays)
        steps = [_steps(engine, stage, executable, arrays) for stage, executable in actors]
        places = [engine.stages[stage].kinds()[executable] for stage, executable in actors]
        alike = [(actors[a][0], places[a]) == (actors[b][0], places[b]) for a, b in pairs]
        found = [
            (_twins if same else _pair)(steps[slowed], steps[beside], seconds) for (slowed, beside), same in zip(pairs, alike, strict=True)
        ]
    return {"pairs": [{"alone": alone, "together": together} for alone, together in found]}


def _steps(engine: Engine, stage: int, executable: int, inputs: Mapping[str, Buffer]) -> Steps:
    lanes = [lane for lane in engine.lanes() if lane.places[stage] == executable]
    if engine.plan.execution.mode == "pipelined":
        return [lane.runs[stage] for lane in lanes[:1]]
    return [partial(lane.call, inputs) if len(engine.stages) == 1 else lane.runs[stage] for lane in lanes]


def _pair(slowed: Steps, beside: Steps, seconds: float) -> tuple[list[float], list[float]]:
    """Return mean durations of the one alone and with the other running, in windows taken in turn, so that a drift meets both."""
    alone: list[float] = []
    together: list[float] = []
    for _ in range(_ROUNDS):
        rest()  # the other one's threads spin on for a while
        alone.append(_mean(slowed, seconds))
        ended = threading.Event()
        neighbours = [threading.Thread(target=_until, args=(each, ended)) for each in beside]
        for each in neighbours:
            each.start()
        try:
            together.append(_mean(slowed, seconds))
        finally:
            ended.set()
            for each in neighbours:
                each.join()
    return alone, together


def _twins(one: Steps, other: Steps, seconds: float) -> tuple[list[float], list[float]]:
    """Return the mean durations of the one alone, and of each of the two while both run, in windows taken in turn."""
    alone: list[float] = []
    together: list[float] = []
    for _ in range(_ROUNDS):
        rest()  # the other one's threads spin on for a while
        alone.append(_mean(one, seconds))
        together.append(2 * _mean([*one, *other], seconds))
    return alone, together


def _mean(steps: Steps, seconds: float) -> float:
    """Return the mean duration over a window. What is answered in a second has all stalls in it; a median of calls has none of them."""
    least = _LEAST if len(steps) == 1 else _LEAST_SEVERAL
    return fmean(time_steps(steps, seconds=seconds / (2 * _ROUNDS), least=least, settle=_SETTLE, each=True).durations)


def _until(run: Callable[[], object], ended: threading.Event) -> None:
    while not ended.is_set():
        run()


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"contention": contention}
