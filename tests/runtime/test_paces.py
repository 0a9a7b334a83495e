"""Drift where calls come apart: a change of the caller's rate is none, and a slowdown is one, whatever it leaves alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from aivmm.runtime import paces
from aivmm.runtime.drift import BLOCK, Drift
from aivmm.runtime.paces import PacedMonitor
from aivmm.runtime.plan import Number
from tests.runtime.machines import ByHand, Suspicious

Floats = npt.NDArray[np.float64]
CALL_S = 5e-3


def plan_says(value: float = CALL_S) -> Number:
    return Number(value=value, low=value * 0.98, high=value * 1.02, source="measured", samples=1000)


def noisy(call_s: float, count: int, seed: int = 0) -> Floats:
    return call_s * np.exp(np.random.default_rng(seed).normal(0, 0.08, count))


def passes(watch: PacedMonitor, nanoseconds: int) -> None:
    """Let time pass on the machine that is asked for causes."""
    assert isinstance(watch._machine, ByHand)
    watch._machine.passes(nanoseconds / 1e9)


def paced(watch: PacedMonitor, seconds: Floats, pause: float) -> None:
    """Feed latencies with pauses between them, as a lane does."""
    for at in range(0, len(seconds) - BLOCK + 1, BLOCK):
        calls = (seconds[at : at + BLOCK] * 1e9).astype(np.int64).tolist()
        passes(watch, sum(calls) + int(BLOCK * pause * 1e9))
        watch.add(calls, sum(calls) + int(BLOCK * pause * 1e9))


def test_calls_are_slower_after_pauses_and_that_is_no_drift() -> None:
    """What was measured on a virtual machine: a model of 0.33 ms takes twice as long after 2 ms, and 2.7 times after 100 ms."""
    rng, call = np.random.default_rng(0), 0.33e-3
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(call), tell=told.append, machine=Suspicious())

    def noise(count: int) -> Floats:
        return call * np.exp(rng.normal(0, 0.08, count))

    for factor, pause in ((1.0, 0.0), (2.15, 2e-3), (2.7, 0.1), (1.0, 10e-6), (1.4, 0.33e-3), (2.15, 2e-3), (1.0, 0.0)):
        paced(watch, factor * noise(6000), pause)
        assert not told and watch.state()["state"] == "inside", pause
    paced(watch, 2.15 * 1.3 * noise(6000), 2e-3)  # and this is one
    assert len(told) == 1 and watch.state()["state"] == "outside"
    paced(watch, 1.3 * noise(6000), 0.0)  # the same one
    assert len(told) == 1
    paced(watch, 2.15 * noise(6000), 2e-3)
    assert watch.state()["state"] == "inside" and len(watch.state()["events"]) == 1


def test_an_engine_that_is_asked_now_and_then_is_not_held_against_a_plan_that_was_proven_without_pauses() -> None:
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(0.33e-3), tell=told.append, machine=Suspicious())
    paced(watch, 0.9e-3 * np.exp(np.random.default_rng(0).normal(0, 0.1, 20_000)), 0.1)
    assert not told and watch.state()["state"] == "inside"


def test_one_pause_among_many_calls_in_a_row_says_nothing_of_calls_that_come_far_apart() -> None:
    rng, call = np.random.default_rng(0), 0.33e-3
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(call), tell=told.append, machine=Suspicious())
    for _ in range(400):
        paced(watch, call * np.exp(rng.normal(0, 0.08, 8 * BLOCK)), 0.0)
        paced(watch, call * np.exp(rng.normal(0, 0.08, BLOCK)), 0.1)  # a pause of 1.6 s, and then as before
    paced(watch, 2.7 * call * np.exp(rng.normal(0, 0.08, 6000)), 0.1)
    assert not told and watch.state()["state"] == "inside"


def test_turns_of_other_callers_are_no_pauses() -> None:
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(), callers=4, tell=told.append, machine=Suspicious())
    paced(watch, noisy(CALL_S, 4000), 2 * CALL_S)
    paced(watch, 1.5 * noisy(CALL_S, 4000), 2 * CALL_S)
    assert len(told) == 1 and told[0].plan_s == CALL_S


def at_rate(watch: PacedMonitor, seconds: Floats, period: float) -> None:
    """Feed latencies of calls that are made each `period` seconds, or one after another where they take longer."""
    for at in range(0, len(seconds) - BLOCK + 1, BLOCK):
        calls = (seconds[at : at + BLOCK] * 1e9).astype(np.int64).tolist()
        watch.add(calls, int(sum(max(each, 1e9 * period) for each in calls)))


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("busy", [0.2, 0.35, 0.5, 0.65, 0.8])
@pytest.mark.parametrize("factor", [1.35, 1.6, 2.0, 3.0])
def test_calls_at_a_fixed_rate_are_told_within_200(factor: float, busy: float, expected: bool) -> None:
    told: list[Drift] = []
    watch = PacedMonitor(plan_says() if expected else None, tell=told.append, machine=Suspicious())
    at_rate(watch, noisy(CALL_S, 2000), CALL_S / busy)
    assert not told and watch.state()["state"] == "inside"
    at_rate(watch, noisy(factor * CALL_S, 208, seed=1), CALL_S / busy)
    assert len(told) == 1 and watch.state()["state"] == "outside"


@pytest.mark.parametrize("pause", [0.5e-3, 1e-3, 3e-3, 5e-3, 10e-3, 0.1])
@pytest.mark.parametrize("factor", [1.35, 1.6, 2.0, 3.0])
def test_calls_with_a_fixed_pause_are_told_within_200(factor: float, pause: float) -> None:
    told: list[Drift] = []
    watch = PacedMonitor(None, tell=told.append, machine=Suspicious())
    paced(watch, noisy(CALL_S, 2000), pause)
    assert not told and watch.state()["state"] == "inside"
    paced(watch, noisy(factor * CALL_S, 208, seed=1), pause)
    assert len(told) == 1 and watch.state()["state"] == "outside"


def natural(pause: float) -> float:
    """What a call of 0.33 ms takes after a pause, put between what was measured."""
    pauses, factors = (50e-6, 0.2e-3, 0.33e-3, 2e-3, 0.1), (1.0, 1.24, 1.4, 2.15, 2.7)
    return 0.33e-3 * float(np.interp(np.log(pause + 1e-9), np.log(pauses), factors))


@pytest.mark.parametrize("seed", range(4))
def test_a_caller_who_changes_his_rate_again_and_again_has_no_drift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(0.33e-3), tell=told.append, machine=Suspicious())
    for _ in range(40):
        pause = 0.0 if rng.random() < 0.2 else float(np.exp(rng.uniform(np.log(20e-6), np.log(0.2))))
        paced(watch, noisy(natural(pause), 3000, seed=int(rng.integers(1 << 30))), pause)
    assert not told and watch.state()["state"] in ("inside", "warming up")


class Clock:
    """Seconds, moved by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(paces, "monotonic", clock)
    return clock


