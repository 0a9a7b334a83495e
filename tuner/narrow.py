"""Parts of a processor: what runs beside something else there gets some of its cores, and its threads do not spin for each other.

Two thread pools of all cores each on one processor wait for each other's time slices: a thread of one pool waits, spinning, for another one
of it that the system does not run because the neighbour's threads spin. So cores are divided, as they are among several models (`ladder`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from aivmm.planner.candidates import Candidate
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.target import Target

_TOTAL = ("INFERENCE_NUM_THREADS",)  # of all of an executable's streams together
_THREADS = (*_TOTAL, "intra_op_num_threads", "threads")
_STREAMS, _HINT = "NUM_STREAMS", "PERFORMANCE_HINT"
_QUIET: dict[str, Setting] = {"session.intra_op.allow_spinning": "0"}
_LOOSE: dict[str, Setting] = {"ENABLE_CPU_PINNING": False}
_STOP: dict[str, Setting] = {"session.force_spinning_stop": "1"}
_PARTS = (2, 4)  # that a processor is divided into


def threads_of(target: Target) -> int:
    """Return how many threads a processor runs at once for us; 1 for other devices."""
    return (target.device.cores or 1) if target.device.kind == "cpu" else 1


def with_threads(config: Config, knobs: Iterable[Knob], threads: int) -> Config | None:
    """Return `config` with so many threads that leave others their cores; None where the target has no knob for their number."""
    settings = sharing(knobs, threads)
    if settings is None:
        return None
    settings = {**config.as_dict(), **settings}
    if _count(settings.get(_STREAMS)) > threads:
        del settings[_STREAMS]  # each has a thread at least
    if settings.get(_HINT) == "THROUGHPUT":
        del settings[_HINT]  # for as many callers as keep all cores busy
    return Config.of(settings, precision=config.precision)


def sharing(knobs: Iterable[Knob], threads: int) -> dict[str, Setting] | None:
    """Return the settings of something that runs with so many threads beside others: they do not spin, and are not pinned where there are
    more cores than that. None where there is no knob for their number."""
    by_name = {each.name: each for each in knobs}
    name = next((each for each in _THREADS if each in by_name), None)
    if name is None:
        return None
    quiet = {key: value for key, value in _QUIET.items() if key in by_name and threads > 1}
    loose = {key: value for key, value in _LOOSE.items() if key in by_name and threads < by_name[name].high}
    return {name: threads, **quiet, **loose}


def resting(config: Config, knobs: Iterable[Knob]) -> Config:
    """Return `config` with threads that rest as soon as a run ends, where the target has a knob for that and nothing is said of spinning.

    For what takes turns with something else on one processor: threads that spin on after a run take the cores from the one that runs then.
    """
    names = {each.name for each in knobs}
    said = any(config.get(each) is not None for each in (*_QUIET, *_STOP))
    stop = {} if said else {key: value for key, value in _STOP.items() if key in names}
    return Config.of({**config.as_dict(), **stop}, precision=config.precision)


def cores_of(candidate: Candidate) -> int:
    """Return how many cores of a processor a candidate can keep busy at most; 0 on other devices, whose host threads mostly wait, and
    where nobody knows how many there are.

    Threads count as set, or one for each core: for all of its requests together, or for each caller its own one beside those of
    a pool that requests share.
    """
    if candidate.target.device.kind != "cpu" or candidate.target.device.cores is None:
        return 0
    cores = threads_of(candidate.target)
    name = next((each for each in _THREADS if _count(candidate.config.get(each))), "")
    threads = _count(candidate.config.get(name)) or cores  # 0 leaves the number to the runtime
    return min(cores, threads if name in _TOTAL else threads - 1 + candidate.callers)


def _count(value: Setting | None) -> int:
    return value if isinstance(value, int) else 0


def parts_of(target: Target) -> list[int]:
    """Return the numbers of threads with which several parts of a plan fit a processor, the most first; none on one core."""
    cores = threads_of(target)
    return sorted({cores // each for each in _PARTS if cores // each >= 1}, reverse=True)


def narrowed(candidate: Candidate, knobs: Sequence[Knob]) -> list[Candidate]:
    """Return a candidate on parts of its processor, one call at a time; none on other devices."""
    if candidate.target.device.kind != "cpu":
        return []
    configs = [with_threads(candidate.config, knobs, threads) for threads in parts_of(candidate.target)]
    return [replace(candidate, config=each, callers=1) for each in configs if each is not None]
