"""Pipelined plans in a tuning with real runtimes: stages measured beside each other, remembered, and a plan whose stages run at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aivmm.planner.candidates import Candidate, Copy, Draft, Piece, Rejection, Score
from aivmm.planner.evidence import Estimate
from aivmm.planner.partition import ChainEvidence
from aivmm.planner.records import TrialRecord
from aivmm.planner.segments import Segments
from aivmm.probes.race import Contestant
from aivmm.runtime.config import Config
from aivmm.runtime.engine import Engine
from aivmm.tuner.decide import Decider
from aivmm.tuner.depths import STUDY, DepthSearch
from aivmm.tuner.explore import Explorer
from aivmm.tuner.measure import Counts
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.pipelining import DEPTH, Pipeliner
from aivmm.tuner.progress import Silent
from aivmm.tuner.session import Session
from aivmm.tuner.together import Together
from aivmm.tuner.whole import Whole, load_engine, raced_whole
from aivmm.tuner.work import Work
from tests.making import ONNXRUNTIME, OPENVINO, chain_model, normal, reference, write_model


class _EnoughError(Exception):
    """The tuning need not go on."""


class _Unmeasurable(Together):
    """Stages that do not run beside each other."""

    def factors(self, draft: Draft, labels: Sequence[Sequence[str]]) -> dict[tuple[str, str], float]:
        return {}


def evidence(work: Work, block_s: float) -> ChainEvidence:
    """Return what is believed where each block takes `block_s` on both targets and a cut costs next to nothing."""
    structure = work.subject.structure
    alone = [Estimate(seconds=block_s, sigma=0.01, source="measured", because="made up") for _ in structure.blocks]
    return ChainEvidence(
        structure=structure, beliefs={name: Segments(alone) for name in (OPENVINO, ONNXRUNTIME)}, handover_s=lambda a, b, size: 1e-9
    )


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TuneOptions:
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "lock"))
    monkeypatch.setenv("AIVMM_CACHE", str(tmp_path / "cache"))
    model = write_model(tmp_path / "chain.onnx", chain_model(width=64, layers=8))
    where = {"output": tmp_path / "chain.aivmm", "db": str(tmp_path / "p.db")}
    return TuneOptions(model=str(model), objective="throughput", budget_s=1.0, trials=1, **where)  # type: ignore[arg-type]


def test_stages_are_measured_at_once_and_remembered_and_the_plan_runs_them_at_once(
    options: TuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(work: Work, explorer: Explorer) -> None:
        assert len(work.subject.structure.blocks) >= 2
        configs = {name: Config(precision="fp32") for name in (OPENVINO, ONNXRUNTIME)}
        counts = Counts()

        def pipeliner(**changes: bool) -> Pipeliner:
            # Blocks of a second: whatever the factors are that these small stages show, the slower of two stages stays below the whole.
            return Pipeliner(
                work=work, evidence=evidence(work, 1.0), configs=configs, together=Together(work=work, counts=counts, **changes)
            )

        first = pipeliner()
        drafts = first.drafts(uncut_s=None)
        assert counts.measured >= 4
        first.together.say()
        assert any("at once, in their place" in note for note in work.notes)
        again = pipeliner(measure_new=False)
        assert [each.pieces for each in again.drafts(uncut_s=None)] == [each.pieces for each in drafts]
        assert counts.reused >= 4
        assert again.together.seen == first.together.seen
        assert pipeliner(measure_new=False).drafts(uncut_s=1e-9) == []
        failing = Pipeliner(work=work, evidence=evidence(work, 1.0), configs=configs, together=_Unmeasurable(work=work, counts=counts))
        assert failing.drafts(uncut_s=None) == [] and failing.tried is not None
        assert (failing.tried.hoped, failing.tried.unmeasurable) == (True, True)
        with monkeypatch.context() as other:  # factors made otherwise are not these
            other.setattr("aivmm.tuner.together.FACTORS", "otherwise")
            assert pipeliner(measure_new=False).drafts(uncut_s=None) == []
        draft = first.draft("p", [(0, 0, OPENVINO), (1, len(work.subject.structure.blocks) - 1, ONNXRUNTIME)], {})
        work.emitter(draft.batch).write(replace(draft, depth=3), tmp_path / "p.aivmm", objective="throughput")
        stopped = DepthSearch(work=work, measurer=explorer.measurer, stop=lambda: True)._outcomes(draft, [1, 2])
        assert all(isinstance(each, Rejection) for each in stopped.values())  # nothing was measured
        _search_depth(work, explorer, draft, measure_new=True)
        _copies_measured_whole(work, explorer)
        raise _EnoughError

    def look_again(work: Work, explorer: Explorer) -> None:
        _search_depth(work, explorer, drafts[0], measure_new=False)
        raise _EnoughError

    drafts: list[Draft] = []
    found: list[tuple[Draft, list[TrialRecord]]] = []

    def _search_depth(work: Work, explorer: Explorer, draft: Draft, *, measure_new: bool) -> None:
        drafts.append(draft)
        deeper, score = DepthSearch(work=work, measurer=explorer.measurer, measure_new=measure_new).best(draft)
        assert score is not None and score.reused is not measure_new
        found.append((deeper, work.database.trials(work.run_id, study_name=STUDY)))

    def _copies_measured_whole(work: Work, explorer: Explorer) -> None:
        config = Config(precision="fp32")
        first, second = (each for each in work.targets if str(each) in (OPENVINO, ONNXRUNTIME))
        piece = Piece(
            target=first, config=config, first=0, last=len(work.subject.structure.blocks) - 1, copies=(Copy(target=second, config=config),)
        )
        both = Draft(name="both", pieces=(piece,), callers=2)
        monkeypatch.setattr("aivmm.tuner.whole._ROUNDS", 0)  # as few as a race has at least: nothing here hangs on the figures
        whole = Whole(work=work, measurer=explorer.measurer, reference_s=1.0)
        assert replace(whole, measure_new=False).expected(both) is None
        seen = whole.expected(both)
        assert seen is not None and seen.source == "measured" and seen.seconds > 0
        assert replace(whole, measure_new=False).expected(both) == seen
        assert replace(whole, measure_new=False).expected(replace(both, callers=3)) is None  # driven otherwise
        assert replace(whole, reference_s=None).expected(both) is None
        _callers_measured_whole(work, explorer)

    def _callers_measured_whole(work: Work, explorer: Explorer) -> None:
        target = next(each for each in work.targets if str(each) == ONNXRUNTIME)
        one, two, slow = (Candidate(target=target, config=Config(precision="fp32"), callers=callers) for callers in (1, 2, 3))
        replicas = replace(two, replicas=2)
        score = Score(ratio=0.1, low=0.1, high=0.1, median_s=0.1)
        scored = [(one, score), (two, score), (replicas, score), (slow, replace(score, ratio=0.2))]

        def seen(*, measure_new: bool, of: int = 4) -> dict[str, Estimate]:
            return raced_whole(work, explorer.measurer, scored[:of], reference_s=1.0, measure_new=measure_new)

        assert seen(measure_new=False) == {}
        found = seen(measure_new=True)
        assert found.keys() == {two.key, replicas.key}  # one caller was timed well enough, and three are far behind
        assert all(each.source == "measured" and each.seconds > 0 for each in found.values())
        assert seen(measure_new=False) == found and seen(measure_new=True, of=1) == {}
        _interrupted_or_short_of_time(work, explorer, [(replace(one, callers=callers), score) for callers in (4, 5, 6)])
        decider = Decider(work, explorer, None, {})  # type: ignore[arg-type]
        decider._whole = found
        assert decider._expected(two, score) == found[two.key] and decider._expected(one, score).because == "the whole model"

    def _interrupted_or_short_of_time(work: Work, explorer: Explorer, scored: list[tuple[Candidate, Score]]) -> None:
        loads: list[str] = []

        def load(*given: Any, **more: Any) -> Contestant | None:
            loads.append("one")
            return load_engine(*given, **more)

        def seen(*, measure_new: bool = True, of: int = 3) -> dict[str, Estimate]:
            return raced_whole(work, explorer.measurer, scored[:of], reference_s=1.0, measure_new=measure_new)

        with monkeypatch.context() as other:
            other.setattr("aivmm.tuner.whole.load_engine", load)
            other.setattr(work, "asked", lambda: bool(loads))  # while the first one loads
            assert seen() == {} and len(loads) == 1
            other.setattr(work, "asked", lambda: False)
            assert seen(measure_new=False) == {}
            looks: list[bool] = []
            other.setattr(work, "asked", lambda: len(looks) > 2 or looks.append(True))  # while it races
            assert seen(of=1) == {} and len(loads) == 2
            other.setattr(work, "asked", lambda: False)
            assert seen(measure_new=False) == {}
            other.setattr("aivmm.tuner.whole.allowed_s", lambda _: 0.0)
            assert seen().keys() == {scored[0][0].key} and len(loads) == 3  # no time for more
            assert seen(measure_new=False).keys() == {scored[0][0].key}

    for each in (look, look_again):
        with pytest.raises(_EnoughError):
            Session(options, Silent(), look=each).run()
    (first, trials), (second, others) = found
    assert first == second and first.callers == 2 * first.depth
    assert sorted(each.depth for each in trials) == [1, 2, 3, 4]
    assert [(each.depth, each.value) for each in others] == [(each.depth, each.value) for each in trials]
    chosen = next(each.value for each in trials if each.depth == first.depth)
    assert chosen is not None and chosen <= 1.02 * min(each.value for each in trials if each.value)
    with Engine.load(tmp_path / "p.aivmm") as engine:
        assert (engine.plan.execution.mode, engine.plan.execution.depth) == ("pipelined", 3)
        assert engine.plan.callers == DEPTH * 2
        inputs = [{"x": normal(2, 64, seed=seed)} for seed in range(6)]
        for feeds, found in zip(inputs, engine.stream(inputs), strict=True):
            np.testing.assert_allclose(found["y"], reference(chain_model(width=64, layers=8), feeds)["y"], rtol=1e-3, atol=1e-4)
