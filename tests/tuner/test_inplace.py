"""Segments timed in their place and alone: real runtimes, a real bundle, a real worker."""

from __future__ import annotations

import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.db.database import Database
from aivmm.planner.candidates import Draft, Piece
from aivmm.planner.chain import ChainPlan
from aivmm.planner.evidence import Estimate
from aivmm.planner.lazy import Look, look
from aivmm.planner.partition import CUT_S, ChainEvidence
from aivmm.planner.records import RunRecord
from aivmm.planner.segments import Segments
from aivmm.probes.arrays import save_arrays
from aivmm.probes.client import Worker
from aivmm.probes.compare import compare
from aivmm.probes.race import Contestant
from aivmm.probes.records import Samples
from aivmm.runtime.config import Config
from aivmm.runtime.engine import Engine
from aivmm.runtime.environment import environment_of
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target
from aivmm.tuner.cutting import CutPlan, Cutter
from aivmm.tuner.inplace import InPlace, _shared_out, chain_digest, middle_half, probe_in_place
from aivmm.tuner.measure import Counts
from aivmm.tuner.narrow import resting
from tests.db.killing import FACTS
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal
from tests.planner.test_partition import structure


def target(name: str) -> Target:
    return next(each for each in load_backend(name.partition(":")[0]).targets() if str(each) == name and isinstance(each, Target))


@pytest.fixture
def draft() -> Draft:
    pieces = (
        Piece(target=target(OPENVINO), config=Config(precision="fp32"), first=0, last=1),
        Piece(target=target(ONNXRUNTIME), config=Config(precision="fp32"), first=2, last=3),
    )
    return Draft(name="cut plan", pieces=pieces)


def test_each_segment_is_timed_between_its_neighbours_and_alone(tmp_path: Path, draft: Draft) -> None:
    bundle = make_bundle(tmp_path / "cut.aivmm", chain_model(width=64), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4, 7)])
    sample = tmp_path / "sample.npz"
    save_arrays(sample, {"x": normal(2, 64)})
    found = probe_in_place(draft, bundle, sample=sample)
    assert not isinstance(found, str), found
    assert [each.span for each in found] == [(0, 1, OPENVINO), (2, 3, ONNXRUNTIME)]
    assert all(len(each.placed.timed_s) >= 5 and len(each.alone.timed_s) >= 5 for each in found)
    assert all(f"blocks {each.piece.first} to {each.piece.last} on {each.piece.target}" in str(each) for each in found)
    assert found[0].engine_s == found[1].engine_s >= 0
    again = InPlace.recalled(found[0].piece, found[0].placed, found[0].alone, found[0].metrics())
    assert again == found[0]
    assert found[0].difference == pytest.approx(found[0].placed.median_s / found[0].alone.median_s - 1)


def test_segments_have_their_shares_of_the_whole_chain() -> None:
    # The two are slow in turn: no call takes less than 5, and the medians of the two add up to 2.
    assert middle_half([[1, 4, 1, 4, 1, 90], [4, 1, 4, 1, 4, 90]]) == [pytest.approx(2.5), pytest.approx(2.5)]
    assert middle_half([[3.0], [1.0]]) == [3.0, 1.0]


def test_a_chain_takes_turns_with_the_reference(tmp_path: Path, draft: Draft) -> None:
    bundle = make_bundle(tmp_path / "cut.aivmm", chain_model(width=64), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4, 7)])
    sample = tmp_path / "sample.npz"
    save_arrays(sample, {"x": normal(2, 64)})
    with Worker("reference") as worker:
        worker.call("load_bundle", limit_s=60, name="reference", bundle=str(bundle), inputs=str(sample))
        found = probe_in_place(draft, bundle, sample=sample, others=[worker.pid], reference=Contestant("reference", worker))
    assert not isinstance(found, str), found
    # The reference is the same chain: its segments and the engine's own share make one of it.
    whole_s = sum(each.placed.median_s for each in found) + found[0].engine_s
    assert sum(each.ratio or 0.0 for each in found) + found[0].engine_s / whole_s == pytest.approx(1.0, abs=0.35)
    assert found[0].sigma == found[1].sigma > 0
    assert all(len(each.placed.timed_s) == len(found[0].placed.timed_s) for each in found)


