"""Comparisons of durations, and races with contestants whose durations are known."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import Unsupported, UsageError
from aivmm.probes import race as racing
from aivmm.probes.client import WorkerDied
from aivmm.probes.compare import bootstrap_median, cautions, compare, median_interval, round_medians, verdict
from aivmm.probes.machine import BackgroundLoad, lock_path, machine_cautions, measuring, peak_memory_bytes, wait_until_quiet
from aivmm.probes.race import Contestant, RaceState, known_well, leader_of, per_sample_s, race, versus
from aivmm.probes.records import Samples
from aivmm.runtime.null_device import FakeClock

DURATIONS = st.lists(st.floats(1e-6, 1e2), min_size=1, max_size=30)


def samples(*durations: float, rounds: tuple[int, ...] = ()) -> Samples:
    return Samples(timed_s=durations, rounds=rounds)


# --- comparing ---


def test_a_known_ratio_is_found_under_noise_that_both_sides_share() -> None:
    noise = np.random.default_rng(0).uniform(1, 5, 40)
    found = compare(samples(*(2 * noise)), samples(*noise))
    assert found.ratio == pytest.approx(2) and found.low == pytest.approx(2) and found.high == pytest.approx(2)
    assert found.pairs == 40 and found.verdict == "slower"


def test_the_scale_is_for_batches() -> None:
    found = compare(samples(*[4.0] * 10), samples(*[1.0] * 10), scale=1 / 4)
    assert found.ratio == pytest.approx(1) and found.verdict == "same"


def test_only_rounds_that_both_ran_are_paired_by_their_medians() -> None:
    a = samples(1, 3, 2, 50, rounds=(0, 0, 0, 7))
    b = samples(4, 99, rounds=(0, 1))
    found = compare(a, b)
    assert found.pairs == 1 and found.ratio == pytest.approx(0.5)
    assert round_medians(a) == {0: 2, 7: 50}
    with pytest.raises(ValueError, match="not measured in one race"):
        compare(samples(1, rounds=(0,)), samples(1, rounds=(1,)))


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.5, 0.98, "faster"),
        (1.02, 2, "slower"),
        (0.995, 1.005, "same"),
        (0.9, 1.1, "ambiguous"),
        (0.9, 1.0, "ambiguous"),
        (1.0, 1.02, "ambiguous"),
    ],
)
def test_verdicts(low: float, high: float, word: str) -> None:
    assert verdict(low, high) == word


SWAPPED = {"faster": "slower", "slower": "faster", "same": "same", "ambiguous": "ambiguous"}


@given(low=st.floats(0.9, 1.1), width=st.floats(0, 0.1))
def test_the_verdict_on_the_inverse_is_the_inverse(low: float, width: float) -> None:
    high = low + width
    edges = (1.01, 1 / 1.01)
    if all(abs(value - edge) > 1e-9 for value in (low, high) for edge in edges):
        assert verdict(1 / high, 1 / low) == SWAPPED[verdict(low, high)]


@settings(deadline=None, max_examples=60)
@given(a=DURATIONS, data=st.data())
def test_swapping_the_sides_inverts_everything(a: list[float], data: st.DataObject) -> None:
    b = data.draw(st.lists(st.floats(1e-6, 1e2), min_size=len(a), max_size=len(a)))
    there, back = compare(samples(*a), samples(*b)), compare(samples(*b), samples(*a))
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1)
    assert there.high * back.low == pytest.approx(1)
    assert there.low <= there.ratio * (1 + 1e-9) and there.ratio <= there.high * (1 + 1e-9)


def test_the_interval_is_the_same_each_time_and_students_where_values_are_few() -> None:
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap_median(values, confidence=0.95) == bootstrap_median(values, confidence=0.95)
    # Three values: their range misses the median in a quarter of all cases. Student: 2 ± 4.303 / sqrt(3).
    assert bootstrap_median([3.0, 1.0, 2.0], confidence=0.95) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert bootstrap_median([1.0, 1.0, 1.0], confidence=0.95) == (1.0, 1.0)
    low, high = bootstrap_median([0.0], confidence=0.95)
    assert low < -0.5 and high > 0.5  # one value says nothing about noise
    narrow, wide = (bootstrap_median(values, confidence=each) for each in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = sum(low <= 1 <= high for low, high in (median_interval(samples(*rng.lognormal(0, 0.1, 25))) for _ in range(60)))
    assert covered >= 50  # 95 % of 60 is 57; the percentile bootstrap is a little short of it


def test_shaky_samples_carry_their_cautions() -> None:
    assert cautions(samples(*[1.0] * 20)) == ()
    assert [each.code for each in cautions(samples(1.0, 2.0, 1.0, 2.0))] == ["spread", "few-samples"]
    assert all(each.advice for each in cautions(samples(1.0, 2.0)))
    cold = cautions(samples(*[1.5] * 5, *[1.0] * 15))
    assert [each.code for each in cold] == ["cold-cache"] and "1.5 times as long" in cold[0].message
    assert not cautions(samples(*[1.0] * 15, *[1.5] * 5))  # slower at the end is no matter of caches
    assert "cold-cache" not in {each.code for each in cautions(samples(*[1.5, 1.0, 1.0, 1.0] * 5))}


# --- racing ---


class Known:
    """Stands for a worker: answers `timed` with the durations it was given, and remembers who was asked."""

    def __init__(
        self,
        durations: dict[str, float],
        *,
        noise: float = 0.0,
        seconds: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        fails: dict[str, Exception] | None = None,
    ) -> None:
        self.pid, self.generation = -1, 1  # no process, yet running
        self.asked: list[str] = []
        self._durations, self._noise, self._fails = durations, noise, fails or {}
        self._seconds, self._sleep = seconds, sleep
        self._random = random.Random(0)

    def call(self, operation: str, *, limit_s: float, name: str, seconds: float, **_: Any) -> dict[str, Any]:
        assert operation == "timed" and seconds > 0 and limit_s > seconds
        self.asked.append(name)
        if name in self._fails:
            raise self._fails[name]
        self._sleep(self._seconds)
        return {"durations": [self._durations[name] * (1 + self._random.uniform(0, self._noise)) for _ in range(3)], "memory_bytes": 5}


def contestants(worker: Known, *names: str, **fields: Any) -> list[Contestant]:
    return [Contestant(name, worker, **fields) for name in names]


def test_the_fastest_leads_and_a_clear_race_ends_early() -> None:
    worker = Known({"slow": 1.05, "fast": 1.0, "slower": 1.07}, noise=0.002)
    field = contestants(worker, "slow", "fast", "slower")
    assert race(field, budget_s=60, least_rounds=8) == 8
    leader = leader_of(field)
    assert leader is not None and leader.name == "fast"
    assert compare(field[0].samples(), leader.samples()).verdict == "slower"  # type: ignore[arg-type]
    # What is loaded twice differs by percents for as long as it lives, in one process too: 5 % of one load each is no claim yet.
    assert versus(field[0], leader).verdict == "ambiguous"
    found = leader.samples()
    assert found and len(found.timed_s) == 24 and set(found.rounds) == set(range(8)) and len(found.warmup_s) == 3
    assert leader.memory_bytes == 5


def test_a_close_race_goes_on_to_its_last_round() -> None:
    worker = Known({"a": 1.0, "b": 1.0}, noise=1.0)
    assert race(contestants(worker, "a", "b"), budget_s=60, least_rounds=4, most_rounds=12) == 12


def test_a_race_goes_on_until_it_is_known_by_how_much() -> None:
    field = contestants(Known({"reference": 3.0, "fast": 1.0}, noise=0.2), "reference", "fast", keep=True)
    rounds = race(field, budget_s=60, least_rounds=8)
    assert rounds == 8  # who is faster is clear
    ends = race(field, budget_s=60, first_round=rounds, warmup=False, enough=known_well(field))
    found = compare(field[1].samples(), field[0].samples())  # type: ignore[arg-type]
    assert ends > 20 and found.high / found.low < 1.031 and found.pairs == ends
    assert known_well(field)(4) and not known_well(field)(5)  # looking costs more than a short round
    assert not known_well(contestants(Known({}), "reference", "fast"))(4)  # nothing was timed


def test_what_a_race_could_not_settle_says_so_and_nothing_else_does() -> None:
    field = contestants(Known({"a": 1.0, "b": 1.0, "clear": 3.0}, noise=1.0), "a", "b", "clear")
    race(field, budget_s=60, least_rounds=4, most_rounds=12)
    leader = leader_of(field)
    told = {each.name: [caution.code for caution in each.cautions] for each in field}
    assert leader is not None and leader.name in ("a", "b")
    assert told == {"a": [], "b": [], "clear": []} | {"ab".replace(leader.name, ""): ["never-settled"]}
    steady = contestants(Known({"a": 1.0, "b": 1.2}, noise=0.001), "a", "b")
    race(steady, budget_s=60)
    assert not steady[0].cautions and not steady[1].cautions


def test_the_hopeless_leave_and_those_to_keep_stay() -> None:
    worker = Known({"fast": 1.0, "hopeless": 2.0, "baseline": 3.0}, noise=0.01)
    field = contestants(worker, "fast", "hopeless", "baseline")
    field[2].keep = True
    race(field, budget_s=60, least_rounds=10, enough=lambda rounds: rounds >= 12)
    assert field[1].dropped.startswith("hopeless: ") and not field[1].racing
    assert not field[0].dropped and not field[2].dropped
    assert worker.asked.count("hopeless") < worker.asked.count("baseline") == 13


def test_each_round_has_an_order_of_its_own_that_the_seed_repeats() -> None:
    def orders(seed: int) -> list[tuple[str, ...]]:
        worker = Known({"a": 1.0, "b": 1.0, "c": 1.0}, noise=1.0)
        race(contestants(worker, "a", "b", "c"), budget_s=60, most_rounds=10, seed=seed, enough=lambda _: False)
        return [tuple(worker.asked[at : at + 3]) for at in range(0, len(worker.asked), 3)]

    assert all(sorted(each) == ["a", "b", "c"] for each in orders(0))
    assert len(set(orders(0))) > 2
    assert orders(0) == orders(0) != orders(1)


def test_the_budget_ends_it_but_not_before_there_is_something_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of their own, whose time passes in blocks alone: 10 ms each, 20 ms a round."""
    clock = FakeClock()
    monkeypatch.setattr(racing, "time", SimpleNamespace(perf_counter=clock.now))
    monkeypatch.setattr(racing, "measuring", lambda: nullcontext(0.0))
    worker = Known({"a": 1.0, "b": 1.0}, noise=1.0, seconds=0.01, sleep=clock.advance)
    assert race(contestants(worker, "a", "b"), budget_s=0.0, least_rounds=5) == 5
    rounds = race(contestants(worker, "a", "b"), budget_s=0.3, least_rounds=3, most_rounds=10_000)
    assert 0.3 - 0.02 <= 0.02 * (rounds + 1) <= 0.3 + 0.04  # with the one to warm up


