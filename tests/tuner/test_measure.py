"""What is remembered of candidates, and what of it an objective can use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.objectives import OBJECTIVES
from aivmm.probes.client import WorkerDied
from aivmm.probes.records import Measured, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.tuner.measure import WINDOWS, Measurer
from tests.planner.test_search import target

ONE = Candidate(target=target(), config=Config())


def remembered(
    metrics: Mapping[str, float], *, callers: int = 1, timed_s: tuple[float, ...] = (0.001, 0.001, 0.001), **fields: Any
) -> Score | Rejection | None:
    """Return what a measurer knows of a candidate whose race an earlier run stored, with these metrics.

    That of one caller is the race's reference; of several, the reference in their race has these metrics, and they have none.
    """
    subject = SimpleNamespace(judged_of=lambda _: "these inputs", deterministic=True, size_bytes=lambda _: 1000)
    measurer = Measurer(
        lab=cast(Any, None), subject=cast(Any, subject), database=cast(Any, None), run_id="", reference=ONE, cosine_limit=None, **fields
    )
    key = ProbeKey(kind="model", subject="s", target=str(ONE.target), environment="e", config=ONE.config, batch=1, callers=1)
    samples, several = Samples(timed_s=timed_s), replace(ONE, callers=callers)
    measurer._races["race"] = {several.key: Measured(key=replace(key, callers=callers), samples=samples, metrics={}, race="race")}
    measurer._races["race"][ONE.key] = Measured(key=key, samples=samples, metrics=metrics, race="race")
    return measurer._known(several)


def test_a_race_on_other_inputs_tells_the_time_and_not_the_accuracy() -> None:
    """Times are kept by structure, and accuracy for its content and inputs alone."""
    assert isinstance(remembered({"cosine@others": 1.0}), Score)
    assert remembered({"cosine@others": 1.0}, needs=frozenset({"cosine"})) is None
    known = remembered({"cosine@these inputs": 0.99}, needs=frozenset({"cosine"}))
    assert isinstance(known, Score)
    assert OBJECTIVES["accuracy"].loss(ONE, known) > -10
    unusable = remembered({"unusable@these inputs": 1.0}, needs=frozenset({"cosine"}))
    assert isinstance(unusable, Rejection)


def test_calls_and_windows_of_one_caller_are_not_taken_for_each_other() -> None:
    """A median of calls has none of the machine's stalls in it, and a mean of a window has them all."""
    assert remembered({}) is not None and remembered({WINDOWS: 1.0}) is None
    assert remembered({}, rate=True) is None
    known = remembered({WINDOWS: 1.0}, rate=True)
    assert isinstance(known, Score) and "p99" not in known.metrics


def test_several_callers_are_not_reused_beside_a_reference_of_the_other_kind() -> None:
    assert remembered({}, callers=2, rate=True) is None and remembered({WINDOWS: 1.0}, callers=2) is None
    assert isinstance(remembered({WINDOWS: 1.0}, callers=2, rate=True), Score) and isinstance(remembered({}, callers=2), Score)


def test_throughput_is_what_all_rounds_answered_and_not_what_most_did() -> None:
    """Every third round answers a third as much; the latency of calls is that of most."""
    for rate, per_s in ((True, (1000 + 1000 + 1000 / 3) / 3), (False, 1000)):
        known = remembered({WINDOWS: 1.0} if rate else {}, timed_s=(0.001, 0.001, 0.003), rate=rate)
        assert isinstance(known, Score)
        assert known.metrics["throughput"] == pytest.approx(per_s) and 1 / known.median_s == pytest.approx(per_s)


@pytest.mark.parametrize("cards_only", [False, True])
def test_what_could_not_be_counted_is_known_as_long_as_the_counters_are_the_same(cards_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated tuning measured each such baseline again, and found as little."""

    def stored(*, counters: bool, died: bool = False) -> dict[str, float]:
        def count(*_: object) -> dict[str, float]:
            if died:
                raise WorkerDied("out of memory")
            return {}

        monkeypatch.setattr("aivmm.tuner.measure.energy_metrics", count)
        monkeypatch.setattr("aivmm.tuner.measure.has_counters", lambda _: counters)
        measurer = Measurer(cast(Any, None), cast(Any, None), cast(Any, None), "", ONE, None, counts_energy=True, cards_only=cards_only)
        return measurer._energy(ONE, cast(Any, None))

    def known(metrics: Mapping[str, float], *, now_cards_only: bool = cards_only) -> Score | Rejection | None:
        return remembered(metrics, counts_energy=True, cards_only=now_cards_only)

    assert known({}) is None and stored(counters=True, died=True) == {}
    for counters in (False, True):  # none, or they did not tick
        metrics = stored(counters=counters)
        found = known(metrics)
        assert isinstance(found, Rejection) and "energy could not be counted" in found.reason
        assert known(metrics, now_cards_only=not cards_only) is None
        monkeypatch.setattr("aivmm.tuner.measure.has_counters", lambda _, now=not counters: now)
        assert known(metrics) is None


@pytest.mark.parametrize(("metrics", "said"), [({"energy_j": 0.0}, "energy could not be counted"), ({}, "compile is not known")])
def test_what_an_objective_needs_and_nobody_counted_is_no_score(metrics: Mapping[str, float], said: str) -> None:
    counts = "energy_j" in metrics
    outcome = remembered(metrics, counts_energy=counts, needs=frozenset({"energy" if counts else "compile"}))
    assert isinstance(outcome, Rejection) and said in outcome.reason
