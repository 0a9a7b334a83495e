"""The timer: calls a step again and again inside a worker, and says how long one call took."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from aivmm.probes.machine import is_runnable, threads_s

BATCH_BELOW_S = 100e-6  # steps shorter than this are timed several at a time, so that the clock does not matter
_BATCH_OF_S = 200e-6
SETTLE_S = 2e-3
WINDOW_S = 0.02
_FEW = 4  # calls to a window: fewer would tell of who was done first, or of single calls
_NAP_S = 1e-3
_STRETCH_S = 5e-3  # warming up looks at calls in stretches of this
_ANY = 0  # no thread has this number
OUTSPIN_S = 0.25  # threads that spin after a run are at rest by then: those of ONNX Runtime took 95 ms beside two busy ones on two cores
_BLIND_S = 0.05  # ... and as long as those spin alone: where threads are not told apart, it is not seen when they rest
_SEVERAL_STRETCH_S = 0.05
_FALLING = 0.98  # a stretch whose median is below this much of the best before is still becoming faster
_STEADY_STRETCHES = 2
_ENOUGH = 20  # durations: fewer are doubted, see `aivmm.probes.compare.cautions`
_LOOK = 5  # so many durations apart it is asked whether they agree

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
    settle_s: float = SETTLE_S,
    tight: float = 0.0,
    window: bool = False,
) -> Timing:
    """Run for `seconds` (and at least `least` times) after `settle` untimed calls or `settle_s` of them.

    Steps below 100 µs are timed several at a time and the mean of each such batch is one duration. With several steps all run at once for
    `seconds`, each in a thread, and the durations are elapsed time per call completed, in windows of 20 ms. `each` forbids batches: tails
    need single calls. `repeat` makes one duration that of so many calls (a known difference, for tests of the timer). With `steady_s` calls
    are made until they no longer become faster, for about so long at most, before anything is timed. With `tight` one step is timed no
    longer than until its median is known to that share of it; see `is_tight`. With `window` the durations of one step are those of windows,
    too, one after the other: their mean has every stall of the machine in it, as what is answered in a second has, and a median of calls
    has none. Where a window would hold few calls, one step and several have one duration for all of the time.
    """
    if len(steps) > 1:
        warm = warm_up(lambda: fmean(several(steps, _SEVERAL_STRETCH_S, 1)), steady_s) if steady_s else []
        return Timing(durations=several(steps, seconds, least), warmup=warm)
    step = steps[0] if repeat == 1 else _repeated(steps[0], repeat)
    warm = warm_up(lambda: median(one(step, _STRETCH_S, 1, most, 1)), steady_s) if steady_s else []
    typical = warm[-1] if warm else _settle(step, settle, settle_s)
    inner = 1 if each or typical >= BATCH_BELOW_S else math.ceil(_BATCH_OF_S / max(typical, 1e-7))
    durations = one(step, seconds, least, most, inner, tight=tight)
    return Timing(durations=_windows(durations, inner) if window else durations, warmup=warm, inner=inner)


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


def spinning() -> bool:
    """Say whether threads of this process are running while it does nothing."""
    return bool(_running())


def _running() -> set[int]:
    """Return the threads that run while this one sleeps, or `_ANY` for all of them where the system does not tell them apart.

    The clock of the whole process would not do where it tells them: what runs on other cores is in it up to their last tick, 4 ms ago. And
    their own clocks do not where others have the cores: a thread that spins, and waits for one, has used nothing.
    """
    before, whole, began = threads_s(), time.process_time(), time.perf_counter()
    time.sleep(_NAP_S)
    least = 0.2 * (time.perf_counter() - began)
    now = threads_s()
    if not now:
        return {_ANY} if time.process_time() - whole > least else set()
    return {each for each, seconds in now.items() if seconds - before.get(each, 0.0) > least or is_runnable(each)}


def outspin(step: Step, most_s: float = OUTSPIN_S) -> float:
    """Call `step` until the threads that run while this process does nothing have come to rest, for `most_s` at most; return the seconds.

    They are those of whatever ran here before. Where they share cores with what runs now, they need longer than they spin alone: each of
    three busy threads on two cores gets two thirds of one. Whether they rest is seen in naps between stretches of calls: during calls those
    run, too, that `step` uses as well (OpenVINO's models share their threads, which rest in less than 1 ms), and those that got no core do
    not. Where the system does not tell threads apart, those of `step` that spin look like any others.
    """
    began, running = time.perf_counter(), _running()
    if _ANY in running:
        most_s = min(most_s, _BLIND_S)
    while running and time.perf_counter() - began < most_s:
        _settle(step, 1, _STRETCH_S)
        time.sleep(_NAP_S)  # until those rest that do so soon after a call
        running &= _running()
    return time.perf_counter() - began


def rest(most_s: float = OUTSPIN_S) -> None:
    """Wait until no thread of this process runs but this one, for `most_s` at most."""
    end = time.perf_counter() + most_s
    while _running() and time.perf_counter() < end:
        pass


@contextlib.contextmanager
def held(step: Step, core: int) -> Iterator[int]:
    """Keep this thread on one core: on `core`, or where it is after some calls of `step` when that is -1. Yields the core.

    For steps that run on the calling thread alone. Cores differ (P and E cores, one with a neighbour on its other hardware thread), and a
    thread that slept may wake up on any. Yields -1 and holds nothing where the system does not say where a thread is, or does not obey.
    """
    if sys.platform != "linux":
        yield -1
        return
    allowed = os.sched_getaffinity(0)
    if core < 0:
        _settle(step, 1, SETTLE_S)
        core = ctypes.CDLL(None).sched_getcpu()
    if core not in allowed:
        yield -1
        return
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, allowed)


def _settle(step: Step, least: int, seconds: float) -> float:
    """Make at least `least` calls, for `seconds`: whoever ran before left its data in the caches. Return how long the later ones took."""
    clock = time.perf_counter
    began = clock()
    durations: list[float] = []
    while len(durations) < max(1, least) or clock() - began < seconds:
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


def is_tight(durations: Sequence[float], share: float) -> bool:
    """Say whether the median of `durations` is known well enough: its 95 % interval is at most twice `share` of it wide.

    The interval is by order statistics: the median lies between the values of ranks (n -+ 1.96 sqrt(n)) / 2. Fewer than 20 are not enough.
    """
    count = len(durations)
    if count < _ENOUGH:
        return False
    ordered, reach = sorted(durations), 0.98 * math.sqrt(count)
    low, high = ordered[math.floor(count / 2 - reach)], ordered[math.ceil(count / 2 + reach) - 1]
    return high - low <= 2 * share * median(ordered)


def one(step: Step, seconds: float, least: int, most: int, inner: int, *, tight: float = 0.0) -> list[float]:
    """Time batches of `inner` calls for `seconds`, `least` to `most` of them; return the mean duration of a call in each.

    With `tight`, no longer than until the median is known so well; see `is_tight`.
    """
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
        if tight and not len(durations) % _LOOK and len(durations) >= least and is_tight(durations, tight):
            return durations


def _windows(durations: Sequence[float], inner: int = 1) -> list[float]:
    """Return the means of calls in a row, of so many as fill a window; of all where they fill none, or few fill one.

    Each duration is the mean of `inner` calls.
    """
    mean = fmean(durations)
    if _FEW * mean >= WINDOW_S:
        return [mean]
    count = min(len(durations), math.ceil(WINDOW_S / (mean * inner)))
    whole = len(durations) // count
    return [fmean(durations[index * len(durations) // whole : (index + 1) * len(durations) // whole]) for index in range(whole)]


def several(steps: Sequence[Step], seconds: float, least: int) -> list[float]:
    """Run all steps at once, each in a thread of its own, and return elapsed seconds per completed call, in one window after the other.

    One window for all: from when every thread has run once to the last call that ended before the end. Were each thread to count in a
    window of its own, the last calls would run with fewer and fewer beside them, and the rate would come out too high.
    """
    clock = time.perf_counter
    began: list[float] = []
    # The last to come takes the time, before any is let go: this thread may wake up when the others have made calls for a while.
    barrier = threading.Barrier(len(steps) + 1, action=lambda: began.append(clock()))
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
    with contextlib.suppress(threading.BrokenBarrierError):  # a thread failed: its error is raised below
        barrier.wait()
        started = began[0]
        while not failures and (clock() - started < seconds or min(map(len, ended)) < least):
            stop.wait(0.001)
    end = clock()
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise next((each for each in failures if not isinstance(each, threading.BrokenBarrierError)), failures[0])
    times = sorted(each for some in ended for each in some if each <= end)
    gaps = [after - before for before, after in itertools.pairwise([*began, *times])]
    return _windows(gaps)
