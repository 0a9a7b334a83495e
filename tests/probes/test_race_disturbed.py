"""What disturbs a race and is kept out of it: other processes' time slices, threads that spin on, and cores that differ. Decision 0014."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import numpy as np
import psutil
import pytest

from aivmm.probes import race as racing
from aivmm.probes import timer
from aivmm.probes.compare import By, compare, rate_interval_s, rate_s, round_figures
from aivmm.probes.machine import BackgroundLoad, is_busy, threads_s
from aivmm.probes.race import Contestant, by_of, far_behind, per_sample_s, race, runs_single, versus
from aivmm.probes.records import Samples
from aivmm.probes.timer import held, outspin, spinning
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says where a thread is")


def sliced(rng: np.random.Generator, rounds: int, factor: float) -> Samples:
    """Return blocks of four durations of a machine on which half of them lost a time slice 2.6 times as long (as seen, decision 0014)."""
    durations = factor * rng.lognormal(0, 0.03, rounds * 4) + 2.6 * (rng.random(rounds * 4) < 0.5)
    return Samples(timed_s=tuple(durations), rounds=tuple(np.repeat(np.arange(rounds), 4).tolist()))


def different(factor: float, by: By) -> float:
    rng = np.random.default_rng(0)
    verdicts = [compare(sliced(rng, 60, factor), sliced(rng, 60, 1.0), confidence=0.99, by=by).verdict for _ in range(100)]
    return sum(each in ("faster", "slower") for each in verdicts) / len(verdicts)


def test_least_durations_see_through_time_slices_and_medians_do_not() -> None:
    assert different(1.05, "least") >= 0.9
    assert different(1.0, "least") <= 0.02
    assert different(1.05, "median") < 0.3


def test_the_least_of_a_round_is_that_of_as_many_on_both_sides() -> None:
    few = Samples(timed_s=(3.0, 2.0, 5.0), rounds=(0, 0, 1))
    many = Samples(timed_s=(4.0, 3.0, 1.0, 6.0), rounds=(0, 0, 0, 1))
    assert round_figures([few, many], "least") == [{0: 2.0, 1: 5.0}, {0: 3.0, 1: 6.0}]
    assert compare(few, many, by="least").by == "least" and compare(few, many).by == "median"


def test_a_round_of_windows_is_its_mean_and_on_a_busy_machine_its_best_window_where_both_have_several() -> None:
    one = Samples(timed_s=(3.0, 2.0, 5.0), rounds=(0, 0, 1))
    other = Samples(timed_s=(4.0, 3.0, 2.0, 4.0, 6.0), rounds=(0, 0, 0, 1, 1))
    assert round_figures([one, other], "mean") == [{0: 2.5, 1: 5.0}, {0: 3.0, 1: 5.0}]
    assert round_figures([one, other], "window") == [{0: 2.0, 1: 5.0}, {0: 3.0, 1: 5.0}]


def test_stalls_in_a_minority_of_rounds_are_in_the_rate_and_not_in_the_median() -> None:
    """Of three rounds, as long as each other, one answers a third as much."""
    seen = Samples(timed_s=(0.002, 0.002, 0.002, 0.002, 0.006, 0.006), rounds=(0, 0, 1, 1, 2, 2))
    assert seen.median_s == 0.002 and 1 / rate_s(seen) == pytest.approx((500 + 500 + 500 / 3) / 3)
    assert rate_interval_s(seen) == (pytest.approx(0.002), pytest.approx(0.006))
    for callers, rate in ((1, True), (2, False)):
        made = Contestant("a", Asked(), callers=callers, rate=rate)  # type: ignore[arg-type]
        made.durations, made.rounds = list(seen.timed_s), list(seen.rounds)
        assert made.windows and per_sample_s(made) == rate_s(seen) and by_of(made, made) == "mean"
        made.busy = True
        assert by_of(made, made) == "window"


@LINUX
def test_what_runs_on_one_thread_is_held_on_a_core_and_let_go() -> None:
    allowed = os.sched_getaffinity(0)
    with held(lambda: None, -1) as core:
        assert os.sched_getaffinity(0) == {core} and core in allowed
    with held(lambda: None, max(allowed)) as core:
        assert os.sched_getaffinity(0) == {core} == {max(allowed)}
    assert os.sched_getaffinity(0) == allowed
    with held(lambda: None, 4095) as core:  # not ours to use
        assert core == -1 and os.sched_getaffinity(0) == allowed
    with pytest.raises(KeyError), held(lambda: None, min(allowed)):
        raise KeyError
    assert os.sched_getaffinity(0) == allowed


def test_a_thread_that_spins_is_noticed() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not spinning():  # on a busy machine it may get no core for a while
            assert time.monotonic() < end
    finally:
        stop.set()
        thread.join()
    end = time.monotonic() + 20
    while spinning():  # threads of tests before this one in the process may still be ending
        assert time.monotonic() < end


@LINUX
def test_what_another_thread_has_used_is_known_up_to_now() -> None:
    """An account as old as its last tick misses what began since: a thread that spins would be seen in one nap of four."""
    stop, used = threading.Event(), [0.0]

    def spin() -> None:
        while not stop.is_set():
            used[0] = time.thread_time()

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        for _ in range(50):
            time.sleep(0.0007)
            least = used[0]
            assert threads_s()[thread.native_id or 0] >= least
    finally:
        stop.set()
        thread.join()
    assert threading.get_native_id() not in threads_s()


def test_a_step_is_called_until_what_spun_before_it_rests() -> None:
    stop, calls = threading.Event(), list[int]()

    def spin() -> None:
        while not stop.is_set():
            pass

    def step() -> None:
        calls.append(len(calls))
        if len(calls) == 300:
            stop.set()
            thread.join()

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert outspin(lambda: time.sleep(0.001), 0.02) < 5.0  # no longer than that and a stretch, however long it spins
        end = time.monotonic() + 20
        while len(calls) < 300:  # on a busy machine the other thread may not be seen in a stretch
            outspin(step, 20.0)
            assert time.monotonic() < end
    finally:
        stop.set()
        thread.join()


class Spinner:
    """A thread that keeps a core busy whenever it is told to, and lets others run Python meanwhile."""

    def __init__(self) -> None:
        self.on, self.ended = threading.Event(), False
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.ended:
            self.on.wait()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 100)

    def spin(self) -> None:
        """Spin, and return when it is seen to: on a busy machine it may get no core for a while."""
        self.on.set()
        while not spinning():
            pass

    def __enter__(self) -> Spinner:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.on.set()
        self.thread.join()


@LINUX
def test_a_thread_that_the_step_uses_too_is_not_outspun_for_ever() -> None:
    """The models of OpenVINO in one process share their threads: those of the one before are at work whenever the next is called."""
    with Spinner() as shared:

        def step() -> None:
            shared.on.set()
            time.sleep(0.001)
            shared.on.clear()

        for _ in range(5):
            shared.spin()
            assert outspin(step, 0.3) < 0.3


@LINUX
def test_a_thread_that_got_no_core_for_a_stretch_does_not_rest() -> None:
    allowed = os.sched_getaffinity(0)
    core = {min(allowed)}
    with Spinner() as before:
        os.sched_setaffinity(before.thread.native_id or 0, core)
        before.spin()
        os.sched_setscheduler(before.thread.native_id or 0, os.SCHED_IDLE, os.sched_param(0))
        os.sched_setaffinity(0, core)
        try:  # whoever calls has the core, and the other one what is left
            assert outspin(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 1000), 0.3) >= 0.3
        finally:
            os.sched_setaffinity(0, allowed)
            os.sched_setaffinity(before.thread.native_id or 0, allowed)


@LINUX
def test_where_threads_are_not_told_apart_it_is_seen_all_the_same_that_all_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "threads_s", dict)
    with Spinner() as before:

        def step() -> None:
            before.on.clear()
            time.sleep(0.005)

        for _ in range(5):  # a clock as old as its last tick does not show it in each nap
            before.spin()
            assert outspin(step, 0.5) < 0.5
            before.spin()
            assert outspin(lambda: time.sleep(0.005), 0.5) < 0.5  # it may be one of its own that spins on


Times = namedtuple("Times", "user system idle steal")


def test_only_cores_that_we_may_use_count_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = [Times(0.0, 0.0, 0.0, 0.0)] * 4
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: busy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    load = BackgroundLoad([])
    time.sleep(0.01)
    busy = [Times(9.0, 9.0, 0.0, 9.0), Times(0.0, 0.0, 9.0, 0.0), Times(0.0, 0.0, 9.0, 0.0), Times(9.0, 9.0, 9.0, 0.0)]
    assert load.read([]) == 0
    busy[2] = Times(1e3, 0.0, 0.0, 1e3)
    assert load.read([]) > 10
    assert is_busy(0.4, 2) and not is_busy(0.2, 2)


class Asked:
    """Stands for one worker that holds several loads; remembers how each block was asked for."""

    def __init__(self) -> None:
        self.pid, self.generation, self.blocks = os.getpid(), 1, list[tuple[str, dict[str, Any]]]()

    def call(self, operation: str, *, name: str, **arguments: Any) -> dict[str, Any]:
        assert operation == "timed"
        self.blocks.append((name, arguments))
        answer: dict[str, Any] = {"durations": [1e-3, 1.1e-3, 1.0e-3, 3e-3], "memory_bytes": 1}
        if "core" in arguments:
            answer["core"] = 7 if arguments["core"] < 0 else arguments["core"]
        return answer


def run(worker: Any, rounds: int, **fields: Any) -> list[Contestant]:
    field = [Contestant(name, worker, keep=True, **fields) for name in "abc"]
    race(field, budget_s=60, most_rounds=rounds, enough=lambda _: False)
    return field


def test_those_of_one_round_that_run_on_one_thread_run_on_one_core() -> None:
    worker = Asked()
    run(worker, 5, single=True)
    cores = [arguments["core"] for _, arguments in worker.blocks[3:]]  # after one round to warm up
    assert cores == [-1, 7, 7] * 5
    worker = Asked()
    run(worker, 5)
    assert not any("core" in arguments for _, arguments in worker.blocks)


def test_another_load_of_the_same_worker_is_outlasted() -> None:
    worker = Asked()
    run(worker, 6)
    names = [name for name, _ in worker.blocks]
    for at in range(3, len(names)):
        assert ("outspin_s" in worker.blocks[at][1]) == (names[at] != names[at - 1])


def test_what_was_frozen_while_it_spun_is_outspun_when_another_load_of_its_worker_runs_next() -> None:
    first, second = Asked(), Asked()
    first.pid = second.pid = -1  # no processes: this one must not be frozen
    field = [Contestant("a", first), Contestant("b", first), Contestant("c", second)]  # type: ignore[arg-type]
    race(field, budget_s=60, least_rounds=12, most_rounds=12, enough=lambda _: False)
    names = [name for name, _ in first.blocks]
    assert all(("outspin_s" in first.blocks[at][1]) == (names[at] != names[at - 1]) for at in range(2, len(names)))  # after the warm-up
    assert not any("outspin_s" in more for _, more in second.blocks)


@pytest.mark.parametrize(("cores", "by", "least"), [(64.0, "least", 4), (0.0, "median", 2)])
def test_a_busy_machine_is_noticed_while_racing(cores: float, by: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Load:
        def __init__(self, pids: list[int]) -> None:
            assert pids == [os.getpid()]

        def read(self, pids: list[int]) -> float:
            return cores

    monkeypatch.setattr(racing, "BackgroundLoad", Load)
    monkeypatch.setattr(racing, "usable_cores", lambda: 4)
    worker = Asked()
    field = run(worker, 12)
    assert all(each.busy == bool(cores) for each in field)
    assert versus(field[0], field[1]).by == by
    assert worker.blocks[-1][1]["least"] == least


def test_what_runs_on_the_calling_thread_alone() -> None:
    def on(kind: Any) -> Target:
        return Target(runtime="r", name="x", device=Device(kind=kind, model="m", memory_bytes=None), runtime_version="1")

    one = Config.of({"intra_op_num_threads": 1})
    assert runs_single([on("cpu")], [one, Config.of({"INFERENCE_NUM_THREADS": 1})])
    assert not runs_single([on("gpu")], [one]) and not runs_single([on("cpu")], [one, Config()])


class Paced(Asked):
    """Stands for a worker whose loads take so many milliseconds a call; a list has those of each round, the last for all that follow."""

    def __init__(self, **paces: float | list[float]) -> None:
        super().__init__()
        self.paces = {name: pace if isinstance(pace, list) else [pace] for name, pace in paces.items()}

    def call(self, operation: str, *, name: str, **arguments: Any) -> dict[str, Any]:
        pace = self.paces[name]
        seen = sum(each == name for each, _ in self.blocks) - 1  # the first block warms up
        answer = super().call(operation, name=name, **arguments)
        return {**answer, "durations": [1e-3 * pace[min(max(seen, 0), len(pace) - 1)]] * 4}


def paced(worker: Paced, field: Iterable[str], rounds: int = 12, **batches: int) -> dict[str, Contestant]:
    """Race what the worker holds, all of it kept; those named in `field` may be the plan."""
    made = {name: Contestant(name, worker, keep=True, batch=batches.get(name, 1)) for name in worker.paces}  # type: ignore[arg-type]
    tire = far_behind(list(made.values()), [made[each] for each in field])
    race(list(made.values()), budget_s=60, most_rounds=rounds, enough=lambda _: False, tire=tire)
    return made


def rounds_of(found: dict[str, Contestant]) -> dict[str, int]:
    return {name: len(set(each.rounds)) for name, each in found.items()}


def test_what_is_far_behind_rests_after_three_rounds_or_two_and_is_compared_by_those() -> None:
    found = paced(Paced(a=1.0, b=2.5, c=9.0, d=11.0), "abcd")
    assert rounds_of(found) == {"a": 12, "b": 12, "c": 3, "d": 2} and found["c"].racing and found["c"].rests
    against = versus(found["c"], found["a"])
    assert against.verdict == "slower" and against.ratio == pytest.approx(9.0) and against.pairs == 3


def test_what_was_near_in_any_round_goes_on_and_what_answers_more_samples_is_not_behind() -> None:
    assert rounds_of(paced(Paced(a=1.0, b=[9.0, 2.0, 9.0]), "ab")) == {"a": 12, "b": 12}
    assert rounds_of(paced(Paced(a=1.0, b=9.0), "ab", b=8)) == {"a": 12, "b": 12}


def test_nobody_rests_for_the_sake_of_one_that_may_not_be_the_plan() -> None:
    found = paced(Paced(barred=0.2, a=1.0, b=1.1), ["a", "b"])
    assert rounds_of(found) == {"barred": 12, "a": 12, "b": 12}


def test_what_rests_has_spent_its_own_time_and_not_that_of_the_others() -> None:
    class Slow(Paced):
        def call(self, operation: str, *, name: str, **arguments: Any) -> dict[str, Any]:
            time.sleep(0.2 if name == "slow" else 0.001)
            return super().call(operation, name=name, **arguments)

    worker = Slow(a=1.0, b=1.01, slow=200.0)
    made = [Contestant(name, worker, keep=True) for name in worker.paces]  # type: ignore[arg-type]
    race(made, budget_s=0.3, most_rounds=12, least_rounds=12, enough=lambda _: False, tire=far_behind(made, made))
    assert rounds_of({each.name: each for each in made}) == {"a": 12, "b": 12, "slow": 2}