def test_what_a_chain_takes_beside_the_reference_is_shared_out_exactly(draft: Draft) -> None:
    def took(name: str, *seconds: float) -> Contestant:
        return Contestant(name, Worker(name), durations=list(seconds), rounds=list(range(len(seconds))))

    # A chain that takes 1.25 times as long in each round; in the middle half of its calls the segments take 3 and 1 and the engine 1.
    stages = [
        {"placed": [3.5, 2.5, 9.0, 3.5, 2.5, 0.1, 3.0, 3.0], "alone": [2.0]},
        {"placed": [0.5, 1.5, 9.0, 0.5, 1.5, 0.1, 8.0, 0.5], "alone": [0.5]},
    ]
    answer = {"stages": stages, "beyond": [0.5, 1.0, 60.0]}
    first, second = _shared_out(
        draft, answer, took("engine", 5.0, 10.0, 2.5, 5.0, 5.0, 5.0), took("reference", 4.0, 8.0, 2.0, 4.0, 4.0, 4.0)
    )
    assert (first.ratio, second.ratio) == (pytest.approx(0.75, rel=1e-12), pytest.approx(0.25, rel=1e-12))
    assert (first.sigma, second.sigma) == (0.0, 0.0)  # no round says otherwise
    assert first.engine_s == second.engine_s == 1.0
    assert [each.placed.timed_s for each in (first, second)] == [tuple(each["placed"]) for each in stages]
    assert [each.alone.timed_s for each in (first, second)] == [(2.0,), (0.5,)]
    # Rounds that differ: how sure the ratio is of the whole is how sure each share is.
    unsure = _shared_out(draft, answer, took("engine", 5.0, 6.0, 4.0, 5.0, 7.0, 5.0), took("reference", *[4.0] * 6))
    found = compare(
        Samples(timed_s=(5.0, 6.0, 4.0, 5.0, 7.0, 5.0), rounds=tuple(range(6))), Samples(timed_s=(4.0,) * 6, rounds=tuple(range(6)))
    )
    assert found.high > found.low
    assert unsure[0].sigma == unsure[1].sigma == pytest.approx(math.log(found.high / found.low) / 3.92)
    # Nothing beside it, or nothing that ran: no ratio.
    for beside in (None, took("reference")):
        assert {each.ratio for each in _shared_out(draft, answer, took("engine", 5.0), beside)} == {None}


def test_wrong_numbers_are_a_reason(tmp_path: Path, draft: Draft) -> None:
    bundle = make_bundle(tmp_path / "cut.aivmm", chain_model(width=64), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4, 7)])
    sample, expected = tmp_path / "sample.npz", tmp_path / "expected.npz"
    save_arrays(sample, {"x": normal(2, 64)})
    with Engine.load(bundle) as engine:
        save_arrays(expected, {name: -array for name, array in engine.run({"x": normal(2, 64)}).items()})
    answer = probe_in_place(draft, bundle, sample=sample, expected=expected, cosine_limit=0.999)
    assert isinstance(answer, str) and "cosine" in answer


def test_a_bundle_that_does_not_load_is_a_reason(tmp_path: Path, draft: Draft) -> None:
    sample = tmp_path / "sample.npz"
    save_arrays(sample, {"x": normal(2, 64)})
    answer = probe_in_place(draft, tmp_path / "nowhere.aivmm", sample=sample)
    assert isinstance(answer, str) and answer


def test_the_same_segment_among_other_neighbours_is_another_measurement(draft: Draft) -> None:
    swapped = Draft(name="cut plan", pieces=(draft.pieces[1], draft.pieces[0]))
    assert chain_digest(draft, ["a", "b"]) != chain_digest(swapped, ["a", "b"])
    alone, placed = InPlace.keys(0, draft, ["a", "b"])
    assert alone != placed and alone.subject.startswith("a ") and placed.subject.startswith("a ")  # neither is a block's own key


def test_several_looks_are_one_by_how_sure_each_is(draft: Draft) -> None:
    def look(number: int, ratio: float, sigma: float) -> InPlace:
        samples = Samples(timed_s=(float(number), float(number)), rounds=(0, 1))
        return InPlace(piece=draft.pieces[0], placed=samples, alone=samples, ratio=ratio, sigma=sigma, engine_s=1e-6 * number, look=number)

    both = InPlace.of_looks([look(1, 1.0, 0.01), look(2, 1.1, 0.02)])
    assert both.ratio == pytest.approx(1.1**0.2) and both.sigma == pytest.approx(0.01 * 0.8**0.5)
    assert (both.placed.timed_s, both.placed.rounds, both.look) == ((1.0, 1.0, 2.0, 2.0), (0, 1, 2, 3), 2)
    assert InPlace.of_looks([look(1, 1.0, 0.0), look(2, 1.1, 0.02)]).ratio == 1.1  # one says nothing of how sure it is


