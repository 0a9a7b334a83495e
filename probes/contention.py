"""How much stages that run at once slow each other: each timed alone, and beside each other one that runs all the while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aivmm.probes import phases
from aivmm.probes.timer import time_steps
from aivmm.runtime.engine import Engine

_LEAST, _SETTLE, _ROUNDS = 5, 3, 4


def contention(state: Any, *, bundle: str, inputs: str, seconds: float) -> dict[str, Any]:
    """Load a bundle of several stages and time each pair, alone and together in turn, for `seconds` a stage and pair in all.

    Returns `pairs`, each with the numbers of the stage `slowed` and the one `beside` it, and durations in seconds: `alone`, `together`. The
    stages run on what the engine has bound, with the values of one run of `inputs`: each writes what it has written before.
    """
    from aivmm.probes.operations import load_arrays  # here: it lists this module's operations

    with Engine.load(Path(bundle), cache=False) as engine:
        phases.enter(phases.RUN)
        lane = engine.one_lane()
        lane.run(load_arrays(inputs))
        runs = list(lane.runs)
        pairs = []
        for slowed in range(len(runs)):
            for beside in range(len(runs)):
                if slowed != beside:
                    alone, together = _pair(runs[slowed], runs[beside], seconds)
                    pairs.append({"slowed": slowed, "beside": beside, "alone": alone, "together": together})
    return {"pairs": pairs}


def _pair(slowed: Callable[[], None], beside: Callable[[], None], seconds: float) -> tuple[list[float], list[float]]:
    """Return durations of the one alone and with the other running, taken in turn, so that a drift meets both."""
    alone: list[float] = []
    together: list[float] = []
    for _ in range(_ROUNDS):
        alone += time_steps([slowed], seconds=seconds / (2 * _ROUNDS), least=_LEAST, settle=_SETTLE, each=True).durations
        ended = threading.Event()
        neighbour = threading.Thread(target=_until, args=(beside, ended))
        neighbour.start()
        try:
            together += time_steps([slowed], seconds=seconds / (2 * _ROUNDS), least=_LEAST, settle=_SETTLE, each=True).durations
        finally:
            ended.set()
            neighbour.join()
    return alone, together


def _until(run: Callable[[], None], ended: threading.Event) -> None:
    while not ended.is_set():
        run()


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"contention": contention}
