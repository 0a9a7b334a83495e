"""Copies: what may be one, what is said of a plan of several, and that each of them is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from aivmm.models.graph import analyse
from aivmm.models.prepare import prepare
from aivmm.planner.candidates import Candidate, Copy, Draft, Piece, Score
from aivmm.planner.constraints import parse
from aivmm.planner.evidence import Estimate
from aivmm.planner.search import Search
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import Worker
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner.copying import Copier, Known
from aivmm.tuner.decide import Decider
from aivmm.tuner.emit import Emitter
from aivmm.tuner.explore import Explorer
from aivmm.tuner.judging import Judge
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.precision_record import _mark_plan
from aivmm.tuner.progress import Silent
from aivmm.tuner.proof import Entrant, Proof
from aivmm.tuner.subject import Further
from aivmm.tuner.whole import Whole
from tests.conftest import targets_like
from tests.making import chain_model, normal, reference, write_model
from tests.planner.test_search import space, target

FP32, INT8 = Config(precision="fp32"), Config(precision="int8:made")


def beside(one: Target, other: Target | None = None, *, last: int = 0) -> Draft:
    """Return a plan of two copies, the second in int8."""
    copies = (Copy(target=other or one, config=INT8),)
    return Draft(name="both", pieces=(Piece(target=one, config=FP32, first=0, last=last, copies=copies),), callers=2)


def entrant(draft: Draft, folder: Path, **fields: Any) -> Entrant:
    paths = {name: folder / f"{name}.npz" for name in ("sample", "reference")}
    return Entrant(draft=draft, role="candidate", bundle=folder / "both.aivmm", size_bytes=1, **paths, **fields)


# --- what may be a copy ---


def decider(options: TuneOptions, *scored: tuple[Candidate, Score]) -> Decider:
    """Return one that knows what a search was told, with the default of each target in bf16."""
    work = cast(Any, SimpleNamespace(options=options, constraints=options.parsed_constraints()))
    explorer = Explorer(work, searched_before=False)
    explorer.search = Search(space(targets=tuple({each.target for each, _ in scored}), objective="throughput"))
    for each, score in scored:
        explorer.search.tell(each, score)
        explorer._default_precisions[str(each.target)] = "bf16"
    explorer.measurer = cast(Any, SimpleNamespace(reference=scored[0][0]))
    explorer.known = {}
    return Decider(work, explorer, cast(Any, None), {})


def rated(name: str, config: Config, per_s: float) -> tuple[Candidate, Score]:
    metrics = {"throughput": per_s, "latency": 1 / per_s}
    score = Score(ratio=100 / per_s, low=99 / per_s, high=101 / per_s, median_s=1 / per_s, metrics=metrics)
    return Candidate(target=target(name, "bf16", "fp32"), config=config), score


def test_a_limit_on_throughput_is_for_all_copies_together_and_other_limits_for_each() -> None:
    fast, slow = rated("GPU.0", FP32, 120.0), rated("GPU.1", FP32, 110.0)
    options = TuneOptions(model="m", objective="throughput", constraints=("throughput>=200/s",))
    assert [each.candidate for each in decider(options, fast, slow).copyable()] == [fast[0], slow[0]]
    strict = replace(options, constraints=("throughput>=200/s", "latency<=8.5ms"))
    assert [each.candidate for each in decider(strict, fast, slow).copyable()] == [fast[0]]


def test_no_copy_computes_in_a_precision_that_is_barred() -> None:
    barred, named, allowed = rated("GPU.0", Config(), 300.0), rated("GPU.0", Config(precision="bf16"), 290.0), rated("GPU.0", FP32, 100.0)
    options = TuneOptions(model="m", objective="throughput", precisions=("fp32",))
    assert [each.candidate for each in decider(options, barred, named, allowed).copyable()] == [allowed[0]]


def test_copies_take_the_memory_of_their_own_batch() -> None:
    def structure(batch: int) -> Any:
        return SimpleNamespace(blocks=[SimpleNamespace(weight_bytes=1000, outputs=[SimpleNamespace(nbytes=10 * batch)])])

    work = cast(Any, SimpleNamespace(subject=SimpleNamespace(structure=structure(1), structure_at=structure)))
    measured: list[Any] = []

    class Together:
        def factors(self, draft: Draft, labels: Any) -> dict[Any, float]:
            measured.append(draft)
            return {(a, a): 1.0 for a in labels[0]}

    def drafts(capacity: float) -> list[Draft]:
        known = Known(candidate=Candidate(target=target("GPU.0"), config=FP32, batch=64, callers=2), seconds=0.01)
        name = str(known.candidate.target)
        copier = Copier(
            work=work, together=cast(Any, Together()), devices={name: "GPU.0"}, memory_bytes={"GPU.0": capacity}, replicas={name: 2}
        )
        return copier.drafts([known], best_s=None)

    assert len(drafts(2 * 1640.0)) == 1 and measured
    assert drafts(2 * 1640.0 - 1) == []


class Alone:
    """Copies that cost each other nothing."""

    def __init__(self) -> None:
        self.measured: list[Draft] = []

    def factors(self, draft: Draft, labels: Sequence[Sequence[str]]) -> dict[tuple[str, str], float]:
        self.measured.append(draft)
        return {(a, b): 1.0 for a in labels[0] for b in labels[0]}


def copier(
    known: Sequence[Known], room: float, *, weights: int = 1000, lowered: int = 250, together: Any = None, replicas: int = 2
) -> Copier:
    """Return one for a model of one block, whose outputs take ten bytes a sample, on devices with so much memory each."""

    def structure(batch: int) -> Any:
        return SimpleNamespace(blocks=[SimpleNamespace(weight_bytes=weights, outputs=[SimpleNamespace(nbytes=10 * batch)])])

    subject = SimpleNamespace(structure_at=structure, size_bytes=lambda form: weights if form is None else lowered)
    targets = {str(each.candidate.target): each.candidate.target for each in known}
    return Copier(
        work=cast(Any, SimpleNamespace(subject=subject)),
        together=together or cast(Any, Alone()),
        devices={name: name for name in targets},
        memory_bytes=dict.fromkeys(targets, room),
        replicas=dict.fromkeys(targets, replicas),
    )


def at_batch(batch: int, seconds: float, *, config: Config = FP32, device: Target | None = None, callers: int = 1) -> Known:
    return Known(candidate=Candidate(target=device or target("GPU.0"), config=config, batch=batch, callers=callers), seconds=seconds)


def test_a_lowered_copy_takes_the_memory_of_its_lowered_weights() -> None:
    int8 = at_batch(1, 0.01, config=INT8)
    assert len(copier([int8], 2 * 260.0).drafts([int8], best_s=None)) == 1
    assert copier([int8], 2 * 260.0 - 1).drafts([int8], best_s=None) == []


def test_where_two_do_not_fit_at_the_best_batch_a_smaller_one_is_tried() -> None:
    """Batch 64 answers most, and one copy fills the memory; two at batch 8 are more than one at 64."""
    known = [at_batch(64, 0.064), at_batch(8, 0.010), at_batch(1, 0.005)]
    found = copier(known, 2300.0)
    (draft,) = found.drafts(known, best_s=0.001)
    assert draft.batch == 8 and draft.pieces[0].replicas == 2
    assert found.tried is not None and found.tried.promised_per_s == pytest.approx(1600) and found.tried.entrant == draft.name


def test_no_batch_is_measured_that_could_not_beat_what_is_known() -> None:
    together = Alone()
    known = [at_batch(64, 0.064), at_batch(8, 0.010), at_batch(1, 0.005)]
    found = copier(known, 1e9, together=together)
    (draft,) = found.drafts(known, best_s=0.001)
    assert draft.batch == 64 and {each.batch for each in together.measured} == {64}


def test_what_could_be_hoped_for_is_said_where_nothing_is_worth_measuring() -> None:
    known = [at_batch(8, 0.010)]
    found = copier(known, 1e9)
    assert found.drafts(known, best_s=0.0001) == []
    assert found.tried is not None and found.tried.hoped and found.tried.promised_per_s == pytest.approx(1600)
    sentence = replace(found.tried, best_per_s=1e4).sentence(Proof(entrants=[]))
    assert "would answer 1600/s if the parts cost each other nothing, and 10000/s is promised without: not measured" in sentence


def test_what_could_not_be_measured_is_not_called_too_slow() -> None:
    class Refused:
        def factors(self, draft: Draft, labels: Sequence[Sequence[str]]) -> dict[tuple[str, str], float]:
            return {}

    known = [at_batch(8, 0.010)]
    found = copier(known, 1e9, together=Refused())
    assert found.drafts(known, best_s=None) == []
    assert found.tried is not None and found.tried.unmeasurable and found.tried.as_json(Proof(entrants=[]))["could_not_be_measured"]
    sentence = found.tried.sentence(Proof(entrants=[]))
    assert sentence.endswith("would answer 1600/s if the parts cost each other nothing: could not be measured")  # and no best to beat
    slow = copier(known, 1e9, together=Refused())
    assert slow.drafts(known, best_s=0.0001) == []
    assert slow.tried is not None and not slow.tried.unmeasurable


def test_what_several_have_to_beat_is_the_best_plan_whether_it_can_be_copied_or_not() -> None:
    alone, (best, score) = rated("GPU.0", FP32, 100.0), rated("GPU.0", Config(), 160.0)
    found = decider(TuneOptions(model="m", objective="throughput"), alone, (replace(best, replicas=2, callers=2), score))
    assert [each.candidate for each in found.copyable()] == [alone[0]]
    assert found.best_s() == pytest.approx(1 / 160.0)
    limited = decider(TuneOptions(model="m", objective="throughput", constraints=("throughput>=1000/s",)), alone)
    assert limited.best_s() == pytest.approx(1 / 100.0)
    assert decider(TuneOptions(model="m", objective="throughput", constraints=("latency<=1ms",)), alone).best_s() is None


def on_engine(seconds: float) -> Estimate:
    return Estimate(seconds=seconds, sigma=0.0, source="measured", because="on the engine")


def test_what_was_not_raced_on_the_engine_is_taken_for_what_those_like_it_came_to_there() -> None:
    """The fourth of the search kept its time in a bare loop, less than what any plan reaches, and had to be beaten."""
    few = [rated("GPU.0", FP32, per_s) for per_s in (100.0, 99.5, 99.0, 98.0)]
    found_ = [(replace(candidate, callers=2, replicas=number), score) for number, (candidate, score) in enumerate(few, 1)]
    other = (replace(rated("GPU.1", FP32, 90.0)[0], callers=2), rated("GPU.1", FP32, 90.0)[1])
    alone = rated("GPU.0", FP32, 50.0)
    found = decider(TuneOptions(model="m", objective="throughput"), alone, *found_, other)
    for candidate, score in found_[:3]:
        found._whole[candidate.key] = on_engine(1.19 * score.median_s)
        found._factors.append((candidate, 1.19))
    assert found.best_s() == pytest.approx(1.19 / 100)
    known = {each.candidate.key: each.seconds for each in found.copyable()}
    assert known[alone[0].key] == pytest.approx(1 / 50)  # one caller
    assert found._engine_expected_s(*found_[3]) == pytest.approx(1.19 / 98)
    found._factors.append((other[0], 0.95))
    assert found._engine_expected_s(*other) == pytest.approx(0.95 / 90) and found.best_s() == pytest.approx(0.95 / 90)


def test_what_the_engine_takes_is_in_what_was_raced_there_under_whatever_name_it_is_proven() -> None:
    (one, score), other = rated("GPU.0", FP32, 100.0), rated("GPU.1", FP32, 90.0)
    two = replace(one, callers=2)
    found = decider(TuneOptions(model="m", objective="throughput"), other, (two, score))
    found.explorer.known = {two.key: (two, score), other[0].key: other}
    found.explorer.aliases = found.explorer.baselines = []
    found._cutter = cast(Any, SimpleNamespace(engine_s=0.001))
    found._whole[two.key] = on_engine(0.011)
    for name in ("candidate 1", "GPU.0 default, batch 8"):
        assert found._engine_s(Draft.whole(name, two, 1)) == 0.0
    assert found._engine_s(Draft.whole("candidate 1", other[0], 1)) == found._engine_s() == 0.001
    proof = Proof(entrants=[SimpleNamespace(draft=Draft.whole("GPU.0 default", two, 1), metrics={})])  # type: ignore[list-item]
    found.note_predictions(proof)
    metrics, reference_s = proof.entrants[0].metrics, 1 / 90 + 0.001
    assert metrics["predicted_ratio"] == pytest.approx(0.011 / reference_s)
    assert metrics["searched_ratio"] == pytest.approx((1 / 90 + 0.001 / 2) / reference_s)  # calls of two overlap


@pytest.mark.parametrize(
    ("changes", "raced"),
    [
        ({}, ["GPU.0"]),
        ({"prefer": ("*:GPU.1",)}, ["GPU.1"]),
        ({"constraints": ("latency<=10ms", "cosine>=0.999")}, ["GPU.1"]),
        ({"min_segments": 2}, []),
    ],
)
def test_only_what_may_be_the_plan_is_raced_on_the_engine(
    changes: dict[str, Any], raced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may not was the fastest all the same, and those that may were not near it."""
    scored = [rated(name, FP32, per_s) for name, per_s in (("GPU.0", 120.0), ("AUTO", 200.0), ("GPU.1", 100.0))]
    scored = [(replace(each, callers=2), replace(score, metrics={**score.metrics, "cosine": 0.5})) for each, score in scored]
    scored[2][1].metrics["cosine"] = 0.9999  # type: ignore[index]
    asked: list[str] = []

    def all_expected(_: Whole, drafts: Sequence[Draft]) -> dict[str, Estimate]:
        asked.extend(each.pieces[0].target.name for each in drafts)
        return {}

    monkeypatch.setattr(Whole, "all_expected", all_expected)
    made = decider(TuneOptions(model="m", objective="throughput", **changes), *scored)
    structure = SimpleNamespace(blocks=[None])
    targets = [each.target for each, _ in scored]
    left = {
        "all_targets": targets,
        "targets": [each for each in targets if each.name == "GPU.1"],
        "min_segments": made.work.options.min_segments,
    }
    vars(made.work).update(left, asked=lambda: False, progress=Silent(), subject=SimpleNamespace(structure=structure))
    made._race_whole(scored)
    assert asked == raced


