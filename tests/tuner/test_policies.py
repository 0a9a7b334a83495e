"""Searching how a model may be cut, on costs that are made up, so that the best placement is known."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.db.database import Database
from aivmm.planner.evidence import Estimate
from aivmm.planner.lazy import Span
from aivmm.planner.partition import ChainEvidence, beliefs_of, place_cuts
from aivmm.planner.records import RunRecord
from aivmm.runtime.config import Config
from aivmm.tuner.policies import STUDY, PolicySearch
from tests.db.killing import FACTS
from tests.planner.test_partition import CPU, GPU, MS, exactly, structure

RUN = "00000000-0000-4000-8000-000000000001"
CONV, ATTENTION = [MS, MS, 4 * MS, 4 * MS], [4 * MS, 4 * MS, MS, MS]  # what each target is good at


class Chain:
    """Four blocks on two targets, a database, and what segments take in their place."""

    def __init__(self, folder: Path, costs: Mapping[str, Sequence[float]], *, cut_s: float = 0.0) -> None:
        self.database = Database.open(f"sqlite:///{folder / 't.db'}")
        self.notes: list[str] = []
        self.measured: list[tuple[Span, ...]] = []
        self.recalled: list[tuple[Span, ...]] = []
        self.stored: set[tuple[Span, ...]] = set()  # what the database knows
        self.costs, self.cut_s = costs, cut_s
        model = structure(4)
        alone = {(index, name): exactly(each) for name, row in costs.items() for index, each in enumerate(row)}
        self.evidence = ChainEvidence(
            structure=model, beliefs=beliefs_of(model, list(costs), alone, {n: exactly(sum(r)) for n, r in costs.items()})
        )
        run = RunRecord(id=RUN, request="r", started_at=datetime.now(UTC), model=FACTS, objective="latency")
        self.database.start_run(run)
        self.work = SimpleNamespace(
            targets=(CPU, GPU),
            options=SimpleNamespace(seed=1),
            asked=lambda: False,
            run_id=RUN,
            note=self.notes.append,
            database=self.database,
        )

    def measure(self, spans: Sequence[Span]) -> dict[Span, Estimate]:
        """Say what segments take: their blocks, and behind each boundary what nobody was told."""
        (self.recalled if tuple(spans) in self.stored else self.measured).append(tuple(spans))
        hidden = [0.0] + [self.cut_s] * (len(spans) - 1)
        return {each: exactly(sum(self.costs[each[2]][each[0] : each[1] + 1]) + extra) for each, extra in zip(spans, hidden, strict=True)}

    def search(self, *, seconds: float = 60.0, **configs: Config) -> int:
        ends = time.perf_counter() + seconds
        return PolicySearch(cast(Any, self.work), self.evidence, configs, self.measure, lambda: len(self.measured), 8 * MS, ends).run()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_policies_that_place_alike_are_measured_once_and_teach_the_exact_placement(folder: Path) -> None:
    chain = Chain(folder, {str(CPU): CONV, str(GPU): ATTENTION})
    assert chain.search() == len(chain.measured) == len(set(chain.measured)) >= 1
    best = ((0, 1, str(CPU)), (2, 3, str(GPU)))
    assert best in chain.measured
    trials = chain.database.trials(RUN, study_name=STUDY)
    assert len({(each.target, str(each.policy)) for each in trials}) == len(trials) > len(chain.measured)  # whole models, too
    least = min((each for each in trials if each.value is not None), key=lambda each: each.value or 0.0)
    assert least.policy is not None and least.value == pytest.approx(0.5, rel=0.05)
    (study,) = chain.database.studies(RUN)
    assert (study.name, study.front) == (STUDY, (least.number,))
    assert "had to be measured" in chain.notes[0]
    # The placement that follows rests on what was measured.
    found = place_cuts(chain.evidence, lambda spans: {}, min_segments=1)
    assert found.worth_proving[0][1].plan.segments == best


def test_what_a_cut_really_costs_is_found_out_where_it_was_thought_to_pay(folder: Path) -> None:
    chain = Chain(folder, {str(CPU): CONV, str(GPU): ATTENTION}, cut_s=30 * MS)
    assert chain.search() >= 1
    assert place_cuts(chain.evidence, lambda spans: {}, min_segments=1, most=4).worth_proving == ()


@pytest.mark.parametrize("gpu", [[9 * MS] * 4, [MS] * 4])
def test_where_no_cut_can_matter_nothing_is_searched(folder: Path, gpu: list[float]) -> None:
    chain = Chain(folder, {str(CPU): [2 * MS] * 4, str(GPU): gpu})
    assert chain.search() == 0
    assert chain.database.trials(RUN) == [] and chain.notes == [] and chain.measured == []


def test_without_time_nothing_is_measured_and_the_reason_is_kept(folder: Path) -> None:
    chain = Chain(folder, {str(CPU): CONV, str(GPU): ATTENTION})
    assert chain.search(seconds=-1.0) == 0 and chain.measured == []
    reasons = {each.reason for each in chain.database.trials(RUN) if each.policy is not None and each.state == "pruned"}
    assert "there was no time to measure it" in reasons


def test_what_is_recalled_is_not_counted_as_measured(folder: Path) -> None:
    (folder / "first").mkdir()
    first = Chain(folder / "first", {str(CPU): CONV, str(GPU): ATTENTION})
    first.search()
    chain = Chain(folder, {str(CPU): CONV, str(GPU): ATTENTION})
    chain.stored = set(first.measured)
    assert chain.search() == len(chain.measured) and set(chain.recalled) == set(first.measured)
    count, known = len(chain.measured), len(chain.recalled)
    assert f"of which {count} placement{'' if count == 1 else 's'} had to be measured, {known} " in chain.notes[0]


def test_a_repeated_search_tries_the_same_policies_in_the_same_order(folder: Path) -> None:
    tried = []
    for number in range(2):
        (folder / str(number)).mkdir()
        chain = Chain(folder / str(number), {str(CPU): CONV, str(GPU): ATTENTION})
        chain.search()
        tried.append([str(each.policy) for each in chain.database.trials(RUN)])
    assert tried[0] == tried[1]
