"""The timer: calls a step again and again inside a worker, and says how long one call took."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

BATCH_BELOW_S = 100e-6  # steps shorter than this are timed several at a time, so that the clock does not matter
_BATCH_OF_S = 200e-6
_SETTLE_S = 2e-3
_STRETCH_S = 5e-3  # warming up looks at calls in stretches of this
_SEVERAL_STRETCH_S = 0.05
_FALLING = 0.98  # a stretch whose median is below this much of the best before is still becoming faster
_STEADY_STRETCHES = 2

Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call (of `repeat` calls where that was asked for), in order."""

    durations: list[float]
    warmup: list[float] = field(default_factory=list)  # one for each stretch of warming up
    inner: int = 1  # calls to one duration, which is their mean: with more than one, there is no tail to see


def time_steps(
    steps: Sequence[Step],
    *,
    seconds: float,
    least: int = 2,
    most: int = 10_000,
    settle: int = 2,
    each: bool = False,
    repeat: int = 1,
    steady_s: float = 0.0,
) -> Timing:
    """Run for `seconds` (and at least `least` times) after `settle` untimed calls or 2 ms of them.

    Steps below 100 µs are timed several at a time and the mean of each such batch is one duration. With several steps all run at once
    for `seconds`, each in a thread, and the one duration is elapsed time per call completed. `each` forbids batches: tails need single
    calls. `repeat` makes one duration that of so many calls (a known difference, for tests of the timer). With `steady_s` calls are made
    until they no longer become faster, for about so long at most, before anything is timed.
    """
    if len(steps) > 1:
        warm = warm_up(lambda: several(steps, _SEVERAL_STRETCH_S, 1), steady_s) if steady_s else []
        return Timing(durations=[several(steps, seconds, least)], warmup=warm)
    step = steps[0] if repeat == 1 else _repeated(steps[0], repeat)
    warm = warm_up(lambda: median(one(step, _STRETCH_S, 1, most, 1)), steady_s) if steady_s else []
    typical = warm[-1] if warm else _settle(step, settle)
    inner = 1 if each or typical >= BATCH_BELOW_S else math.ceil(_BATCH_OF_S / max(typical, 1e-7))
    return Timing(durations=one(step, seconds, least, most, inner), warmup=warm, inner=inner)


def warm_up(stretch: Callable[[], float], most_s: float) -> list[float]:
    """Call `stretch` until the durations that it returns have stopped falling, or `most_s` seconds are over; return them.

    No number of calls is right for all: a small model is warm after ten calls, one whose runtime compiles, allocates or raises the clock in
    the background after hundreds.
    """
    end = time.perf_counter() + most_s
    durations = [stretch()]
    stale = 0
    while stale < _STEADY_STRETCHES and time.perf_counter() < end:
        duration = stretch()
        stale = stale + 1 if duration > _FALLING * min(durations) else 0
        durations.append(duration)
    return durations


def _settle(step: Step, least: int) -> float:
    """Make at least `least` calls, for 2 ms: whoever ran before left its own data in the caches. Return how long the later ones took."""
    clock = time.perf_counter
    began = clock()
    durations: list[float] = []
    while len(durations) < max(1, least) or clock() - began < _SETTLE_S:
        before = clock()
        step()
        durations.append(clock() - before)
    # One call in which the machine did something else must not decide how many make a batch.
    return median(durations[len(durations) // 2 :])


def _repeated(step: Step, repeat: int) -> Step:
    def run() -> None:
        for _ in range(repeat):
            step()

    return run


def one(step: Step, seconds: float, least: int, most: int, inner: int) -> list[float]:
    """Time batches of `inner` calls for `seconds`, `least` to `most` of them; return the mean duration of a call in each."""
    clock = time.perf_counter
    durations: list[float] = []
    end = clock() + seconds
    while True:
        started = clock()
        for _ in range(inner):
            step()
        now = clock()
        durations.append((now - started) / inner)
        if (now >= end and len(durations) >= least) or len(durations) >= most:
            return durations


def several(steps: Sequence[Step], seconds: float, least: int) -> float:
    """Run all steps at once, each in a thread of its own, and return elapsed seconds per completed call.

    One window for all: from when every thread has run once to the last call that ended before the end. Were each thread to count in a
    window of its own, the last calls would run with fewer and fewer beside them, and the rate would come out too high.
    """
    clock = time.perf_counter
    barrier = threading.Barrier(len(steps) + 1)
    stop = threading.Event()
    ended: list[list[float]] = [[] for _ in steps]
    failures: list[BaseException] = []

    def run(index: int, step: Step) -> None:
        try:
            step()
            barrier.wait()
            while not stop.is_set():
                step()
                ended[index].append(clock())
        except BaseException as error:  # noqa: BLE001 - carried over to the calling thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(index, step)) for index, step in enumerate(steps)]
    for thread in threads:
        thread.start()
    started = clock()
    with contextlib.suppress(threading.BrokenBarrierError):  # a thread failed: its error is raised below
        barrier.wait()
        started = clock()
        while not failures and (clock() - started < seconds or min(map(len, ended)) < least):
            stop.wait(0.001)
    end = clock()
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise next((each for each in failures if not isinstance(each, threading.BrokenBarrierError)), failures[0])
    times = [each for some in ended for each in some if each <= end]
    return (max(times) - started) / len(times)