def test_batches_are_compared_by_the_sample() -> None:
    worker = Known({"one": 1.0, "four": 2.0})
    one, four = contestants(worker, "one", "four")
    four.batch = 4
    race([one, four], budget_s=60)
    assert leader_of([one, four]) is four
    assert per_sample_s(four) == pytest.approx(0.5)
    assert versus(four, one).ratio == pytest.approx(0.5) and versus(one, four).ratio == pytest.approx(2)


@pytest.mark.parametrize("error", [WorkerDied("crashed"), Unsupported("out of memory")])
def test_one_that_fails_costs_only_itself(error: Exception) -> None:
    worker = Known({"good": 1.0, "also": 1.2}, fails={"bad": error})
    field = contestants(worker, "bad", "good", "also")
    race(field, budget_s=60)
    assert field[0].failed and str(error) in field[0].failed.reason and field[0].samples() is None
    assert worker.asked.count("bad") == 1
    leader = leader_of(field)
    assert leader is not None and leader.name == "good"


def test_a_race_of_one_and_a_race_of_none_end() -> None:
    only = contestants(Known({"a": 1.0}), "a")
    assert race(only, budget_s=60) == 8
    assert leader_of(only) is only[0]
    assert race([], budget_s=60) == 8 and leader_of([]) is None