def test_on_one_processor_copies_share_its_cores() -> None:
    device = replace(target("CPU"), device=replace(target("CPU").device, cores=2))
    whole = at_batch(1, 0.01, device=device)
    part = at_batch(1, 0.016, config=Config.of({"intra_op_num_threads": 1}, precision="fp32"), device=device)
    assert copier([whole], 1e9).drafts([whole], best_s=None) == []
    (draft,) = copier([whole, part], 1e9).drafts([whole, part], best_s=None)
    assert draft.pieces[0].replicas == 2 and draft.pieces[0].config == part.candidate.config and draft.callers == 2


# --- what is said and judged ---


def test_a_plan_marks_the_form_of_each_of_its_copies() -> None:
    cpu, gpu = target("CPU"), target("GPU.0")
    places = [(str(cpu), FP32), (str(cpu), INT8), (str(gpu), FP32), (str(gpu), INT8)]
    rows: list[dict[str, Any]] = [{"at": each} for each in places]
    _mark_plan(rows, Proof(entrants=[], plan=entrant(beside(cpu, gpu), Path())))
    assert [row["is_plan"] for row in rows] == [True, False, False, True]


def test_the_sentence_on_precision_knows_a_lowered_copy() -> None:
    recipe = SimpleNamespace(precision="int8", plain=(), whole=None, name="made")
    subject = SimpleNamespace(kind_of_samples="samples", classifies=False, lowerer=SimpleNamespace(recipe=lambda _: recipe))
    work, explorer = SimpleNamespace(subject=subject, constraints=()), SimpleNamespace(scout=None)
    said = Decider(cast(Any, work), cast(Any, explorer), cast(Any, None), {}).precision_sentence(
        Proof(entrants=[], plan=entrant(beside(target("CPU")), Path(), metrics={"cosine": 0.9991}))
    )
    assert said.startswith("int8 (made)") and "0.9991" in said


