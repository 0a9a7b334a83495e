"""A repeated run goes by the scores that the first one was told, whatever was raced since."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.records import TrialRecord
from aivmm.planner.space import Space
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target
from aivmm.tuner.asked import request
from aivmm.tuner.explore import Explorer
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.told import as_told

TARGET = Target(runtime="null", name="CPU", device=Device(kind="cpu", model="made-up"), runtime_version="1")
CONFIG = Config(settings=(("threads", 2),), precision="fp32")


def candidate(batch: int = 1) -> Candidate:
    return Candidate(target=TARGET, config=CONFIG, batch=batch)


def told(state: str = "complete", value: float | None = 1.9, **changes: object) -> TrialRecord:
    known = {"low": 1.8, "high": 2.0, "median_s": 0.019, "metrics": {"latency": 0.019}} if state == "complete" else {}
    base = {"number": 0, "target": str(TARGET), "config": CONFIG, "batch": 1, "callers": 1, "state": state, "value": value}
    return TrialRecord(**{**base, **known, **changes})  # type: ignore[arg-type]


def newest(ratio: float = 2.1) -> Score:
    return Score(ratio=ratio, low=2.0, high=2.2, median_s=0.021, reused=True, metrics={"latency": 0.021, "compile": 0.5})


def test_what_an_earlier_run_was_told_goes_before_what_was_raced_since() -> None:
    mine = candidate()
    (found,) = as_told({mine.key: (mine, newest())}, [told()]).values()
    assert found[0] is mine
    assert isinstance(found[1], Score)
    assert (found[1].ratio, found[1].low, found[1].high, found[1].median_s) == (1.9, 1.8, 2.0, 0.019)
    assert found[1].metrics == {"latency": 0.019, "compile": 0.5}  # what was not kept with the trial stays
    assert found[1].reused


def test_what_no_run_was_told_stays_as_it_was_measured() -> None:
    mine, other = candidate(), candidate(batch=4)
    known = {mine.key: (mine, newest()), other.key: (other, newest(3.0))}
    assert as_told(known, []) == known
    assert as_told(known, [told()])[other.key] == known[other.key]


def test_the_time_of_one_that_was_pruned_is_the_one_it_was_pruned_with() -> None:
    mine = candidate()
    pruned = Rejection(state="pruned", reason="over the limit", ratio=2.1, reused=True)
    (found,) = as_told({mine.key: (mine, pruned)}, [told("pruned", reason="over the limit")]).values()
    assert isinstance(found[1], Rejection) and (found[1].ratio, found[1].reason) == (1.9, "over the limit")


@pytest.mark.parametrize("state", ["refused", "failed", "pruned"])
def test_a_trial_without_a_time_changes_nothing(state: str) -> None:
    mine = candidate()
    known = {mine.key: (mine, newest())}
    assert as_told(known, [told(state, value=None, reason="no room")]) == known


def test_a_run_that_repeats_another_tells_its_search_no_more_than_that_one_did() -> None:
    """What the first measured after its search, parts of the processor for copies, is known and was no point of it."""
    mine, part = candidate(), replace(candidate(), config=Config(settings=(("threads", 1),), precision="fp32"))
    database = SimpleNamespace(trials=lambda _, study_name: [told()] if study_name == "search" else [], studies=lambda _: [])
    work, earlier = cast(Any, SimpleNamespace(database=database, note=lambda _: None)), cast(Any, SimpleNamespace(id="earlier"))
    for searched_before, wanted in ((True, [mine]), (False, [mine, part])):
        explorer = Explorer(work, searched_before=searched_before, earlier=earlier)
        explorer.known = {each.key: (each, newest()) for each in (mine, part)}
        found = explorer._told_before(Space(targets=[TARGET], knobs={}, objective="throughput", precisions={str(TARGET): ["fp32"]}))
        assert [each for each, _ in found] == wanted


def test_what_is_preferred_is_part_of_a_request_and_for_throughput_how_factors_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one decides which targets are searched at all; of the other a run that only repeats would have none."""
    subject = SimpleNamespace(structure=SimpleNamespace(content="c"), base_batch=1, data_digest="", ways=list, subject_of=str)

    def asked_for(**changes: Any) -> str:
        return request(cast(Any, SimpleNamespace(options=TuneOptions(model="m", **changes), subject=subject, targets=())))

    found = [asked_for(), asked_for(prefer=("*:GPU*",)), asked_for(prefer=("*:CPU", "*:GPU*")), asked_for(prefer=("*:GPU*", "*:CPU"))]
    assert len(set(found)) == 4 and asked_for(prefer=("*:GPU*",)) == found[1]
    before = asked_for(), asked_for(objective="throughput")
    monkeypatch.setattr("aivmm.tuner.asked.FACTORS", "otherwise")
    after = asked_for(), asked_for(objective="throughput")
    assert before[0] == after[0] and before[1] != after[1]