class Tuning:
    """As much of a tuning as measuring segments takes: a model of two segments that are alike, and a database."""

    def __init__(self, folder: Path, *, fresh: bool = False, measure_new: bool = True) -> None:
        here, number = target(ONNXRUNTIME), len(list(folder.glob("run-*")))
        self.folder = folder / f"run-{number}"
        self.folder.mkdir()
        self.database, self.counts = Database.open(f"sqlite:///{folder / 't.db'}"), Counts()
        self.database.remember_environment(environment_of(here))
        run_id = f"00000000-0000-4000-8000-{number:012}"
        self.database.start_run(RunRecord(id=run_id, request="r", started_at=datetime.now(UTC), model=FACTS, objective="latency"))
        sample = self.folder / "sample.npz"
        save_arrays(sample, {"x": normal(2, 64)})
        work = SimpleNamespace(
            targets=(here,),
            folder=self.folder,
            database=self.database,
            run_id=run_id,
            cosine_limit=None,
            options=SimpleNamespace(fresh=fresh, objective="latency"),
            progress=SimpleNamespace(detail=lambda text: None),
            asked=lambda: False,
            lab=SimpleNamespace(pids=list),
            subject=SimpleNamespace(base_batch=1, deterministic=True, at=lambda batch: SimpleNamespace(samples=[sample])),
            emitter=lambda batch: self,
        )
        measurer = SimpleNamespace(load_reference=lambda: None, reference=SimpleNamespace(key="reference"), counts=self.counts)
        self.cutter = Cutter(cast(Any, work), cast(Any, None), {}, cast(Any, measurer), reference_s=None, measure_new=measure_new)
        self.cutter.evidence = ChainEvidence(structure=structure(4), beliefs={ONNXRUNTIME: Segments([None] * 4)})

    def segment(self, first: int, last: int) -> Any:
        return SimpleNamespace(structure="two layers")

    def write(self, draft: Draft, bundle: Path, *, objective: str) -> None:
        made = make_bundle(self.folder / "made.aivmm", chain_model(width=64), [Part(ONNXRUNTIME, 0, 3), Part(ONNXRUNTIME, 4, 7)])
        shutil.move(made, bundle)
        shutil.rmtree(self.folder / "made.aivmm.work")

    def look(self) -> dict[Any, Any]:
        return self.cutter._measure([(0, 1, ONNXRUNTIME), (2, 3, ONNXRUNTIME)])

    def rows(self) -> int:
        return len(self.database.entries(kind="segment", all=True))


def test_a_second_look_in_one_run_measures_again_and_later_runs_know_both(tmp_path: Path) -> None:
    first = Tuning(tmp_path)
    seen = [first.look()]
    assert len(seen[0]) == 2 and (first.rows(), first.counts.measured) == (4, 4)
    seen.append(first.look())
    assert len(seen[1]) == 2 and (first.rows(), first.counts.measured, first.counts.reused) == (8, 8, 0)
    again = Tuning(tmp_path, measure_new=False)
    assert [again.look(), again.look()] == seen  # each look once, in the order of time
    assert (again.counts.measured, again.counts.reused) == (0, 8)
    # Each of two equal segments has its own rows.
    assert list(again.cutter._seen.values()) == list(first.cutter._seen.values())
    assert again.look() == {}  # what was recalled is no further look, and nothing may be measured
    fresh = Tuning(tmp_path, fresh=True)
    fresh.look()
    assert (fresh.counts.reused, fresh.rows()) == (0, 12)
    after = Tuning(tmp_path)
    after.look()
    assert (after.counts.measured, after.counts.reused) == (0, 4)  # what was measured afresh replaces what was known