def test_a_slowdown_that_was_told_at_another_pace_is_told_again_when_that_pace_is_over(clock: Clock) -> None:
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(), tell=told.append, machine=Suspicious())
    paced(watch, noisy(CALL_S, 2000), 0.0)
    paced(watch, noisy(CALL_S, 2000), 0.05)
    paced(watch, noisy(2 * CALL_S, 2000), 0.05)
    assert len(told) == 1
    clock.now_s += 10.0
    paced(watch, noisy(2 * CALL_S, 2000), 0.0)  # the same one, as far as anybody knows
    assert len(told) == 1 and watch.state()["state"] == "outside"
    clock.now_s += 51.0
    paced(watch, noisy(2 * CALL_S, 2 * BLOCK), 0.0)  # and it lasts
    assert len(told) == 2 and told[1].plan_s == CALL_S and told[1].live_s == pytest.approx(2 * CALL_S, rel=0.05)
    assert watch.state()["state"] == "outside" and len(watch.state()["events"]) == 2
    clock.now_s += 600.0
    paced(watch, noisy(2 * CALL_S, 4000), 0.0)
    assert len(told) == 2


def test_a_slowdown_of_another_pace_is_told_at_once_when_the_one_before_is_over(clock: Clock) -> None:
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(), tell=told.append, machine=Suspicious())
    for factor in (1.0, 2.0, 1.0):
        paced(watch, noisy(factor * CALL_S, 2000), 0.05)
    assert len(told) == 1 and watch.state()["state"] == "inside"
    paced(watch, noisy(2 * CALL_S, 2000), 0.0)  # 2000 calls after the other one was over, and within the same minute
    assert len(told) == 2


def test_what_is_too_slow_stays_so_when_the_rate_changes(clock: Clock) -> None:
    watch = PacedMonitor(plan_says(), tell=lambda event: None, machine=Suspicious())
    paced(watch, noisy(CALL_S, 2000), 0.05)
    paced(watch, noisy(2 * CALL_S, 1000), 0.05)
    paced(watch, noisy(2 * CALL_S, 4 * BLOCK), 0.5)
    assert watch.state()["state"] == "outside"
    clock.now_s += 61.0  # nobody knows by now
    paced(watch, noisy(2 * CALL_S, BLOCK), 0.5)
    assert watch.state()["state"] == "warming up"


@pytest.mark.parametrize("burst", [32, 48, 80])
@pytest.mark.parametrize("ahead", [0, 5, 11])  # how many calls of a burst are in a block with the end of the one before
def test_bursts_are_watched(burst: int, ahead: int) -> None:
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(), tell=told.append, machine=Suspicious())

    def bursts(factor: float, count: int) -> None:
        calls = (noisy(factor * CALL_S, burst * count, seed=int(factor)) * 1e9).astype(np.int64).tolist()
        for at in range(0, len(calls) - BLOCK + 1, BLOCK):
            gaps = sum((call - ahead) % burst == 0 for call in range(at, at + BLOCK))
            watch.add(calls[at : at + BLOCK], sum(calls[at : at + BLOCK]) + gaps * 760_000_000)

    bursts(1.0, 3000 // burst)
    assert not told and watch.state()["state"] == "inside"
    bursts(2.0, 600 // burst)
    assert len(told) == 1 and told[0].plan_s == CALL_S and watch.state()["state"] == "outside"


def test_one_gap_in_a_block_now_and_then_costs_that_block_alone() -> None:
    """Of calls at a fixed rate: those of the other blocks are of one pace, and those of that block of none."""
    told: list[Drift] = []
    watch = PacedMonitor(plan_says(), tell=told.append, machine=Suspicious())

    def calls(factor: float, count: int) -> None:
        for _ in range(count // 2):
            at_rate(watch, noisy(factor * CALL_S, BLOCK, seed=len(told)), 4 * CALL_S)
            each = [int(factor * CALL_S * 1e9)] * BLOCK
            watch.add(each, int(BLOCK * 4e9 * CALL_S) + 1_000_000_000)

    calls(1.0, 200)
    assert not told and watch.state()["state"] == "inside"
    calls(1.5, 26)
    assert len(told) == 1 and watch.state()["state"] == "outside"
