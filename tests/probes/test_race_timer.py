"""The timer inside a worker, and who runs while another is timed. Real processes; no absolute time is asserted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from aivmm.probes import timer, wire
from aivmm.probes.arrays import save_arrays
from aivmm.probes.client import Worker, WorkerDied
from aivmm.probes.compare import rate_interval_s, rate_s
from aivmm.probes.machine import freeze, thaw
from aivmm.probes.race import Contestant, apart_of, race, versus
from aivmm.probes.records import Samples
from aivmm.probes.timer import BATCH_BELOW_S, is_tight, one, time_steps, warm_up

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a frozen worker with its parent")


# --- the timer ---


class Spin:
    """A step that takes `seconds`, and counts its calls."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self) -> None:
        self.calls += 1
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass


@pytest.mark.parametrize("step_s", [0.5e-6, 5e-6, 30e-6])
def test_short_steps_are_timed_in_batches_long_enough_for_the_clock(step_s: float) -> None:
    timing = time_steps([Spin(step_s)], seconds=0.01, settle=9)  # one of them may stand still for a while
    assert timing.inner > 1
    assert min(timing.durations) * timing.inner >= 0.5 * BATCH_BELOW_S
    assert step_s <= min(timing.durations)


def test_long_steps_and_tails_are_timed_one_by_one() -> None:
    assert time_steps([Spin(2 * BATCH_BELOW_S)], seconds=0.005).inner == 1
    short = Spin(1e-6)
    timing = time_steps([short], seconds=0.0, least=100, settle=1, each=True)
    assert timing.inner == 1 and len(timing.durations) == 100


def test_one_slow_call_does_not_decide_the_size_of_a_batch() -> None:
    calls = iter(range(1_000_000))

    def step() -> None:
        if next(calls) == 0:
            time.sleep(0.003)

    assert time_steps([step], seconds=0.002, settle=9).inner > 1


def test_a_duration_may_hold_several_calls() -> None:
    step = Spin(0.0)
    timing = time_steps([step], seconds=0.0, least=4, most=4, settle=1, repeat=21, each=True)
    assert len(timing.durations) == 4 and step.calls % 21 == 0


def test_windows_have_every_stall_in_them() -> None:
    turns = count()
    timing = time_steps([lambda: time.sleep(0.01 if next(turns) % 8 == 0 else 0.001)], seconds=0.2, settle=1, window=True)
    assert len(timing.durations) >= 3
    assert 0.0019 < fmean(timing.durations) < 0.008 and max(timing.durations) < 0.0099


def test_windows_of_short_calls_are_as_long_as_others() -> None:
    timing = time_steps([Spin(5e-6)], seconds=0.08, settle=9, window=True)
    assert timing.inner > 1 and 2 <= len(timing.durations) <= 5


@pytest.mark.parametrize("callers", [1, 2])
@pytest.mark.parametrize("call_s", [0.006, 0.025])
def test_few_calls_to_a_window_are_one_duration_however_many_call(callers: int, call_s: float) -> None:
    timing = time_steps([lambda: time.sleep(call_s * callers)] * callers, seconds=0.1, settle=1, window=True)
    assert len(timing.durations) == 1 and timing.durations[0] > 0.9 * call_s


def test_what_is_told_of_windows_is_elapsed_time_over_calls_though_most_of_them_have_no_stall() -> None:
    """2 ms calls, and each 24th stands still: of its block one window in two or three, and of windows the lesser part."""
    ended: list[float] = []

    def step() -> None:
        time.sleep(0.03 if len(ended) % 24 == 23 else 0.002)
        ended.append(time.perf_counter())

    timed: list[float] = []
    rounds: list[int] = []
    began = time.perf_counter()
    for number in range(12):
        found = time_steps([step], seconds=0.08, settle=1, settle_s=0.0, window=True).durations
        timed += found
        rounds += [number] * len(found)
    samples = Samples(timed_s=tuple(timed), rounds=tuple(rounds))
    assert rate_s(samples) == pytest.approx((ended[-1] - began) / len(ended), rel=0.15)
    low, high = rate_interval_s(samples)
    assert low <= rate_s(samples) <= high


def test_warming_up_goes_on_while_calls_become_faster_and_not_much_longer() -> None:
    falling = iter([9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 1.01, 0.995, 1.0, 1.0, 1.0, 1.0])
    assert warm_up(lambda: next(falling), 60.0) == [9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 1.01, 0.995]
    assert warm_up(lambda: 1.0, 60.0) == [1.0, 1.0, 1.0]
    assert warm_up(lambda: 1.0, 0.0) == [1.0]  # at its cap


