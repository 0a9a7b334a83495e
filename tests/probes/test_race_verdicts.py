"""What a verdict is worth: races and comparisons on simulated machines whose noise is known, the same in every run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.probes.compare import APART, Apart, Comparison, bootstrap_median, compare, observed_apart
from aivmm.probes.records import Samples

CONFIDENCE = 0.99
TRIALS = 100


def machine(
    rng: np.random.Generator, rounds: int, copies: int, factors: tuple[float, ...], *, process: float, block: float, spikes: float = 0.1
) -> list[Samples]:
    """Return a race on a machine with slow phases that all share, spikes that hit single blocks, and processes that differ for life."""
    slow = np.cumsum(rng.random(rounds) < 0.1) % 2 * 0.5
    turn = np.arange(rounds) % copies
    made = []
    for factor in factors:
        lifelong = rng.normal(0, process, copies)[turn]
        hit = np.where(rng.random(rounds) < spikes, rng.exponential(0.5, rounds), 0)
        made.append(factor * np.exp(slow + lifelong + rng.normal(0, block, rounds) + hit))
    return [Samples(timed_s=tuple(each), rounds=tuple(range(rounds))) for each in made]


def different(rounds: int, factor: float, *, copies: int = 1, process: float = 0.0, block: float = 0.02, know: bool = True) -> float:
    """Return how often the first of three is told from the second, when it takes `factor` times as long."""
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(TRIALS):
        runs = machine(rng, rounds, copies, (factor, 1.0, 1.0), process=process, block=block)
        apart = observed_apart(runs, copies) if know and process else None
        verdict = compare(runs[0], runs[1], confidence=CONFIDENCE, copies=(copies, copies), apart=apart).verdict
        found += verdict in ("faster", "slower")
    return found / TRIALS


@pytest.mark.parametrize("rounds", [5, 8, 12])
@pytest.mark.parametrize("block", [0.02, 0.1])
def test_the_same_in_one_process_is_rarely_called_different(rounds: int, block: float) -> None:
    assert different(rounds, 1.0, block=block) <= 0.02


def test_five_percent_in_one_process_are_found() -> None:
    assert different(40, 1.05) >= 0.9


@pytest.mark.parametrize(("process", "copies"), [(0.03, 1), (0.03, 3), (0.01, 2)])
def test_the_same_in_other_processes_is_rarely_called_different(process: float, copies: int) -> None:
    assert different(24, 1.0, process=process, copies=copies) <= 0.02


def test_five_percent_across_processes_are_found_by_copies_in_several() -> None:
    assert different(48, 1.05, process=0.005, copies=6) >= 0.9


@pytest.mark.slow
def test_five_percent_across_processes_that_differ_by_three_are_found_by_many_copies() -> None:
    assert different(240, 1.05, process=0.03, copies=40) >= 0.9


def test_copies_on_cores_of_unlike_speed_are_told_from_five_percent_and_not_from_each_other() -> None:
    """As seen on a virtual machine (decision 0029): a third of the rounds is far out, since the core was another or did something else."""
    rng = np.random.default_rng(5)
    found = {1.0: 0, 1.05: 0}
    for _ in range(40):
        for factor in found:
            runs = machine(rng, 168, 12, (factor, 1.0, 1.0), process=0.004, block=0.03, spikes=0.18)
            apart = observed_apart(runs, 12)
            found[factor] += compare(runs[0], runs[1], confidence=CONFIDENCE, copies=(12, 12), apart=apart).verdict in ("faster", "slower")
    assert found[1.0] == 0 and found[1.05] >= 36


def test_rounds_alone_cannot_tell_a_process_from_a_config() -> None:
    """The reason for all this: without copies, noise that lasts as long as a process looks like a difference."""
    assert different(48, 1.0, process=0.03, know=False) > 0.3


def test_the_spread_between_processes_is_found_from_copies() -> None:
    rng = np.random.default_rng(0)
    vague = Apart(sd=0.01, weight=1.0)
    for process in (0.0, 0.03):
        found = [
            observed_apart(machine(rng, 80, 8, (1.0, 1.3, 2.0, 1.0), process=process, block=0.01, spikes=0), 8, prior=vague)
            for _ in range(20)
        ]
        assert found[0].weight == 1 + 3 * 7
        typical = math.sqrt(np.mean([each.sd**2 for each in found]))
        assert typical == pytest.approx(process, rel=0.2) if process else typical < 0.004


def test_without_copies_the_prior_is_all_there_is() -> None:
    runs = machine(np.random.default_rng(0), 12, 1, (1.0, 1.0), process=0.03, block=0.01)
    assert observed_apart(runs, 1) is APART
    assert observed_apart(runs[:1], 4) is APART
    assert observed_apart(runs, 12) is APART  # one round of each copy says nothing
    known = Apart(sd=0.02, weight=math.inf)
    assert observed_apart(runs, 4, prior=known) is known
    assert known.half_width((1, 1), 0.95) == pytest.approx(1.96 * 0.02 * math.sqrt(2), rel=1e-3)
    assert known.half_width((4, 4), 0.95) == pytest.approx(known.half_width((1, 1), 0.95) / 2)


def wide(sd: float, copies: int) -> Comparison:
    runs = machine(np.random.default_rng(1), 24, copies, (1.1, 1.0), process=0.01, block=0.02)
    return compare(runs[0], runs[1], copies=(copies, copies), apart=Apart(sd=sd, weight=5))


@settings(deadline=None, max_examples=25)
@given(sd=st.floats(0, 0.2), more=st.floats(1e-3, 0.2), copies=st.integers(1, 6))
def test_more_spread_between_processes_never_makes_an_interval_narrower(sd: float, more: float, copies: int) -> None:
    narrow, wider = wide(sd, copies), wide(sd + more, copies)
    assert wider.low <= narrow.low <= narrow.ratio <= narrow.high <= wider.high
    assert wider.ratio == narrow.ratio


@pytest.mark.parametrize("count", [2, 3, 6, 8, 15])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int, confidence: float) -> None:
    rng = np.random.default_rng(count)
    missed = 0
    for _ in range(TRIALS):
        low, high = bootstrap_median(rng.standard_normal(count), confidence=confidence)
        missed += not low <= 0 <= high
    # 3 standard deviations of what chance may add
    assert missed / TRIALS <= (1 - confidence) + 3 * math.sqrt(confidence * (1 - confidence) / TRIALS)


def test_rounds_that_follow_each_other_in_their_noise_know_less() -> None:
    rng = np.random.default_rng(4)
    steps = rng.standard_normal(60)
    together = np.repeat(steps[:15], 4) + 0.1 * steps
    alone = rng.permutation(together)
    (low, high), (least, most) = (bootstrap_median(each, confidence=0.95) for each in (together, alone))
    assert high - low > 1.2 * (most - least)


def test_a_spread_that_is_none_is_refused() -> None:
    for sd, weight in ((-0.1, 1.0), (math.inf, 1.0), (0.1, 0.0)):
        with pytest.raises(ValueError, match="no spread"):
            Apart(sd=sd, weight=weight)
