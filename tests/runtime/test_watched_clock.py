"""The clock of a lane: what it passes on, on a clock made up; whose calls are in a row, and when they are told."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.runtime import clocks, hot
from aivmm.runtime.clocks import RING
from aivmm.runtime.drift import BLOCK, Calm, Drift, Sums
from aivmm.runtime.paces import PacedMonitor
from aivmm.runtime.watched_clock import WatchedClock
from tests.runtime.machines import ByHand


class Watch:
    """Takes what is passed on: the durations of each block, and in what time they came."""

    def __init__(self) -> None:
        self.durations: list[int] = []
        self.passed: list[tuple[int, int, int]] = []  # calls, what they took, in what time they came
        self.limits: Calm | None = Calm()
        self.sums: list[Sums] = []

    def calm(self) -> Calm | None:
        return self.limits

    def add(self, durations_ns: list[int], passed_ns: int, block: int = BLOCK) -> None:
        self.durations += durations_ns
        self.passed.append((len(durations_ns), sum(durations_ns), passed_ns))

    def add_sums(self, sums: Sums, passed_ns: int) -> None:
        assert sums.calls - sums.step <= (len(sums.each_ns) - 1) * sums.step < sums.calls and sums.step >= BLOCK
        self.sums.append(sums)
        self.passed.append((sums.calls, sums.busy_ns, passed_ns))

    def add_short(self, blocks: list[list[int]], passed_ns: int) -> None:
        self.add([each for block in blocks for each in block], passed_ns)


class Caller:
    """Calls as `shortest` does."""

    def __init__(self, watch: Any = None) -> None:
        self.clock, self.watch = WatchedClock(), watch or Watch()
        self.clock.watch = self.watch
        self.now_ns = self.clock.ended_ns
        self.looks = 0

    def call(self, took_ns: int, pause_ns: int = 2000) -> None:
        started_ns = self.now_ns + pause_ns
        self.now_ns = ended_ns = started_ns + took_ns
        clock = self.clock
        clock.note(took_ns)
        clock.count += 1
        if clock.count >= clock.due or ended_ns >= clock.due_ns:
            self.looks += 1
            clock.pass_on(started_ns, ended_ns)
        clock.ended_ns = ended_ns


@given(st.lists(st.tuples(st.integers(1, 3_000), st.integers(1, 20_000_000), st.integers(0, 10**9)), min_size=1, max_size=6))
def test_each_call_is_passed_on_once_and_in_order(phases: list[tuple[int, int, int]]) -> None:
    caller, made = Caller(), []
    for calls, took_ns, pause_ns in phases:
        for number in range(calls):
            made.append(took_ns + number % 7)
            caller.call(made[-1], pause_ns if number == 0 else 2000)
    told = caller.watch.durations
    assert told == made[: len(told)] and len(made) - len(told) < RING + BLOCK
    assert caller.clock.count == len(made) and caller.clock.total_ns == sum(made)
    assert sum(passed_ns for _, _, passed_ns in caller.watch.passed) <= caller.now_ns


@pytest.mark.parametrize("took_ns", [60_000, 300_000, 1_000_000, 1_900_000, 5_000_000])
def test_calls_are_passed_on_seldom_where_nothing_is_told_of_them(took_ns: int) -> None:
    caller = Caller()
    for _ in range(8000):
        caller.call(took_ns)
    passed = [calls for calls, _, _ in caller.watch.passed[5:]]
    if took_ns < 2_000_000:
        assert min(passed) * took_ns >= 20_000_000 and (min(passed) >= 480 or min(passed) * took_ns >= 200_000_000)
    assert (max(passed) - BLOCK) * took_ns <= 250_000_000  # a warm-up needs some


@pytest.mark.parametrize("limits", [Calm(), Calm(call_ns=1e9, ratio=1e12, most_ns=10**9), None], ids=["warming up", "calm", "slow"])
@pytest.mark.parametrize(
    ("burst", "took_ns", "pause_ns"), [(100, 300_000, 120_000_000), (100, 1_000_000, 300_000_000), (400, 300_000, 300_000_000)]
)
def test_what_is_passed_on_of_bursts_are_calls_in_a_row(limits: Calm | None, burst: int, took_ns: int, pause_ns: int) -> None:
    """Else a slowdown is held against no pace that is known: the calls are cut into other parts as soon as they are slow."""
    caller = Caller()
    caller.watch.limits = limits
    for _ in range(2):  # at first it may not be seen that they are bursts
        caller.watch.passed.clear()
        for number in range(300 * burst):
            caller.call(took_ns, 2000 if number % burst else pause_ns)
    in_row = [calls for calls, busy_ns, passed_ns in caller.watch.passed if passed_ns < 1.1 * busy_ns]
    assert sum(in_row) >= 0.8 * 300 * burst


@pytest.mark.parametrize("pause_ns", [2000, 8_000_000, 200_000_000])
def test_long_calls_are_not_looked_at_before_they_are_a_block(pause_ns: int) -> None:
    """A lane of a pipeline has its turn seldom: each look is a twentieth of a stage of 2 ms, and only a block can tell anything."""
    caller = Caller()
    for _ in range(20 * BLOCK):
        caller.call(4_000_000, pause_ns)
    assert sum(calls for calls, _, _ in caller.watch.passed) >= 19 * BLOCK
    assert caller.looks <= 22


ANY_RATIO = 1e12  # of what calls are said to take to the CPU time of these tests


def watched(took_ns: int, ratio: float = ANY_RATIO) -> Caller:
    """Return a caller whose calls are slow from 1.14 times on of what they took, as was passed on lately."""
    caller = Caller()
    caller.watch.limits = Calm(call_ns=1.14 * took_ns, ratio=ratio, most_ns=2 * took_ns)
    for _ in range(max(1200, 300_000_000 // took_ns)):
        caller.call(took_ns)
    caller.watch.passed.clear()
    caller.watch.sums.clear()
    caller.looks = 0
    return caller


@pytest.mark.parametrize("took_ns", [10_000, 60_000, 300_000, 1_000_000])
def test_short_calls_that_are_not_slow_wait_for_seconds_or_as_many_as_are_remembered(took_ns: int) -> None:
    caller, observation = watched(took_ns), max(BLOCK, 20_000_000 // took_ns)
    for _ in range(5 * RING):
        caller.call(took_ns * 11 // 10)
    most = min(2e9 / (1.1 * took_ns), RING - BLOCK)
    waited = [calls for calls, _, _ in caller.watch.passed]
    assert min(waited) >= most / 1.1 and max(waited) <= most * 1.1
    assert caller.looks >= 5 * RING // (observation + 1)  # whether they are


@pytest.mark.parametrize("took_ns", [10_000, 60_000, 300_000, 1_000_000])
def test_calls_that_are_kept_from_cores_are_passed_on_with_the_first_observation_of_them(took_ns: int) -> None:
    caller, observation = watched(took_ns, 1e-9), max(BLOCK, 20_000_000 // took_ns)
    caller.call(took_ns)
    caller.watch.passed.clear()
    for _ in range(2 * observation + 2):  # one altogether, and what is left of the one before
        caller.call(took_ns)
    assert caller.watch.passed
    caller.watch.limits = None  # and then each, as long as they may come to be told
    for _ in range(2 * observation + 2):
        caller.call(took_ns * 12 // 10)
    caller.watch.passed.clear()
    for _ in range(10 * observation):
        caller.call(took_ns * 12 // 10)
    assert len(caller.watch.passed) >= 8


@pytest.mark.parametrize("took_ns", [60_000, 300_000, 1_000_000])
@pytest.mark.parametrize("begun", [False, True])
def test_calls_that_are_slow_otherwise_are_passed_on_by_a_few_observations(took_ns: int, begun: bool) -> None:
    """Such a slowdown is told after half a second at the soonest, and is a host's mood mostly, which comes and goes."""
    caller, observation = watched(took_ns), max(BLOCK, 20_000_000 // took_ns)
    for _ in range(observation // 2):
        caller.call(took_ns)
    caller.watch.passed.clear()
    if begun:  # and as long as it goes on
        caller.watch.limits = Calm(call_ns=math.inf, ratio=ANY_RATIO, most_ns=2 * took_ns, begun=True)
    slow = 0
    while len(caller.watch.passed) < 6 and slow < 60 * observation:
        caller.call(took_ns * 12 // 10)
        slow += 1
    by = [calls / observation for calls, _, _ in caller.watch.passed]
    assert by[0] <= RING / observation and min(by[1:]) >= 3.3 and max(by[1:]) <= 5.2  # observations of slow calls have fewer
    assert slow <= 32 * observation  # those before it were passed on with the first of them, after 4 to 5 observations


def test_calls_that_waited_are_told_by_sums_in_which_none_counts_for_much() -> None:
    caller = watched(60_000)
    waiting = caller.clock.count - caller.clock.added_up[0]
    made = [60_000] * waiting
    for number in range(2 * RING):
        made.append(60_000 + number % 11 + 80_000 * (number % 1000 == 5))
        caller.call(made[-1])
    first = next(each for each in caller.watch.sums if each.calls >= waiting)
    counted = [min(each, 120_000) for each in made[: first.calls]]
    assert list(first.each_ns) == [sum(counted[at : at + first.step]) for at in range(0, first.calls, first.step)]
    assert first.busy_ns == sum(made[: first.calls]) > sum(first.each_ns)
    assert list(first.last_ns) == made[first.calls - BLOCK : first.calls]


def test_calls_before_a_pause_do_not_wait_for_those_behind_it() -> None:
    caller = watched(300_000)
    for _ in range(200):
        caller.call(300_000)
    caller.watch.passed.clear()
    caller.call(300_000, 1_000_000_000)
    assert [calls for calls, _, _ in caller.watch.passed] and caller.watch.passed[0][2] < 1_000_000_000


@pytest.mark.parametrize(("took_ns", "burst"), [(1_000_000, 300), (300_000, 400), (60_000, 400)])
def test_calls_of_a_burst_are_passed_on_as_calls_in_a_row(took_ns: int, burst: int) -> None:
    caller = Caller()
    for number in range(40 * burst):
        caller.call(took_ns, 1_000_000_000 if number % burst == 0 else 2000)
    for calls, taken_ns, passed_ns in caller.watch.passed[1:]:
        assert passed_ns - taken_ns <= 2000 * calls  # the pause is in none of them


def test_who_pauses_at_each_call_has_a_pace_of_his_own() -> None:
    caller = Caller()
    for _ in range(200):
        caller.call(1_000_000, 1_000_000_000)
    for calls, taken_ns, passed_ns in caller.watch.passed[1:]:
        assert passed_ns - taken_ns == pytest.approx(calls * 1e9, rel=0.1)


def test_a_fault_of_the_watch_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such counter")

    watch = Watch()
    broken: Callable[..., None] = fails
    watch.add = watch.add_short = broken  # type: ignore[method-assign]
    caller = Caller(watch)
    with caplog.at_level(logging.ERROR, logger="aivmm.engine"):
        for _ in range(100):
            caller.call(5_000_000)
    assert caller.clock.count == 100 and caller.clock.watch is None
    assert caplog.text.count("latency is not watched any more") == 1 and "no such counter" in caplog.text


@pytest.mark.parametrize("took_ns", [60_000, 300_000, 5_000_000])
def test_what_looks_take_is_no_pause_of_the_caller(took_ns: int) -> None:
    class Slow(Watch):
        def add(self, durations_ns: list[int], passed_ns: int, block: int = BLOCK) -> None:
            super().add(durations_ns, passed_ns, block)
            time.sleep(2e-3)

    caller = Caller(Slow())
    while len(caller.watch.passed) < 6:
        before = len(caller.watch.passed)
        caller.call(took_ns)
        if len(caller.watch.passed) > before:
            caller.now_ns += 2_000_000
    for calls, taken_ns, passed_ns in caller.watch.passed[1:]:
        assert taken_ns <= passed_ns <= taken_ns + 2000 * calls


@pytest.mark.parametrize("kind", ["python", "native"])
def test_a_look_that_is_waited_with_is_timed_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "native" and hot.native is None:
        pytest.skip(hot.why_not)
    clock: Any = clocks.PythonClock() if kind == "python" else hot.native.Clock()  # type: ignore[union-attr]
    monkeypatch.setattr(clocks, "process_time_ns", lambda: time.sleep(3e-3) or time.process_time_ns())
    clock.fill()
    clock.wait(0, 16, RING - 1, 10**9, 10**9, 1e9, 1e12, 0)
    for _ in range(RING // 2):
        clock.note(1000)
        clock.count += 1
    assert clock.looking_ns == 0
    assert clock.may_wait(1000)
    assert clock.looking_ns >= (3_000_000 if kind == "python" else 1)
    taken_ns = clock.looking_ns
    assert not clock.may_wait(2 * 10**9) and clock.looking_ns == taken_ns  # the clock said so: there was no look


class Turns(ByHand):
    """A core on which others take turns of 4 ms with this process.

    In Linux who has had 1.4 ms and reads its CPU time gives it up at once.
    """

    others = 0
    had_s = looking_s = 0.0

    def works(self, seconds: float) -> float:
        """Need so much CPU time; return how long that takes."""
        began_s = self.at.seconds
        while seconds > 0:
            part_s = min(seconds, 4e-3 - self.had_s)
            self.passes(part_s, own=part_s)
            seconds, self.had_s = seconds - part_s, self.had_s + part_s
            if self.had_s >= 4e-3 - 1e-9:
                self.gives_up()
        return self.at.seconds - began_s

    def gives_up(self) -> None:
        waits_s, self.had_s = 4e-3 * self.others, 0.0
        self.passes(waits_s, others=waits_s, waited=waits_s)

    def own_s(self) -> float:
        found_s, began_s = self.at.own, self.at.seconds
        if self.had_s >= 1.4e-3:
            self.gives_up()
        self.looking_s += self.at.seconds - began_s
        return found_s


class Sharing(Caller):
    """Calls on a core that is shared. What `pass_on` times is added by hand."""

    def __init__(self, seed: int) -> None:
        self.told: list[Drift] = []
        self.machine, self.rng = Turns(), np.random.default_rng(seed)
        super().__init__(PacedMonitor(None, tell=self.told.append, machine=self.machine))

    def need(self, seconds: float) -> None:
        looks = self.looks
        self.call(int(1e9 * self.machine.works(seconds * np.exp(self.rng.normal(0, 0.05)))))
        if self.looks > looks:
            self.machine.own_s()  # as `may_wait` does
        looking_ns, self.machine.looking_s = int(1e9 * self.machine.looking_s), 0.0
        self.now_ns += looking_ns
        self.clock.looking_ns += looking_ns


@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_who_takes_the_core_while_it_is_looked_at_is_told_all_the_same(others: int, seed: int) -> None:
    """Calls of 0.37 ms on a core with three busy processes: what was waited in looks was taken for pauses, and so for another pace, whose
    baseline the neighbours were in. They were told after 4 to 8 s, or never."""
    caller = Sharing(seed)
    for _ in range(8000):
        caller.need(370e-6)
    assert not caller.told and caller.watch.state()["state"] == "inside"
    caller.machine.others = others
    began_s, calls = caller.machine.at.seconds, 0
    while not caller.told and calls < 3000:
        caller.need(370e-6)
        calls += 1
    assert [each.cause for each in caller.told] == ["other processes"]
    assert caller.machine.at.seconds - began_s < 1.5