def test_a_step_that_warms_up_is_timed_when_warm() -> None:
    class Warming(Spin):
        def __call__(self) -> None:
            self.seconds = max(0.2e-3, 8e-3 * 0.6**self.calls)
            super().__call__()

    step = Warming(0.0)
    timing = time_steps([step], seconds=0.005, settle=1, steady_s=5.0)
    assert len(timing.warmup) >= 3
    assert min(timing.durations) < timing.warmup[0] / 3


def test_several_steps_give_a_duration_for_each_window_and_warm_up_too() -> None:
    began = time.perf_counter()
    timing = time_steps([Spin(1e-4), Spin(1e-4)], seconds=0.01, steady_s=0.1)
    most = (time.perf_counter() - began - 0.1) / timer.WINDOW_S  # one on a quiet machine; a stall makes the block longer
    assert 1 <= len(timing.durations) <= max(1, most) and timing.warmup


def test_calls_of_several_before_the_timing_thread_wakes_up_are_not_timed_as_none() -> None:
    """Threads that keep the interpreter have it for 50 ms: whoever let them go looks at the clock that much later."""

    class Late(Spin):
        def __call__(self) -> None:
            if not self.calls:
                time.sleep(0.01)  # so that the timing thread is not the last to come
            super().__call__()

    before = sys.getswitchinterval()
    sys.setswitchinterval(0.05)
    try:
        found = [timer.several([Late(2e-4), Late(2e-4)], 0.1, 1) for _ in range(4)]
    finally:
        sys.setswitchinterval(before)
    assert min(map(min, found)) > 1e-4  # of 0.2 ms, one at a time


# --- freezing ---


# Of evenly spread durations the interval is spread * 1.96 / sqrt(n) wide: below 2 % from 24 on, with whole ranks and looks by fives at 30.
@pytest.mark.parametrize(("spread", "expected"), [(0.0, 20), (0.01, 20), (0.05, 30), (0.5, 100)])
def test_timing_stops_when_the_median_is_known_well_enough(monkeypatch: pytest.MonkeyPatch, spread: float, expected: int) -> None:
    """The clock is made of numbers: durations of 1 ms, evenly spread around that; 0.1 s is a hundred of them."""
    now, count = 0.0, 0

    def step() -> None:
        nonlocal now, count
        now += 1e-3 * (1 + spread * ((count * 0.618034) % 1 - 0.5))
        count += 1

    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: now))
    found = one(step, 0.1, 5, 1000, 1, tight=0.01)
    assert abs(len(found) - expected) <= (1 if expected == 100 else 0)
    assert is_tight(found, 0.01) == (expected < 100)
    now, count = 0.0, 0
    assert abs(len(one(step, 0.1, 5, 1000, 1)) - 100) <= 1


def test_few_durations_are_never_enough() -> None:
    assert not is_tight([1.0] * 19, 0.01) and is_tight([1.0] * 20, 0.01)


@LINUX
def test_a_frozen_worker_burns_nothing_and_answers_once_it_goes_on(worker: Worker) -> None:
    worker.call("memory", limit_s=30)
    assert freeze(worker.pid)
    end = time.monotonic() + 10
    while psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < end:
        time.sleep(0.001)
    burnt = psutil.Process(worker.pid).cpu_times()
    time.sleep(0.05)
    assert psutil.Process(worker.pid).cpu_times() == burnt
    assert psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED
    thaw(worker.pid)
    assert worker.call("memory", limit_s=30)["peak_bytes"] > 0


def test_what_is_gone_or_no_process_is_not_frozen() -> None:
    assert not freeze(0) and not freeze(-1) and not freeze(2**22 + 1)
    thaw(-1)
    thaw(2**22 + 1)