ALONE = Draft.whole("one", Candidate(target=target("CPU"), config=FP32), 1)


@pytest.mark.parametrize(("draft", "asked"), [(beside(target("CPU")), True), (ALONE, False)])
def test_a_plan_with_a_lowered_copy_is_judged_on_all_that_was_held_out(draft: Draft, asked: bool, tmp_path: Path) -> None:
    calls: list[int] = []

    def further() -> Further:
        calls.append(1)
        return Further(samples=(), references=(), extras=())

    one = entrant(draft, tmp_path, samples=[tmp_path / "first.npz"], judged=[{}, {}])
    Judge(cosine_limit=0.9, metric=None, further=further).on_all(one, lambda _: None)
    assert bool(calls) == asked


def test_the_users_metric_is_that_of_the_worst_copy(tmp_path: Path) -> None:
    """The copy in `int8:made` is the model with its last weights doubled: it answers twice as much."""
    ((cpu, *_), _) = targets_like("onnxruntime:CPU")
    path, lowered = tmp_path / "model.onnx", tmp_path / "lowered.onnx"
    model = chain_model(layers=1)
    facts = prepare(write_model(tmp_path / "source.onnx", model), path)
    doubled = 2 * np.frombuffer(model.graph.initializer[0].raw_data, np.float32)
    model.graph.initializer[0].raw_data = doubled.tobytes()
    prepare(write_model(tmp_path / "doubled.onnx", model), lowered)
    structure = analyse(path)
    emitter = Emitter(path, facts, structure, tmp_path / "segments", version="test", lowered=lambda _: lowered)
    draft = beside(cpu, last=len(structure.blocks) - 1)
    one = entrant(draft, tmp_path)
    emitter.write(draft, one.bundle, objective="throughput")
    emitter.close()
    x = normal(2, 32)
    save_arrays(one.sample, {"x": x})

    def most(samples: Sequence[Path], extras: Sequence[Path | None], outputs: Sequence[Path]) -> float:
        return float(np.max(load_arrays(str(outputs[0]))["y"]))

    with Worker("copies") as worker:
        one.worker = worker
        loaded = worker.call("load_bundle", limit_s=120, name="engine", bundle=str(one.bundle), inputs=str(one.sample))
        loaded |= {"accuracy": {}, "problem": ""}
        found = {
            text: Judge(cosine_limit=None, metric=most, constraints=parse(text) if text else ()).proof(one, loaded)[0]["metric"]
            for text in ("", "metric>=0.1", "metric<=0.1")
        }
    plain = float(np.max(reference(chain_model(layers=1), {"x": x})["y"]))
    assert found == {"": pytest.approx(plain), "metric>=0.1": pytest.approx(plain), "metric<=0.1": pytest.approx(2 * plain)}