def test_what_is_told_of_a_cut_plan_is_what_its_own_chain_took(tmp_path: Path) -> None:
    tuning = Tuning(tmp_path)
    spans = ((0, 1, ONNXRUNTIME), (2, 3, ONNXRUNTIME))
    plan = ChainPlan(assignment=(ONNXRUNTIME,) * 4, segments=spans, cost_s=9.0, bound_s=9.0, seconds=0.0)  # from parts of other chains
    found = tuning.cutter._plan("cut plan", Look(plan=plan, bound_s=9.0, proven=True, probes=2, possible=8, solves=1, seconds=0.0))
    (looks,) = tuning.cutter._seen.values()
    assert [each.seconds for each in found.parts] == [each.placed.median_s for each in looks[0]]  # there is no reference here
    assert found.boundaries_s == 0 and found.expected.seconds == pytest.approx(sum(each.seconds for each in found.parts))
    assert {each.source for each in found.parts} == {"measured"}
    assert found.believed_s is None and not found.assembled  # nobody had timed these segments, alone or anywhere

    other = Tuning(tmp_path, fresh=True)
    assert other.cutter.evidence is not None
    for first, last, name in spans:
        other.cutter.evidence.beliefs[name].observe(first, last, Estimate(seconds=4.0, sigma=0.1, source="measured"))
    found = other.cutter._plan("cut plan", Look(plan=plan, bound_s=9.0, proven=True, probes=2, possible=8, solves=1, seconds=0.0))
    price = other.cutter.evidence.crossing(2, ONNXRUNTIME, ONNXRUNTIME)
    assert found.assembled and price is not None and found.believed_s == pytest.approx(8.0 + price.seconds)
    assert found.expected.seconds < 1


def test_a_boundary_that_is_priced_at_more_than_its_segment_takes_is_paid_once_where_cuts_are_chosen(tmp_path: Path) -> None:
    tuning = Tuning(tmp_path)
    spans = ((0, 1, ONNXRUNTIME), (2, 3, ONNXRUNTIME))
    belief = Segments([Estimate(seconds=1.0, sigma=0.1, source="measured")] * 4)
    evidence = ChainEvidence(structure=structure(4), beliefs={ONNXRUNTIME: belief}, handover_s=lambda source, destination, size: 1.0)
    tuning.cutter.evidence, chain = evidence, evidence.chain(min_segments=2)
    tuning.cutter._after[2, 2, ONNXRUNTIME] = ONNXRUNTIME  # behind the same boundary, learnt when that was still priced at a second
    belief.observe(2, 2, Estimate(seconds=5.0, sigma=0.1, source="measured"))
    learnt = tuning.cutter._measure(spans)
    (looks,) = tuning.cutter._seen.values()
    price = evidence.crossing(2, ONNXRUNTIME, ONNXRUNTIME)
    took = [each.placed.median_s for each in looks[0]]
    assert price is not None and price.seconds == pytest.approx(0.9 * took[1]) and price.seconds < 1
    assert sum(each.seconds for each in learnt.values()) + price.seconds == pytest.approx(sum(took))
    assert belief.measured[2, 2].seconds == pytest.approx(5.0 + 1.0 + CUT_S - price.seconds)
    for first, last, name in spans:
        evidence.beliefs[name].observe(first, last, learnt[first, last, name])
    found = look(chain, lambda wanted: {}, most=0)  # a chain that was there before knows of it too
    assert found.plan.segments == spans and found.plan.cost_s == pytest.approx(sum(took))


def test_parts_that_were_timed_beside_one_reference_err_together() -> None:
    part = Estimate(seconds=1.0, sigma=0.1, source="measured")
    found = CutPlan(draft=cast(Any, None), look=cast(Any, None), parts=(part, part), boundaries_s=0.5)
    assert (found.expected.seconds, found.expected.sigma) == (2.5, pytest.approx(0.1))


def test_segments_that_take_turns_on_one_processor_rest_after_a_run(tmp_path: Path) -> None:
    backend, here = load_backend("onnxruntime"), target(ONNXRUNTIME)
    rests = resting(Config(precision="fp32"), backend.knobs(here))
    assert rests.get("session.force_spinning_stop") == "1" and rests.precision == "fp32"
    never = Config.of({"session.intra_op.allow_spinning": "0"})
    assert resting(never, backend.knobs(here)) == never  # they do not spin anyway
    plain = Config(precision="fp32")
    assert resting(plain, load_backend("openvino").knobs(target(OPENVINO))) == plain
    cutter = Tuning(tmp_path).cutter
    cutter._configs, cutter._resting = {ONNXRUNTIME: plain}, {ONNXRUNTIME: rests}
    assert [each.config for each in cutter._draft("two", [(0, 1, ONNXRUNTIME), (2, 3, ONNXRUNTIME)]).pieces] == [rests, rests]
    assert [each.config for each in cutter._draft("one", [(0, 3, ONNXRUNTIME)]).pieces] == [plain]