def test_a_later_race_numbers_its_rounds_on_and_tells_how_it_goes() -> None:
    told: list[RaceState] = []
    field = contestants(Known({"a": 1.0, "b": 1.3}), "a", "b")
    after = race(field, budget_s=60, first_round=100, warmup=False, tell=told.append)
    assert after == 108 and min(field[0].rounds) == 100 and not field[0].warmup
    assert [each.round for each in told] == list(range(1, 9))
    assert told[-1].leader is field[0] and told[0].racing == 2 and told[-1].racing == 1


# --- the machine ---


def test_one_measurement_runs_at_a_time() -> None:
    with measuring() as waited:
        assert waited < 5
        with pytest.raises(UsageError, match="another aivmm has been measuring"), measuring(timeout_s=0.05):
            pass
    with measuring():
        pass


def test_a_lock_that_cannot_be_made_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "file" / "lock"))
    assert lock_path() == tmp_path / "file" / "lock"
    with pytest.raises(UsageError, match="set AIVMM_LOCK"), measuring(timeout_s=0.1):
        pass


def test_where_no_folder_can_be_written_there_is_no_lock_and_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container whose file systems are all read-only."""
    monkeypatch.delenv("AIVMM_LOCK", raising=False)
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(UsageError, match="set AIVMM_LOCK to a file that you may write, or TMPDIR to a folder"), measuring(timeout_s=0.1):
        pass


def test_waiting_for_quiet_ends_soon_for_what_is_quiet_gone_or_never_quiet() -> None:
    assert wait_until_quiet(2**22 + 1) < 10
    assert wait_until_quiet(os.getpid()) < 10  # which is never quiet: this very call burns time


def test_foreign_load_is_a_number_of_cores() -> None:
    load = BackgroundLoad([])
    time.sleep(0.05)
    assert 0 <= load.read([]) < 1024
    assert peak_memory_bytes() > 10 << 20
    assert [each.code for each in machine_cautions(1.0, 2) if each.code == "machine-busy"] == ["machine-busy"]
    assert not [each for each in machine_cautions(0.1, 2) if each.code == "machine-busy"]