@LINUX
def test_a_frozen_worker_ends_with_its_parent(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import os, sys\nfrom aivmm.probes.client import Worker\nfrom aivmm.probes.machine import freeze\n"
        "w = Worker('w'); w.call('memory', limit_s=60); freeze(w.pid); print(w.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout and parent.stdin
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- copies in several processes ---


@pytest.fixture
def load_wild(wild: Path, tmp_path: Path) -> Callable[[Worker], None]:
    import numpy as np

    from tests.probes.conftest import TARGET

    save_arrays(tmp_path / "x.npz", {"x": np.ones(4, dtype=np.float32)})

    def load(worker: Worker, how: str = "") -> None:
        config: dict[str, Any] = {"settings": {"how": how}, "precision": None}
        inputs = str(tmp_path / "x.npz")
        worker.call("compile", limit_s=60, name="m", model="none", target=wire.target_out(TARGET), config=config, inputs=inputs)

    return load


def frozen(workers: Sequence[Worker]) -> int:
    """Return how many are stopped, once one runs: a signal takes a moment to reach all threads of a process."""
    end = time.monotonic() + (20.0 if sys.platform == "linux" else 0.0)
    while True:
        count = sum(psutil.Process(each.pid).status() == psutil.STATUS_STOPPED for each in workers)
        if count == len(workers) - 1 or time.monotonic() > end:
            return count
        time.sleep(0.001)


def test_copies_take_turns_and_only_one_worker_runs_at_a_time(load_wild: Callable[[Worker], None]) -> None:
    workers = [Worker(name) for name in "abcd"]
    try:
        for each in workers:
            load_wild(each)
        first = Contestant("m", workers[0], others=(workers[1],), expected_s=1e-5, keep=True)
        second = Contestant("m", workers[2], others=(workers[3],), expected_s=1e-5, keep=True)
        asked: list[tuple[int, str]] = []
        stopped: list[int] = []
        for each in workers:

            def call(operation: str, *, worker: Worker = each, ask: Any = each.call, **arguments: Any) -> Any:
                asked.append((len(asked), worker.name))
                stopped.append(frozen(workers) if len(asked) > len(workers) else 0)  # in the round to warm up they run as they like
                return ask(operation, **arguments)

            each.call = call  # type: ignore[method-assign]
        after = race([first, second], budget_s=60, most_rounds=8, enough=lambda _: False)
        assert after == 8
        assert set(first.rounds) == set(second.rounds) == set(range(8))
        assert sorted(name for _, name in asked[:4]) == ["a", "b", "c", "d"]  # each copy is warmed up
        assert [{name for _, name in asked[at : at + 2]} for at in range(4, 20, 2)] == [{"a", "c"}, {"b", "d"}] * 4
        if sys.platform == "linux":
            assert stopped[4:] == [3] * 16  # all but the one that is asked
        assert all(psutil.Process(each.pid).status() != psutil.STATUS_STOPPED for each in workers)
        first.durations, first.rounds, second.durations, second.rounds = [1.0, 1.01] * 8, [*range(16)], [1.02, 1.0] * 8, [*range(16)]
        found = versus(first, second, field=(first, second))
        narrow = versus(first, Contestant("m", workers[0], others=(workers[1],), durations=second.durations, rounds=second.rounds))
        assert apart_of(first, second) is not None
        assert found.high / found.low > narrow.high / narrow.low  # the same numbers from the same processes are surer
    finally:
        for each in workers:
            each.close()


def test_a_copy_that_dies_ends_the_race_of_its_contestant_and_leaves_none_frozen(load_wild: Callable[..., None]) -> None:
    with Worker("good") as good, Worker("other") as other:
        load_wild(good)
        load_wild(other)
        one = Contestant("m", good, expected_s=1e-5)
        two = Contestant("m", good, others=(other,), expected_s=1e-5)
        psutil.Process(other.pid).kill()
        time.sleep(0.1)
        race([one, two], budget_s=60, most_rounds=8)
        assert two.failed and one.samples() is not None
        assert psutil.Process(good.pid).status() != psutil.STATUS_STOPPED


def test_an_interrupted_race_leaves_no_worker_frozen(load_wild: Callable[..., None]) -> None:
    with Worker("a") as a, Worker("b") as b:
        load_wild(a)
        load_wild(b)

        def stop(_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            race([Contestant("m", a, expected_s=1e-5), Contestant("m", b, expected_s=1e-5)], budget_s=60, tell=stop)
        for each in (a, b):
            assert psutil.Process(each.pid).status() != psutil.STATUS_STOPPED
            assert each.call("memory", limit_s=30)


def test_a_contestant_whose_worker_refuses_fails_alone(load_wild: Callable[..., None]) -> None:
    with Worker("a") as a:
        load_wild(a)
        missing = Contestant("m", a, expected_s=1e-5)
        missing.generation = 99
        fine = Contestant("m", a, expected_s=1e-5)
        race([missing, fine], budget_s=60, most_rounds=8)
        assert missing.lost and isinstance(missing.failed, WorkerDied) and fine.durations
