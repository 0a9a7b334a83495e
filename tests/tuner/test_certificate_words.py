"""What the terminal says of how sure the planner is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.planner.candidates import Draft, Piece
from aivmm.planner.certificate import Certificate, certify
from aivmm.planner.chain import ChainPlan
from aivmm.planner.evidence import Estimate, total
from aivmm.planner.lazy import Look
from aivmm.planner.objectives import parse_objectives
from aivmm.runtime.config import Config
from aivmm.tuner.certifying import certificate_of
from aivmm.tuner.cutting import CutPlan
from aivmm.tuner.expected import in_other_processes
from aivmm.tuner.options import on_top
from aivmm.tuner.printing import print_dry_run, print_outcome
from aivmm.tuner.verdict import stages_json
from aivmm.tuner.work import Work
from tests.planner.test_partition import CPU

PARTS = (
    Estimate(seconds=3e-3, sigma=0.02, source="measured", because="in its place"),
    Estimate(seconds=1e-3, sigma=0.2, source="modelled", because="operators"),
)


def summary(certificate: dict[str, Any] | None, config: Config | None = None) -> dict[str, Any]:
    counts = {"measured": 3, "reused": 0, "refused": 0, "failed": 0}
    plan = {"path": "p", "stages": stages_json(Draft(name="d", pieces=(Piece(target=CPU, config=config or Config(), first=0, last=1),)))}
    predicted = {} if certificate is None else {"sentence": "0.5 of the time of A, proven 0.5: kept. 4 ms expected, 4 ms proven."}
    found = {"verdict": "v", "plan": plan, "report": "r", "probes": counts, "certificate": certificate, "predicted": predicted}
    return found | {"baselines": []}


def test_the_certificate_is_a_sentence_of_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    found = certify(total(PARTS), PARTS, objective="latency", looked=None, among="", why_no_bound="the model has one block")
    print_outcome(summary(found.as_json()), [], verbose=False)
    said = " ".join(capsys.readouterr().out.split())
    assert f"sure {found.sentence}" in said
    assert "promise 0.5 of the time of A, proven 0.5: kept. 4 ms expected, 4 ms proven." in said
    assert "expected to take 4 ms" in said and "75 % measured and 25 % modelled" in said and "the model has one block" in said


def test_where_nothing_was_foretold_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(summary(None), [], verbose=False)
    assert not any(line.startswith(("sure", "promise")) for line in capsys.readouterr().out.splitlines())


def test_a_dry_run_counts_the_proof_on_top_and_sets_it_no_limit_that_it_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    nothing: dict[str, Any] = {name: [] for name in ("inputs", "constraints", "targets", "unavailable", "baselines", "batches", "notes")}
    model = {"path": "m.onnx", "category": {"name": "vision", "reason": "convolutions"}}
    rest: dict[str, Any] = {"knobs": {}, "blocks": 3, "operators": 2, "budget_s": 60.0, "on_top": on_top(60.0, "latency", cards=False)}
    print_dry_run({**nothing, "model": model, "objective": "latency", **rest}, False)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("budget"))
    assert "60 s, and on top" in said and "at most" not in said


def test_settings_that_the_verdict_only_counts_stand_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(summary(None, Config.of({"a": 1, "b": "x", "c": 3})), [], verbose=False)
    assert f"with {CPU}: a=1, b=x, c=3" in " ".join(capsys.readouterr().out.split())
    print_outcome(summary(None, Config.of({"a": 1, "b": "x"})), [], verbose=False)
    assert not any(line.startswith("with") for line in capsys.readouterr().out.splitlines())


WHOLE = Draft(name="whole", pieces=(Piece(target=CPU, config=Config(), first=0, last=11),))
FOUND = Estimate(seconds=4e-3, sigma=0.02, source="measured", because="the whole model")


def certified(
    draft: Draft, objective: str, *, least: int = 1, blocks: int = 12, looked: bool = True, cut: CutPlan | None = None
) -> Certificate:
    plan = ChainPlan(assignment=("a",), segments=((0, 0, "a"),), cost_s=4e-3, bound_s=4e-3, seconds=0.0)
    look = Look(plan=plan, bound_s=3.9e-3, proven=True, probes=7, possible=42, solves=4, seconds=0.01)
    work = SimpleNamespace(
        subject=SimpleNamespace(base_batch=1, structure=SimpleNamespace(blocks=range(blocks))),
        targets=[CPU],
        min_segments=least,
        options=SimpleNamespace(objectives=parse_objectives(objective)),
    )
    return certificate_of(cast(Work, work), draft, cut.expected if cut else FOUND, cut=cut, looked=look if looked else None, engine_s=0.0)


def test_for_latency_it_is_bounded_and_nothing_else_is_said() -> None:
    found = certified(WHOLE, "latency,memory")
    assert found.bound_s == 3.9e-3 and found.objective == "latency"
    assert found.sentence == (
        "The plan was expected to take 4 ms (3.73 ms to 4.29 ms); that is 100 % measured. None of the placements of 12 blocks on 1 target "
        "is expected to take less than 3.9 ms, so at most 2.5 % is left to gain; 7 of 42 possible segments had to be measured for that."
    )
    assert "12 blocks on 1 target in 3 segments or more" in certified(WHOLE, "latency", least=3).sentence


def test_the_interval_is_the_one_that_is_told_of_the_plan_elsewhere() -> None:
    part = Estimate(seconds=1e-3, sigma=0.03, source="measured")
    cut = CutPlan(draft=WHOLE, look=cast(Look, None), parts=(part, part, part), boundaries_s=0.0)
    found = certified(WHOLE, "latency", cut=cut)
    assert (found.low_s, found.high_s) == pytest.approx(in_other_processes(cut.expected).interval_s)
    assert (found.low_s, found.high_s) == pytest.approx((2.76e-3, 3.26e-3), abs=5e-6)  # these parts err together
    assert found.bound_s is None and found.rests_on == {"measured": 1.0}  # 3 ms are less than the search thought possible


def test_another_objective_is_said_to_be_bounded_by_nothing() -> None:
    for objective, words in (
        (
            "memory,latency",
            "All of this is about time: its peak memory is what the proof measured, and nothing bounds that of other plans.",
        ),
        ("energy", "about time: its energy for a sample is what"),
        ("p99", "about the median of calls: its 99th percentile of latency is what"),
        ("throughput", "about one call at a time: its throughput is what"),
    ):
        found = certified(WHOLE, objective)
        assert words in found.sentence and found.as_json()["sentence"] == found.sentence and found.bound_s is not None


def test_what_answers_several_at_once_has_its_pace_and_no_bound_of_one_call() -> None:
    alone = "bounds are for one call at a time, at the model's own batch and precision"
    for draft in (replace(WHOLE, callers=2), replace(WHOLE, mode="pipelined")):
        found = certified(draft, "throughput")
        assert found.objective == "throughput" and found.bound_s is None and found.gap is None
        assert found.sentence.startswith("The plan was expected to answer a call every 4 ms") and found.sentence.endswith(f"{alone}.")
    assert certified(replace(WHOLE, batch=8), "latency").sentence.endswith(f"{alone}.")


def test_without_a_bound_it_says_why() -> None:
    assert "the model has one block" in certified(WHOLE, "latency", blocks=1, looked=False).sentence
    assert "what some blocks take is known on no target" in certified(WHOLE, "latency", looked=False).sentence
